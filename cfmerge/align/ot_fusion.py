r"""OT fusion: a model transported onto another, which may have other widths, and averaged with it.

Sidak Pal Singh, Martin Jaggi, "Model Fusion via Optimal Transport", NeurIPS 2020, https://arxiv.org/abs/1910.05653.
Model B stays. Spaces are taken along the flow of data; when one comes, those that its writers read have been:

    W'_A = W_A with what it reads transported
    C_ij = | row i of W'_A - row j of W_B |          rows of all tensors that write the space, side by side
    T    = argmin <T, C>,   T 1 = alpha,  T^T 1 = beta                                          (`transport`)

    written axes    row j of the result is   sum_i T_ij / beta_j  row i                           a mean of A's neurons
    read axes       column j of the result is   sum_i T_ij / alpha_i  column i

    W = (1 - share) W_A transported + share W_B

The paper and the authors' code divide by beta on read axes too (`outgoing="mean"`). With uniform histograms of one
width that is the same. Where widths differ it is not: if A has every neuron of B twice, each with half of the outgoing
weight, the mean of the two outgoing columns is half of what they give together. So the sum is the default: with a plan
that joins equal neurons the transported model computes what A does.

A residual stream is one space with one plan, from all of its writers. These read spaces that read the stream, so the
first plan is from the writers that are known (an embedding), and all plans are made again until none changes. The
paper's code averages the plans of a skip and of its branch block by block; there a stream has no plan of its own.

Heads are transported as blocks: what permutes within them keeps its order. Biases and the scales of norms are entries
of their neuron's row (the paper has neither); `biases=False` leaves them out of the cost, but not out of the result.
Running statistics of BatchNorm are no weights, and are refused.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from cfmerge.align.gains import Tensors, check_model, read
from cfmerge.align.soft import Maps, mapped
from cfmerge.align.transport import COSTS, costs, transport
from cfmerge.align.trees import built, flat
from cfmerge.errors import CfmergeError, and_more
from cfmerge.models.kinds import is_running
from cfmerge.models.spaces import Axis, Spaces

PASSES = 10  # over all spaces, where a stream is read by what writes it
HISTOGRAMS = ("uniform", "norm")


class Fused(NamedTuple):
    """Two models fused.

    >>> spaces = cfmerge.align.parse_spaces({"up": "h, in -", "down": "-, in h"}, {"up": (2, 2), "down": (1, 2)})
    >>> a = {"up": np.eye(2), "down": np.array([[1.0, 2.0]])}
    >>> b = cfmerge.align.permute(spaces, a, {"h": np.array([1, 0])})
    >>> fused = cfmerge.align.ot_fusion(spaces, b, a)
    >>> fused.plans["h"].tolist(), fused.costs
    ([[0.0, 0.5], [0.5, 0.0]], {'h': 0.0})

    Attributes:
        tensors: as model b was given, in its shapes and dtypes.
        plans: `{space: transport plan (n of a, n of b)}`, each of which sums to 1.
        costs: `{space: what its plan costs}`, `<T, C>`.
    """

    tensors: Any
    plans: dict[str, np.ndarray]
    costs: dict[str, float]


def ot_fusion(
    spaces: Spaces,
    a: Tensors,
    b: Tensors,
    *,
    spaces_a: Spaces | None = None,
    share: float = 0.5,
    cost: Literal["euclidean", "squared", "cosine"] = "euclidean",
    histogram: Literal["uniform", "norm"] = "uniform",
    reg: float | None = None,
    biases: bool = True,
    outgoing: Literal["sum", "mean"] = "sum",
    statistics: Collection[str] = (),
) -> Fused:
    """Model a transported onto model b, and averaged with it: OT fusion.

    Args:
        spaces: of b; its axes that tensors read are marked `in`.
        a: `{name: array}` or a tree of arrays, which is transported.
        b: the same, whose widths the result has.
        spaces_a: of a, where its widths are others: the same table, parsed with a's shapes.
        share: of b in the result.
        cost: of two neurons: the distance of their rows, its square, or one less their cosine.
        histogram: how much each neuron counts: `uniform`, or in proportion to the `norm` of its row in W'_A or W_B.
        reg: None for exact transport; otherwise the strength of Sinkhorn's entropy, in the unit of the cost.
        biases: whether biases and norms, that is tensors of one axis, are in the cost.
        outgoing: whether a neuron of the result gets the `sum` of the outgoing weights that are sent to it, which
            preserves what the model computes, or their `mean` as in the paper.
        statistics: names of further tensors that are running statistics.

    Raises:
        CfmergeError: models that do not fit their spaces or each other; running statistics; a space that no tensor
            writes; a NaN or an infinity; Sinkhorn does not converge.

    Example:
        >>> table = {"up": "h, in -", "down": "-, in h"}
        >>> wide = {"up": np.array([[1.0], [2.0], [1.0], [2.0]]), "down": np.array([[1.5, 2.0, 1.5, 2.0]])}
        >>> narrow = {"up": np.array([[2.0], [1.0]]), "down": np.array([[4.0, 3.0]])}
        >>> of_wide, of_narrow = (
        ...     cfmerge.align.parse_spaces(table, {name: array.shape for name, array in model.items()})
        ...     for model in (wide, narrow)
        ... )
        >>> fused = cfmerge.align.ot_fusion(of_narrow, wide, narrow, spaces_a=of_wide)
        >>> fused.tensors["up"].tolist(), fused.tensors["down"].tolist()
        ([[2.0], [1.0]], [[4.0, 3.0]])
    """
    a, structure = flat(spaces, a)[0], flat(spaces, b)[1]
    b = flat(spaces, b)[0]
    if not 0 <= share <= 1:
        raise CfmergeError(f"ot_fusion: share: expected a number from 0 to 1, found {share}")
    if reg is not None and not reg > 0:
        raise CfmergeError(f"ot_fusion: reg: expected a number above 0, or None, which is exact; found {reg}")
    _check_choices(cost=(cost, COSTS), histogram=(histogram, HISTOGRAMS), outgoing=(outgoing, ("sum", "mean")))
    _check_alike(spaces, spaces_a or spaces)
    _check_widths(spaces, a, spaces_a)
    for tensors, own, who in ((a, spaces_a or spaces, "a"), (b, spaces, "b")):
        check_model(own, tensors, who)
    found = [name for name in spaces.axes if is_running(name, spaces.axes) or name in statistics]
    if found:
        raise CfmergeError(
            f"ot_fusion: {and_more(found)}: running statistics of BatchNorm are wrong after fusion, and are not fused; "
            "fuse the other tensors, with a table that leaves these out, and estimate them again with data"
        )
    fusion = _Fusion(spaces, spaces_a or spaces, a, b, cost, histogram, reg, biases, outgoing)
    with jax.enable_x64(True):
        plans, prices = fusion.plans()
        tensors = {name: fusion.fused(name, plans, share) for name in b}
    return Fused(built(structure, tensors), plans, prices)


class Writer(NamedTuple):
    """A part of a written axis that has a space: the part's number, and the other spaces of its tensor."""

    tensor: str
    axis: int
    part: int
    others: frozenset[str]


@dataclasses.dataclass
class _Fusion:
    """Two models, and how plans are made between their spaces."""

    spaces: Spaces
    spaces_a: Spaces
    a: Tensors
    b: Tensors
    cost: str
    histogram: str
    reg: float | None
    biases: bool
    outgoing: str

    def plans(self) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """`{space: its plan}` and `{space: its cost}`, in order of the flow of data."""
        writers = {space: self.writers(space) for space in self.spaces.names}
        plans, prices, early = dict[str, np.ndarray](), dict[str, float](), False
        while left := [space for space in writers if space not in plans]:
            known = {s: [w.others <= plans.keys() for w in writers[s]] for s in left}
            space = max(left, key=lambda s: (all(known[s]), sum(known[s])))
            early |= not all(known[space])
            plans[space], prices[space] = self.plan(space, writers[space], plans)
        for _ in range(PASSES if early else 0):
            before = dict(plans)
            for space in before:
                plans[space], prices[space] = self.plan(space, writers[space], plans)
            if all(np.array_equal(before[space], plans[space]) for space in before):
                break
        return plans, prices

    def writers(self, space: str) -> list[Writer]:
        """Where a space is written."""
        found = []
        for tensor, number in self.spaces.uses(space):
            axes = self.spaces.axes[tensor]
            if axes[number].reads or (len(axes) == 1 and not self.biases):
                continue
            for place, part in enumerate(axes[number].parts):
                if space in [factor.name for factor in part]:
                    names = {name for other, axis in enumerate(axes) if other != number for name in axis.spaces}
                    names |= {factor.name for factor in part} - {space, ""}
                    outer = frozenset(name for name in names if "." not in name)
                    found.append(Writer(tensor, number, place, outer))
        if not found:
            raise CfmergeError(
                f"ot_fusion: no tensor writes space {space!r}, so nothing tells its neurons apart: mark the axes that "
                "tensors read with `in`, and no others"
            )
        return found

    def plan(self, space: str, writers: list[Writer], plans: Mapping[str, np.ndarray]) -> tuple[np.ndarray, float]:
        """The plan of a space from the writers whose other spaces have plans, and what it costs."""
        n, m = self.spaces_a.sizes[space], self.spaces.sizes[space]
        inner, own, other = np.zeros((n, m)), np.zeros(n), np.zeros(m)
        for writer in writers:
            if writer.others <= plans.keys():
                name, but = writer.tensor, (writer.axis, space)
                moved = self.moved(name, self.tensor(name, "a"), plans, but)
                x = _rows(self.spaces_a.axes[name][writer.axis], writer, space, moved)
                y = _rows(self.spaces.axes[name][writer.axis], writer, space, self.tensor(name, "b"))
                inner += np.asarray(x @ y.T)
                own, other = own + np.asarray((x**2).sum(1)), other + np.asarray((y**2).sum(1))
        cost = costs(self.cost, inner, own, other)
        alpha, beta = (_histogram(self.histogram, np.sqrt(squares)) for squares in (own, other))
        plan = transport(cost, alpha, beta, self.reg)
        return plan, float((plan * cost).sum())

    def moved(self, name: str, tensor: Any, plans: Mapping[str, np.ndarray], but: tuple[int, str] | None = None) -> Any:
        """A tensor of a with its spaces transported."""
        writes: dict[str, Maps] = {space: {(): _shares(plan, axis=0).T} for space, plan in plans.items()}
        reads: dict[str, Maps] = (
            writes if self.outgoing == "mean" else {s: {(): _shares(p, axis=1).T} for s, p in plans.items()}
        )
        return mapped(self.spaces_a.axes[name], tensor, writes, but, reads)

    def fused(self, name: str, plans: Mapping[str, np.ndarray], share: float) -> Any:
        """One tensor of the result."""
        one, other = self.tensor(name, "a"), self.tensor(name, "b")
        stored = self.b[name]
        if one is None or other is None:
            if not np.array_equal(self.a[name], stored):
                raise CfmergeError(f"tensor {name!r}: differs between the models, and {stored.dtype} is not averaged")
            return stored
        return ((1 - share) * self.moved(name, one, plans) + share * other).astype(stored.dtype)

    def tensor(self, name: str, who: str) -> Any:
        """One tensor of a model in float64; None for integers."""
        spaces, tensors = (self.spaces_a, self.a) if who == "a" else (self.spaces, self.b)
        tensor = read(spaces, name, tensors, who)
        return None if tensor is None else tensor.astype(np.float64)


def _rows(axis: Axis, writer: Writer, space: str, tensor: Any) -> Any:
    """One row for each element of a space: `(n, all other entries of the part)`."""
    part = axis.parts[writer.part]
    start = sum(math.prod(factor.size for factor in other) for other in axis.parts[: writer.part])
    sizes = [factor.size for factor in part]
    piece = tensor[(slice(None),) * writer.axis + (slice(start, start + math.prod(sizes)),)]
    piece = piece.reshape(*tensor.shape[: writer.axis], *sizes, *tensor.shape[writer.axis + 1 :])
    place = writer.axis + [factor.name for factor in part].index(space)
    return piece.transpose(place, *range(place), *range(place + 1, piece.ndim)).reshape(piece.shape[place], -1)


def _histogram(kind: str, norms: np.ndarray) -> np.ndarray:
    counts = np.ones_like(norms) if kind == "uniform" or not norms.any() else norms + 1e-9 * norms.max()
    return counts / counts.sum()


def _shares(plan: np.ndarray, axis: int) -> np.ndarray:
    """The plan divided by its sums over an axis; zero where these are."""
    sums = plan.sum(axis=axis, keepdims=True)
    return np.divide(plan, sums, out=np.zeros_like(plan), where=sums > 0)


def _check_choices(**choices: tuple[str, tuple[str, ...]]) -> None:
    for name, (value, known) in choices.items():
        if value not in known:
            raise CfmergeError(f"ot_fusion: {name} {value!r} is not known; there is: {', '.join(known)}")


def _check_alike(spaces: Spaces, spaces_a: Spaces) -> None:
    """Raises `CfmergeError` unless two models differ in the sizes of spaces alone."""
    if spaces.table() != spaces_a.table():
        differ = [n for n in {**spaces.table(), **spaces_a.table()} if spaces.table().get(n) != spaces_a.table().get(n)]
        raise CfmergeError(f"ot_fusion: the tables of the two models differ at tensor {and_more(differ)}")
    for name, axes in spaces.axes.items():
        for axis, other in zip(axes, spaces_a.axes[name], strict=True):
            pairs = zip(sum(axis.parts, ()), sum(other.parts, ()), strict=True)
            wrong = [(f, g) for f, g in pairs if f.size != g.size and (not f.name or f.parent)]
            if wrong:
                (here, there), what = wrong[0], wrong[0][0].name or "what does not permute"
                raise CfmergeError(
                    f"ot_fusion: tensor {name!r}, {axis}: {what} has {there.size} elements in model a and {here.size} "
                    "in b; only spaces may differ in size, and not what permutes within their elements"
                )


def _check_widths(spaces: Spaces, a: Tensors, spaces_a: Spaces | None) -> None:
    """Raises `CfmergeError` where model a has other widths than b, and no spaces of its own."""
    for name in spaces.axes if spaces_a is None else ():
        shape = tuple(axis.size for axis in spaces.axes[name])
        if name in a and len(shape) == np.ndim(a[name]) and np.shape(a[name]) != shape:
            raise CfmergeError(
                f"tensor {name!r}: model a has the shape {np.shape(a[name])}, model b {shape}; for other widths give "
                "`spaces_a=parse_spaces(spaces.table(), shapes of a)`"
            )
