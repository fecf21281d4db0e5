"""Units: the smallest pieces of work, each solved in one compiled call.

A unit is segments (a tensor, its first entry, how many) of one layout and one method but for its numbers:

    whole tensors of one shape, stacked
    some layers of one tensor that stacks layers
    rows of one length, cut from tensors of any shape, for methods that take entries one by one: one compilation

A unit depends on headers, methods and the memory bound alone: never on devices or processes.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cfmerge.core.call import of_expert
from cfmerge.core.random import digest_of
from cfmerge.core.several import leaders, members
from cfmerge.core.survey import Found
from cfmerge.engine.inputs import Inputs, Settings, column, settings_of
from cfmerge.engine.segments import Segment
from cfmerge.engine.surveys import Place, at_places
from cfmerge.errors import CfmergeError
from cfmerge.methods import Method
from cfmerge.models.deltas import Dense, Factors
from cfmerge.planning.work import Job, Readable, Work
from cfmerge.statistics import named_leaves, stacked


@dataclasses.dataclass(frozen=True)
class Unit:
    """Segments whose arrays are stacked: `(stack, *shape)`.

    Attributes:
        row: the length of the rows that the segments are cut into, the last of each filled up with zeros; none: a
            segment is one array of the stack, whole or some of its layers.
        at_once: how many layers of the tensor, which stacks them along an axis that is not the first, are solved at a
            time, see `pieces`; 0: all.
    """

    work: Work
    segments: tuple[Segment, ...]
    row: int | None = None
    at_once: int = 0

    @property
    def jobs(self) -> tuple[Job, ...]:
        return tuple(segment.job for segment in self.segments)

    @property
    def job(self) -> Job:
        """The first job: it shares layout, dtypes, method and experts with the others."""
        return self.segments[0].job

    @property
    def experts(self) -> tuple[int, ...]:
        return self.job.experts

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(segment.job.name for segment in self.segments)

    @property
    def methods(self) -> tuple[Method, ...]:
        return tuple(job.method for job in self.jobs)

    @functools.cached_property
    def spans(self) -> tuple[slice, ...]:
        """Where each segment lies in the stack."""
        sizes = [1 if self.row is None else segment.rows(self.row) for segment in self.segments]
        ends = np.cumsum(sizes).tolist()
        return tuple(slice(end - size, end) for size, end in zip(sizes, ends, strict=True))

    @property
    def stack(self) -> int:
        """The length of the stack: rows are filled up to a power of two, so that few lengths are compiled."""
        used = self.spans[-1].stop
        return used if self.row is None else 1 << (used - 1).bit_length()

    @property
    def entries(self) -> int:
        """How many entries of tensors its segments hold."""
        return sum(segment.entries for segment in self.segments)

    @property
    def working_bytes(self) -> int:
        """Bytes that merging it may need, see `Job.working_bytes`."""
        each = self.at_once or (len(self.layers) if self.job.layers_apart and not self.row else 1)
        return len(self.segments) * each * self.job.working_bytes

    @property
    def layers(self) -> range:
        """Which canonical matrices of its tensor the first segment holds; the others hold as many."""
        return self.layers_of(self.segments[0])

    def layers_of(self, segment: Segment) -> range:
        """Which canonical matrices of its tensor a segment holds."""
        return segment.layers if self.row is None else range(segment.job.matrices)

    @property
    def _places(self) -> Iterator[tuple[Job, int]]:
        """Every canonical matrix in the stack: its job, and which of its tensor's it is."""
        return ((segment.job, layer) for segment in self.segments for layer in self.layers_of(segment))

    @property
    def places(self) -> tuple[Place, ...]:
        if self.row is not None:
            return tuple((segment.job.name, segment.first) for segment in self.segments)
        return tuple((job.name, layer) for job, layer in self._places)

    @property
    def pieces(self) -> tuple["Unit", ...]:
        """Units of the layers that are solved at a time, whose results are put together before they are written."""
        if not self.at_once:
            return (self,)
        job, size = self.job, math.prod(self.job.seen_shape)
        spans = [(n, min(self.at_once, job.matrices - n)) for n in range(0, job.matrices, self.at_once)]
        return tuple(Unit(self.work, (Segment(job, first * size, count * size),)) for first, count in spans)

    def only(self, number: int) -> "Unit":
        """The unit of one of its segments."""
        return dataclasses.replace(self, segments=(self.segments[number],))

    # --- arrays ---------------------------------------------------------------------------------------------------

    def base(self) -> Any:
        """The base's share `(stack, *shape)`."""
        return self.read(self.work.base.tensors, self.names)

    def expert(self, number: int) -> tuple[Any, Any]:
        """The same of an expert, and of which tensors it is the delta: `Inputs.minus`.

        Of an expert that lacks the tensors the base, for surveys: no delta.
        """
        if number not in self.experts:
            return self.base(), None
        deltas = [segment.delta(self.work, number) for segment in self.segments]
        shape = self.job.parameter.shape if self.segments[0].count is None else (-1,)
        arrays = [d.product.reshape(shape) if isinstance(d, Factors) else d.tensor for d in deltas]
        if all(isinstance(delta, Dense) for delta in deltas):
            return self._stacked(arrays), None
        return self._stacked(arrays), np.repeat([float(isinstance(delta, Dense)) for delta in deltas], self._repeats)

    def factors(self, number: int) -> tuple[Any, Any]:
        """The factors of an expert's deltas, `(stack, rows, r)` and `(stack, r, columns)`; of rank 0 a column of zeros.

        Raises:
            CfmergeError: the source has other factors than its header says.
        """
        deltas = [segment.delta(self.work, number) for segment in self.segments]
        ranks = [delta.right.shape[0] if isinstance(delta, Factors) else None for delta in deltas]
        said = self.job.ranks[number]
        if set(ranks) != {said}:
            at = next(n for n, rank in enumerate(ranks) if rank != said)
            raise CfmergeError(
                f"{self.work.experts[number].told}: the factors of {self.names[at]!r} have rank {ranks[at]}, expected "
                f"{said}, which its header says: is the adapter's configuration that of its weights?"
            )
        own = [d.balanced if self.job.method.needs.factors else (d.left, d.right) for d in deltas]  # type: ignore[union-attr]
        sides = zip(*own, strict=True)
        left, right = (np.stack(_one_dtype([np.asarray(factor) for factor in side])) for side in sides)
        if said == 0:
            left, right = np.pad(left, ((0, 0), (0, 0), (0, 1))), np.pad(right, ((0, 0), (0, 1), (0, 0)))
        return left, right

    def read(self, model: Readable, names: Sequence[str]) -> Any:
        """The unit's share of a model, one name for each segment."""
        return self._stacked([s.read(model, name) for s, name in zip(self.segments, names, strict=True)])

    def _stacked(self, arrays: Sequence[Any]) -> Any:
        if self.row is None and self.segments[0].count is not None:
            arrays = [array.reshape(len(self.layers), *self.job.shape[1:]) for array in arrays]
        if any(isinstance(array, jax.Array) for array in arrays):
            return jnp.stack([jnp.asarray(array) for array in arrays])
        arrays = _one_dtype(arrays)
        if self.row is not None:
            return self._in_rows(arrays, self.row)
        return arrays[0][None] if len(arrays) == 1 else np.stack(arrays)

    def _in_rows(self, arrays: Sequence[np.ndarray], row: int) -> np.ndarray:
        if arrays[0].size == self.stack * row:
            return arrays[0].reshape(self.stack, row)
        rows = np.zeros((self.stack, row), arrays[0].dtype)
        for span, array in zip(self.spans, arrays, strict=True):
            rows[span].reshape(-1)[: array.size] = array
        return rows

    def parts(self, values: Any) -> Iterator[tuple[Job, int, Any]]:
        """`(job, first entry, values)` of each segment, out of an array `(stack, ...)`.

        Or out of a pair of factors, or of the arrays by name that a composer makes.
        """
        for segment, span in zip(self.segments, self.spans, strict=True):
            if self.row is None:
                own = jax.tree.map(lambda leaf, at=span.start: leaf[at], values)
                yield segment.job, segment.first, own if isinstance(own, dict) else segment.stored(own)
            else:
                cut = functools.partial(_flat, span=span, count=segment.entries)
                yield segment.job, segment.first, jax.tree.map(cut, values)

    # --- numbers that come with them ------------------------------------------------------------------------------

    @property
    def _repeats(self) -> Any:
        """How often each segment's numbers are repeated: for its matrices or rows; the last's for all that fill up."""
        if self.row is None:
            return len(self.layers)
        sizes = [span.stop - span.start for span in self.spans]
        return [*sizes[:-1], sizes[-1] + self.stack - self.spans[-1].stop]

    def repeated(self, leaf: Any) -> Any:
        """Values of the segments `(segments, ...)`, for each of their rows."""
        return np.repeat(np.asarray(leaf), self._repeats, axis=0)

    def inputs(self, number: int) -> Inputs:
        """The weights of an expert, and all that its context needs."""
        needs, expert = self.job.method.needs, self.work.experts[number]
        weight = column([job.weights[number] for job in self.jobs], self._repeats)
        inputs = Inputs(weight, self.work.before + number, seed=self.work.seed, start=self._starts())
        if needs.random:
            told = [layer_name(job.name, layer, job.matrices) for job, layer in self._places]
            digests = np.stack([digest_of(layer, expert.name) for layer in told])
            inputs = inputs._replace(digest=digests if self.row is None else np.repeat(digests, self._repeats, axis=0))
        if needs.ranks:
            ranks = [segment.ranks(self.work, number) for segment in self.segments]
            inputs = inputs._replace(rank=self._in_rows(ranks, self.row or 1))
        if needs.moments and expert.moments is not None:
            inputs = inputs._replace(moment=self._moment(expert.moments, needs.moments))
        return inputs

    def _starts(self) -> np.ndarray:
        """The first entry of every row in its tensor; 0 of what is no row."""
        if self.row is None:
            return np.zeros(len(self.segments) * len(self.layers), np.uint32)
        starts = np.zeros(self.stack, np.uint32)
        for segment, span in zip(self.segments, self.spans, strict=True):
            starts[span] = segment.first + self.row * np.arange(span.stop - span.start)
        return starts

    def _moment(self, moments: Readable, kind: str) -> Any:
        if kind != "input_gram":
            return self.read(moments, self.names)
        arrays = [moments.read(name) for name in self.names]
        spans = [self.layers_of(segment) for segment in self.segments]
        each = [a.reshape(-1, *a.shape[-2:])[s.start : s.stop] for a, s in zip(arrays, spans, strict=True)]
        return (jnp if isinstance(each[0], jax.Array) else np).concatenate(each)

    def settings(self, methods: Sequence[Method], found: Found | None) -> list[Settings]:
        """The settings of start and solve, and then of each expert that takes part."""
        numbers = [0, *(self.work.before + t for t in self.experts)]
        known = at_places(found, self.places)
        if known is not None and known.tensor is not None and self.row is not None:
            known = known._replace(tensor=jax.tree.map(self.repeated, known.tensor))
        return [settings_of([of_expert(m, t) for m in methods], self._repeats, known) for t in numbers]

    def kept(self, method: Method, compute: str) -> Any:
        """The method's statistics as the work's statistics hold them; None if it has none."""
        if self.work.statistics is None:
            return None
        own = [self.work.statistics.tensors[name] for name in self.names]
        shares = [
            {leaf: segment.share(array, self.row) for leaf, array in leaves.items()}
            for segment, leaves in zip(self.segments, own, strict=True)
        ]
        if self.row is not None:
            shares.append(_nothing(shares[-1], self.stack - self.spans[-1].stop))
        each = [stacked(shares, one, self.job.seen_shape, compute) for one in leaders(method)]
        return each[0] if members(method) == (method,) else tuple(each)

    def shares(self, statistics: Any) -> Iterator[tuple[Job, int, dict[str, Any]]]:
        """`(job, first layer or entry, {leaf: its share})` of each segment; a scalar comes with the first entry."""
        for segment, span in zip(self.segments, self.spans, strict=True):
            layers = 1 if self.row is not None else len(self.layers)
            leaves = named_leaves(statistics, slice(span.start * layers, span.stop * layers))
            if self.row is None:
                yield segment.job, self.layers_of(segment).start, leaves
                continue
            cut = {
                leaf: array.reshape(-1)[: segment.count] if array.ndim > 1 else array[:1]
                for leaf, array in leaves.items() if array.ndim > 1 or segment.first == 0
            }  # fmt: skip
            yield segment.job, segment.first, cut


def _flat(rows: Any, span: slice, count: int) -> Any:
    """The entries of a segment out of rows `(stack, ..., row)`, as the last axis."""
    own = rows[span]
    if own.ndim > 2:
        own = np.moveaxis(own, 0, -2)
    return own.reshape(*own.shape[:-2], -1)[..., :count]


def _one_dtype(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The arrays in one dtype: NumPy has none for float16 and bfloat16."""
    if len({array.dtype for array in arrays}) == 1:
        return list(arrays)
    wide = np.float64 if any(array.dtype == np.float64 for array in arrays) else np.float32
    return [array.astype(wide) for array in arrays]


def _nothing(like: dict[str, Any], rows: int) -> dict[str, Any]:
    """Statistics of rows that only fill up."""
    return {leaf: np.zeros((rows, *array.shape[1:]), array.dtype) for leaf, array in like.items()}


def layer_name(name: str, layer: int, layers: int) -> str:
    """The text that a random method's keys are made of: the tensor's name, and which of its stacked layers."""
    return name if layers == 1 else f"{name}[{layer}]"
