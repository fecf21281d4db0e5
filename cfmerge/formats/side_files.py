"""The files that an output has besides weights: config, tokenizer, code, licence, small tensors of other libraries.

Everything that lies beside the base's weights is carried, at any depth, but for copies of the weights in other formats
(in the output they would be the base's old ones), leftovers of a training run, and hidden files.
"""

import fnmatch
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from cfmerge.errors import CfmergeError, and_more
from cfmerge.formats.containers import directory_format
from cfmerge.formats.magic import is_lfs_pointer, lfs_advice

TENSORS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".gguf", ".onnx", ".npz", ".ot")
# the weights in other formats, as libraries and converters name them; a folder's name stands for all in it
COPIES = (
    "*.safetensors",
    "*.gguf",
    "*.ggml",
    "*.onnx",
    "*.onnx_data",
    "*.onnx.data",
    "*.tflite",
    "*.mlmodel",
    "*.keras",
    "*.nemo",
    "*.llamafile",
    "*.distcp",
    "saved_model.pb",
    "openvino_model.*",
    "pytorch_lora_weights.*",
    "adapter_model.*",
)
COPIES_BESIDE = (  # such files of tensors, where they lie beside weights that are read
    "*.h5",
    "*.msgpack",
    "*.ot",
    "*.ckpt",
    "pytorch_model*",
    "diffusion_pytorch_model*",
    "open_clip_pytorch_model*",
    "model*",
    "consolidated*",
    "ggml-*",
    "tf_model*",
    "flax_model*",
)
COPY_FOLDERS = ("onnx", "openvino", "coreml", "original", "gguf", "metal", "tflite", "saved_model", "*.mlpackage")
TRAINING = (
    "optimizer*",
    "scheduler.pt",
    "scheduler.bin",
    "scaler.pt",
    "rng_state*",
    "random_states*",
    "training_args.bin",
    "trainer_state.json",
    "events.out.tfevents*",
    "zero_to_fp32.py",
)
TRAINING_FOLDERS = (
    "checkpoint-*",
    "global_step*",
    "optimizer_*",
    "pytorch_model_fsdp_*",
    "runs",
    "wandb",
    "__pycache__",
)
REPLACED = {"README.md"}  # the output has its own
OF_CHECKPOINTS = re.compile(  # in directories of Orbax, torch.distributed and Megatron
    r"_.*|manifest\.ocdbt|ocdbt\.process_.*|commit_success\.txt|orbax\.checkpoint|array_metadatas|root_metadata|d|state"
    r"|descriptor|metrics|(\w+_)?\d+|.*\.(orbax-checkpoint-tmp|partial_save).*|latest_checkpointed_iteration\.txt"
)
LARGE = 64_000_000  # bytes: a file of tensors beside the weights that is larger, and no small part of them, is a copy


class Beside(NamedTuple):
    """`files` are carried, `{name in the directory: path}`; `tensors` of them hold tensors that are not merged."""

    files: dict[str, Path]
    tensors: list[str]
    copies: list[str]  # left out: the base's weights once more
    training: list[str]  # left out: leftovers of a training run
    missing: list[str]  # left out: links to nothing


def look_beside(
    directory: Path, weights: Iterable[Path] = (), ignored: Iterable[Path] = (), apart: Iterable[Path] = ()
) -> Beside:
    """Everything in a model's directory that is not one of its files of weights, sorted by what becomes of it.

    Args:
        directory: the model's.
        weights: the files that are read.
        ignored: files that were told of already.
        apart: folders that hold the model once more.
    """
    own = set(weights)
    found = Beside({}, [], [], [], [])
    for file in _walk(directory, set(apart), found):
        name = file.relative_to(directory).as_posix()
        if file in own or file in ignored or name in REPLACED:
            continue
        if file.is_symlink() and not file.exists():
            found.missing.append(name)
        elif is_training(file):
            found.training.append(name)
        elif _is_copy(file, own, {directory, *(path.parent for path in own)}) or is_index(file):
            found.copies.append(name)
        else:
            found.files[name] = file
            if file.suffix in TENSORS:
                found.tensors.append(name)
    return found


def look_around(directory: Path, weights: Iterable[Path]) -> dict[str, Path]:
    """The files beside the weights of a checkpoint that is the directory as a whole, `{name in the directory: path}`.

    What lies in a folder of the checkpoint, or of an older one, is the checkpoint's.
    """
    weights = list(weights)
    own = {file.relative_to(directory).parts[0] for file in weights if directory in file.parents}

    def beside(name: str) -> bool:
        first = name.partition("/")[0]
        return first not in own and not OF_CHECKPOINTS.fullmatch(first)

    return {name: file for name, file in look_beside(directory, weights).files.items() if beside(name)}


def _walk(directory: Path, apart: set[Path], found: Beside) -> Iterable[Path]:
    """Files at any depth, in order; folders that are left out as a whole are noted as `NAME/`."""
    for place, folders, files in os.walk(directory):
        here, kept = Path(place), []
        for folder in sorted(folders):
            name = (here / folder).relative_to(directory).as_posix() + "/"
            if _matches(folder, TRAINING_FOLDERS):
                found.training.append(name)
            elif _matches(folder, COPY_FOLDERS) or here / folder in apart:
                found.copies.append(name)
            elif not folder.startswith("."):
                kept.append(folder)
        folders[:] = kept
        yield from (here / name for name in sorted(files) if not name.startswith("."))


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def is_training(file: Path) -> bool:
    """Whether a training run has left the file beside its model."""
    return _matches(file.name, TRAINING)


def _is_copy(file: Path, weights: set[Path], places: set[Path]) -> bool:
    """Whether a file holds the weights once more; outside the `places` with weights it may be all that there is."""
    if _matches(file.name, COPIES):
        return True
    if file.suffix not in TENSORS or file.parent not in places:
        return False
    large = file.stat().st_size > max(LARGE, sum(own.stat().st_size for own in weights) // 4)
    return large or _matches(file.name, COPIES_BESIDE)


def is_index(file: Path) -> bool:
    """Whether a JSON file is an index of weights, of whatever format."""
    if ".index." not in file.name or file.suffix != ".json":
        return False
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and "weight_map" in content


def side_files(directory: Path) -> Mapping[str, Path]:
    """The files that a directory gives to an output besides weights, `{name in the directory: path}`."""
    if directory_format(directory):
        return look_around(directory, directory.rglob("*.distcp"))
    return look_beside(directory, directory.rglob("*.safetensors")).files


def check_whole(files: Mapping[str, Path]) -> None:
    """Raises `CfmergeError` if one is a Git LFS pointer, so that an output would lack the file itself."""
    for file in files.values():
        if is_lfs_pointer(file):
            raise CfmergeError(lfs_advice(file))


def about(beside: Beside, path: Path) -> tuple[str, ...]:
    """Notes on files of the base's directory that the output lacks, or holds unmerged."""
    notes = []
    if beside.tensors:
        notes.append(
            f"{', '.join(beside.tensors[:6])}{_more(beside.tensors)}: copied from {path}, not merged, since they lie "
            "beside the model's weights; where the experts have others, copy the right ones into the output"
        )
    if beside.copies:
        notes.append(
            f"{', '.join(beside.copies[:6])}{_more(beside.copies)}: not in the output: the weights of {path} once "
            "more, or others that are not part of the model; convert the merged model anew where you need them"
        )
    if beside.training:
        notes.append(f"{and_more(beside.training)}: not in the output: a training run left it in {path}")
    if beside.missing:
        notes.append(
            f"{', '.join(beside.missing[:6])}{_more(beside.missing)}: not in the output: in {path} it is a link to a "
            "file that is not there; fetch the model again"
        )
    return tuple(notes)


def _more(names: list[str]) -> str:
    return f" and {len(names) - 6} more" if len(names) > 6 else ""
