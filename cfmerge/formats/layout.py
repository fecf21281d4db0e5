"""The files of a directory that hold a model's tensors: one file, shards and their index, or components in folders."""

import dataclasses
import fnmatch
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cfmerge.errors import CfmergeError
from cfmerge.formats.base import Folder
from cfmerge.formats.containers import directory_format
from cfmerge.formats.magic import CONVERT, is_lfs_pointer, lfs_advice, wrong_file
from cfmerge.formats.side_files import COPY_FOLDERS, TENSORS, TRAINING_FOLDERS, is_training


class Files(NamedTuple):
    """A format's files in a model's folder: their suffixes, and the stems that clients look for, in their order."""

    format: str
    suffixes: tuple[str, ...]
    stems: tuple[str, ...]

    def there(self, folder: Path) -> list[Path]:
        return sorted(path for path in folder.iterdir() if path.suffix in self.suffixes and not path.is_dir())

    def indices(self, folder: Path) -> list[Path]:
        names = (path for suffix in self.suffixes for path in folder.glob(f"*{suffix}.index*.json"))
        return sorted(names)


KINDS = (  # the first whose files are there is read
    Files("safetensors", (".safetensors",), ("model", "diffusion_pytorch_model")),
    Files(
        "torch",
        (".bin", ".pt", ".pth", ".ckpt"),
        ("pytorch_model", "diffusion_pytorch_model", "open_clip_pytorch_model", "model"),
    ),
    Files("msgpack", (".msgpack",), ("flax_model", "diffusion_flax_model")),
    Files("npz", (".npz",), ("model",)),
)
INDEX = "model.safetensors.index.json"
# files of tensors that lie beside a model's weights, and are not they
ADAPTERS = ("adapter_model*", "pytorch_lora_weights*", "adapter.*")
OTHERS = (
    *ADAPTERS,
    "consolidated*",
    "optimizer*",
    "optim_states*",
    "training_*",
    "random_states*",
    "rng_state*",
    "scheduler*",
    "scaler*",
    "*_optim_states*",
)


@dataclasses.dataclass(frozen=True)
class Weights:
    """The weights in one folder.

    Attributes:
        where: the index, `{tensor: file}`; {} without one.
        stem, suffix: the first part of their names, and the last.
        ignored: files of tensors of the same format that are not read.
    """

    files: list[Path]
    index: Path | None
    where: Mapping[str, str]
    stem: str
    ignored: list[Path]
    suffix: str = ".safetensors"
    known: bool = False  # clients look for an index of this stem

    def folder(self, prefix: str, name: str) -> Folder:
        plain, _, variant = self.stem.partition(".")
        index = f"{plain}{self.suffix}.index.{variant}.json" if variant else f"{plain}{self.suffix}.index.json"
        sharded = self.index is not None or self.known
        return Folder(prefix, name, self.stem, self.index.name if self.index else index, sharded, suffix=self.suffix)


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


def find_weights(folder: Path) -> Weights | None:
    """The files of tensors in one folder, of the first format that it has; None if it has none.

    Raises:
        CfmergeError: several without an index, shards that are missing, or links to nothing.
    """
    for files in KINDS:
        _check_links(folder, files.suffixes)
        there, indices = files.there(folder), files.indices(folder)
        chosen = _first_known(folder, files, indices, there) or _first_other(folder, files, indices, there)
        if chosen:
            pickled = files.format == "torch"
            ignored = [path for path in there if path not in chosen.files and (not pickled or not is_training(path))]
            known = chosen.stem.partition(".")[0] in files.stems
            return dataclasses.replace(chosen, ignored=ignored, known=known)
    return None


def _check_links(folder: Path, suffixes: tuple[str, ...]) -> None:
    for path in folder.iterdir():
        weights = (
            (path.suffix in suffixes and not is_training(path) and not _is_other(path))
            or path.name.endswith(".index.json")
            or path.name == "config.json"
        )
        if weights and path.is_symlink() and not path.exists():
            raise CfmergeError(
                f"{path}: is a link to {os.readlink(path)}, which is not there: the download is not complete, or its "
                "cache was cleaned; fetch the model again"
            )


def _first_known(folder: Path, files: Files, indices: list[Path], there: list[Path]) -> Weights | None:
    """The weights of the first stem that clients know: its index, else its one file."""
    for stem in files.stems:
        index = next((path for path in indices if _stem(path) == stem), None)
        single = next((path for path in there if path.stem == stem), None)
        if index:
            return _of_index(folder, index, single)
        if single:
            return Weights([single], None, {}, stem, [], single.suffix)
    return None


def _first_other(folder: Path, files: Files, indices: list[Path], there: list[Path]) -> Weights | None:
    """The weights where no stem is known: the one index, not of a variant such as fp16 if it can be; else one file."""
    plain = [path for path in indices if "." not in _stem(path)] or indices
    if len(plain) > 1:
        raise CfmergeError(
            f"{folder}: {len(plain)} indices of weights: {', '.join(path.name for path in plain)}; leave one of them"
        )
    if plain:
        single = next((path for path in there if path.stem == _stem(plain[0])), None)
        return _of_index(folder, plain[0], single)
    only = _only(folder, files, there)
    return Weights([only], None, {}, only.stem, [], only.suffix) if only else None


def _stem(index: Path) -> str:
    """`model.fp16` of `model.safetensors.index.fp16.json` (or of `model.fp16.safetensors.index.json`)."""
    before, _, after = _parts(index)
    variant = after.removesuffix("json").strip(".")
    return f"{before}.{variant}" if variant else before


def _parts(index: Path) -> tuple[str, str, str]:
    """The stem, the suffix of the shards, and the rest of an index's name."""
    before, _, after = index.name.partition(".index")
    stem = Path(before)
    return stem.stem, stem.suffix, after


def _of_index(folder: Path, index: Path, single: Path | None) -> Weights:
    where = weight_map(index)
    names = sorted(set(where.values()))
    for name in names:
        if Path(name).name != name or name in {"", ".", ".."}:
            raise CfmergeError(
                f"{index}: points to {name!r}, outside its own directory; refusing to read it. Move the shards beside "
                "the index, and name them in it without a folder"
            )
    missing = [name for name in names if not (folder / name).is_file()]
    if single and missing == names:  # the index of shards that were joined
        return Weights([single], None, {}, single.stem, [], single.suffix)
    if missing:
        raise CfmergeError(f"{folder}: shard {missing[0]} of {index.name} is missing; fetch it again")
    return Weights([folder / name for name in names], index, where, _stem(index), [], _parts(index)[1])


def _is_other(path: Path) -> bool:
    return any(fnmatch.fnmatchcase(path.name, other) for other in OTHERS)


def _only(folder: Path, files: Files, there: list[Path]) -> Path | None:
    """The one file that can be the model's, where none has a known name."""
    models = [path for path in there if not _is_other(path)]
    plain = [path for path in models if "." not in path.stem]
    pieces = [path for path in there if path.name.startswith("consolidated")]
    if not models:
        models = pieces
    if len(pieces) > 1 and models == pieces and files.format == "torch":
        raise CfmergeError(
            f"{folder}: {', '.join(path.name for path in pieces[:2])}: pieces of a model in Meta's own format, cut for "
            "several devices; take its Hugging Face one"
        )
    if len(models) > 1 and len(plain) == 1:  # the others are its variants: fp16, ...
        models = plain
    if len(models) > 1:
        raise CfmergeError(
            f"{folder}: {len(models)} {'safetensors' if files.format == 'safetensors' else files.format} files and no "
            f"{files.stems[0]}{files.suffixes[0]}.index.json: {', '.join(file.name for file in models[:4])}; "
            "name one file, or restore the index"
        )
    return models[0] if models else None


def weight_map(index: Path) -> dict[str, str]:
    """`{tensor: file}` of an index; whatever else it holds."""
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
        raise CfmergeError(f"{index}: has no valid 'weight_map' {{tensor: file}}; fetch it again")
    return found


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} where there is no file."""
    if not path.is_file():
        return {}
    if is_lfs_pointer(path):
        raise CfmergeError(lfs_advice(path))
    try:
        content = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise CfmergeError(f"{path}: is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise CfmergeError(f"{path}: should hold a JSON object, found {type(content).__name__}")
    return content


# --- components in folders ---------------------------------------------------------------------------------------


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
    """Folders below the directory, at any depth, that hold safetensors: `{folder: weights}`, in order.

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
