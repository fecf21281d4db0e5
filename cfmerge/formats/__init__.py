"""Formats: one file each, a `Source` that tensors come from, a `Sink` that they go to, or both."""

from pathlib import Path

from cfmerge import hub
from cfmerge.errors import CfmergeError
from cfmerge.formats.base import Folder as Folder
from cfmerge.formats.base import Sink as Sink
from cfmerge.formats.base import Source as Source
from cfmerge.formats.base import TensorInfo as TensorInfo
from cfmerge.formats.base import Totals as Totals
from cfmerge.formats.huggingface import HuggingFaceSource
from cfmerge.formats.sinks import DirectorySink as DirectorySink
from cfmerge.formats.sinks import FileSink as FileSink
from cfmerge.formats.sinks import check_directory_name as check_directory_name
from cfmerge.formats.sinks import open_sink as open_sink


def open_checkpoint(path: str | Path) -> Source:
    """The source of a model: a directory, a file of tensors, a checkpoint, or its folder in the Hugging Face cache.

        >>> model = cfmerge.open_checkpoint("base")
        >>> {name: info.shape for name, info in model.tensors.items()}
        {'layer.bias': (4,), 'layer.weight': (4, 3)}
        >>> model.read("layer.weight", first=3, count=2)
        array([3., 4.], dtype=float32)

    Only headers are read. The content of the files decides the format. `PATH::PART` names a part of a file or
    checkpoint that holds several sets of tensors: `run.ckpt::ema`, `checkpoints/100::params`.

    Raises:
        CfmergeError: there is nothing there, it is of a format that is not read, or its headers are corrupt.
    """
    path, part = _parts(path)
    if path.is_symlink() and not path.exists():
        raise CfmergeError(f"{path}: is a link to {path.readlink()}, which is not there; fetch the model again")
    if not path.exists():
        looks_like_a_name = len(path.parts) == 2 and not path.is_absolute() and "." not in path.parts
        hint = (
            "; this looks like a name on the Hugging Face hub: download it first (hf download NAME --local-dir DIR)"
            if looks_like_a_name
            else ""
        )
        raise CfmergeError(f"{path}: no such file or directory{hint}")
    return HuggingFaceSource(hub.newest(path), part)


def _parts(path: str | Path) -> tuple[Path, str]:
    """The path, and the part of it that is named behind `::`."""
    whole = Path(path).expanduser()
    before, separator, part = str(path).partition("::")
    return (Path(before).expanduser(), part) if separator and not whole.exists() else (whole, "")
