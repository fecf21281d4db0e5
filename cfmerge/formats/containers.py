"""The formats of files and directories of named tensors, and the one that a path has: told by content."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

from cfmerge.errors import CfmergeError
from cfmerge.formats import msgpack, npz, pytorch, safetensors
from cfmerge.formats.base import Container, Folder, Header
from cfmerge.formats.distributed import LATEST, DistributedCheckpoint
from cfmerge.formats.distributed_files import distributed
from cfmerge.formats.distributed_index import NAME as INDEX_OF_CHUNKS
from cfmerge.formats.magic import format_of, wrong_file
from cfmerge.formats.orbax import OrbaxCheckpoint
from cfmerge.formats.orbax_layout import FIRST, is_orbax
from cfmerge.formats.orbax_writer import OrbaxWriter
from cfmerge.formats.ranges import Covered
from cfmerge.formats.shards import Lay, ShardWriter, Writer


class Write(Protocol):
    """The writer of one folder of an output; see `ShardWriter`."""

    def __call__(
        self,
        directory: Path,
        tensors: Mapping[str, Header],
        shard_bytes: int,
        folder: Folder,
        *,
        metadata: Mapping[str, str],
        index: str | None,
        done: Covered | None,
    ) -> Writer: ...


class Format(NamedTuple):
    """A format of named tensors.

    Attributes:
        suffixes: the ends of its files' names, the usual one first; none: a checkpoint is a directory.
        open: the container at a path; of it the part that is named, such as a subtree, "" for all parameters.
        write: the writer of a folder.
        shares: a tensor that has several names is written once.
    """

    suffixes: tuple[str, ...]
    open: Callable[[Path, str], Container]
    write: Write
    shares: bool = False


def _files(lay: Lay) -> Write:
    """The writer of files that are laid out so."""

    def write(directory, tensors, shard_bytes, folder, *, metadata, index, done):  # type: ignore[no-untyped-def]
        return ShardWriter(
            directory, tensors, shard_bytes, metadata, folder.stem, index, done, suffix=folder.suffix, lay=lay
        )

    return write


def _ties(folder: Folder, tensors: Mapping[str, Header]) -> dict[str, str]:
    """`{alias: name}` of the folder's further names of some tensors."""
    return {alias: name for alias, name in folder.ties.items() if name in tensors and alias not in tensors}


def _safetensors(directory, tensors, shard_bytes, folder, *, metadata, index, done):  # type: ignore[no-untyped-def]
    told = {**_ties(folder, tensors), **metadata}  # as safetensors.torch.save_model tells them
    return _files(safetensors.lay)(directory, tensors, shard_bytes, folder, metadata=told, index=index, done=done)


def _torch(directory, tensors, shard_bytes, folder, *, metadata, index, done):  # type: ignore[no-untyped-def]
    def lay(own, told):  # type: ignore[no-untyped-def]
        return pytorch.lay(own, told, _ties(folder, own), folder.key)

    return _files(lay)(directory, tensors, shard_bytes, folder, metadata=metadata, index=index, done=done)


def _msgpack(directory, tensors, shard_bytes, folder, *, metadata, index, done):  # type: ignore[no-untyped-def]
    lay = functools.partial(msgpack.lay, keys=getattr(folder.like, "keys", {}))
    return _files(lay)(directory, tensors, shard_bytes, folder, metadata=metadata, index=index, done=done)


def _distributed(directory, tensors, shard_bytes, folder, *, metadata, index, done):  # type: ignore[no-untyped-def]
    like = folder.like if isinstance(folder.like, DistributedCheckpoint) else None
    opaque = {name: like.content(name) for name in like.opaque} if like else {}
    files = distributed(opaque, like.paths if like else None)
    return ShardWriter(directory, tensors, shard_bytes, metadata, "", index, done, files=files)


def _orbax(version, directory, tensors, shard_bytes, folder, *, metadata, index, done):  # type: ignore[no-untyped-def]
    keys = getattr(folder.like, "keys", {})
    return OrbaxWriter(directory, tensors, shard_bytes, metadata, folder.stem, index, done, version=version, keys=keys)


def _whole(path: Path, part: str) -> Container:
    if part:
        raise CfmergeError(f"{path}::{part}: a safetensors file has no parts; name the file alone")
    return safetensors.SafetensorsFile(path)


FORMATS: dict[str, Format] = {
    "safetensors": Format((".safetensors",), _whole, _safetensors, shares=True),
    "torch": Format((".bin", ".pt", ".pth", ".ckpt"), pytorch.TorchFile, _torch, shares=True),
    "msgpack": Format((".msgpack",), msgpack.MsgpackFile, _msgpack),
    "npz": Format((".npz",), npz.NpzFile, _files(npz.lay)),
    "orbax": Format((), OrbaxCheckpoint, functools.partial(_orbax, "v1")),
    "orbax-v0": Format((), OrbaxCheckpoint, functools.partial(_orbax, "v0")),
    "distributed": Format((), DistributedCheckpoint, _distributed),
}


def directory_format(path: Path) -> str | None:
    """The format of a directory that is one checkpoint as a whole; None where it may hold files of tensors."""
    if (path / INDEX_OF_CHUNKS).is_file() or (path / LATEST).is_file():
        return "distributed"
    if not is_orbax(path):
        return None
    first = any((folder / FIRST).exists() for folder in (path, *(inner for inner in path.iterdir() if inner.is_dir())))
    return "orbax" if first else "orbax-v0"


def kind_of(path: Path) -> str:
    """The format of a file, or of a directory that is a checkpoint.

    Raises:
        CfmergeError: it cannot be read, or is of a format that is not read.
    """
    try:
        found = directory_format(path) if path.is_dir() else None
        wrong = None if found else wrong_file(path)
        if wrong:
            raise CfmergeError(wrong)
        return found or format_of(path)
    except OSError as error:
        raise CfmergeError(f"{path}: cannot be read: {error.strerror}") from None


def open_container(path: Path, part: str = "") -> Container:
    """The container at a path.

    Raises:
        CfmergeError: it cannot be read, is of a format that is not read, or is corrupt.
    """
    return FORMATS[kind_of(path)].open(path, part)
