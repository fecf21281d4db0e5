"""Files of a zip: its directory, written and read strictly, and a checkpoint where all is zipped."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cfmerge.align.groups import Groups
from cfmerge.align.trees import NESTED
from cfmerge.errors import CfmergeError, and_more
from cfmerge.formats import DirectorySink, Folder, Totals, open_checkpoint, open_sink
from cfmerge.formats.composed import ZIP as TABLE
from cfmerge.formats.layout import read_json
from cfmerge.formats.safetensors import SafetensorsFile
from cfmerge.formats.sinks import HEADS
from cfmerge.models.ties import likely_ties

if TYPE_CHECKING:
    from cfmerge.align.zipped import Zipped

TRUNK = "trunk"
KIND, VERSION = "cfmerge-zip", 1
FILE_NAME = re.compile(r"[^/\\\0.][^/\\\0]*")


def save(zipped: "Zipped", directory: Path, overwrite: bool = False) -> Path:
    """The directory, made whole or not at all; without `overwrite` nothing is replaced.

    Raises:
        CfmergeError: there is something (without `overwrite`), or a model's name cannot be a file's.
    """
    for name in zipped.models:
        if not FILE_NAME.fullmatch(name):
            raise CfmergeError(f"zip: model {name!r} cannot be a file's name; give models as {{name: model}}")
    trunk = {name: np.asarray(leaf) for name, leaf in zipped.trunk.items()}
    heads = [(model, {name: np.asarray(leaf) for name, leaf in own.items()}) for model, own in zipped.heads.items()]
    with DirectorySink(directory, [Folder(stem=TRUNK, sharded=False)], overwrite=overwrite) as sink:
        sink.declare({name: (array.shape, array.dtype) for name, array in trunk.items()})
        for name, array in trunk.items():
            sink.write(name, array)
        sink.finish(Totals(heads=[one for one in heads if one[1]], files={TABLE: _text(zipped)}))
        sink.commit()
    return sink.target


def _text(zipped: "Zipped") -> str:
    content = {
        "format": KIND,
        "version": VERSION,
        "models": list(zipped.models),
        "stop_at": list(zipped.stop_at),
        "nested": zipped.layout is not None,
        "spaces": dict(zipped.table),
        "sizes": dict(zipped.sizes),
        "heads": list(zipped.heads[zipped.models[0]]),
        "shapes": {
            "trunk": _shapes(zipped.trunk),
            "heads": {model: _shapes(own) for model, own in zipped.heads.items()},
        },
        "groups": {
            space: {"partition": groups.partition.tolist(), "widths": list(groups.widths), "bias": groups.bias}
            for space, groups in zipped.groups.items()
        },
        "blocks": [{name: order.tolist() for name, order in one.items()} for one in zipped.blocks],
        "notes": list(zipped.notes),
    }
    return json.dumps(content, indent=1) + "\n"


def _shapes(tensors: Mapping[str, Any]) -> dict[str, list[int]]:
    return {name: list(np.shape(leaf)) for name, leaf in sorted(tensors.items())}


def load(directory: Path) -> dict[str, Any]:
    """The fields of the `Zipped` that lies in a directory; its arrays are views of the mapped files.

    Raises:
        CfmergeError: there is none, its table is none, or its files are not whole.
    """
    table = directory / TABLE
    if not table.is_file():
        raise CfmergeError(f"{directory}: holds no zip: there is no {TABLE}")
    content = read_json(table)
    if content.get("format") != KIND or content.get("version") != VERSION:
        found = f"{content.get('format')!r}, version {content.get('version')!r}"
        raise CfmergeError(f"{table}: should be {KIND!r}, version {VERSION}; found {found}")
    try:
        fields: dict[str, Any] = {
            "models": _texts(content["models"]),
            "groups": {space: _groups(one) for space, one in content["groups"].items()},
            "blocks": tuple({n: np.array(order, np.intp) for n, order in one.items()} for one in content["blocks"]),
            "table": dict(zip(content["spaces"], _texts(content["spaces"].values()), strict=True)),
            "sizes": {space: int(size) for space, size in content["sizes"].items()},
            "stop_at": _texts(content["stop_at"]),
            "notes": _texts(content["notes"]),
            "layout": NESTED if content["nested"] else None,
        }
        own = _texts(content["heads"])
        if not fields["models"] or len(fields["blocks"]) != len(fields["models"]) or set(own) - set(fields["table"]):
            raise ValueError("models, blocks and heads do not fit together")
        trunk = [name for name in fields["table"] if name not in set(own)]
        shapes = content["shapes"]
        of_trunk = {name: list(shapes["trunk"].get(name, [])) for name in trunk}
        of_heads = {
            model: {name: list(shapes["heads"].get(model, {}).get(name, [])) for name in own}
            for model in fields["models"]
        }
        _check(fields)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CfmergeError(f"{table}: is not whole, or was changed: {type(error).__name__}: {error}") from None
    for model in fields["models"]:
        if not FILE_NAME.fullmatch(model):
            raise CfmergeError(f"{table}: model {model!r} cannot be a file's name")
    fields["trunk"] = _tensors(directory / f"{TRUNK}.safetensors", of_trunk, TABLE)
    fields["heads"] = {
        model: _tensors(directory / HEADS / f"{model}.safetensors", expected, TABLE) if expected else {}
        for model, expected in of_heads.items()
    }
    return fields


def _check(fields: Mapping[str, Any]) -> None:
    """Raises `ValueError` if the fields contradict each other."""
    models, sizes = fields["models"], fields["sizes"]
    if len(set(models)) < len(models):
        raise ValueError(f"a model is named twice: {', '.join(models)}")
    if unknown := [space for space in (*fields["stop_at"], *fields["groups"]) if space not in sizes]:
        raise ValueError(f"there is no space {unknown[0]!r}")
    for space, groups in fields["groups"].items():
        if len(groups.widths) != len(models) or groups.width != sizes[space]:
            raise ValueError(f"space {space!r} has {sizes[space]} features, and {groups.width} groups")


def _groups(told: Mapping[str, Any]) -> Groups:
    partition, widths = np.array(told["partition"], np.intp), tuple(map(int, told["widths"]))
    if partition.ndim != 1 or len(partition) != sum(widths) or partition.min() < -1:
        raise ValueError(f"a partition of {len(partition)} features, and widths {widths}")
    return Groups(partition, widths, float(told["bias"]))


def _texts(values: Any) -> tuple[str, ...]:
    found = () if isinstance(values, str) else tuple(values)
    if isinstance(values, str) or not all(isinstance(value, str) for value in found):
        raise ValueError(f"a list of names is expected, found {values!r}")
    return found


def _tensors(path: Path, shapes: Mapping[str, list[int]], table: str) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise CfmergeError(f"{path}: is not there, and {table} tells of its tensors: the zip is not whole")
    file = SafetensorsFile(path)
    if set(file.tensors) != set(shapes):
        lost, more = [n for n in shapes if n not in file.tensors], [n for n in file.tensors if n not in shapes]
        told = f"lacks {and_more(lost)}" if lost else f"has {and_more(more)} too"
        raise CfmergeError(f"{path}: {told}, not as {table} tells")
    for name, shape in shapes.items():
        if list(file.tensors[name].shape) != shape:
            found = file.tensors[name].shape
            raise CfmergeError(f"{path}: tensor {name!r} has shape {found}, in {table} {tuple(shape)}: it was changed")
    return {name: file.read(name) for name in shapes}


def write(tensors: Mapping[str, Any], output: Path, base: str | Path, overwrite: bool = False) -> Path:
    """A checkpoint of some tensors, which lies as its base does, with its side files; whole or not at all.

    Raises:
        CfmergeError: the tensors are not those of the base, in its shapes; or there is something (without `overwrite`).
    """
    source = open_checkpoint(base)
    missing = [name for name in source.tensors if name not in tensors]
    if missing or (set(tensors) - set(source.tensors)):
        more = [name for name in tensors if name not in source.tensors]
        told = f"has tensor {and_more(missing)}" if missing else f"has no tensor {and_more(more)}"
        raise CfmergeError(f"{source.path}: {told}, unlike the zip; give base= the files of a model that was zipped")
    for name, info in source.tensors.items():
        if info.shape != np.shape(tensors[name]):
            raise CfmergeError(
                f"{source.path}: tensor {name!r} has shape {info.shape}, in the zip {np.shape(tensors[name])}; zip to "
                "the model's own width, and give base= the model whose head is written"
            )
    for alias, name in likely_ties(source.tensors, source.config, {}).items():
        if alias in tensors and name in tensors and not _same(tensors, alias, name) and _same(source.read, alias, name):
            raise CfmergeError(
                f"{source.path}: {alias!r} is {name!r} there, and another tensor in the zip, which clients would not "
                "read; match by permutations (method='permute'), or untie the layers of the models"
            )
    with open_sink(
        output, source.folders, shard_bytes=5 * 10**9, side_files=source.side_files, edits={},
        inputs=[*source.files, source.path], overwrite=overwrite,
    ) as sink:  # fmt: skip
        sink.declare({name: (info.shape, tensors[name].dtype) for name, info in source.tensors.items()})
        for name in source.tensors:
            sink.write(name, np.asarray(tensors[name]))
        sink.finish(Totals())
        sink.commit()
        return sink.target


def _same(tensors: Mapping[str, Any] | Callable[[str], Any], one: str, other: str) -> bool:
    """Whether two tensors are equal."""
    read = tensors if callable(tensors) else tensors.__getitem__
    return np.array_equal(np.asarray(read(one)), np.asarray(read(other)))
