"""A task of a composed result as a model: a source over its base, and the checkpoint that is written of it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from cfmerge.compose.artifact import Artifact, added, check_digest, computing, load
from cfmerge.compose.entries import About
from cfmerge.errors import CfmergeError, nearest
from cfmerge.formats import Source, TensorInfo, open_checkpoint
from cfmerge.formats.composed import TABLE
from cfmerge.formats.containers import FORMATS
from cfmerge.formats.dequantised import KEYS, dequantised
from cfmerge.formats.layout import read_json
from cfmerge.formats.naming import format_by_name, in_format
from cfmerge.formats.wrapped import Wrapped
from cfmerge.models.names import unchanged
from cfmerge.products.convert import Converted, copied
from cfmerge.recipe import Recipe, parse

Progress = Callable[[str, int], None]


class TaskSource(Wrapped):
    """The base plus one task's delta, in the base's dtypes; the task's own heads where it has such.

        >>> made = compose.build("base", ["math", "code"], "tsv_c", output="composed")
        >>> model = compose.TaskSource(cfmerge.open_checkpoint("base"), made, "math")
        >>> model.read("layer.weight").shape
        (4, 3)

    Every tensor of the base is compared with the SHA-256 that the result tells, when it is first read.

    Raises:
        CfmergeError: an unknown task, a tensor that the base lacks; when a tensor is read, another base.
    """

    def __init__(self, base: Source, artifact: Artifact, task: str):
        super().__init__(base)
        self.artifact, self.task = artifact, task
        artifact.about.number(task)
        shapes = {name: info.shape for name, info in base.tensors.items()}
        tied = {alias: shapes[name] for alias, name in base.ties.items() if name in shapes}  # one is stored
        artifact.check_shapes(tied | shapes, f"base {base.path}")
        self.heads = artifact.heads.get(task, {})
        own = {name: TensorInfo(head.shape, head.dtype, base.path) for name, head in self.heads.items()}
        self.tensors = {**base.tensors, **own}
        self.changed = self.tensors
        self._checked: set[str] = set()
        self._last: tuple[str, Any] = ("", None)

    def read(self, name: str, first: int = 0, count: int | None = None) -> np.ndarray:
        if name in self.heads:
            head = self.heads[name]
            return head if count is None else head.reshape(-1)[first : first + count]
        self._check(name)
        base, compute = self.inner.read(name, first, count), computing(self.inner.tensors[name].dtype)
        delta = self._delta(name, first, count, compute)
        return base if delta is None else added(f"base {self.inner.path}", name, base, delta)

    def _delta(self, name: str, first: int, count: int | None, compute: Any) -> Any:
        about = self.artifact.about
        by_entry = name not in about.names or about.entries[about.names[name]].by_entry
        if count is None or by_entry:
            return self.artifact.delta(self.task, name, first, count, compute)
        if self._last[0] != name:  # a product is made whole, and read in pieces
            self._last = (name, self.artifact.delta(self.task, name, dtype=compute))
        whole = self._last[1]
        return None if whole is None else whole.reshape(-1)[first : first + count]

    def _check(self, name: str) -> None:
        expected = self.artifact.about.digests.get(name)
        if expected is not None and name not in self._checked:
            check_digest(f"base {self.inner.path}", name, self.inner.read(name), expected)
            self._checked.add(name)


def materialise(
    composed: str | Path | Artifact,
    task: str,
    output: str | Path,
    *,
    base: str | Path | Source | None = None,
    format: str | None = None,
    shard_size: str = "5GB",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Converted:
    """The checkpoint of one task of a composed result: base plus the task's delta, tensor by tensor.

        >>> made = compose.build("base", ["math", "code"], "emr", output="composed")
        >>> done = compose.materialise("composed", "math", "model")
        >>> done.output.name, cfmerge.open("model")["layer.bias"].shape
        ('model', (4,))

    It is computed from the base each time, so that the same files give the same bytes. Files beside the base's weights
    are copied; a task's own heads are in it, with the keys of `config.json` that they need.

    Args:
        composed: the directory of the result, or the result.
        task: the name of an expert.
        output: the directory to make, or the file. It appears when it is complete.
        base: where the base is; None: where it was when the result was made.
        format: `safetensors`, `torch`, ...; None: as the output's name says, else the base's.
        shard_size: the largest file.
        overwrite: replace a model that is there.
        progress: called with (tensor name, bytes).

    Raises:
        CfmergeError: an unknown task, no base or another one, a result that is not whole; nothing is written then.
    """
    if format not in {None, *FORMATS}:
        raise CfmergeError(f"unknown format {format!r}{nearest(str(format), FORMATS)}")
    artifact = composed if isinstance(composed, Artifact) else load(composed)
    source = TaskSource(_base(artifact, base), artifact, task)
    wanted = format_by_name(Path(output), format) or format
    folders = [in_format(folder, wanted) for folder in source.folders]
    headers = {name: (info.shape, info.dtype) for name, info in source.tensors.items()}
    edits = _edits(source, artifact.about.configs.get(task, {}), asked_of(artifact.about).dequantize)
    place = artifact.about.place
    how: Any = {"shard_size": shard_size, "overwrite": overwrite, "progress": progress}
    return copied(
        source, Path(output), unchanged(headers), folders, wanted, source.side_files, edits=edits,
        card=_card(artifact, task, source), inputs=[place] if place else [], **how,
    )  # fmt: skip


def _base(artifact: Artifact, base: str | Path | Source | None) -> Source:
    """The base, opened as it was when the result was made."""
    if base is not None and not isinstance(base, str | Path):
        return base
    told, asked = artifact.about.base, asked_of(artifact.about)
    if base is None and not told:
        raise CfmergeError("materialise: the result was made of a tree in memory; name its base")
    try:
        opened = open_checkpoint(told if base is None else base, download=asked.download, cache_dir=asked.cache_dir)
    except CfmergeError as error:
        if base is not None:
            raise
        raise CfmergeError(f"{error}; the result was made over the base {told}: say with --base where it is") from None
    return dequantised("base", opened) if asked.dequantize else opened


def asked_of(about: About) -> Recipe:
    """The recipe of a result; an empty one of trees."""
    try:
        return parse(yaml.safe_load(about.recipe), TABLE) if about.recipe else Recipe("", [])
    except yaml.YAMLError:
        raise CfmergeError(f"{TABLE}: its recipe was changed, and is no YAML any more") from None


def _edits(source: Source, config: Mapping[str, Any], dequantised: bool) -> dict[str, Mapping[str, Any]]:
    """`{config.json: {key: value}}`: what the model's head needs, and no quantisation where there is none any more."""
    gone = [key for key in KEYS if dequantised and "config.json" in source.side_files]
    told = read_json(source.side_files["config.json"]) if gone else {}
    edits = {**dict.fromkeys(key for key in gone if key in told), **config}
    return {"config.json": edits} if edits and "config.json" in source.side_files else {}


def _card(artifact: Artifact, task: str, source: Source) -> str:
    about = artifact.about
    return (
        f"# {task}\n\nThe model of task {task!r} out of {about.system} over {len(about.tasks)} tasks "
        f"({', '.join(about.tasks)}), made by [cfmerge](https://github.com/cfmerge/cfmerge) from the base "
        f"{source.path.name}.\n"
    )
