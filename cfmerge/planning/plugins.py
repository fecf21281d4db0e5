"""Methods from elsewhere: Python files that a recipe names, and entry points of installed packages."""

import functools
import hashlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from cfmerge.errors import CfmergeError

GROUP = "cfmerge.methods"  # entry points: each is a module, or a factory, that registers methods when imported


def load_plugins(files: Sequence[str] = ()) -> None:
    """Imports the Python files and all entry points, so that recipes can name the methods that they register.

    Raises:
        CfmergeError: a file is missing, or importing it fails.
    """
    _load_entry_points()
    for file in files:
        _load_file(Path(file).expanduser().resolve())


@functools.cache
def _load_entry_points() -> None:
    for point in importlib.metadata.entry_points(group=GROUP):
        try:
            point.load()
        except Exception as error:
            raise CfmergeError(f"entry point {point.name!r} ({point.value}) of {GROUP} fails: {error}") from error


@functools.cache
def _load_file(path: Path) -> None:
    if not path.is_file():
        raise CfmergeError(f"plugin {path}: there is no such file")
    name = f"cfmerge_plugin_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise CfmergeError(f"plugin {path}: is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise CfmergeError(f"plugin {path}: {type(error).__name__}: {error}") from error
