"""Adapters: experts that are a change of their base, and factors that lie among a model's weights, which are none.

An `AdapterSource` has all tensors of its base, as the model would that peft's `merge_and_unload` makes. Its deltas are
exact factors where the change is a product, and the tensor that comes out where it is more.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cfmerge.errors import CfmergeError
from cfmerge.formats import lora_names, peft
from cfmerge.formats.adapter_parts import Adapter
from cfmerge.formats.adapter_targets import Placing
from cfmerge.formats.base import Folder, Source, TensorInfo
from cfmerge.formats.containers import open_container
from cfmerge.formats.huggingface import HuggingFaceSource
from cfmerge.formats.layout import read_json
from cfmerge.formats.peft_config import FILE
from cfmerge.models import is_float
from cfmerge.models.deltas import Delta, Dense, Factors
from cfmerge.models.patterns import tell
from cfmerge.models.renames import apply_renames

FACTORS = re.compile(
    r"((^|[./_])lora[./_](A|B|embedding_A|embedding_B|magnitude_vector|down|up|mid)"
    r"|[./](hada_w\d_[ab]|lokr_w\d(_[ab])?))([./]|$)"
)
MODELS = ("model*.safetensors", "pytorch_model*.bin", "diffusion_pytorch_model*.safetensors", "model_index.json")
FOUR_BITS = re.compile(r"(?i)[-_.](bnb[-_.])?(4bit|int4|8bit|nf4|gptq|awq)\b.*$")


def is_adapter(path: Path) -> bool:
    """Whether a directory or a file is an adapter: it holds factors, and no model beside them."""
    if path.is_dir():
        if (path / FILE).is_file():
            return peft.find_file(path) is not None or not _holds_model(path)
        return lora_names.find_file(path) is not None and not _holds_model(path)
    if not path.is_file():
        return False
    if path.stem in {peft.STEM, lora_names.STEM}:
        return True
    if path.suffix != ".safetensors":
        return False
    names = open_container(path).tensors
    return 3 * sum(bool(FACTORS.search(name)) for name in names) > len(names)  # A and B, and alpha beside them


def _holds_model(path: Path) -> bool:
    return any(next(path.glob(pattern), None) for pattern in MODELS)


def adapter_alone(path: Path) -> Source | None:
    """The tensors in an adapter's own file, with its config; None where the path holds no adapter."""
    if not path.exists() or not is_adapter(path):
        return None
    directory = path if path.is_dir() else path.parent
    file = peft.find_file(path) or lora_names.find_file(path) if path.is_dir() else path
    if file is None:
        peft.read_peft(path)  # says that it is missing
        return None
    found = HuggingFaceSource(file)
    found.config = read_json(directory / FILE) or {"peft_type": "LORA"}
    return found


def read_adapter(path: Path, base: Source) -> Adapter:
    """The adapter in a directory or a file.

    Raises:
        CfmergeError: it is none that is read, or damaged.
    """
    directory = path if path.is_dir() else path.parent
    named = path.is_dir() or path.stem == peft.STEM
    if named and (directory / FILE).is_file():
        return peft.read_peft(path)
    if path.stem == peft.STEM and path.is_file():
        raise CfmergeError(
            f"{path}: is an adapter (LoRA) without its {FILE}, which says by which scale its factors count; fetch that "
            "too, into the same directory"
        )
    return lora_names.read_lora(path, base)


class AdapterSource:
    """An adapter over its base.

    Args:
        path: the adapter's directory or file.
        base: the model that it changes.
        renames: `(pattern, text)` for names of the adapter's tensors.
        partial: what the base lacks is left out.
        own_base: the base is another model than the one that is merged: its tensors differ from that, and the
            deltas are dense.
    """

    def __init__(
        self,
        path: Path,
        base: Source,
        renames: Sequence[tuple[str, str]] = (),
        *,
        partial: bool = False,
        own_base: bool = False,
    ):
        self.path, self.base, self.own_base = path, base, own_base
        adapter = read_adapter(path, base)
        adapter, self.matched = _renamed(adapter, renames)
        placed = Placing(adapter, base, partial).run()
        self.trained_on = adapter.trained_on
        self._changes = {**placed.changes, **placed.extra}
        self.tensors: Mapping[str, TensorInfo] = {
            **base.tensors, **{name: change.info for name, change in self._changes.items()}
        }  # fmt: skip
        self.config: Mapping[str, Any] = {key: value for key, value in base.config.items() if key != "_name_or_path"}
        self.files = (*(base.files if own_base else ()), *adapter.files)
        self.side_files: Mapping[str, Path] = base.side_files if own_base else {}
        self.ties: Mapping[str, str] = base.ties
        self.metadata: Mapping[str, str] = adapter.container.metadata
        self.folders: tuple[Folder, ...] = base.folders
        beside = path.is_dir() and _holds_model(path)
        model = f"{path}: holds a model beside the adapter; the adapter is read, over the base"
        self.notes = (
            *([model] if beside else []),
            *adapter.notes,
            *(base.notes if own_base else ()),
            *(f"{path}: {note}" for note in placed.notes),
        )
        self.left_out: tuple[str, ...] = ()

    def prepare(self) -> None:
        self.base.prepare()

    def grain(self, name: str) -> int:
        return 1 if name in self._changes else self.base.grain(name)

    def read(self, name: str, first: int = 0, count: int | None = None) -> np.ndarray:
        change = self._changes.get(name)
        return self.base.read(name, first, count) if change is None else change.read(first, count)

    def delta(self, name: str, first: int = 0, count: int | None = None) -> Delta:
        rank, change = self.rank(name), self._changes.get(name)
        if rank is None:
            return Dense(self.read(name, first, count))
        if change is not None:
            return change.factors(first, count)
        shape = self.tensors[name].shape
        rows = shape[0] if shape else 1
        columns = self.tensors[name].size // rows if rows else 0
        return Factors(np.zeros((rows, 0), np.float32), np.zeros((0, columns), np.float32), first, count)

    def rank(self, name: str) -> int | None:
        if self.own_base:
            return None
        change = self._changes.get(name)
        if change is not None:
            return change.rank
        return 0 if is_float(self.tensors[name].dtype.name) else None


def _renamed(adapter: Adapter, renames: Sequence[tuple[str, str]]) -> tuple[Adapter, set[str]]:
    """The adapter with other names of its targets, and the patterns that match some of them."""

    def new(name: str) -> str:
        return apply_renames([name], renames)[name]

    current, matched = [target for part in adapter.parts for target in part.targets], set()
    for pattern, to in renames:
        matched |= {pattern} if any(re.search(pattern, name) for name in current) else set()
        current = [re.sub(pattern, to, name) for name in current]
    parts = [dataclasses.replace(part, targets=tuple(map(new, part.targets))) for part in adapter.parts]
    return dataclasses.replace(adapter, parts=parts), matched


def other_bases(adapters: Mapping[str, AdapterSource], base: Source, told: str) -> tuple[list[str], list[str]]:
    """Problems and notes on the bases that adapters say they were trained on.

    Args:
        adapters: by expert.
        told: the name that the base is known by; "" if none.
    """
    notes, names = [], {}
    for expert, source in adapters.items():
        name = source.trained_on.rstrip("/")
        if FOUR_BITS.search(name):
            notes.append(
                f"expert {expert!r} was trained on {name}, a quantised model: its delta belongs to those weights, and "
                "is merged into the base's"
            )
        elif name:
            names[expert] = name
    ends = {expert: name.rpartition("/")[2].casefold() for expert, name in names.items()}
    ours = told.rpartition("/")[2].casefold() if told else ""
    distinct = {**({"the base": told} if told else {}), **{f"expert {e!r}": n for e, n in names.items()}}
    if len({*ends.values(), *([ours] if ours else [])}) < 2:
        return [], notes
    listed = ", ".join(f"{who} has {name!r}" for who, name in distinct.items())
    return [f"adapters of different bases (base_model_name_or_path of {FILE}): {listed}"], notes


def factors(source: Source) -> list[str]:
    """The names of a model's tensors that are factors of an adapter."""
    return [name for name in source.tensors if FACTORS.search(name)]


def check_adapters(base: Source, experts: Mapping[str, Source], skipped: Callable[[str], bool]) -> list[str]:
    """A note on factors that base and experts both have, and that are merged each for itself.

    Args:
        base, experts: the models.
        skipped: whether a rule leaves a name out.

    Raises:
        CfmergeError: an expert holds factors of an adapter, and the base does not.
    """
    found = {name: [f for f in factors(expert) if not skipped(f)] for name, expert in experts.items()}
    if factors(base):
        return [
            f"{tell(factors(base))}: factors of an adapter; each is merged by itself, and the product of merged "
            "factors is not the merged product"
        ]
    problems = [
        f"expert {name!r} ({experts[name].path}) holds an adapter (LoRA) that is not merged into its weights: "
        f"{tell(names, experts[name].tensors)}. Merge it first: peft's model.merge_and_unload().save_pretrained(OUT)"
        for name, names in found.items() if names
    ]  # fmt: skip
    if problems:
        raise CfmergeError("\n".join(problems))
    return []
