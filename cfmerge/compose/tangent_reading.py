"""Files of components read, and checked against the base that they belong to."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import msgspec
import numpy as np

from cfmerge.compose.tangents import Tangent
from cfmerge.errors import CfmergeError, nearest
from cfmerge.formats.pytree import flatten
from cfmerge.formats.safetensors import SafetensorsFile
from cfmerge.models.patterns import tell
from cfmerge.products.loading import load as load_tensors

MANIFEST = "tangents.json"
BASE = "cfmerge.tangents.base"  # in a component's metadata: which base it belongs to


class Leaf(msgspec.Struct):
    """A leaf of the base, as the components know it."""

    shape: list[int]
    dtype: str
    sha256: str


class Component(msgspec.Struct):
    """A component, and the names of its leaves in its file."""

    name: str
    file: str
    coefficient: float
    leaves: list[str]


class Manifest(msgspec.Struct):
    """The content of `tangents.json`: components in their order, and the base that they belong to."""

    components: list[Component]
    base: dict[str, Leaf]
    format: Literal["cfmerge.tangents"] = "cfmerge.tangents"
    version: Literal[1] = 1

    def text(self) -> str:
        return json.dumps(msgspec.to_builtins(self), indent=1) + "\n"


def described(base: Any) -> dict[str, Leaf]:
    """Shape, dtype and SHA-256 of every leaf of a base, by name."""
    return {name: Leaf(list(leaf.shape), str(leaf.dtype), _hash(leaf)) for name, leaf in flatten(base)[0].items()}


def _hash(leaf: Any) -> str:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return hashlib.sha256(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data).hexdigest()


def digest(base: Mapping[str, Leaf]) -> str:
    """One hash for a whole base."""
    return hashlib.sha256(json.dumps(msgspec.to_builtins(base), sort_keys=True).encode()).hexdigest()


def manifest_of(place: Path) -> Manifest:
    """What `tangents.json` tells.

    Raises:
        CfmergeError: it is not there, or is something else.
    """
    file = place / MANIFEST
    try:
        content = json.loads(file.read_text())
        told = {key: content[key] for key in ("format", "version")}
        manifest = msgspec.convert({**content, **told}, Manifest)
        twice = [name for name, count in Counter(entry.name for entry in manifest.components).items() if count > 1]
        if twice:
            raise ValueError(f"component {twice[0]!r} twice")
        return manifest
    except OSError as error:
        raise CfmergeError(f"{file}: cannot be read: {error.strerror}; a directory that `save` wrote has it") from None
    except (ValueError, KeyError, TypeError) as error:
        known = Manifest([], {})
        raise CfmergeError(
            f"{file}: expected {known.format!r}, version {known.version}, found {error!r}; copy the file again"
        ) from None


def check_base(place: Path, expected: Mapping[str, Leaf], base: Any) -> None:
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
        other = [name for name in expected if getattr(expected[name], key) != getattr(found[name], key)]
        if other:
            what = "other values" if key == "sha256" else f"another {key}"
            known, own = (getattr(leaves[other[0]], key) for leaves in (expected, found))
            raise CfmergeError(
                f"{place}: the base has {what} in {len(other)} of {len(expected)} leaves: {tell(other, expected)}; "
                f"{key} of {other[0]!r}: expected {known}, found {own}; {way_out}"
            )


def component_of(place: Path, entry: Component, leaves: Mapping[str, Any], expected: str) -> Tangent:
    """A component's arrays from its file."""
    file, name, listed = place / entry.file, entry.name, entry.leaves
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
