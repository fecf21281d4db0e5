"""Components in files: saved, loaded, one more added, one erased.

    OUT/NAME.safetensors     a component: its tensors by name of leaf, "path/of/leaf"
    OUT/tangents.json        components in order: name, file, coefficient, leaves; the base's leaves: shape, dtype, hash

The base is not stored: it is told by a SHA-256 of every leaf, and checked against the base that `load` gets. Any reader
of safetensors and JSON reads all of it. Every component has a file of its own, which nothing rewrites, so components
that separate processes have trained come together by `append`. All appears whole or not at all.
"""

import contextlib
import fcntl
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cfmerge.compose.tangent_reading import (
    BASE,
    MANIFEST,
    Component,
    Leaf,
    Manifest,
    check_base,
    component_of,
    described,
    digest,
    manifest_of,
)
from cfmerge.compose.tangents import Tangents
from cfmerge.errors import CfmergeError, nearest
from cfmerge.formats import DirectorySink, FileSink, Folder, Totals
from cfmerge.formats.pytree import flatten
from cfmerge.formats.sinks import disk_errors
from cfmerge.formats.staged import StagedFile


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
        with disk_errors(target):
            (sink.path / MANIFEST).write_text(Manifest(_entries(tangents), base).text())
        sink.commit()
    return target


def load(directory: str | Path, base: Any) -> Tangents:
    """The components that `save` and `append` wrote, over their base; arrays lie as the base's leaves do.

        >>> base = {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}}
        >>> birds = compose.Tangents(base).add("birds", {"dense": {"kernel": 0.1 * jnp.ones((2, 3))}})
        >>> load(save(birds, "components"), base)
        <Tangents: 1 component, 1 of 2 leaves: birds 1.0>

    Raises:
        CfmergeError: there are no components, the base is another, or a file is missing, truncated or does not fit.
    """
    place = Path(directory).expanduser()
    manifest = manifest_of(place)
    check_base(place, manifest.base, base)
    leaves, _ = flatten(base)
    entries = manifest.components
    files = {entry.file for entry in entries}
    strays = sorted(file.name for file in place.glob("*.safetensors") if file.name not in files)
    if strays:
        warnings.warn(f"{place}: {', '.join(strays)}: not in {MANIFEST}, so no component; not loaded", stacklevel=2)
    return Tangents(
        base,
        tuple(entry.name for entry in entries),
        tuple(component_of(place, entry, leaves, digest(manifest.base)) for entry in entries),
        tuple(entry.coefficient for entry in entries),
    )


def append(directory: str | Path, tangents: Tangents) -> Path:
    """The directory with these components behind those that it has, whose files are left as they are.

    Processes that append at the same time wait for each other.

    Raises:
        CfmergeError: a name is taken, or the base is another.
    """
    place = Path(directory).expanduser()
    with _alone(place):
        manifest = manifest_of(place)
        check_base(place, manifest.base, tangents.base)
        taken = [entry.name for entry in manifest.components]
        twice = [name for name in tangents.names if name in taken]
        if twice:
            raise CfmergeError(
                f"{place}: there is a component {twice[0]!r} already; name yours otherwise, or erase it first: "
                f"tangent_files.erase({str(place)!r}, {twice[0]!r})"
            )
        entries = _entries(tangents)
        for name, arrays in zip(tangents.names, _components(tangents), strict=True):
            file = FileSink(_file(place, name), [_folder(name, manifest.base, "")], metadata={}, overwrite=True)
            with file as sink:
                sink.declare({leaf: (array.shape, array.dtype) for leaf, array in arrays.items()})
                for leaf, array in arrays.items():
                    sink.write(leaf, array)
                sink.finish(Totals())
                sink.commit()
        _rewrite(place, Manifest([*manifest.components, *entries], manifest.base))
    return place


def erase(directory: str | Path, name: str) -> Path:
    """The directory without a component, whose file is deleted: unlearning on disk.

    Raises:
        CfmergeError: there is no such component.
    """
    place = Path(directory).expanduser()
    with _alone(place):
        manifest = manifest_of(place)
        names = [entry.name for entry in manifest.components]
        if name not in names:
            raise CfmergeError(f"{place}: there is no component {name!r}{nearest(name, names)}")
        _rewrite(place, Manifest([entry for entry in manifest.components if entry.name != name], manifest.base))
        _file(place, name).unlink(missing_ok=True)
    return place


# --- writing ------------------------------------------------------------------------------------------------------


def _file(place: Path, name: str) -> Path:
    return place / f"{name}.safetensors"


def _folder(name: str, base: Mapping[str, Leaf], prefix: str | None = None) -> Folder:
    """One component's file among the others of the directory."""
    return Folder(f"{name}/" if prefix is None else prefix, stem=name, sharded=False, metadata={BASE: digest(base)})


def _entries(tangents: Tangents) -> list[Component]:
    parts = zip(tangents.names, map(float, tangents.coefficients), tangents.components, strict=True)
    entries = [Component(name, _file(Path(), name).name, c, list(component)) for name, c, component in parts]
    for entry in entries:
        if not math.isfinite(entry.coefficient):
            raise CfmergeError(f"component {entry.name!r}: its coefficient is {entry.coefficient}; give it a number")
    return entries


def _components(tangents: Tangents) -> list[dict[str, np.ndarray]]:
    """Every component's arrays on the host, all of them finite."""
    found = [{leaf: np.asarray(a) for leaf, a in component.items()} for component in tangents.components]
    for name, arrays in zip(tangents.names, found, strict=True):
        for leaf, array in arrays.items():
            if not np.isfinite(array).all():
                raise CfmergeError(f"component {name!r}: leaf {leaf!r} holds a NaN or an infinity; train it anew")
    return found


def _rewrite(place: Path, manifest: Manifest) -> None:
    with disk_errors(place), StagedFile(place / MANIFEST, overwrite=True) as staged:
        (staged.path / MANIFEST).write_text(manifest.text())
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
