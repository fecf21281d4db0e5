"""A merge written as an adapter over its base: `adapter_model.safetensors` and `adapter_config.json`, as PEFT has them.

    matrices, convolutions   B A, the leading triplets of the merged delta: B = U sqrt(s), A = sqrt(s) V^T, scale 1
    biases                   as they are, `bias: all`
    norms, embeddings        as they are, their modules in `modules_to_save`

A delta is known when all pieces of its tensor are there; only that one tensor is in memory.
"""

import dataclasses
import functools
import json
import math
import shutil
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from cfmerge import linalg
from cfmerge.errors import CfmergeError
from cfmerge.formats.adapter_form import check_forms, form_of, module_of, peft_config_of
from cfmerge.formats.base import Header, Source, Totals
from cfmerge.formats.peft_config import FILE
from cfmerge.formats.ranges import Covered, Range
from cfmerge.formats.shards import ShardWriter, Unfit
from cfmerge.formats.sinks import FORMAT, UNBOUNDED, DirectorySink, disk_errors
from cfmerge.models import Parameter
from cfmerge.models.mixtures import single_experts
from cfmerge.models.patterns import patterns, tell

Rank = int | Literal["exact"]
PREFIX = "base_model.model."
PARTS = ".parts"  # a folder of factors until all are there


@dataclasses.dataclass(frozen=True)
class Kept:
    """The factors of one tensor: their rank, and the squared norms of the delta and of their product."""

    rank: int
    whole: float
    kept: float


class AdapterSink(DirectorySink):
    """An adapter's directory.

    Args:
        target: the directory that appears.
        base: the model that the adapter is over.
        merged: the tensors that are merged, as the merge sees them; others are the base's.
        rank: of every factor at most; "exact": that of the delta, up to rounding.
        name: the base's name in the config.
        overwrite, inputs, digest, keep, resume, join: see `StagedDirectory`.

    Raises:
        CfmergeError: a tensor that is merged has no place in an adapter; or several processes write it.
    """

    def __init__(
        self, target: Path, base: Source, merged: Mapping[str, Parameter], rank: Rank, name: str = "", **how: Any
    ):
        if how.get("join"):
            raise CfmergeError(f"output {target}: an adapter is written by one process; leave --processes out")
        if isinstance(rank, int) and rank < 1:
            raise CfmergeError(f"adapter_out: a rank is a positive number, or `exact`, found {rank}")
        check_forms(target, base, merged)
        self._base, self._merged, self._rank, self._name = base, dict(merged), rank, name or str(base.path)
        self._numbers = {name: number for number, name in enumerate(merged)}
        self._kept: dict[str, Kept] = {}
        self._taken: set[str] = set()
        self._full: dict[str, Path] = {}
        self._pieces: dict[str, tuple[np.memmap, Covered]] = {}
        self._lock = threading.Lock()
        super().__init__(target, **how)

    @property
    def _parts(self) -> Path:
        return self.path / PARTS

    def declare(self, headers: Mapping[str, Header], done: Covered | None = None) -> None:
        """See `Sink`; what an earlier run has left is not gone on with."""
        if done is not None:
            raise Unfit("an adapter is written in one run")
        with disk_errors(self._asked):
            self._staged.clear()
            self._parts.mkdir()

    def write(self, name: str, values: np.ndarray, first: int = 0) -> None:
        if name not in self._merged:
            return
        with disk_errors(self._asked):
            shape = self._merged[name].shape
            if values.size == math.prod(shape):
                return self._take(name, np.asarray(values).reshape(shape))
            with self._lock:
                if name not in self._pieces:
                    file = self._file(name, "pieces")
                    self._pieces[name] = np.memmap(file, values.dtype, "w+", shape=(math.prod(shape),)), Covered()
                whole, covered = self._pieces[name]
                whole[first : first + values.size] = np.asarray(values).reshape(-1)
                covered.add(name, first, values.size)
                complete = covered.count(name) == whole.size
            if complete:
                self._take(name, np.asarray(whole).reshape(shape))
                with self._lock:
                    del self._pieces[name]
                self._file(name, "pieces").unlink()

    def write_factors(self, name: str, left: Any, right: Any) -> None:
        """Takes a tensor's merged delta as a product, in rows and columns of the tensor as it is stored."""
        if name not in self._merged:
            return None
        left, right = np.asarray(left, np.float32), np.asarray(right, np.float32)
        if self._form(name) != "factors":  # a table of rows, which an adapter holds in full
            base = self._base.read(name)
            return self.write(name, (base.astype(np.float32) + (left @ right).reshape(base.shape)).astype(base.dtype))
        left, right = (right.T, left.T) if self._merged[name].layout == "io" else (left, right)
        with disk_errors(self._asked):
            self._taken.add(name)
            u, s, vt = _of_product(left, right)
            self._keep(name, u, s, vt, float(np.sum(np.square(s, dtype=np.float64))))
        return None

    def keep(self, wanted: bool) -> None:
        """Nothing: what is written is not gone on with."""

    def covers(self, ranges: Iterable[Range]) -> None:
        """Nothing: one process writes it all."""

    def sync(self) -> None:
        """Nothing: what is written is not gone on with."""

    # --- one tensor -----------------------------------------------------------------------------------------------

    def _form(self, name: str) -> str:
        return form_of(self._merged[name])

    def _file(self, name: str, what: str) -> Path:
        return self._parts / f"{self._numbers[name]}.{what}"

    def _take(self, name: str, merged: np.ndarray) -> None:
        self._taken.add(name)
        base = self._base.read(name)
        if self._form(name) == "full":
            if not np.array_equal(merged, base.astype(merged.dtype)):
                self._full[name] = _saved(self._file(name, "full"), merged)
            return
        delta = merged.astype(np.float32) - base.astype(np.float32)
        delta = delta.T if self._merged[name].layout == "io" else delta.reshape(len(delta), -1)
        whole = float(np.sum(np.square(delta, dtype=np.float64)))
        if self._rank == "exact":
            u, s, vt = (np.asarray(part) for part in linalg.svd(jnp.asarray(delta)))
            noise = 4 * np.finfo(np.float32).eps * math.sqrt(max(delta.shape)) * np.abs(base).max(initial=0)
            count = int(np.sum(s > max(linalg.rank_cutoff(delta.shape, np.float32) * s[0], noise)))
            u, s, vt = u[:, :count], s[:count], vt[:count]
        else:
            u, s, vt = (np.asarray(part) for part in _leading(jnp.asarray(delta), min(self._rank, *delta.shape)))
        self._keep(name, u, s, vt, whole)

    def _keep(self, name: str, u: np.ndarray, s: np.ndarray, vt: np.ndarray, whole: float) -> None:
        count = min(len(s), self._rank if isinstance(self._rank, int) else len(s))
        count = min(count, int(np.count_nonzero(s)))
        u, s, vt = u[:, :count], s[:count], vt[:count]
        if count:
            root, window = np.sqrt(s), self._merged[name].shape[2:]
            _saved(self._file(name, "B"), (u * root).reshape(-1, count, *(1,) * len(window)))
            columns = vt.shape[1] // math.prod(window)
            _saved(self._file(name, "A"), (root[:, None] * vt).reshape(count, columns, *window))
        self._kept[name] = Kept(count, whole, float(np.sum(np.square(s, dtype=np.float64))))

    # --- all of them ----------------------------------------------------------------------------------------------

    @property
    def notes(self) -> tuple[str, ...]:
        """The share of the deltas' squared norm that the adapter has, in all and where it is least."""
        kept = {name: one for name, one in self._kept.items() if one.whole > 0}
        if not kept:
            return ()
        whole, share = sum(one.whole for one in kept.values()), sum(one.kept for one in kept.values())
        told = f"adapter: {min(share / whole, 1):.2%} of the deltas' squared norm is kept"
        if self._rank != "exact":
            told += f" at rank {self._rank}"
        lines = []
        for pattern in patterns(list(kept)):
            mine = [kept[name] for name in pattern.names]
            lines.append((sum(one.kept for one in mine) / sum(one.whole for one in mine), pattern))
        lines.sort(key=lambda line: line[0])
        least = ", ".join(f"{pattern} {min(share, 1):.2%}" for share, pattern in lines[:8])
        single = [name for own in single_experts(kept).values() for part in own.values() for name in part.values()]
        packed = (
            f"adapter: {tell(single)}: experts of a mixture by themselves; PEFT finds them where the model that it "
            "loads has them so, and does not pack them (transformers 5 does)"
        )
        full = [*([packed] if single else [])]
        full += [f"adapter: {tell(list(self._full))}: written as they are, beside the factors"] if self._full else []
        return (f"{told}: {least}{', ...' if len(lines) > 8 else ''}", *full)

    @notes.setter
    def notes(self, value: tuple[str, ...]) -> None:
        """The base class begins with none."""

    def finish(self, totals: Totals) -> None:
        with disk_errors(self._asked):
            missing = [name for name in self._merged if name not in self._taken]
            if missing:
                raise CfmergeError(f"tensors were not wholly written: {', '.join(missing[:5])}")
            ranks = {module_of(name): one.rank for name, one in self._kept.items() if one.rank}
            saved = self._saved_modules(set(ranks))
            tensors = self._tensors(ranks, saved)
            if not tensors:
                raise CfmergeError(f"output {self._asked}: the merged delta is zero: there is nothing to write")
            headers = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
            writer = ShardWriter(self.path, headers, UNBOUNDED, FORMAT, "adapter_model", None)
            for name, tensor in tensors.items():
                writer.write(name, np.asarray(tensor))
            writer.close()
            biases = any(module_of(name) not in saved for name in self._full)
            config = peft_config_of(ranks, saved, biases, self._name, self._base.config)
            (self.path / FILE).write_text(json.dumps(config, indent=2) + "\n")
            if totals.card:
                (self.path / "README.md").write_text(totals.card)
            del tensors
            shutil.rmtree(self._parts)

    def _saved_modules(self, targets: set[str]) -> dict[str, list[str]]:
        """`{module: its tensors}` that are written whole: those with more than a bias that has changed.

        PEFT takes every module whose name ends so, and wants the tensors of each.
        """
        wanted = {module_of(name) for name in self._full if name.endswith(".weight")}
        by_module: dict[str, list[str]] = {}
        for name in self._base.tensors:
            by_module.setdefault(module_of(name), []).append(name)
        aliases = {module_of(alias): name for alias, name in self._base.ties.items() if name in self._full}
        by_module |= {module: [name] for module, name in aliases.items() if module not in by_module}
        wanted |= set(aliases) & set(by_module)
        found = {module: names for module, names in by_module.items() if module.endswith(tuple(wanted))}
        clash = sorted(targets & set(found))
        if clash:
            raise CfmergeError(
                f"output {self._asked}: {clash[0]!r} has factors, and PEFT would take it for a module to save, for it "
                f"ends as {sorted(one for one in wanted if clash[0].endswith(one))[0]!r} does; leave that at the base "
                "by a rule with method keep-base"
            )
        return found if wanted else {}

    def _tensors(self, ranks: Mapping[str, int], saved: Mapping[str, Sequence[str]]) -> dict[str, np.ndarray]:
        """All tensors of the file, on disk until they are written."""
        found: dict[str, np.ndarray] = {}
        for name, one in self._kept.items():
            if one.rank:
                for what in "AB":
                    found[f"{PREFIX}{module_of(name)}.lora_{what}.weight"] = _loaded(self._file(name, what))
        for module, names in saved.items():
            for name in names:
                tensor = _loaded(self._full[name]) if name in self._full else self._base.read(name)
                found[f"{PREFIX}{module}.{name.rpartition('.')[2]}"] = tensor
        for name, path in self._full.items():
            module = module_of(name)
            if module not in saved:
                inner = ".base_layer" if module in ranks else ""
                found[f"{PREFIX}{module}{inner}.bias"] = _loaded(path)
        return found


@functools.partial(jax.jit, static_argnums=1)
def _leading(delta: Any, count: int) -> Any:
    return linalg.leading(delta, count)


def _of_product(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The singular triplets of `left @ right`, by those of the small core between two orthonormal bases."""
    q, r = np.linalg.qr(left.astype(np.float64))
    p, t = np.linalg.qr(right.T.astype(np.float64))
    u, s, vt = np.linalg.svd(r @ t.T, full_matrices=False)
    tiny = s <= (s[0] if len(s) else 0) * linalg.rank_cutoff((left.shape[0], right.shape[1]), np.float64)
    u, s, vt = u[:, ~tiny], s[~tiny], vt[~tiny]
    return (q @ u).astype(np.float32), s.astype(np.float32), (vt @ p.T).astype(np.float32)


def _saved(path: Path, array: np.ndarray) -> Path:
    """The array in a file, whose dtype NumPy's own format need not know."""
    path.write_bytes(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    path.with_name(path.name + ".json").write_text(json.dumps([array.dtype.name, list(array.shape)]))
    return path


def _loaded(path: Path) -> np.ndarray:
    dtype, shape = json.loads(path.with_name(path.name + ".json").read_text())
    return np.memmap(path, jnp.dtype(dtype), "r", shape=tuple(shape))
