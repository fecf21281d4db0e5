"""The folders of a model that hold its weights: one, or the components of a pipeline, each with files of its own."""

import fnmatch
import json
import os
import re
from pathlib import Path
from typing import NamedTuple

from cfmerge.errors import CfmergeError
from cfmerge.formats.containers import directory_format
from cfmerge.formats.layout import ADAPTERS, INDEX, KINDS, Weights, find_weights
from cfmerge.formats.magic import CONVERT, wrong_file
from cfmerge.formats.side_files import COPY_FOLDERS, TENSORS, TRAINING_FOLDERS, is_training


class Component(NamedTuple):
    """A folder with weights: `prefix` stands before the names of its tensors.

    `declared`: a file of the model says that it consists of several; else the folder may hold the model once more.
    """

    prefix: str
    folder: str
    weights: Weights
    declared: bool = True


def find_components(directory: Path) -> list[Component]:
    """The folders of a model's directory that hold its weights, the main one first.

    The directory itself; the modules of sentence-transformers (modules.json); the components of a diffusers pipeline
    (model_index.json); folders with weights of their own.

    Raises:
        CfmergeError: there are no weights, or it is open which of several files are they.
    """
    declared = any((directory / name).is_file() for name in ("modules.json", "model_index.json"))
    if not declared and _is_checkpoint(directory):
        return [Component("", "", Weights([directory], None, {}, "model", [], ""))]
    root = find_weights(directory)
    folders = {} if root is None and not declared else _folders(directory, declared)
    if root is None and not folders:
        raise CfmergeError(_nothing(directory))
    components = [Component("", "", root)] if root else []
    modules = [folder for folder in _modules(directory) if folder in folders]
    if root is None and modules:  # the first module is the transformer, which has plain names wherever it lies
        components.append(Component("", modules[0], folders.pop(modules[0])))
    return components + [Component(f"{folder}/", folder, found, declared) for folder, found in folders.items()]


def _is_checkpoint(directory: Path) -> bool:
    """Whether a directory is one checkpoint as a whole, and holds no weights of a model in files that clients know."""
    if not directory_format(directory):
        return False
    stems = [(files, stem) for files in KINDS for stem in files.stems]
    return not any((directory / f"{stem}{suffix}").exists() for files, stem in stems for suffix in files.suffixes) and (
        not any(files.indices(directory) for files in KINDS)
    )


def _modules(directory: Path) -> list[str]:
    """The folders of the modules of sentence-transformers, in their order."""
    path = directory / "modules.json"
    try:
        modules = json.loads(path.read_text()) if path.is_file() else []
        ordered = sorted(modules, key=lambda module: module.get("idx", 0))
        return [str(module["path"]).strip("/") for module in ordered if module.get("path")]
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise CfmergeError(f"{path}: is no list of modules of sentence-transformers ({error!r})") from None


def _folders(directory: Path, declared: bool) -> dict[str, Weights]:
    """Folders below the directory, at any depth, that hold weights: `{folder: weights}`, in order.

    Where the model does not say that it has several, they count if their files are called as a model's are.
    """
    found = {}
    for place, inside, _ in os.walk(directory):
        here = Path(place)
        inside[:] = sorted(name for name in inside if not _apart(here / name))
        try:
            weights = find_weights(here) if here != directory else None
        except CfmergeError:
            if declared:
                raise
            continue  # files of something else
        if weights and (declared or weights.index or weights.known):
            found[here.relative_to(directory).as_posix()] = weights
    return dict(sorted(found.items(), key=lambda item: _numbers_first(item[0])))


def _apart(folder: Path) -> bool:
    """Whether a folder is no component: hidden, a copy in another format, a step of training, an adapter."""
    patterns = COPY_FOLDERS + TRAINING_FOLDERS
    named = any(fnmatch.fnmatchcase(folder.name, pattern) for pattern in (".*", *patterns))
    return named or (folder / "adapter_config.json").is_file()


def _numbers_first(folder: str) -> list[tuple[int, str]]:
    """`2_Dense` before `10_Dense`."""
    parts = (re.match(r"(\d*)(.*)", part) for part in folder.split("/"))
    return [(int(match[1] or 0), match[2]) for match in parts if match]


def _nothing(directory: Path) -> str:
    """The message about a directory without weights: the files that are there instead, and the way out."""
    start = f"{directory}: no weights here"
    models = sorted(path.parent.name for kind in KINDS for path in directory.glob(f"*/*{kind.suffixes[0]}"))
    models += sorted(path.name for path in directory.iterdir() if path.is_dir() and directory_format(path))
    files = (path for path in directory.iterdir() if path.is_file() and not is_training(path))
    others = sorted(path for path in files if path.suffix in TENSORS)
    if (directory / "zero_to_fp32.py").is_file():
        return f"{start}, but a DeepSpeed checkpoint; join it first: python {directory}/zero_to_fp32.py {directory} OUT"
    adapters = [file.name for file in others if any(fnmatch.fnmatchcase(file.name, name) for name in ADAPTERS)]
    if adapters or (directory / "adapter_config.json").is_file():
        return (
            f"{directory}: holds an adapter (LoRA), not a model: {', '.join(adapters) or 'adapter_config.json'}; name "
            "it as an expert, beside the base that it was trained on"
        )
    if others:
        return f"{start}, but {', '.join(file.name for file in others[:4])}. {_conversion(others)}"
    if models:
        return f"{start}, but in its folders {', '.join(list(dict.fromkeys(models))[:6])}; name the one that is meant"
    return f"{start}; a model directory holds model.safetensors, or shards and {INDEX}, or a file of another format"


def _conversion(files: list[Path]) -> str:
    """How files of tensors in other formats become ones that are read: told by the first bytes of one of them."""
    for file in files:
        told = wrong_file(file) or ""
        if "from_tf" in told or "gguf_file" in told or "LFS" in told:
            return told
    return f"Convert it with transformers: {CONVERT}"
