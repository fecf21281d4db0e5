"""Checkpoints of Orbax as an output: tensors go into a plain file first, in any order, and Orbax writes from there.

Orbax takes whole arrays, and does not go on with a checkpoint that was interrupted. So the file takes the pieces, from
several processes and over several runs; when all are there, Orbax saves some arrays at a time, mapped from the file.
Until the output gets its name, all of this lies in its staging directory.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from cfmerge.errors import CfmergeError, and_more
from cfmerge.formats import safetensors
from cfmerge.formats.base import Header, bytes_of
from cfmerge.formats.orbax import OrbaxCheckpoint
from cfmerge.formats.orbax_layout import CHECKPOINT, TREE, Keys, find_tree, mark_lists
from cfmerge.formats.ranges import Covered, Range
from cfmerge.formats.safetensors import SafetensorsFile
from cfmerge.formats.shards import ShardWriter, shard
from cfmerge.formats.trees import nested

AT_ONCE = 1 << 26  # bytes of arrays that Orbax saves in one call, which takes long
CHUNK = 1 << 24  # bytes of a chunk, the least that is read again
KEYS = "keys"  # the entry of the plain file's metadata with the keys of names
ELSEWHERE = 'write another format (format: "safetensors")'


class OrbaxWriter:
    """A writer of one checkpoint, tensor by tensor, in any order; its calls are those of `ShardWriter`.

    Names are cut at "/" into nested keys, but for those whose keys are known. The directory itself becomes the
    checkpoint, beside what else lies in it.

    Args:
        version: "v1", whose arrays lie in the item `state`, or "v0", that of `StandardCheckpointer`, for which Orbax
            holds all arrays at once.
        keys: the keys of names, as the base's checkpoint has them.

    Raises:
        Unfit: the file that is there is not that of an earlier writer.
        CfmergeError: Orbax has no place for a tensor; on `close`, a tensor was not wholly written.
        OSError: the disk is full, or the directory cannot be written.
    """

    def __init__(
        self,
        directory: Path,
        tensors: Mapping[str, Header],
        max_shard_bytes: int = 0,
        metadata: Mapping[str, str] | None = None,
        stem: str = "model",
        index: str | None = None,
        done: Covered | None = None,
        *,
        version: str = "v1",
        keys: Mapping[str, Keys] | None = None,
    ):
        _check(tensors, keys)
        self._keys = {name: own for name, own in (keys or {}).items() if name in tensors}
        self._directory, self._tensors, self._metadata = directory, dict(tensors), dict(metadata or {})
        self._version = version
        self._stem = f"{stem}.orbax-arrays"  # not hidden: Orbax finds no parts below a hidden name
        told = {KEYS: json.dumps(self._keys)}
        self._pieces = ShardWriter(directory, tensors, 1 << 62, told, self._stem, None, done)

    def write(self, name: str, values: np.ndarray, first: int = 0) -> None:
        """Writes a tensor, or a piece of it from flat element `first` on."""
        self._pieces.write(name, values, first)

    def covers(self, ranges: Iterable[Range]) -> None:
        """Takes note of ranges that another writer of the same files has written."""
        self._pieces.covers(ranges)

    def sync(self) -> None:
        """Makes safe what is written so far."""
        self._pieces.sync()

    def close(self) -> None:
        """Makes the checkpoint out of what was written."""
        self._pieces.close()
        file, made = self._directory / f"{self._stem}.safetensors", self._directory / f"{self._stem}.made"
        for stale in self._directory.glob(f"{made.name}*"):  # of a run that was interrupted
            shutil.rmtree(stale)
        try:
            save(made.absolute(), file, self._metadata, self._version)
        except Exception as error:  # Orbax's errors are of many kinds
            if isinstance(error, OSError | CfmergeError):
                raise
            raise CfmergeError(f"{self._directory}: Orbax cannot write the checkpoint: {error}; {ELSEWHERE}") from error
        mark_lists(find_tree(made)[0], self._keys)
        self._compare(made)
        for part in sorted(made.iterdir(), key=lambda part: part.name in {TREE, CHECKPOINT}):
            place = self._directory / part.name
            if place.is_dir():
                shutil.rmtree(place)
            if part.name != "commit_success.txt":  # which tells the path that it had
                part.replace(place)
        shutil.rmtree(made)
        file.unlink()

    def _compare(self, made: Path) -> None:
        """Raises `CfmergeError` if Orbax has not written all tensors as they are."""
        written = OrbaxCheckpoint(made, whole=True).tensors
        found = {name: (info.shape, info.dtype) for name, info in written.items()}
        asked = {name: (tuple(shape), np.dtype(dtype)) for name, (shape, dtype) in self._tensors.items()}
        wrong = [name for name in asked.keys() | found.keys() if asked.get(name) != found.get(name)]
        if wrong:
            name = min(wrong)
            raise CfmergeError(
                f"{self._directory}: Orbax wrote {len(wrong)} tensors otherwise than asked, such as {name!r}: "
                f"{asked.get(name)} became {found.get(name)}; {ELSEWHERE}"
            )

    def abort(self) -> None:
        """Closes the files, whatever is in them."""
        self._pieces.abort()


def _check(tensors: Mapping[str, Header], keys: Mapping[str, Keys] | None) -> None:
    """Raises `CfmergeError` for what Orbax does not hold."""
    nested(tensors, keys)
    empty = [name for name, header in tensors.items() if not bytes_of(header)]
    if empty:
        raise CfmergeError(f"{and_more(empty)}: a tensor without entries, which Orbax does not save; {ELSEWHERE}")
    stored: dict[str, str] = {}
    for name in tensors:
        other = stored.setdefault(name.replace("/", "."), name)
        if other != name or not all(name.split("/")):
            raise CfmergeError(f"tensors {other!r} and {name!r}: Orbax cannot tell these names apart; {ELSEWHERE}")
    odd = [f"{name!r} ({dtype})" for name, (_, dtype) in tensors.items() if np.dtype(dtype) not in safetensors.NAMES]
    if odd:
        raise CfmergeError(f"{and_more(odd)}: a dtype that is not written; cast it (dtype: ...)")


def save(made: Path, file: Path, metadata: Mapping[str, str], version: str) -> None:
    """Makes a checkpoint out of a file; among several JAX processes in a process apart, as Orbax waits for all."""
    import jax

    if jax.process_count() == 1:
        {"v1": _save_v1, "v0": _save_v0}[version](made, SafetensorsFile(file), metadata)
        return
    call = [sys.executable, "-m", __name__, str(made), str(file), json.dumps(dict(metadata)), version]
    apart = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_COORD", "JAX_NUM_PROC"))}
    done = subprocess.run(call, capture_output=True, text=True, env={**apart, "JAX_PLATFORMS": "cpu"})
    if done.returncode:
        raise CfmergeError(f"{made.parent}: Orbax cannot write the checkpoint: {done.stderr.strip()[-2000:]}")


def _save_v1(made: Path, file: SafetensorsFile, metadata: Mapping[str, str]) -> None:
    from orbax.checkpoint import v1 as ocp

    context = ocp.Context()
    context.array.saving.use_compression = False
    context.array.saving.storage_options.chunk_byte_size = CHUNK
    headers = {name: (info.shape, info.dtype) for name, info in file.tensors.items()}
    keys = json.loads(file.metadata[KEYS])
    with context:
        for names in shard(headers, AT_ONCE):
            tree = nested({name: file.read(name) for name in names}, keys)
            ocp.partial.save(made, tree, custom_metadata=dict(metadata))
        ocp.partial.finalize(made)


def _save_v0(made: Path, file: SafetensorsFile, metadata: Mapping[str, str]) -> None:
    import orbax.checkpoint

    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        tree = nested({name: file.read(name) for name in file.tensors}, json.loads(file.metadata[KEYS]))
        checkpointer.save(made, tree, custom_metadata=dict(metadata))


if __name__ == "__main__":
    save(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]), sys.argv[4])
