"""Tensors in files of any format: read by name, and written."""

from pathlib import Path
from typing import Any

from cfmerge.errors import CfmergeError
from cfmerge.formats import Folder, Totals, open_checkpoint, open_sink
from cfmerge.formats.arrays import ArraysSource, named_arrays
from cfmerge.formats.containers import FORMATS
from cfmerge.formats.named import Tensors
from cfmerge.recipe import parse_size


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
