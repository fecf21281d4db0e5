"""What takes long to make, on disk, named by a hash of what made it: code, data, sizes and seed. And compiled code."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file

from cfmerge.demo.archives import cache_directory

if TYPE_CHECKING:
    from cfmerge_accuracy.zoo import Params


def digest(of: Mapping[str, Any], code: Sequence[ModuleType], data: Sequence[np.ndarray]) -> str:
    """A hash of settings, of modules' source text, and of arrays' bytes."""
    whole = hashlib.sha256(json.dumps(of, sort_keys=True).encode())
    for module in code:
        whole.update(Path(str(module.__file__)).read_bytes())
    for array in data:
        whole.update(str((array.shape, array.dtype)).encode())
        whole.update(np.ascontiguousarray(array).tobytes())
    return whole.hexdigest()[:16]


def cached(
    name: str,
    make: Callable[[], Params],
    *,
    of: Mapping[str, Any],
    code: Sequence[ModuleType],
    data: Sequence[np.ndarray] = (),
) -> Params:
    """What `make()` returns, a tree of arrays; from the cache if the same code made it of the same data before.

    Args:
        name: for the file, such as "vision-0-mnist".
        make: trains, measures or draws.
        of: everything else that decides the result: seed, sizes, steps; the digests of what it starts from.
        code: the modules whose text decides the result.
        data: what it is made of.
    """
    path = cache_directory() / "accuracy" / f"{name}-{digest(of, code, data)}.safetensors"
    if path.exists():
        return unflatten_dict(load_file(path), sep="/")
    params = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    flat = {key: np.ascontiguousarray(value) for key, value in flatten_dict(params, sep="/").items()}
    save_file(flat, partial)
    partial.rename(path)
    return unflatten_dict(flat, sep="/")


def keep_compiled() -> None:
    """Of this process, compiled code is kept beside the experts: most of a row is compilation, alike in every run."""
    import jax

    jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
