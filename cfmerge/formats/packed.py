"""Plain values as bytes: a line of JSON, and the arrays behind it as they lie in memory."""

import json
from typing import Any

import numpy as np


def packed(value: Any) -> bytes:
    """Numbers, texts, arrays, and mappings, tuples and lists of these, as bytes.

    >>> unpacked(packed({("a", 1): [np.arange(3), None, 2.5]}))
    {('a', 1): [array([0, 1, 2]), None, 2.5]}

    Raises:
        TypeError: it holds anything else.
    """
    arrays: list[bytes] = []
    text = json.dumps(_plain(value, arrays), separators=(",", ":")).encode()
    return b"".join([text, b"\n", *arrays])


def unpacked(content: bytes) -> Any:
    """The inverse of `packed`; arrays without axes come back as scalars."""
    text, _, rest = content.partition(b"\n")
    return _as_it_was(json.loads(text), memoryview(rest), [0])


def _plain(value: Any, arrays: list[bytes]) -> Any:
    if value is None or isinstance(value, str | bool | int) or type(value) is float:
        return value
    if isinstance(value, np.ndarray | np.generic):
        array = np.ascontiguousarray(value)
        if array.dtype.kind not in "biuf":
            raise TypeError(f"arrays of {array.dtype}")
        arrays.append(array.tobytes())
        return {"array": array.dtype.str, "shape": list(np.shape(value))}
    if type(value) is dict:
        return {"dict": [[_plain(key, arrays), _plain(own, arrays)] for key, own in value.items()]}
    if type(value) in {tuple, list}:
        return {type(value).__name__: [_plain(own, arrays) for own in value]}
    raise TypeError(f"values of type {type(value).__name__}")


def _as_it_was(value: Any, rest: memoryview, at: list[int]) -> Any:
    if not isinstance(value, dict):
        return value
    if "array" in value:
        dtype, shape = np.dtype(value["array"]), value["shape"]
        size = int(np.prod(shape, dtype=np.int64))
        array = np.frombuffer(rest, dtype, size, at[0]) if size else np.zeros(0, dtype)
        at[0] += size * dtype.itemsize
        return array.reshape(shape).copy()[()]
    if "dict" in value:
        return {_as_it_was(key, rest, at): _as_it_was(own, rest, at) for key, own in value["dict"]}
    ((kind, content),) = value.items()
    each = [_as_it_was(own, rest, at) for own in content]
    return tuple(each) if kind == "tuple" else each
