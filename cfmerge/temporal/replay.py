"""Replay buffers: a few examples of the tasks so far, from which the training of the next expert may draw.

    buffer = temporal.Reservoir(2000, seed=0)         each example seen so far is kept with the same probability
    buffer = temporal.PerTask(2000, seed=0)           each task so far has the same share of the places
    buffer.add({"image": images, "label": labels}, "birds")
    batch = buffer.draw(64)                           {"image": (64, ...), "label": (64,), "task": (64,)}

What is kept depends on the seed and the examples alone (`sampling.py`): draws have a generator of their own.
"""

from __future__ import annotations

import abc
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import ml_dtypes  # noqa: F401 - NumPy knows bfloat16 and its like by name
import numpy as np

from cfmerge.errors import CfmergeError
from cfmerge.formats.staged import StagedFile
from cfmerge.temporal.sampling import Columns, Sample

Examples = Mapping[str, Any]  # arrays with one leading axis in common
TASK, HEAD = "task", "head"
KIND, VERSION = "cfmerge-replay", 1


class Replay(abc.ABC):
    """What both buffers share: see `Reservoir` and `PerTask`.

    Attributes:
        capacity: the number of places.
        tasks: the names of the tasks seen so far, in the order in which they came.
    """

    rule: ClassVar[str]

    def __init__(self, capacity: int, seed: int) -> None:
        if isinstance(capacity, bool) or not isinstance(capacity, int | np.integer) or capacity < 1:
            raise CfmergeError(f"a replay buffer's capacity is a number of examples, at least 1; found {capacity!r}")
        self.capacity, self.tasks = int(capacity), list[str]()
        self._keeping, self._drawing = map(np.random.default_rng, np.random.SeedSequence(seed).spawn(2))
        self._samples: list[Sample] = []
        self._form: dict[str, tuple[tuple[int, ...], np.dtype]] = {}  # by name, of one example

    def __len__(self) -> int:
        return sum(len(sample) for sample in self._samples)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.capacity}, {len(self)} examples, tasks: {', '.join(self.tasks)})"

    @property
    def seen(self) -> int:
        """How many examples were added, those that are not kept among them."""
        return sum(sample.seen for sample in self._samples)

    def add(self, examples: Examples, task: str) -> None:
        """Offers examples of a task to the buffer.

        Raises:
            CfmergeError: their names, shapes or dtypes are not those of earlier examples, or their leading axes differ.
                The buffer stays as it was.
        """
        rows = self._checked(examples)
        count = len(next(iter(rows.values())))
        if not count:
            return
        task = str(task)
        sample = self._sample_of(task)
        if task not in self.tasks:
            self.tasks.append(task)
        self._form = self._form or {name: (column.shape[1:], column.dtype) for name, column in rows.items()}
        sample.offer({**rows, TASK: np.full(count, self.tasks.index(task), np.int32)}, self._keeping)

    def draw(self, count: int, seed: int | np.random.Generator | None = None, *, replace: bool = False) -> Columns:
        """Examples drawn with equal probability from those that are kept, and the task of each under "task".

        Args:
            count: how many.
            seed: of this draw alone, or a generator; none: the buffer's own generator, which `save` keeps.
            replace: an example may come more than once.

        Raises:
            CfmergeError: the buffer holds fewer than `count`, without `replace`; or none at all.
        """
        held = len(self)
        if not held:
            raise CfmergeError("the replay buffer is empty: add examples first")
        if count > held and not replace:
            raise CfmergeError(f"{count} examples asked for, the replay buffer holds {held}: draw(..., replace=True)")
        generator = self._drawing if seed is None else np.random.default_rng(seed)
        chosen = generator.choice(held, count, replace=replace)
        starts = np.cumsum([0, *map(len, self._samples)])
        part = np.searchsorted(starts, chosen, side="right") - 1
        drawn = {name: np.empty((count, *shape), dtype) for name, (shape, dtype) in self._form.items()}
        drawn[TASK] = np.empty(count, np.int32)
        for index, sample in enumerate(self._samples):
            mine = part == index
            for name, column in drawn.items():
                column[mine] = sample.columns[name][chosen[mine] - starts[index]]
        return {**drawn, TASK: np.asarray(self.tasks)[drawn[TASK]]}

    def counts(self) -> dict[str, int]:
        """How many examples of each task are kept."""
        kept = [sample.rows()[TASK] for sample in self._samples if len(sample)]
        counted = np.bincount(np.concatenate([np.empty(0, np.int32), *kept]), minlength=len(self.tasks))
        return dict(zip(self.tasks, counted.tolist(), strict=True))

    def save(self, path: str | Path) -> Path:
        """Writes the buffer into one file, whole or not at all; returns its path.

        The generators' states are part of it: a run that loads it draws what it would have drawn without a stop.
        """
        arrays = {
            f"{index}/{name}": np.ascontiguousarray(column)
            for index, sample in enumerate(self._samples)
            for name, column in sample.rows().items()
        }
        generators = [generator.bit_generator.state for generator in (self._keeping, self._drawing)]
        head = {
            "format": KIND,
            "version": VERSION,
            "rule": self.rule,
            "capacity": self.capacity,
            "tasks": self.tasks,
            "generators": generators,
            "samples": [[sample.capacity, sample.seen] for sample in self._samples],
            "arrays": {key: [_name_of(array.dtype), list(array.shape)] for key, array in arrays.items()},
        }
        raw: dict[str, Any] = {key: np.frombuffer(array.tobytes(), np.uint8) for key, array in arrays.items()}
        raw[HEAD] = np.frombuffer(json.dumps(head).encode(), np.uint8)
        with StagedFile(Path(path), overwrite=True) as staged:
            with open(staged.path / staged.target.name, "wb") as stream:
                np.savez(stream, **raw)
            staged.commit()
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """A buffer as `save` has written it.

        Raises:
            CfmergeError: there is no such file, it is not whole, or it holds a buffer of another kind.
        """
        try:
            with np.load(path, allow_pickle=False) as content:
                head = json.loads(content[HEAD].tobytes())
                raw = {key: content[key].tobytes() for key in head["arrays"]}
        except FileNotFoundError:
            raise CfmergeError(f"{path}: there is no such file; save a buffer there first") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
            raise CfmergeError(f"{path}: no replay buffer, or not a whole one: {error}") from None
        if (head.get("format"), head.get("version")) != (KIND, VERSION):
            found = f"{head.get('format')!r}, version {head.get('version')!r}"
            raise CfmergeError(f"{path}: expected {KIND!r}, version {VERSION}; found {found}")
        kind = next(kind for kind in (Reservoir, PerTask) if kind.rule == head["rule"])
        if not issubclass(kind, cls):
            raise CfmergeError(f"{path}: holds a {kind.__name__}, not a {cls.__name__}: {kind.__name__}.load(...)")
        made = kind(head["capacity"], 0)
        made._restore(head, raw)
        return cast(Self, made)

    def _restore(self, head: Mapping[str, Any], raw: Mapping[str, bytes]) -> None:
        self.tasks = list(head["tasks"])
        for generator, state in zip((self._keeping, self._drawing), head["generators"], strict=True):
            generator.bit_generator.state = state
        self._samples = [Sample(capacity, seen) for capacity, seen in head["samples"]]
        for key, (dtype, shape) in head["arrays"].items():
            index, _, name = key.partition("/")
            sample = self._samples[int(index)]
            column = np.frombuffer(raw[key], np.dtype(dtype)).reshape(shape)
            sample.columns[name] = np.empty((sample.capacity, *column.shape[1:]), column.dtype)
            sample.columns[name][: len(column)] = column
            if name != TASK:
                self._form[name] = (column.shape[1:], column.dtype)

    def _checked(self, examples: Examples) -> Columns:
        """The examples as arrays of the form that the buffer holds."""
        if not examples:
            raise CfmergeError('examples are named arrays, such as {"image": (N, ...), "label": (N,)}; found none')
        if TASK in examples:
            raise CfmergeError(f"the name {TASK!r} is the buffer's own: draw() tells the task under it; rename yours")
        rows = {name: np.asarray(array) for name, array in examples.items()}
        for name, array in rows.items():
            if array.ndim == 0 or array.dtype.hasobject or array.dtype.names:
                found = f"shape {array.shape}, dtype {array.dtype}"
                raise CfmergeError(
                    f"examples {name!r}: expected an array of numbers or texts by example; found {found}"
                )
        lengths = {name: len(array) for name, array in rows.items()}
        if len(set(lengths.values())) > 1:
            told = ", ".join(f"{name!r} has {length}" for name, length in lengths.items())
            raise CfmergeError(f"the arrays of examples should have one leading axis in common: {told}")
        if self._form and set(rows) != set(self._form):
            raise CfmergeError(f"examples have {sorted(rows)}; those before had {sorted(self._form)}")
        for name, (shape, dtype) in self._form.items():
            if rows[name].shape[1:] != shape or rows[name].dtype != dtype:
                before, found = f"{shape} of {dtype}", f"{rows[name].shape[1:]} of {rows[name].dtype}"
                raise CfmergeError(f"examples {name!r}: each was {before} before, and is {found} now; convert them")
        return rows

    @abc.abstractmethod
    def _sample_of(self, task: str) -> Sample:
        """The sample that a task's examples are offered to."""


class Reservoir(Replay):
    """A uniform sample of all examples that were added: a task with more examples has more places.

        >>> buffer = temporal.Reservoir(100, seed=0)
        >>> buffer.add({"image": np.zeros((500, 8, 8)), "label": np.arange(500) % 10}, "birds")
        >>> buffer.add({"image": np.ones((1500, 8, 8)), "label": np.arange(1500) % 10}, "cars")
        >>> len(buffer), buffer.seen, buffer.tasks
        (100, 2000, ['birds', 'cars'])
        >>> batch = buffer.draw(16)
        >>> batch["image"].shape, batch["label"].shape, sorted(set(batch["task"].tolist()))
        ((16, 8, 8), (16,), ['birds', 'cars'])
        >>> again = temporal.Reservoir.load(buffer.save("replay.npz"))
        >>> bool(np.all(again.draw(16)["label"] == buffer.draw(16)["label"]))
        True

    Args:
        capacity: the number of places.
        seed: decides which examples are kept and drawn.
    """

    rule = "reservoir"

    def __init__(self, capacity: int, seed: int) -> None:
        super().__init__(capacity, seed)
        self._samples = [Sample(self.capacity)]

    def _sample_of(self, task: str) -> Sample:
        return self._samples[0]


class PerTask(Replay):
    """A uniform sample of each task's examples: all tasks seen so far have the same share, which shrinks as tasks come.

        >>> buffer = temporal.PerTask(100, seed=0)
        >>> buffer.add({"image": np.zeros((500, 8, 8))}, "birds")
        >>> buffer.counts()
        {'birds': 100}
        >>> buffer.add({"image": np.ones((1500, 8, 8))}, "cars")
        >>> buffer.counts()
        {'birds': 50, 'cars': 50}

    Places that do not divide evenly go to the first tasks, one each. A task with fewer examples than its share leaves
    places empty.

    Args:
        capacity: the number of places of all tasks together.
        seed: decides which examples are kept and drawn.
    """

    rule = "per-task"

    def _sample_of(self, task: str) -> Sample:
        if task in self.tasks:
            return self._samples[self.tasks.index(task)]
        count = len(self.tasks) + 1
        if count > self.capacity:
            raise CfmergeError(f"task {task!r}: a buffer of {self.capacity} has no share for {count} tasks")
        share, more = divmod(self.capacity, count)
        for index, sample in enumerate(self._samples):
            sample.shrink(share + (index < more), self._keeping)
        self._samples.append(Sample(share))
        return self._samples[-1]


def _name_of(dtype: np.dtype) -> str:
    """A name that `np.dtype` reads: those of ml_dtypes have no code of their own."""
    return dtype.name if dtype.kind == "V" else dtype.str
