"""The layout of files that `torch.load(weights_only=True, mmap=True)` reads: a zip archive of stored members.

The pickle is written by hand. Every storage begins at a multiple of 64 bytes; its CRC-32 follows when its bytes are
there.
"""

import dataclasses
import json
from collections.abc import Mapping

import numpy as np

from cfmerge.errors import CfmergeError
from cfmerge.formats import zips
from cfmerge.formats.base import FileLayout, Header, bytes_of
from cfmerge.formats.opcodes import Opcodes
from cfmerge.formats.torch_archives import DTYPES, METADATA, STORAGES

ALIGNED = 64
ROOT = "archive/"
NAMES = {dtype: name for name, dtype in DTYPES.items()}
TYPED = {dtype: name for name, dtype in STORAGES.items()}


def lay(
    tensors: Mapping[str, Header], metadata: Mapping[str, str], ties: Mapping[str, str] | None = None, key: str = ""
) -> FileLayout:
    """The layout of a file with these tensors as an OrderedDict.

    Args:
        metadata: text, in a member of its own, which torch does not look at.
        ties: `{alias: name}`, further names of the same numbers.
        key: the entry under which the dictionary stands, levels apart by `::`; "": it is the whole object.
    """
    write = Opcodes()
    keys = {name: str(number) for number, name in enumerate(tensors)}
    named = [*((name, name) for name in tensors), *(ties or {}).items()]
    empty = write.call(write.name("collections", "OrderedDict"))
    pairs = [(write.text(name), tensor(write, tensors[owner], keys[owner])) for name, owner in named]
    value = empty + write.items(pairs)
    for step in reversed(key.split("::") if key else ()):
        value = write.dict_of([(write.text(step), value)])
    sizes = {keys[name]: bytes_of(header) for name, header in tensors.items()}
    kept = {name: text for name, text in metadata.items() if (name, text) != ("format", "pt")}
    laid = archive(write.ended(value), sizes, kept)
    return dataclasses.replace(laid, places={name: laid.places[keys[name]] for name in tensors})


def tensor(write: Opcodes, header: Header, key: str) -> bytes:
    """The opcodes of a tensor that is a whole storage."""
    shape, dtype = header[0], np.dtype(header[1])
    if dtype not in NAMES:
        raise CfmergeError(f"a tensor of {dtype} cannot be written to a PyTorch file; it holds {', '.join(DTYPES)}")
    typed, size = TYPED.get(dtype), bytes_of(header)
    kind = write.name("torch", typed) if typed else write.name("torch.storage", "UntypedStorage")
    count = size // dtype.itemsize if typed else size
    storage = (
        write.tuple_of(write.word("storage"), kind, write.text(key), write.word("cpu"), write.number(count)) + b"Q"
    )
    strides: list[int] = []
    step = 1
    for n in reversed(shape):
        strides.insert(0, step)
        step *= max(n, 1)
    hooks = write.call(write.name("collections", "OrderedDict"))
    args = [storage, write.number(0), write.numbers(shape), write.numbers(strides), b"\x89", hooks]
    if typed:
        return write.call(write.name("torch._utils", "_rebuild_tensor_v2"), *args)
    args.append(write.name("torch", NAMES[dtype]))
    return write.call(write.name("torch._utils", "_rebuild_tensor_v3"), *args)


def archive(pickle: bytes, sizes: Mapping[str, int], metadata: Mapping[str, str], start: int = 0) -> FileLayout:
    """The layout of an archive with such a pickle and storages of such sizes, from byte `start` of a file on."""
    small = {"data.pkl": pickle, "byteorder": b"little"}
    if metadata:
        small[METADATA] = json.dumps(dict(metadata)).encode()
    members = {f"{ROOT}{name}": (content, 0) for name, content in small.items()}
    members |= {f"{ROOT}data/{key}": (b"", size) for key, size in sizes.items()}
    laid = zips.lay({**members, f"{ROOT}version": (b"3\n", 0)}, ALIGNED, start)
    return dataclasses.replace(laid, places={key: laid.places[f"{ROOT}data/{key}"] for key in sizes})
