"""Models as the Hugging Face hub holds them: a directory of safetensors and side files, or one file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cfmerge.errors import CfmergeError
from cfmerge.formats.base import TensorInfo
from cfmerge.formats.safetensors import SafetensorsFile
from cfmerge.models.ties import likely_ties

INDEX = "model.safetensors.index.json"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".gguf", ".onnx", ".npz")


class HuggingFaceCheckpoint:
    """A directory with `model.safetensors` or an index of shards, or a single `.safetensors` file."""

    def __init__(self, path: Path):
        self.path = path
        directory = path if path.is_dir() else None
        files = [path] if directory is None else find_weights(directory)
        self._files = [SafetensorsFile(file) for file in files]
        self._where: dict[str, SafetensorsFile] = {}
        for file in self._files:
            for name in file.tensors:
                if name in self._where:
                    raise CfmergeError(
                        f"{path}: tensor {name!r} is in both {self._where[name].path.name} and {file.path.name}"
                    )
                self._where[name] = file
        if directory is not None and (directory / INDEX).is_file():
            self._check_index(directory / INDEX)
        self.files = tuple(files)
        self.tensors: Mapping[str, TensorInfo] = {name: file.tensors[name] for name, file in self._where.items()}
        self.config: Mapping[str, Any] = _read_json(directory / "config.json") if directory else {}
        self.side_files: Mapping[str, Path] = side_files(directory) if directory else {}
        self.metadata: Mapping[str, str] = self._files[0].metadata if self._files else {}
        self.ties: Mapping[str, str] = self._find_ties()
        if not self.tensors:
            raise CfmergeError(f"{path}: holds no tensors")

    def read(self, name: str) -> np.ndarray:
        return self._where[name].read(name)

    def _check_index(self, index: Path) -> None:
        listed = _weight_map(index)
        for name, file in listed.items():
            if name not in self._where or self._where[name].path.name != Path(file).name:
                raise CfmergeError(f"{index}: tensor {name!r} should be in {file}, and is not; fetch it again")
        unlisted = sorted(set(self._where) - set(listed))
        if unlisted:
            raise CfmergeError(
                f"{index}: does not list {len(unlisted)} tensors of its shards, such as {unlisted[0]!r}; "
                "the index is of another version of the model, fetch it again"
            )

    def _find_ties(self) -> dict[str, str]:
        """Aliases, stored or not, of tensors that are stored."""
        return likely_ties(self._where, self.config, self.metadata)


def find_weights(directory: Path) -> list[Path]:
    """The safetensors files of a model directory.

    Raises:
        CfmergeError: none (says what is there instead), several without an index, or an index that points
            outside the directory.
    """
    index = directory / INDEX
    if index.is_file():
        names = sorted(set(_weight_map(index).values()))
        for name in names:
            if Path(name).name != name or name in {"", ".", ".."}:
                raise CfmergeError(f"{index}: points to {name!r}, outside its own directory; refusing to read it")
            if not (directory / name).is_file():
                raise CfmergeError(f"{directory}: shard {name} of {index.name} is missing; fetch it again")
        return [directory / name for name in names]
    if (directory / "model.safetensors").is_file():
        return [directory / "model.safetensors"]
    if (directory / "adapter_config.json").is_file():
        raise CfmergeError(
            f"{directory}: holds an adapter (LoRA), not a model; adapters are not read yet. Merge it into its "
            "base first: peft's model.merge_and_unload().save_pretrained(...)"
        )
    found = sorted(directory.glob("*.safetensors"))
    if len(found) == 1:
        return found
    if found:
        raise CfmergeError(
            f"{directory}: {len(found)} safetensors files and no {INDEX}: "
            f"{', '.join(file.name for file in found[:4])}; name one file, or restore the index"
        )
    others = sorted(file.name for file in directory.iterdir() if file.suffix in WEIGHTS)
    raise CfmergeError(
        f"{directory}: no safetensors here"
        + (
            f", but {', '.join(others[:4])}; convert it with transformers: "
            "AutoModel.from_pretrained(dir).save_pretrained(out, safe_serialization=True)"
            if others
            else "; a model directory holds model.safetensors, or shards and " + INDEX
        )
    )


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CfmergeError(f"{index}: has no valid 'weight_map' {{tensor: file}}; fetch it again")
    return weight_map


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise CfmergeError(f"{path}: is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise CfmergeError(f"{path}: should hold a JSON object, found {type(content).__name__}")
    return content


def side_files(directory: Path) -> dict[str, Path]:
    """All that a model needs besides weights (config, tokenizer, code, licence), two levels deep at most."""
    skipped = {"README.md", ".gitattributes", INDEX, "training_args.bin"}
    files = {}
    for file in sorted((*directory.glob("*"), *directory.glob("*/*"))):
        name = file.relative_to(directory).as_posix()
        hidden = any(part.startswith((".", "checkpoint-")) for part in Path(name).parts)
        weights = file.suffix in WEIGHTS or name.endswith(".index.json")
        if file.is_file() and not hidden and not weights and name not in skipped:
            files[name] = file
    return files
