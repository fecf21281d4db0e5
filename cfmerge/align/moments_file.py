"""The file of joint moments: one of safetensors, which says what it holds."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from cfmerge.align.space_moments import SpaceMoments
from cfmerge.errors import CfmergeError, and_more
from cfmerge.formats import FileSink, Folder, Totals
from cfmerge.formats.safetensors import SafetensorsFile

HOLDS = "joint_moments"  # what the file says that it holds
PARTS = ("tokens", "mean", "covariance")  # of a space in the file


def write(path: Path, models: Sequence[str], spaces: Mapping[str, SpaceMoments], overwrite: bool) -> None:
    """Writes moments, whole or not at all; see `Moments.save`."""
    if path.suffix != ".safetensors" or not spaces:
        lack = "moments of no space" if path.suffix == ".safetensors" else "must be called .safetensors"
        raise CfmergeError(f"{path}: {lack}")
    arrays = {f"{space}:{part}": np.asarray(getattr(one, part)) for space, one in spaces.items() for part in PARTS}
    widths = {space: one.widths for space, one in spaces.items()}
    metadata = {"holds": HOLDS, "models": json.dumps(models), "widths": json.dumps(widths)}
    with FileSink(path, [Folder(stem=path.stem, sharded=False)], metadata=metadata, overwrite=overwrite) as sink:
        sink.declare({name: (array.shape, array.dtype) for name, array in arrays.items()})
        for name, array in arrays.items():
            sink.write(name, array)
        sink.finish(Totals())
        sink.commit()


def read(path: Path) -> tuple[list[str], dict[str, SpaceMoments]]:
    """The models of a file, and the moments of each space; see `Moments.load`."""
    file = SafetensorsFile(path)
    if file.metadata.get("holds") != HOLDS:
        raise CfmergeError(f"{path}: holds {_other(file)}")
    try:
        models = list(json.loads(file.metadata["models"]))
        widths = {space: tuple(map(int, own)) for space, own in json.loads(file.metadata["widths"]).items()}
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise CfmergeError(f"{path}: its metadata do not tell models and widths ({error}); save it again") from None
    return models, {space: _read(file, space, own, len(models)) for space, own in widths.items()}


def _other(file: SafetensorsFile) -> str:
    """What a file holds in place of joint moments, and the way out."""
    out = "collect joint moments by cfmerge.activations.collect_joint_linen or collect_joint_nnx, or by Moments.add"
    if file.metadata.get("holds") == "input_gram":
        return f"input Grams, each of one model, which do not say how the features of two models vary together; {out}"
    found = and_more([repr(name) for name in file.tensors]) if file.tensors else "nothing"
    return f"no joint moments, but {found}; {out}"


def _read(file: SafetensorsFile, space: str, widths: tuple[int, ...], models: int) -> SpaceMoments:
    """The moments of one space in a file."""
    where, size = f"{file.path}: space {space!r}", sum(widths)
    if len(widths) != models:
        raise CfmergeError(f"{where}: it has the widths of {len(widths)} models, and the file is of {models}")
    missing = [f"{space}:{part}" for part in PARTS if f"{space}:{part}" not in file.tensors]
    if missing:
        raise CfmergeError(f"{where}: tensor {and_more([repr(name) for name in missing])} is missing; save it again")
    for part, shape in zip(PARTS, ((), (size,), (size, size)), strict=True):
        found = file.tensors[f"{space}:{part}"].shape
        if found != shape:
            raise CfmergeError(
                f"{where}: {part} has shape {found}, expected {shape}: the widths {'+'.join(map(str, widths))} are "
                f"{size} features"
            )
    tokens, mean, covariance = (np.asarray(file.read(f"{space}:{part}"), np.float64) for part in PARTS)
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise CfmergeError(f"{where}: its moments hold a NaN or an infinity; collect them again")
    if tokens < 1 or (np.diagonal(covariance) < 0).any():
        raise CfmergeError(f"{where}: {int(tokens)} tokens, or a negative variance; the file is no moments' file")
    return SpaceMoments(int(tokens), mean, covariance, widths)
