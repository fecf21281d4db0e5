"""The work of a run: the models that take part, and a job for each tensor of the output.

Planning makes it, whether the models lie in files or in memory; the loop (`run.py`) asks nothing else.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from cfmerge.core.call import in_pieces
from cfmerge.core.several import members
from cfmerge.methods import Method
from cfmerge.models import Parameter
from cfmerge.models.deltas import Delta
from cfmerge.planning.assign import Assignment
from cfmerge.planning.cost import statistic_size
from cfmerge.statistics import Statistics

Progress = Callable[[str, int], None]  # (tensor name, bytes read since the last call)


def silent(name: str, count: int) -> None:
    """Progress that nobody is told of."""


class Readable(Protocol):
    """Named arrays: a `Source`, or a tree in memory."""

    def read(self, name: str, first: int = 0, count: int | None = None) -> Any:
        """The array; with `count` so many entries of the flat one, from entry `first` on."""
        ...


class Tuned(Readable, Protocol):
    """An expert's arrays, also as deltas; see `cfmerge.formats.Source`."""

    def rank(self, name: str) -> int | None:
        """The rank of the factors that its delta comes as, by its header; None: it comes as a tensor."""
        ...

    def delta(self, name: str, first: int = 0, count: int | None = None) -> Delta: ...


class Writable(Protocol):
    """The part of a `Sink` that the loop knows."""

    def write(self, name: str, values: Any, first: int = 0) -> None:
        """Takes a tensor, or a piece of the flat one from entry `first` on; pieces come in any order.

        A sink that has `write_factors(name, left, right)` gets the merged deltas of adapters by it, where they are
        merged in a joint basis: `left @ right` in the rows and columns of the stored tensor, without the base.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Participant:
    """A model that takes part.

    Attributes:
        name: the expert's name; "base" for the base.
        told: the model in messages, such as `expert 'math' (models/math)`.
        tensors: its arrays by name; an expert's also as deltas.
        moments: its measurements, by the base's names; None: there are none.
    """

    name: str
    told: str
    tensors: Any  # Readable; for an expert Tuned
    moments: Readable | None = None


@dataclasses.dataclass(frozen=True)
class Job:
    """One tensor of the output.

    Attributes:
        writes: the names that it is written under: its own and those tied to it.
        sources: its name in each expert, or None where the expert does not have it.
        dtype: the output's.
        weights: the experts', for this tensor.
        ranks: of the factors that each expert's delta comes as, by its header; None where it comes as a tensor. Empty
            where it is not asked for.
    """

    name: str
    assignment: Assignment
    writes: tuple[str, ...]
    sources: tuple[str | None, ...]
    dtype: np.dtype
    weights: tuple[Any, ...]
    ranks: tuple[int | None, ...] = ()

    @property
    def parameter(self) -> Parameter:
        return self.assignment.parameter

    @property
    def method(self) -> Method:
        return self.assignment.method

    @property
    def experts(self) -> tuple[int, ...]:
        """Numbers of the experts that have the tensor."""
        return tuple(number for number, source in enumerate(self.sources) if source is not None)

    @functools.cached_property
    def joint(self) -> tuple[int, ...] | None:
        """The ranks of the experts' factors, where they are merged in their joint basis; None: as dense deltas.

        They are where the method commutes with bases (`Part.joint`) and they have few directions together, or where the
        method asks for the factors.
        """
        own = tuple(self.ranks[number] for number in self.experts) if self.ranks else ()
        if self.assignment.action != "merge" or not own or not self.method.joint or not self.factor_layout:
            return None
        ranks = tuple(rank for rank in own if rank is not None)
        few = 2 * sum(ranks) <= min(self.sides) or self.method.needs.factors
        return ranks if len(ranks) == len(own) and few else None

    @property
    def sides(self) -> tuple[int, int]:
        """Outputs and inputs of the matrix that factors make; rows and columns where the tensor has no such view."""
        shape = self.parameter.canonical[1:] if self.parameter.layout else self.parameter.shape
        return shape[0], shape[1]

    @property
    def factor_layout(self) -> str:
        """The layout in which factors lie, whose rows are one axis of the tensor; empty where there is none."""
        layout = self.parameter.layout or ("oi" if len(self.parameter.shape) == 2 else "")
        return layout if layout == "io" or re.fullmatch("oi+", layout) else ""

    @property
    def bytes_read(self) -> int:
        return self.parameter.size * _dtype(self.parameter.dtype).itemsize

    @property
    def layout(self) -> str:
        """The layout in which the tensor is taken up, stacked axes as one, the first.

        None if the method takes entries one by one, or where there is no matrix.
        """
        stored = "" if self.method.needs.scope == "entry" else self.parameter.layout
        return "b" + stored.replace("b", "") if "b" in stored else stored

    @property
    def is_turned(self) -> bool:
        """Whether stacked axes are brought to the front when the tensor is taken up: it is not stored so."""
        stored = self.parameter.layout
        return "b" in self.layout and not (stored.startswith("b") and stored.count("b") == 1)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in which the tensor is taken up."""
        if not self.is_turned:
            return self.parameter.shape
        axes = zip(self.parameter.shape, self.parameter.layout, strict=True)
        return (self.matrices, *(size for size, at in axes if at != "b"))

    @property
    def matrices(self) -> int:
        """The number of canonical matrices in the tensor: layers may be stacked."""
        return self.parameter.canonical[0] if self.layout else 1

    @property
    def seen_shape(self) -> tuple[int, ...]:
        """The shape of one canonical matrix, or of the tensor where there is none."""
        return self.parameter.canonical[1:] if self.layout else self.parameter.shape

    @property
    def flops(self) -> int:
        """Floating-point operations, about: for a matrix method a Gram and a cross term an expert, and one solve."""
        if self.assignment.action != "merge":
            return 0
        experts = len(self.experts)
        if self.method.needs.scope != "matrix":
            return 3 * experts * self.parameter.size
        b, m, n = self.parameter.canonical
        return b * (experts * (2 * m * n * n + 2 * m * n * min(n, 2 * m)) + n**3 // 3 + 2 * m * n * n)

    @property
    def layers_apart(self) -> bool:
        """Whether the tensor stacks layers, so that some can be merged at a time."""
        return self.matrices > 1

    @property
    def layers_in_turn(self) -> bool:
        """Whether it stacks layers that lie one behind the other: some of them are a range of its entries."""
        return self.layers_apart and not self.is_turned

    @property
    def row(self) -> int | None:
        """The length of the rows of the matrix that the tensor is, if they lie one behind the other in the file.

        Of a tensor without a canonical view, the length of its last axis.
        """
        layout, shape = self.parameter.layout, self.parameter.shape
        if not layout:
            return shape[-1] if shape else 1
        return self.parameter.canonical[-1] if list(layout) == sorted(layout, key="boi".index) else None

    @property
    def working_bytes(self) -> int:
        """Bytes that merging its smallest unit may need: the statistic of all experts, the experts, and room to solve.

        Of a tensor that stacks layers a unit is one of them, and all of the result where they do not lie in turn.
        In float32 for an output of 16 bits; in float64 otherwise, to which an ill-conditioned one is driven.
        """
        method = self.method
        if self.joint is not None:
            return self._joint_bytes(sum(self.joint))
        if self.assignment.action != "merge" or method.needs.scope == "entry":
            return 0
        _, m, n = self.parameter.canonical if self.layout else (1, 1, self.parameter.size)
        shape = (m, n) if self.layout else self.parameter.shape
        floats = statistic_size(method, shape, len(self.experts)) + (5 + len(members(method))) * m * n
        if method.needs.scope == "matrix":
            floats += 3 * n * n
        if not method.additive:
            floats += len(self.experts) * m * n
        held = self.parameter.size * self.dtype.itemsize if self.layers_apart and not self.layers_in_turn else 0
        return (4 if self.dtype.itemsize == 2 else 8) * floats + held

    def _joint_bytes(self, rank: int) -> int:
        """Of a merge in a joint basis: factors and bases, all experts' cores, and what is as large as the tensor."""
        m, n = self.sides
        p, q = min(m, rank + 1), min(n, rank)
        cores = 4 * (len(self.experts) + 4) * p * q + 4 * (p * p + q * q)
        tall = 4 * (m * p + n * q) + len(members(self.method)) * m * q
        dense = (1 + 2 * len(members(self.method))) * m * n
        return 8 * (cores + tall) + (4 if self.dtype.itemsize <= 4 else 8) * dense


def _dtype(name: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


@dataclasses.dataclass(frozen=True)
class Work:
    """Base, experts, and the action on every tensor.

    Attributes:
        statistics: the statistics of earlier experts, which come first in the order of experts.
        precision: "auto", or the dtype that all is computed in.
        traced: some values are known to a transformation of JAX only; then nothing looks at values.
        from_files: options of a recipe exist, and messages may name them.
        sums: the statistics are wanted, unsolved.
        sharded: the shardings of the tensors that lie on several devices, by name: each is merged there by itself.
    """

    base: Participant
    experts: tuple[Participant, ...]
    jobs: tuple[Job, ...]
    statistics: Statistics | None = None
    seed: Any = 0
    precision: str = "auto"
    traced: bool = False
    from_files: bool = False
    sums: bool = False
    sharded: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def before(self) -> int:
        """The number of experts in the statistics: those of the work are numbered after them."""
        return len(self.statistics.experts) if self.statistics else 0

    def by_entry(self, job: Job) -> Job:
        """The job, its method in the form that takes entries after a look within the tensor, where there is one.

        Findings have a place for each expert: all must have the tensor. Statistics know no such form.
        """
        everybody = len(job.experts) == len(self.experts) and self.statistics is None and not self.sums
        method = in_pieces(job.method) if self.from_files and everybody and job.joint is None else None
        if method is None or (method.needs.ranks and job.row is None):
            return job
        return dataclasses.replace(job, assignment=dataclasses.replace(job.assignment, method=method))

    @functools.cached_property
    def merged(self) -> tuple[Job, ...]:
        """The jobs that merge something."""
        return tuple(job for job in self.jobs if job.assignment.action == "merge" and job.parameter.size > 0)

    @functools.cached_property
    def entries(self) -> int:
        """The number of entries that are merged, of one model."""
        return sum(job.parameter.size for job in self.merged)
