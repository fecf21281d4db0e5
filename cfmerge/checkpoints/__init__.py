"""Formats: one file each, a `Source` that tensors come from, a `Sink` that they go to, or both."""

from pathlib import Path

from cfmerge import hub
from cfmerge.checkpoints.base import Folder as Folder
from cfmerge.checkpoints.base import Sink as Sink
from cfmerge.checkpoints.base import Source as Checkpoint
from cfmerge.checkpoints.base import TensorInfo as TensorInfo
from cfmerge.checkpoints.base import Totals as Totals
from cfmerge.checkpoints.huggingface import HuggingFaceSource
from cfmerge.checkpoints.sinks import DirectorySink as DirectorySink
from cfmerge.checkpoints.sinks import FileSink as FileSink
from cfmerge.checkpoints.sinks import check_directory_name as check_directory_name
from cfmerge.checkpoints.sinks import open_sink as open_sink
from cfmerge.errors import CfmergeError


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a model directory, a single `.safetensors` file or a model's folder in the Hugging Face cache.

    Only headers are read. A format is chosen by what the files hold; a new one is one more line here.

    Raises:
        CfmergeError: there is nothing there, it is of a format that is not read, or its headers are corrupt.
    """
    path = Path(path).expanduser()
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
    return HuggingFaceSource(hub.newest(path))
