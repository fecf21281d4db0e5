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
from cfmerge.formats.magic import CONVERT, is_lfs_pointer, lfs_advice, wrong_file
from cfmerge.formats.side_files import COPY_FOLDERS, TENSORS, TRAINING_FOLDERS

INDEX = "model.safetensors.index.json"
STEMS = ("model", "diffusion_pytorch_model")  # clients look for an index of these too; the first that is there is read
# safetensors that lie beside a model's weights, and are not they
OTHERS = ("consolidated*", "adapter_model*", "optimizer*", "pytorch_lora_weights*", "training_*", "random_states*")


@dataclasses.dataclass(frozen=True)
class Weights:
    """The weights in one folder: `where` is the index, {} without one; `ignored` are safetensors that are not read."""

    files: list[Path]
    index: Path | None
    where: Mapping[str, str]
    stem: str
    ignored: list[Path]

    def folder(self, prefix: str, name: str) -> Folder:
        plain, _, variant = self.stem.partition(".")
        index = f"{plain}.safetensors.index.{variant}.json" if variant else f"{plain}.safetensors.index.json"
        sharded = self.index is not None or plain in STEMS
        return Folder(prefix, name, self.stem, self.index.name if self.index else index, sharded)


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
    root = find_weights(directory)
    declared = any((directory / name).is_file() for name in ("modules.json", "model_index.json"))
    folders = {} if root is None and not declared else _folders(directory, declared)
    if root is None and not folders:
        raise CfmergeError(_nothing(directory))
    components = [Component("", "", root)] if root else []
    modules = [folder for folder in _modules(directory) if folder in folders]
    if root is None and modules:  # the first module is the transformer, which has plain names wherever it lies
        components.append(Component("", modules[0], folders.pop(modules[0])))
    return components + [Component(f"{folder}/", folder, found, declared) for folder, found in folders.items()]


def find_weights(folder: Path) -> Weights | None:
    """The safetensors of one folder; None if it has none.

    Raises:
        CfmergeError: several without an index, shards that are missing, or links to nothing.
    """
    there = sorted(folder.glob("*.safetensors"))
    indices = sorted(folder.glob("*.safetensors.index*.json"))
    for path in (*there, *indices, folder / "config.json"):
        if path.is_symlink() and not path.exists():
            raise CfmergeError(
                f"{path}: is a link to {os.readlink(path)}, which is not there: the download is not complete, or its "
                "cache was cleaned; fetch the model again"
            )
    chosen = _first_known(folder, indices, there) or _first_other(folder, indices, there)
    return chosen and dataclasses.replace(chosen, ignored=[path for path in there if path not in chosen.files])


def _first_known(folder: Path, indices: list[Path], there: list[Path]) -> Weights | None:
    """The weights of the first stem that clients know: its index, else its one file."""
    for stem in STEMS:
        index = next((path for path in indices if _stem(path) == stem), None)
        single = next((path for path in there if path.stem == stem), None)
        if index:
            return _of_index(folder, index, single)
        if single:
            return Weights([single], None, {}, stem, [])
    return None


def _first_other(folder: Path, indices: list[Path], there: list[Path]) -> Weights | None:
    """The weights where no stem is known: the one index, not of a variant such as fp16 if it can be; else one file."""
    plain = [path for path in indices if "." not in _stem(path)] or indices
    if len(plain) > 1:
        raise CfmergeError(
            f"{folder}: {len(plain)} indices of weights: {', '.join(path.name for path in plain)}; leave one of them"
        )
    if plain:
        single = next((path for path in there if path.stem == _stem(plain[0])), None)
        return _of_index(folder, plain[0], single)
    only = _only(folder, there)
    return Weights([only], None, {}, only.stem, []) if only else None


def _stem(index: Path) -> str:
    """`model.fp16` of `model.safetensors.index.fp16.json` (or of `model.fp16.safetensors.index.json`)."""
    before, _, after = index.name.partition(".safetensors.index")
    variant = after.removesuffix("json").strip(".")
    return f"{before}.{variant}" if variant else before


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
        return Weights([single], None, {}, single.stem, [])
    if missing:
        raise CfmergeError(f"{folder}: shard {missing[0]} of {index.name} is missing; fetch it again")
    return Weights([folder / name for name in names], index, where, _stem(index), [])


def _only(folder: Path, there: list[Path]) -> Path | None:
    """The one file that can be the model's, where none has a known name."""
    models = [path for path in there if not any(fnmatch.fnmatchcase(path.name, other) for other in OTHERS)]
    plain = [path for path in models if "." not in path.stem]
    if not models and (folder / "adapter_config.json").is_file():
        raise CfmergeError(
            f"{folder}: holds an adapter (LoRA), not a model; adapters are not read yet. Merge it into its "
            "base first: peft's model.merge_and_unload().save_pretrained(...)"
        )
    if not models and there:
        models = [path for path in there if path.name.startswith("consolidated")] or there
    if len(models) > 1 and len(plain) == 1:  # the others are its variants: fp16, ...
        models = plain
    if len(models) > 1:
        raise CfmergeError(
            f"{folder}: {len(models)} safetensors files and no {INDEX}: "
            f"{', '.join(file.name for file in models[:4])}; name one file, or restore the index"
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
        if weights and (declared or weights.index or weights.stem.partition(".")[0] in STEMS):
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
    """The message about a directory without safetensors: the files that are there instead, and the way out."""
    start = f"{directory}: no safetensors here"
    models = sorted(path.parent.name for path in directory.glob("*/*.safetensors"))
    others = sorted(file for file in directory.iterdir() if file.suffix in TENSORS)
    pieces = sorted(file.name for file in directory.glob("consolidated.*.pth"))
    if pieces:
        return (
            f"{start}, but {', '.join(pieces[:2])}: pieces of a model in Meta's own format; take its Hugging Face one"
        )
    if (directory / "zero_to_fp32.py").is_file():
        return f"{start}, but a DeepSpeed checkpoint; join it first: python {directory}/zero_to_fp32.py {directory} OUT"
    if others:
        return f"{start}, but {', '.join(file.name for file in others[:4])}. {_conversion(others)}"
    if models:
        return f"{start}, but in its folders {', '.join(list(dict.fromkeys(models))[:6])}; name the one that is meant"
    return f"{start}; a model directory holds model.safetensors, or shards and {INDEX}"


def _conversion(files: list[Path]) -> str:
    """How files of tensors in other formats become safetensors: told by the first bytes of one of them."""
    for file in files:
        with file.open("rb") as stream:
            told = wrong_file(file, stream.read(64), file.stat().st_size) or ""
        if "from_tf" in told or "gguf_file" in told or "LFS" in told:
            return told
    return f"Convert it with transformers: {CONVERT}"
