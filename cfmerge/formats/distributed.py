"""PyTorch's distributed checkpoints (FSDP, torchtitan, NeMo, Megatron): `.metadata` beside `__RANK_N.distcp` files.

A tensor is one chunk or several, each a whole file of `torch.save` at a place in one of the files. Chunks are mapped,
and a range reads those that it touches.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from cfmerge.errors import CfmergeError, and_more
from cfmerge.formats.base import TensorInfo
from cfmerge.formats.boxes import Box, boxes_of, common
from cfmerge.formats.distributed_index import NAME, Chunk, Entry, Record, read_index
from cfmerge.formats.mapped import mapped
from cfmerge.formats.pickles import Call
from cfmerge.formats.safetensors import SafetensorsFile
from cfmerge.formats.torch_archives import AGAIN, OLD, ZIP, Archive, open_archive
from cfmerge.formats.torch_tensors import View, is_tensor, read, view_of

LATEST = "latest_checkpointed_iteration.txt"  # Megatron's, beside `iter_0000100/`
NO_PARAMETERS = re.compile(  # beginnings of names; whole names
    r"(\w+[./])?(optimizers?|optim)[./]|(opt|chained_\d+|chained_optim\w*|lr_schedulers?|schedulers?|opt_param_scheduler"
    r"|dataloaders?|data_loaders?|train_state|trainer|rng|rng_state|random_state|rerun_state_machine\w*|loops|callbacks"
    r"|grad_scaler|scaler)([./]|$)|(step|steps|global_step|iteration|epoch|epochs|args|content_metadata|num_\w*flop\w*"
    r"|checkpoint_version|hparams|hyper_parameters|pytorch-lightning_version)$"
)
FUSED = re.compile(r"linear_(qkv|fc1)\.weight$")


class DistributedCheckpoint:
    """A directory of chunks. Its index is checked when it is opened; chunks are views of mapped files.

    Args:
        path: the directory, or one whose `latest_checkpointed_iteration.txt` names it.
        select: only tensors whose names begin with this; "": all that are parameters.

    Attributes:
        opaque: `{name: record}`: objects that are no tensors (`_extra_state`); `content` has their bytes.
        paths: `{name: keys}` in the nested dictionary that was saved.
        side_files: Megatron's further files, by name.

    Raises:
        CfmergeError: it is corrupt, chunks are missing or overlap, or it is of a kind that is not read.
    """

    path: Path
    files: tuple[Path, ...]
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    notes: tuple[str, ...]
    ties: Mapping[str, str] = {}

    def __init__(self, path: Path, select: str = ""):
        self.path = path
        self._root = checkpoint_directory(path)
        index = read_index(self._root)
        names = [*index.tensors, *index.opaque]
        taken = {name for name in names if (name.startswith(select) if select else not NO_PARAMETERS.match(name))}
        if not taken & index.tensors.keys():
            asked = f"begins with {select!r}" if select else "is a parameter"
            raise CfmergeError(f"{path}: holds no tensor whose name {asked}; there is: {_told(names)}")
        self._entries = {name: entry for name, entry in index.tensors.items() if name in taken}
        self.opaque = {name: record for name, record in index.opaque.items() if name in taken}
        self.paths = {name: keys for name, keys in index.paths.items() if name in taken}
        self._maps: dict[str, memoryview] = {}
        self._views: dict[Record, tuple[Archive, View]] = {}
        self._plain = _files_in_safetensors(self._root, self._entries, self.opaque)
        files = {chunk.record.file for entry in self._entries.values() for chunk in entry.chunks}
        self.files = tuple(self._root / file for file in sorted(files))
        self.tensors = {
            name: TensorInfo(
                entry.shape, entry.dtype, self._root / (entry.chunks[0].record.file if entry.chunks else NAME)
            )
            for name, entry in self._entries.items()
        }
        self.metadata = {}
        beside = [self._root / name for name in ("common.pt", "metadata.json")]
        self.side_files = {file.name: file for file in beside if file.is_file()}
        self.notes = self._notes([name for name in names if name not in taken], select)

    def _notes(self, left_out: list[str], select: str) -> tuple[str, ...]:
        notes = []
        if left_out:
            why = f"do not begin with {select!r}" if select else "are no parameters"
            notes.append(f"{self.path.name}: entries that {why} are left out: {_told(left_out)}")
        if self.opaque:
            notes.append(
                f"{self.path.name}: objects that are no tensors are not merged, only copied from the base: "
                f"{and_more(list(self.opaque))}"
            )
        fused = [name for name in self.tensors if FUSED.search(name)]
        if fused:
            notes.append(
                f"{self.path.name}: {len(fused)} tensors are fused projections of Megatron's (such as {fused[0]}): "
                "a method that solves matrices takes each as one, so it merges them otherwise than split checkpoints"
            )
        return tuple(notes)

    def grain(self, name: str) -> int:
        return 1

    def read(self, name: str, first: int = 0, count: int | None = None) -> np.ndarray:
        """The tensor; with `count`, so many entries of the flat tensor from `first` on. Only their chunks are read."""
        entry, size = self._entries[name], self.tensors[name].size
        if not 0 <= first <= first + (count or 0) <= size:
            raise IndexError(f"tensor {name!r} has {size} entries: there are no {count} from {first} on")
        if len(entry.chunks) == 1:
            return self._chunk(name, entry.chunks[0], first, count)
        flat = np.empty(size if count is None else count, entry.dtype)
        filled = 0
        for box in boxes_of(entry.shape, first, flat.size):
            self._fill(flat[filled : filled + box.size].reshape(box.shape), box, name, entry.chunks)
            filled += box.size
        flat.flags.writeable = False
        return flat.reshape(entry.shape) if count is None else flat

    def _fill(self, target: np.ndarray, box: Box, name: str, chunks: tuple[Chunk, ...]) -> None:
        for chunk in chunks:
            both = common(box, chunk.box)
            if both is not None:
                content = self._chunk(name, chunk)
                target[both.within(box.start)] = content[both.within(chunk.box.start)]

    def content(self, name: str) -> bytes:
        """The bytes of an object that is no tensor."""
        record = self.opaque[name]
        return bytes(self._map(record.file)[record.offset : record.offset + record.length])

    def _map(self, file: str) -> memoryview:
        if file not in self._maps:
            self._maps[file] = mapped(self._root / file)
        return self._maps[file]

    def _chunk(self, name: str, chunk: Chunk, first: int = 0, count: int | None = None) -> np.ndarray:
        record = chunk.record
        where = f"{self._root / record.file}: tensor {name!r}, chunk at {chunk.box.start}"
        if record.file in self._plain:
            return self._plain[record.file].read(name, first, count)
        if record not in self._views:
            self._views[record] = self._open(name, chunk, where)
        archive, view = self._views[record]
        view.storage.check(archive.content, where)
        return read(view, archive.content, first, count)

    def _open(self, name: str, chunk: Chunk, where: str) -> tuple[Archive, View]:
        record = chunk.record
        archive = open_archive(self._map(record.file)[record.offset : record.offset + record.length], where)
        if not isinstance(archive.pickle.value, Call) or not is_tensor(archive.pickle.value):
            raise CfmergeError(f"{where} is no tensor; {AGAIN}")
        view = view_of(archive.pickle.value, archive, where)
        expected = (chunk.box.shape, self._entries[name].dtype)
        if (view.shape, view.dtype) != expected:
            raise CfmergeError(
                f"{where} has shape {view.shape} and dtype {view.dtype}, {NAME} says {expected[0]} and {expected[1]}; "
                f"the files are of several checkpoints, or corrupt: {AGAIN}"
            )
        return archive, view


def checkpoint_directory(path: Path) -> Path:
    """The directory with the `.metadata`: this one, or the newest of Megatron's iterations in it.

    Raises:
        CfmergeError: there is none, or it is of another kind of Megatron's checkpoints.
    """
    if (path / LATEST).is_file() and not (path / NAME).is_file():
        told = (path / LATEST).read_text(errors="replace").strip()
        if not re.fullmatch(r"\d{1,18}|release", told):
            raise CfmergeError(f"{path / LATEST}: names no iteration, but {told[:40]!r}")
        path = path / (told if told == "release" else f"iter_{int(told):07d}")
    described = path / "metadata.json"
    if described.is_file():
        try:
            backend = json.loads(described.read_text()).get("sharded_backend")
        except (OSError, ValueError, AttributeError, RecursionError):
            raise CfmergeError(f"{described}: is not JSON with the key 'sharded_backend'; {AGAIN}") from None
        if backend not in ("torch_dist", None):
            raise CfmergeError(
                f"{path}: is a checkpoint of Megatron's backend {str(backend)[:40]!r}, cfmerge reads 'torch_dist'; "
                "save it with --dist-ckpt-format torch_dist"
            )
    if not (path / NAME).is_file():
        raise CfmergeError(f"{path}: has no {NAME}; it is no distributed checkpoint, or was not written to its end")
    return path


def _files_in_safetensors(
    root: Path, entries: Mapping[str, Entry], opaque: Mapping[str, Record]
) -> dict[str, SafetensorsFile]:
    """The files that are not records one behind another, but one safetensors file each.

    Raises:
        CfmergeError: a file is missing or too short, or records overlap.
    """
    by_file: dict[str, list[tuple[Record, str, Chunk | None]]] = {}
    for name, entry in entries.items():
        for chunk in entry.chunks:
            by_file.setdefault(chunk.record.file, []).append((chunk.record, name, chunk))
    for name, record in opaque.items():
        by_file.setdefault(record.file, []).append((record, name, None))
    plain = {}
    for file, held in by_file.items():
        path, name = root / file, held[0][1]
        if not path.is_file():
            raise CfmergeError(f"{path}: is not there, and {name!r} and {len(held) - 1} more lie in it; fetch it")
        size = path.stat().st_size
        with path.open("rb") as content:
            content.seek(held[0][0].offset)
            start = content.read(len(OLD))
        if held[0][2] is not None and not start.startswith(ZIP) and start != OLD:
            plain[file] = _checked(SafetensorsFile(path), held)
            continue
        end = 0
        for record, name, own in sorted(held, key=lambda one: one[0].offset):
            least = 0 if own is None else own.box.size * entries[name].dtype.itemsize
            if record.offset < end or record.offset + record.length > size or record.length < least:
                raise CfmergeError(
                    f"{path}: {name!r} is to lie in {record.length} bytes from {record.offset} on, which overlap "
                    f"others, are too few, or go beyond the file's {size}; it is truncated or corrupt, {AGAIN}"
                )
            end = record.offset + record.length
    return plain


def _checked(file: SafetensorsFile, held: list[tuple[Record, str, Chunk | None]]) -> SafetensorsFile:
    for _, name, chunk in held:
        found = file.tensors[name].shape if name in file.tensors else None
        if chunk is None or found != chunk.box.shape:
            raise CfmergeError(
                f"{file.path}: tensor {name!r} has shape {found}, expected {chunk and chunk.box.shape}: files in "
                "safetensors form are read where each holds one chunk of a tensor and no objects; save it with "
                "SerializationFormat.TORCH_SAVE"
            )
    return file


def _told(names: list[str]) -> str:
    """Names as their beginnings, with counts."""
    counts = Counter(re.match(r"[^./]*[./]?", name).group() for name in names)  # type: ignore[union-attr]
    told = [f"{name}* ({count})" if name[-1:] in ("/", ".") else name for name, count in counts.most_common(6)]
    return ", ".join(told) + (f" and {len(counts) - 6} more" if len(counts) > 6 else "")
