"""Tensors in files of any format: read by name, and written."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cfmerge.errors import CfmergeError
from cfmerge.formats import Folder, Source, TensorInfo, Totals, open_checkpoint, open_sink
from cfmerge.formats.arrays import ArraysSource, named_arrays
from cfmerge.formats.containers import FORMATS
from cfmerge.recipe import parse_size


class Tensors(Mapping[str, np.ndarray]):
    """A model's tensors by name, each read when it is asked for: read-only, of a mapped file as a view.

    Attributes:
        source: the model as `open_checkpoint` opens it.
        tensors: `{name: header}`, with `shape` and `dtype`; `config`, `metadata`: the model's.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.tensors: Mapping[str, TensorInfo] = source.tensors
        self.config: Mapping[str, Any] = source.config
        self.metadata: Mapping[str, str] = source.metadata

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.tensors:
            raise KeyError(name)
        return self.source.read(name)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __repr__(self) -> str:
        return f"<{len(self)} tensors of {self.source.path}>"


def open(source: str | Path, **how: Any) -> Tensors:
    """The tensors of a model in files, of whatever format: a mapping whose arrays are read when they are asked for.

        >>> model = cfmerge.open("base")
        >>> list(model), model["layer.weight"].shape, model.tensors["layer.bias"].dtype
        (['layer.bias', 'layer.weight'], (4, 3), dtype('float32'))

    Args:
        source: as `open_checkpoint` takes it.
        **how: its other arguments.

    Raises:
        CfmergeError: there is nothing there, it is of a format that is not read, or its headers are corrupt.
    """
    return Tensors(open_checkpoint(source, **how))


def save(
    tensors: Any, path: str | Path, format: str | None = None, *, shard_size: str = "5GB", overwrite: bool = False
) -> Path:
    """The path of a file or a directory of tensors, written whole or not at all, one tensor at a time.

        >>> tree = {"dense": {"kernel": jnp.ones((3, 4)), "bias": jnp.zeros(4)}}
        >>> list(cfmerge.open(cfmerge.save(tree, "tree.safetensors")))
        ['dense/bias', 'dense/kernel']

    Args:
        tensors: a dict of arrays of torch, NumPy or JAX, whose names stay as they are; a module of torch; or a pytree
            of arrays, whose names are joined by `/`.
        path: a file where its ending is a format's (`model.npz`), else a directory.
        format: such as `safetensors` or `torch`; None: as a file's ending says, safetensors in a directory.
        shard_size: the largest file in a directory.
        overwrite: replace what is there.

    Raises:
        CfmergeError: a value is no array, the format is unknown, or there is something at the path.
    """
    target = Path(path).expanduser()
    if format not in {None, *FORMATS}:
        raise CfmergeError(f"save: unknown format {format!r}; there is: {', '.join(FORMATS)}")
    model = ArraysSource(named_arrays(tensors, "save", trees=True), "save", str(target), {})
    if model.others:
        raise CfmergeError(f"save: {next(iter(model.others))!r} is no array")
    size = parse_size(shard_size)
    sink = open_sink(
        target, [Folder()], shard_bytes=size, side_files={}, edits={}, format=format, overwrite=overwrite
    )  # fmt: skip
    with sink:
        sink.declare({name: (info.shape, info.dtype) for name, info in model.tensors.items()})
        for name in model.tensors:
            sink.write(name, model.read(name))
        sink.finish(Totals())
        sink.commit()
    return target
