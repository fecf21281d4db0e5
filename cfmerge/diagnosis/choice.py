"""The rule of `method: auto`: which method a tensor gets, from its kind and from two numbers about its deltas.

    convolution                                         power >> half_flatten
    every delta of low rank, weights alike              opcm
    least squares would outgrow the experts             dc_merge
    else                                                tsv_m >> svc(alpha=1)

A delta is of low rank if its rank, above rounding, is at most a quarter of the matrix's smaller side. ACE's merged
delta outgrows the experts where its `growth` is above the bound that its own note has. Tensors that are no matrices
get the mean of the deltas, as with any matrix method. docs/auto.md says where the rule comes from.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jax import lax
from jaxtyping import Array, Float

from cfmerge.core.part import Seen
from cfmerge.diagnosis.ranks import numerical_rank, rounding
from cfmerge.least_squares import GROWN
from cfmerge.methods import ace
from cfmerge.models import Kind

LOW = 0.25  # of the smaller side: the largest rank that counts as low


class Branch(NamedTuple):
    """A method, and the reason for it: a clause that begins with the tensors."""

    method: str
    why: str


CONVOLUTION = Branch("power >> half_flatten", "convolutions")
LOW_RANK = Branch("opcm", "deltas of low rank")
LOW_RANK_WEIGHTED = Branch("dc_merge", "deltas of low rank, with weights that opcm has none of")
GROWING = Branch("dc_merge", "deltas whose least-squares merge would outgrow them")
FULL = Branch("tsv_m >> svc(alpha=1)", "some deltas of full rank")
UNCHANGED = Branch("average", "no expert changed them")
BRANCHES = (CONVOLUTION, LOW_RANK, LOW_RANK_WEIGHTED, GROWING, FULL, UNCHANGED)


def look(seen: Seen) -> dict[str, Array]:
    """The numbers that the rule needs of one canonical matrix: each delta's rank, and the growth of ACE's merge.

    Args:
        seen: the base `(m, n)` and all deltas `(T, m, n)`.

    Example:
        >>> from cfmerge.methods import Seen
        >>> deltas = jnp.stack([jnp.eye(8), jnp.outer(jnp.arange(8.0), jnp.ones(8))])
        >>> told = look(Seen(jnp.ones((8, 8)), deltas, jnp.ones(2)))
        >>> told["ranks"].tolist(), bool(told["growth"] > 0)
        ([8, 1], True)
    """
    ranks = lax.map(lambda delta: numerical_rank(delta, rounding(seen.base + delta)), seen.deltas)
    return {"ranks": ranks, "growth": growth(seen)}


def growth(seen: Seen) -> Float[Array, ""]:
    """How long ACE's merged delta is, over the length of the sum of as many unrelated deltas.

    Example:
        >>> from cfmerge.methods import Seen
        >>> deltas = jnp.stack([jnp.eye(4), jnp.eye(4)[::-1]])
        >>> bool(growth(Seen(jnp.zeros((4, 4)), deltas, jnp.ones(2))) < 2)
        True
    """
    method = ace()
    statistic = method.init(seen.base)
    for delta, weight in zip(seen.deltas, seen.weights, strict=True):
        statistic = method.see(statistic, delta, weight)
    return method.solve(statistic)[1]["growth"]


def chosen(
    kind: Kind, sides: tuple[int, int], ranks: Sequence[int], grown: float, weights: Sequence[Any] = ()
) -> Branch:
    """The branch of the rule that a tensor takes.

    Args:
        kind: a matrix or a convolution.
        sides: outputs and inputs of the canonical matrix.
        ranks: of the deltas; 0 of an expert that did not change the tensor.
        grown: `growth` of ACE's merge.
        weights: the experts'.

    Example:
        >>> chosen(Kind.MATRIX, (64, 64), [8, 8], 1.0).method, chosen(Kind.MATRIX, (64, 64), [8, 64], 2.5).method
        ('opcm', 'dc_merge')
    """
    if kind is Kind.CONVOLUTION:
        return CONVOLUTION
    if max(ranks, default=0) == 0:
        return UNCHANGED
    if max(ranks) <= LOW * min(sides):
        return LOW_RANK if len(set(map(float, weights))) <= 1 else LOW_RANK_WEIGHTED
    return GROWING if grown > GROWN else FULL
