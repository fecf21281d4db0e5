"""Components in files: saved, loaded, one more added, one erased.

    OUT/NAME.safetensors     a component: its tensors by name of leaf, "path/of/leaf"
    OUT/tangents.json        components in order: name, file, coefficient, leaves; the base's leaves: shape, dtype, hash

The base is not stored: it is told by a SHA-256 of every leaf, and checked against the base that `load` gets. Any reader
of safetensors and JSON reads all of it. Every component has a file of its own, which nothing rewrites, so components
that separate processes have trained come together by `append`. All appears whole or not at all.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cfmerge.compose.tangents import Tangent, Tangents
from cfmerge.errors import CfmergeError, nearest
from cfmerge.formats import DirectorySink, FileSink, Folder, Totals
from cfmerge.formats.pytree import flatten
from cfmerge.formats.safetensors import SafetensorsFile
from cfmerge.formats.staged import StagedFile
from cfmerge.models.patterns import tell
from cfmerge.products.loading import load as load_tensors

MANIFEST, FORMAT, VERSION = "tangents.json", "cfmerge.tangents", 1
BASE = "cfmerge.tangents.base"  # in a component's metadata: which base it belongs to

Described = Mapping[str, Mapping[str, Any]]  # {leaf of the base: {"shape", "dtype", "sha256"}}


def save(tangents: Tangents, directory: str | Path, *, overwrite: bool = False) -> Path:
    """The directory of the components, written whole or not at all; the base is not in it.

    Raises:
        CfmergeError: it exists, or a component holds a NaN or an infinity.
    """
    target, base = Path(directory).expanduser(), described(tangents.base)
    folders = [_folder(name, base) for name in tangents.names]
    parts = dict(zip(tangents.names, _components(tangents), strict=True))
    with DirectorySink(target, folders, metadata={}, overwrite=overwrite) as sink:
        sink.declare(
            {f"{name}/{leaf}": (a.shape, a.dtype) for name, arrays in parts.items() for leaf, a in arrays.items()}
        )
        for name, arrays in parts.items():
            for leaf, array in arrays.items():
                sink.write(f"{name}/{leaf}", array)
        sink.finish(Totals())
        (sink.path / MANIFEST).write_text(_text(base, _entries(tangents)))
        sink.commit()
    return target


def load(directory: str | Path, base: Any) -> Tangents:
    """The components that `save` and `append` wrote, over their base; arrays lie as the base's leaves do.

        >>> base = {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}}
        >>> birds = Tangents(base).add("birds", {"dense": {"kernel": 0.1 * jnp.ones((2, 3))}})
        >>> load(save(birds, "components"), base)
        <Tangents: 1 component, 1 of 2 leaves: birds 1.0>

    Raises:
        CfmergeError: there are no components, the base is another, or a file is missing, truncated or does not fit.
    """
    place = Path(directory).expanduser()
    manifest = _manifest(place)
    _check_base(place, manifest["base"], base)
    leaves, _ = flatten(base)
    entries = manifest["components"]
    files = {entry["file"] for entry in entries}
    strays = sorted(file.name for file in place.glob("*.safetensors") if file.name not in files)
    if strays:
        warnings.warn(f"{place}: {', '.join(strays)}: not in {MANIFEST}, so no component; not loaded", stacklevel=2)
    return Tangents(
        base,
        tuple(entry["name"] for entry in entries),
        tuple(_component(place, entry, leaves, _digest(manifest["base"])) for entry in entries),
        tuple(entry["coefficient"] for entry in entries),
    )


def append(directory: str | Path, tangents: Tangents) -> Path:
    """The directory with these components behind those that it has, whose files are left as they are.

    Processes that append at the same time wait for each other.

    Raises:
        CfmergeError: a name is taken, or the base is another.
    """
    place = Path(directory).expanduser()
    with _alone(place):
        manifest = _manifest(place)
        _check_base(place, manifest["base"], tangents.base)
        taken = [entry["name"] for entry in manifest["components"]]
        twice = [name for name in tangents.names if name in taken]
        if twice:
            raise CfmergeError(
                f"{place}: there is a component {twice[0]!r} already; name yours otherwise, or erase it first: "
                f"tangent_files.erase({str(place)!r}, {twice[0]!r})"
            )
        for name, arrays in zip(tangents.names, _components(tangents), strict=True):
            file = FileSink(_file(place, name), [_folder(name, manifest["base"], "")], metadata={}, overwrite=True)
            with file as sink:
                sink.declare({leaf: (array.shape, array.dtype) for leaf, array in arrays.items()})
                for leaf, array in arrays.items():
                    sink.write(leaf, array)
                sink.finish(Totals())
                sink.commit()
        _rewrite(place, _text(manifest["base"], [*manifest["components"], *_entries(tangents)]))
    return place


def erase(directory: str | Path, name: str) -> Path:
    """The directory without a component, whose file is deleted: unlearning on disk.

    Raises:
        CfmergeError: there is no such component.
    """
    place = Path(directory).expanduser()
    with _alone(place):
        manifest = _manifest(place)
        names = [entry["name"] for entry in manifest["components"]]
        if name not in names:
            raise CfmergeError(f"{place}: there is no component {name!r}{nearest(name, names)}")
        _rewrite(place, _text(manifest["base"], [e for e in manifest["components"] if e["name"] != name]))
        _file(place, name).unlink(missing_ok=True)
    return place


def described(base: Any) -> dict[str, dict[str, Any]]:
    """Shape, dtype and SHA-256 of every leaf of a base, by name."""
    return {
        name: {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "sha256": _hash(leaf)}
        for name, leaf in flatten(base)[0].items()
    }


def _hash(leaf: Any) -> str:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return hashlib.sha256(np.ascontiguousarray(leaf).view(np.uint8) if np.size(leaf) else b"").hexdigest()


def _digest(base: Described) -> str:
    """One hash for a whole base."""
    return hashlib.sha256(json.dumps(base, sort_keys=True).encode()).hexdigest()


# --- writing ------------------------------------------------------------------------------------------------------


def _file(place: Path, name: str) -> Path:
    return place / f"{name}.safetensors"


def _folder(name: str, base: Described, prefix: str | None = None) -> Folder:
    """One component's file among the others of the directory."""
    return Folder(f"{name}/" if prefix is None else prefix, stem=name, sharded=False, metadata={BASE: _digest(base)})


def _entries(tangents: Tangents) -> list[dict[str, Any]]:
    return [
        {"name": name, "file": _file(Path(), name).name, "coefficient": float(c), "leaves": list(component)}
        for name, component, c in zip(tangents.names, tangents.components, tangents.coefficients, strict=True)
    ]


def _components(tangents: Tangents) -> list[dict[str, np.ndarray]]:
    """Every component's arrays on the host, all of them finite."""
    found = [{leaf: np.asarray(a) for leaf, a in component.items()} for component in tangents.components]
    for name, arrays in zip(tangents.names, found, strict=True):
        for leaf, array in arrays.items():
            if not np.isfinite(array).all():
                raise CfmergeError(f"component {name!r}: leaf {leaf!r} holds a NaN or an infinity; train it anew")
    return found


def _text(base: Described, components: list[dict[str, Any]]) -> str:
    content = {"format": FORMAT, "version": VERSION, "components": components, "base": base}
    return json.dumps(content, indent=1) + "\n"


def _rewrite(place: Path, text: str) -> None:
    with StagedFile(place / MANIFEST, overwrite=True) as staged:
        (staged.path / MANIFEST).write_text(text)
        staged.commit()


@contextlib.contextmanager
def _alone(place: Path) -> Iterator[None]:
    """This process changes the directory, and others wait."""
    try:
        opened = os.open(place, os.O_RDONLY)
    except OSError as error:
        raise CfmergeError(f"{place}: cannot be read: {error.strerror}; `save` makes such a directory") from None
    try:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)


# --- reading ------------------------------------------------------------------------------------------------------


def _manifest(place: Path) -> dict[str, Any]:
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


def _check_base(place: Path, expected: Described, base: Any) -> None:
    """Raises `CfmergeError` unless the base is, leaf by leaf, that of the components."""
    found = described(base)
    way_out = "components belong to the very base that they were trained from: load that one"
    for told, names, among in (
        ("lacks", [name for name in expected if name not in found], expected),
        ("has besides", [name for name in found if name not in expected], found),
    ):
        if names:
            raise CfmergeError(f"{place}: the base {told} {len(names)} leaves: {tell(names, among)}; {way_out}")
    for key in ("shape", "dtype", "sha256"):
        other = [name for name in expected if expected[name][key] != found[name][key]]
        if other:
            first, count = other[0], f"{len(other)} of {len(expected)} leaves"
            raise CfmergeError(
                f"{place}: the base has {'other values' if key == 'sha256' else f'another {key}'} in {count}: "
                f"{tell(other, expected)}; {key} of {first!r}: expected {expected[first][key]}, "
                f"found {found[first][key]}; {way_out}"
            )


def _component(place: Path, entry: Mapping[str, Any], leaves: Mapping[str, Any], digest: str) -> Tangent:
    """A component's arrays from its file."""
    file, name, listed = place / entry["file"], entry["name"], entry["leaves"]
    if not file.is_file():
        raise CfmergeError(
            f"{file}: component {name!r} is in {MANIFEST}, and its file is not there; put it back, or forget it: "
            f"tangent_files.erase({str(place)!r}, {name!r})"
        )
    stored = SafetensorsFile(file)
    again = f"put back the file that was saved as component {name!r}"
    if stored.metadata.get(BASE, digest) != digest:
        raise CfmergeError(f"{file}: belongs to another base than {MANIFEST} tells; {again}")
    for told, names, among in (
        ("holds tensors that are no leaves of the base", [n for n in stored.tensors if n not in leaves], leaves),
        ("lacks leaves", [n for n in listed if n not in stored.tensors], listed),
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
