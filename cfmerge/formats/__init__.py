"""Checkpoints: one file a format, behind the interface `Checkpoint`."""

from pathlib import Path

from cfmerge.errors import CfmergeError
from cfmerge.formats.base import Checkpoint as Checkpoint
from cfmerge.formats.base import TensorInfo as TensorInfo
from cfmerge.formats.huggingface import HuggingFaceCheckpoint


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a model directory or a single `.safetensors` file, and reads its headers only.

    Raises:
        CfmergeError: there is nothing there, it is of a format that is not read, or its headers are corrupt.
    """
    path = Path(path).expanduser()
    if not path.exists():
        hint = (
            "; this looks like a name on the Hugging Face hub: download it first (hf download NAME --local-dir DIR)"
            if len(path.parts) == 2 and not path.is_absolute() and "." not in path.parts
            else ""
        )
        raise CfmergeError(f"{path}: no such file or directory{hint}")
    return HuggingFaceCheckpoint(path)
