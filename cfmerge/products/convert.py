"""`convert`: the same tensors in another format, or under the names that another library gives them."""

import collections
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from cfmerge.errors import CfmergeError, nearest
from cfmerge.formats import DirectorySink, Folder, Source, Totals, open_checkpoint, open_sink
from cfmerge.formats.containers import FORMATS
from cfmerge.formats.naming import format_by_name, in_format
from cfmerge.formats.side_files import check_whole
from cfmerge.formats.sinks import total_bytes
from cfmerge.models.names import FAMILIES, Move, Translation, family_of, sizes_of, translate, unchanged
from cfmerge.recipe import parse_size

AT_ONCE = 64_000_000  # bytes that are read, and written, in one piece
WAITING = 2 * AT_ONCE  # bytes that are read and not yet written
PAGE = 4096
COLUMNS = 32  # that are transposed at once
Progress = Callable[[str, int], None]


@dataclasses.dataclass(frozen=True)
class Converted:
    """A converted model.

    Attributes:
        output: the directory or the file.
        tensors: `{name: (shape, dtype)}` in it.
        notes: notes for the user.
        seconds: how long it took.
    """

    output: Path
    tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]]
    notes: tuple[str, ...]
    seconds: float

    @property
    def bytes(self) -> int:
        return total_bytes(self.tensors)


def convert(
    source: str | Path | Source,
    output: str | Path,
    *,
    format: str | None = None,
    names: str | None = None,
    config: str | Path | None = None,
    shard_size: str = "5GB",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Converted:
    """A model in another format, bit for bit, and if wanted under another library's names.

        >>> done = cfmerge.convert("base", "again")
        >>> done.output.name, list(done.tensors)
        ('again', ['layer.bias', 'layer.weight'])

    No tensor is computed with: dtypes stay, and names change by renaming, transposing, reshaping, stacking and
    splitting alone. So the way back gives the same bytes.

    Args:
        source: a directory, a file, or an open source.
        output: the directory to make, or the file. It appears when it is complete.
        format: `"safetensors"`, `"torch"`, `"msgpack"`, `"npz"`, ...; None: as the output's name says, else the
            source's, or with `names` the usual one on the other side.
        names: a family whose names are changed: Hugging Face's into the other's where the source has Hugging Face's,
            and back where it has the other's; see docs/convert.md.
        config: the model's config.json, where it is not beside the source.
        shard_size: the largest file.
        overwrite: replace a model that is there.
        progress: called with (tensor name, bytes).

    Raises:
        CfmergeError: bad input, a name without a rule, or a shape that does not fit; nothing is written then.
    """
    output = Path(output)
    if format not in {None, *FORMATS}:
        raise CfmergeError(f"unknown format {format!r}{nearest(str(format), FORMATS)}")
    opened = open_checkpoint(source) if isinstance(source, str | Path) else source
    check_whole(opened.side_files)
    made = _translated(opened, names, config)
    single = format_by_name(output, format)
    wanted = single or format or (_usual(opened, names, made.forward) if names else None)
    how: Any = {"shard_size": shard_size, "overwrite": overwrite, "progress": progress}
    return copied(opened, output, made, _folders(opened, made, names, wanted), wanted, _side_files(opened), **how)


def copied(
    source: Source,
    output: Path,
    made: Translation,
    folders: Sequence[Folder],
    format: str | None,
    side_files: Mapping[str, Path],
    *,
    edits: Mapping[str, Mapping[str, Any]] | None = None,
    card: str = "",
    inputs: Sequence[Path] = (),
    shard_size: str = "5GB",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Converted:
    """A source's tensors in files, whole or not at all.

    Args:
        made: the tensors of the output, and how each is made.
        folders: how its files lie.
        side_files, edits: see `DirectorySink`.
        card: the text of README.md.
        inputs: what is read beside the source, and so not written into.
    """
    started = time.monotonic()
    with open_sink(
        output, folders, shard_bytes=parse_size(shard_size), side_files=side_files, edits=edits or {}, format=format,
        overwrite=overwrite, inputs=[*source.files, source.path, *inputs],
    ) as sink:  # fmt: skip
        sink.declare(made.headers)
        _copy(source, made, sink, progress or (lambda name, count: None))
        sink.finish(Totals(card))
        sink.commit()
        notes = (*source.notes, *source.left_out, *made.notes, *sink.notes)
        return Converted(sink.target, made.headers, notes, time.monotonic() - started)


def _translated(source: Source, names: str | None, config: str | Path | None) -> Translation:
    """The tensors of the output, and how each is made."""
    headers = {name: (info.shape, info.dtype) for name, info in source.tensors.items()}
    if names is None:
        return unchanged(headers)
    family = family_of(names)
    content = source.config if config is None else _read(Path(config))
    again = functools.partial(_same_bytes, source)
    try:
        return translate(headers, family, sizes_of(family, content), again, FAMILIES)
    except CfmergeError as error:
        raise CfmergeError(f"{source.path}: {error}") from None


def _read(path: Path) -> Mapping[str, Any]:
    path = path / "config.json" if path.is_dir() else path
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CfmergeError(f"{path}: is no config.json that can be read: {error}") from None
    if not isinstance(found, dict):
        raise CfmergeError(f"{path}: should hold a JSON object, found {type(found).__name__}")
    return found


def _same_bytes(source: Source, alias: str) -> str | None:
    """The name that a tensor is tied to, where both are stored and are the same."""
    name = source.ties.get(alias)
    if name is None or name not in source.tensors or source.tensors[name].nbytes != source.tensors[alias].nbytes:
        return None
    here, there = (source.read(one).reshape(-1).view(np.uint8) for one in (alias, name))
    return name if np.array_equal(here, there) else None


def _usual(source: Source, names: str | None, forward: bool) -> str:
    """The format that the names on the other side usually come in, if it is written; else the source's."""
    usual = {"HF-Flax": "msgpack"}.get(family_of(str(names)).right) if forward else "safetensors"
    return usual if usual in FORMATS else source.folders[0].format


def _folders(source: Source, made: Translation, names: str | None, wanted: str | None) -> list[Folder]:
    """How the output's files lie: as the source's do; under other names no tie is told by the old ones."""
    folders = [in_format(folder, wanted) for folder in source.folders]
    if not names:
        return folders
    format = {"format": "flax" if made.forward else "pt"}
    return [
        dataclasses.replace(
            folder,
            ties={},
            metadata={key: value for key, value in folder.metadata.items() if value not in source.tensors} | format,
        )
        for folder in folders
    ]


def _side_files(source: Source) -> dict[str, Path]:
    """The files beside the weights, with the model's card, which a merge would replace by its own."""
    card = source.path / "README.md"
    return {**source.side_files, **({"README.md": card} if card.is_file() else {})}


def _copy(source: Source, made: Translation, sink: DirectorySink, progress: Progress) -> None:
    """Reads in this thread and writes in another, a bounded number of bytes behind."""
    waiting: collections.deque[tuple[Future[None], int]] = collections.deque()
    held = 0
    source.prepare()
    with ThreadPoolExecutor(1, "write") as writer:
        for move in made.moves:
            for values, first in _pieces(source, move):
                while waiting and held + values.nbytes > WAITING:
                    done, size = waiting.popleft()
                    done.result()
                    held -= size
                waiting.append((writer.submit(sink.write, move.target, values, first), values.nbytes))
                held += values.nbytes
                progress(move.target, values.nbytes)
        for done, _ in waiting:
            done.result()


def _pieces(source: Source, move: Move) -> Iterator[tuple[np.ndarray, int]]:
    """`(flat entries, where they begin in the target)` of a tensor, at most `AT_ONCE` bytes of it at a time."""
    info = source.tensors[move.source]
    count = info.size if move.entries is None else move.entries
    if move.how.in_order:
        grain = source.grain(move.source)
        step = max(AT_ONCE // info.dtype.itemsize // grain, 1) * grain
        for start in range(0, max(count, 1), step):
            values = source.read(move.source, move.first + start, min(step, count - start))
            yield _read_in(values), move.at + start
        return
    split, order = move.how.shortest
    turned = source.read(move.source, move.first, count).reshape(split).transpose(order)
    row = count // turned.shape[0]
    rows = max(AT_ONCE // info.dtype.itemsize // row, 1)
    for start in range(0, turned.shape[0], rows):
        yield _in_order(turned[start : start + rows]), move.at + start * row


def _in_order(turned: np.ndarray) -> np.ndarray:
    """The entries of a transposed array as one flat one, a few columns at a time: NumPy's own way misses the cache."""
    bits = turned.view(f"u{turned.itemsize}") if turned.itemsize in {1, 2, 4, 8} else turned
    made = np.empty(bits.shape, bits.dtype)
    for column in range(0, bits.shape[-1], COLUMNS):
        made[..., column : column + COLUMNS] = bits[..., column : column + COLUMNS]
    return made.view(turned.dtype).reshape(-1)


def _read_in(values: np.ndarray) -> np.ndarray:
    """The same values, read from the disk: of a mapped file, one byte a page is looked at."""
    if values.size:
        values.view(np.uint8)[::PAGE].max()
    return values
