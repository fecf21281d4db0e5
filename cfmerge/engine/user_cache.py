"""The user's cache directory: folders in it that are the user's alone, and files that are there whole or not at all.

cfmerge relies on what it finds there: compiled code that it will run, rates of the machine, digests of files. So a
folder has mode 0700, and one that another user owns, or may write, is not used.
"""

import contextlib
import functools
import hashlib
import os
import platform
import stat
import tempfile
from pathlib import Path


class Unusable(Exception):
    """Why a directory is not used."""


def cache_directory() -> Path:
    """`$CFMERGE_CACHE`, else `$XDG_CACHE_HOME/cfmerge`, else `~/.cache/cfmerge`."""
    if chosen := os.environ.get("CFMERGE_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "cfmerge"


def own_directory(kind: str, machine: str) -> Path:
    """`KIND/MACHINE` in cfmerge's cache directory, made if need be.

    Raises:
        Unusable: it cannot be made or written, another user owns it or may write it, or there is no home directory.
    """
    try:
        folder = cache_directory().absolute() / kind / machine
    except RuntimeError as error:
        raise Unusable(f"there is no home directory ({error})") from None
    return _prepared(folder)


def _prepared(folder: Path) -> Path:
    """The directory, made if need be, when it and the two around it are the user's alone.

    Raises:
        Unusable: it cannot be made or written, or another user owns it or may write it.
    """
    own = (folder.parent.parent, folder.parent, folder)
    for one in (*reversed(own[0].parents), *own):
        try:
            if not one.is_dir():
                one.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise Unusable(f"{one} cannot be made: {error.strerror}") from None
    for one in own:
        _check_private(one)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise Unusable(f"{folder} cannot be written")
    return folder


def _check_private(folder: Path) -> None:
    if not hasattr(os, "getuid"):  # Windows: a user's cache directory is his own
        return
    found = folder.stat()
    if found.st_uid != os.getuid():
        raise Unusable(f"{folder}, whose files cfmerge relies on, belongs to another user ({found.st_uid})")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise Unusable(f"{folder}, whose files cfmerge relies on, can be written by others (chmod go-w)")


def write_whole(file: Path, text: str) -> None:
    """Writes the file at once or not at all; raises `OSError`."""
    descriptor, name = tempfile.mkstemp(dir=file.parent)
    try:
        with os.fdopen(descriptor, "w") as stream:
            stream.write(text)
        os.replace(name, file)
    except OSError:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        raise


@functools.cache
def machine() -> str:
    """A name for the class of processor: a home directory may be shared by machines, whose code differs."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        features = platform.processor()
    digest = hashlib.sha256(features.encode()).hexdigest()[:8]
    return f"{platform.machine() or 'machine'}-{digest}"


def shrink(folder: Path, limit: int) -> None:
    """Removes the files that were not used for the longest time, where all are larger than `limit`; -1: all files."""
    files = []
    with contextlib.suppress(OSError):
        for file in folder.rglob("*"):
            with contextlib.suppress(OSError):
                if file.is_file():
                    found = file.stat()
                    files.append((max(found.st_atime, found.st_mtime), found.st_size, file))
    size = sum(each for _, each, _ in files)
    if size <= limit:
        return
    for _, each, file in sorted(files):
        if size <= limit // 2:
            break
        with contextlib.suppress(OSError):
            file.unlink()
        size -= each
