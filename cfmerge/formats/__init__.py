"""Formats: one file each, a `Source` that tensors come from, a `Sink` that they go to, or both."""

from pathlib import Path

from cfmerge import hub
from cfmerge.errors import CfmergeError
from cfmerge.formats.base import Folder as Folder
from cfmerge.formats.base import Sink as Sink
from cfmerge.formats.base import Source as Source
from cfmerge.formats.base import TensorInfo as TensorInfo
from cfmerge.formats.base import Totals as Totals
from cfmerge.formats.composed import is_composed, is_zip
from cfmerge.formats.download import snapshot_of
from cfmerge.formats.huggingface import HuggingFaceSource
from cfmerge.formats.outputs import FileSink as FileSink
from cfmerge.formats.outputs import open_sink as open_sink
from cfmerge.formats.sinks import DirectorySink as DirectorySink
from cfmerge.formats.sinks import check_directory_name as check_directory_name


def open_checkpoint(path: str | Path, *, download: bool = False, cache_dir: str | None = None) -> Source:
    """The source of a model: a directory, a file of tensors, a checkpoint, or a model of the Hugging Face hub.

        >>> model = cfmerge.open_checkpoint("base")
        >>> {name: info.shape for name, info in model.tensors.items()}
        {'layer.bias': (4,), 'layer.weight': (4, 3)}
        >>> model.read("layer.weight", first=3, count=2)
        array([3., 4.], dtype=float32)

    Only headers are read. The content of the files decides the format. `PATH::PART` names a part of a file or
    checkpoint that holds several sets of tensors: `run.ckpt::ema`, `checkpoints/100::params`.

    Args:
        path: a path; or, where there is none, `ORG/NAME` or `ORG/NAME@REVISION`, as on the hub.
        download: fetch such a model if it is not in the cache.
        cache_dir: the cache's directory; None: where huggingface_hub has it.

    Raises:
        CfmergeError: there is nothing there, it is of a format that is not read, or its headers are corrupt.
    """
    named, part = _parts(path)
    found = located(named, download, cache_dir)
    if found.is_symlink() and not found.exists():
        raise CfmergeError(f"{found}: is a link to {found.readlink()}, which is not there; fetch the model again")
    if not found.exists():
        raise CfmergeError(f"{found}: no such file or directory")
    if is_composed(found):
        raise CfmergeError(
            f"{found}: is a composed result, not a model; `cfmerge materialise {found} --task NAME -o MODEL` makes the "
            "model of a task, `cfmerge inspect` lists the tasks"
        )
    if is_zip(found):
        raise CfmergeError(
            f"{found}: is a zip of several models, not a model; cfmerge.save(cfmerge.align.load_zipped({str(found)!r})"
            ".tensors(NAME), OUT) makes one of them"
        )
    return HuggingFaceSource(hub.newest(found), part)


def located(path: str | Path, download: bool, cache_dir: str | None, weights: bool = True) -> Path:
    """The path that a text stands for: of a name on the hub its snapshot in the cache; see `open_checkpoint`."""
    model = hub.asked(path)
    return Path(path).expanduser() if model is None else snapshot_of(model, download, cache_dir, weights)


def _parts(path: str | Path) -> tuple[str, str]:
    """The path, and the part of it that is named behind `::`."""
    before, separator, part = str(path).partition("::")
    return (before, part) if separator and not Path(path).expanduser().exists() else (str(path), "")
