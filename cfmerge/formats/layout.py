"""The files of one folder that hold a model's tensors: one file, or shards and an index, of the first format there."""

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
from cfmerge.formats.magic import is_lfs_pointer, lfs_advice
from cfmerge.formats.side_files import is_training


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
            f"{folder}: {len(models)} {files.format} files and no "
            f"{files.stems[0]}{files.suffixes[0]}.index.json: {', '.join(file.name for file in models[:4])}; "
            "name one file, or restore the index"
        )
    shard = re.search(r"-0*\d+-of-0*(\d+)$", models[0].stem) if models else None
    if shard and int(shard[1]) > 1:
        raise CfmergeError(
            f"{models[0]}: is one of {shard[1]} shards, and the others and their index are not there; fetch them, or "
            "name the file if it is all that you want"
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
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CfmergeError(f"{path}: is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise CfmergeError(f"{path}: should hold a JSON object, found {type(content).__name__}")
    return content
