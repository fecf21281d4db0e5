"""Files of components read, and checked against the base that they belong to."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cfmerge.compose.tangents import Tangent
from cfmerge.errors import CfmergeError, nearest
from cfmerge.formats.pytree import flatten
from cfmerge.formats.safetensors import SafetensorsFile
from cfmerge.models.patterns import tell
from cfmerge.products.loading import load as load_tensors

MANIFEST, FORMAT, VERSION = "tangents.json", "cfmerge.tangents", 1
BASE = "cfmerge.tangents.base"  # in a component's metadata: which base it belongs to

Described = Mapping[str, Mapping[str, Any]]  # {leaf of the base: {"shape", "dtype", "sha256"}}


def described(base: Any) -> dict[str, dict[str, Any]]:
    """Shape, dtype and SHA-256 of every leaf of a base, by name."""
    return {
        name: {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "sha256": _hash(leaf)}
        for name, leaf in flatten(base)[0].items()
    }


def _hash(leaf: Any) -> str:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return hashlib.sha256(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data).hexdigest()


def digest(base: Described) -> str:
    """One hash for a whole base."""
    return hashlib.sha256(json.dumps(base, sort_keys=True).encode()).hexdigest()


def manifest_of(place: Path) -> dict[str, Any]:
    file = place / MANIFEST
    try:
        content = json.loads(file.read_text())
        if content["format"] == FORMAT and content["version"] == VERSION:
            names = [entry["name"] + entry["file"] for entry in content["components"]]
            if len(set(names)) == len(names) and {"shape", "dtype", "sha256"} >= set().union(*content["base"].values()):
                return dict(content)
        found = f"format {content['format']!r}, version {content['version']!r}"
    except OSError as error:
        raise CfmergeError(f"{file}: cannot be read: {error.strerror}; a directory that `save` wrote has it") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        found = repr(error)
    raise CfmergeError(f"{file}: expected {FORMAT!r}, version {VERSION}, found {found}; copy the file again")


def check_base(place: Path, expected: Described, base: Any) -> None:
    """Raises `CfmergeError` unless the base is, leaf by leaf, that of the components."""
    found = described(base)
    way_out = "components belong to the very base that they were trained from: load that one"
    for told, names, among in (
        ("lacks leaves that they know", [name for name in expected if name not in found], expected),
        ("has leaves that they do not know", [name for name in found if name not in expected], found),
    ):
        if names:
            raise CfmergeError(f"{place}: the base {told}: {tell(names, among)}; {way_out}")
    for key in ("shape", "dtype", "sha256"):
        other = [name for name in expected if expected[name][key] != found[name][key]]
        if other:
            first, count = other[0], f"{len(other)} of {len(expected)} leaves"
            raise CfmergeError(
                f"{place}: the base has {'other values' if key == 'sha256' else f'another {key}'} in {count}: "
                f"{tell(other, expected)}; {key} of {first!r}: expected {expected[first][key]}, "
                f"found {found[first][key]}; {way_out}"
            )


def component_of(place: Path, entry: Mapping[str, Any], leaves: Mapping[str, Any], expected: str) -> Tangent:
    """A component's arrays from its file."""
    file, name, listed = place / entry["file"], entry["name"], entry["leaves"]
    if not file.is_file():
        raise CfmergeError(
            f"{file}: component {name!r} is in {MANIFEST}, and its file is not there; put it back, or forget it: "
            f"tangent_files.erase({str(place)!r}, {name!r})"
        )
    stored = SafetensorsFile(file)
    again = f"put back the file that was saved as component {name!r}"
    if stored.metadata.get(BASE, expected) != expected:
        raise CfmergeError(f"{file}: belongs to another base than {MANIFEST} tells; {again}")
    for told, names, among in (
        ("holds tensors that are no leaves of the base", [n for n in stored.tensors if n not in leaves], leaves),
        ("lacks leaves", [n for n in listed if n not in stored.tensors], ()),
        (f"holds leaves that {MANIFEST} has not", [n for n in stored.tensors if n not in listed], listed),
    ):
        if names:
            raise CfmergeError(f"{file}: {told}: {tell(names)}{nearest(names[0], among)}; {again}")
    for leaf, info in stored.tensors.items():
        if info.shape != leaves[leaf].shape or not jnp.issubdtype(info.dtype, jnp.inexact):
            raise CfmergeError(
                f"{file}: tensor {leaf!r}: expected floats of shape {leaves[leaf].shape}, as in the base, found "
                f"{info.dtype} of shape {info.shape}; {again}"
            )
    like = {
        leaf: jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=getattr(leaves[leaf], "sharding", None))
        for leaf, info in stored.tensors.items()
    }
    found: Tangent = load_tensors(stored, like)
    return found
