"""Adapters merged in a joint basis: methods that commute with orthonormal bases never see a dense delta.

For deltas given as factors, `D_t = L_t R_t` (L_t m x r_t, R_t r_t x n), with `T` experts (Core Space, arXiv 2509.17786)

    [L_1 .. L_T  1/sqrt(m)] = U [l_1 .. l_T  u],   [R_1; ..; R_T] = [r_1; ..; r_T] V^T      U, V orthonormal
    D_t = U M_t V^T,   M_t = l_t r_t                                                       exactly
    X = U x V^T,       x the merge of the cores M_t

by any method for which the merge of the `U M_t V^T` is `U x V^T`. The ones are in the basis of the outputs, so that the
centring of rows, `J = I - 1 1^T / m`, stays in it: `J U = U (I - u u^T)`. The cost is that of `sum r_t`.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from cfmerge import linalg
from cfmerge.core.part import Composer, Context, Method, Part, Report

P = TypeVar("P", bound=Part)


class Joint(NamedTuple):
    """All that a method may ask of the joint basis `U, V` of the cores that it sees.

    Attributes:
        shape: of a dense delta, `(out, in)`.
        outputs: `u = U^T 1 / sqrt(out)`, the direction that centring takes away; of length 1.
        inputs: `v = V^T 1`, the sums over the inputs.
        v: `V`, for a merge that leaves the inputs' basis, see `Beyond`.
    """

    shape: tuple[int, int]
    outputs: Float[Array, " p"]
    inputs: Float[Array, " q"]
    v: Float[Array, "n q"]


class Beyond(NamedTuple):
    """A merged core `left @ right` that has left the inputs' basis: `X = U left right`."""

    left: Float[Array, "p k"]
    right: Float[Array, "k n"]


class Cores(NamedTuple):
    """Deltas in their joint basis.

    Attributes:
        u, v: the bases; a column is zero where there is one direction less.
        lefts, rights: `l_t` and `r_t`, the factors in it.
    """

    u: Float[Array, "m p"]
    v: Float[Array, "n q"]
    lefts: Sequence[Float[Array, "p r"]]
    rights: Sequence[Float[Array, "r q"]]
    joint: Joint

    @property
    def cores(self) -> list[Float[Array, "p q"]]:
        """`M_t`."""
        return [linalg.matmul(left, right) for left, right in zip(self.lefts, self.rights, strict=True)]


def cores_of(lefts: Sequence[Float[Array, "m r"]], rights: Sequence[Float[Array, "r n"]]) -> Cores:
    """The joint basis of deltas given as factors, and their cores.

    Example:
        >>> left, right = jnp.array([[1.0], [2.0], [2.0]]), jnp.array([[3.0, 4.0]])
        >>> found = joint.cores_of([left, 2 * left], [right, right])
        >>> found.u.shape, found.v.shape                                    # the ones are in the basis of the outputs
        ((3, 3), (2, 2))
        >>> bool(jnp.allclose(found.u @ found.cores[1] @ found.v.T, 2 * left @ right, atol=1e-5))
        True
    """
    m, n = lefts[0].shape[0], rights[0].shape[1]
    ones = jnp.full((m, 1), m**-0.5, lefts[0].dtype)
    u, columns = linalg.span(jnp.concatenate([*lefts, ones], axis=1))
    v, rows = linalg.span(jnp.concatenate([*rights]).T)
    spans = list(itertools.pairwise(itertools.accumulate((left.shape[1] for left in lefts), initial=0)))
    own = [columns[:, a:b] for a, b in spans], [rows[:, a:b].T for a, b in spans]
    return Cores(u, v, *own, Joint((m, n), columns[:, -1], jnp.sum(v, axis=0), v))


def in_joint(part: P, joint: Joint) -> P:
    """The part for cores in that basis; one that says that it commutes, see `Part.joint`."""
    return part.joint(joint) if callable(part.joint) else part  # type: ignore[return-value]


def merged_factors(
    rules: Sequence[Method], cores: Cores, weights: Sequence[Any], contexts: Sequence[Context]
) -> tuple[Float[Array, "... m q"], Float[Array, "... q n"], Report]:
    """`U x` and `V^T`, whose product is the merged delta, and the report; of a sweep one `U x` (and `V^T`) a result.

    Args:
        rules: the method with the numbers of each expert.
    """
    merged, report = _solved(rules, cores, weights, contexts)
    core, rows = merged if isinstance(merged, Beyond) else (merged, cores.v.T)
    return linalg.matmul(cores.u, core), rows, report


def composed_factors(
    rules: Sequence[Method], cores: Cores, weights: Sequence[Any], contexts: Sequence[Context]
) -> tuple[Mapping[str, Array], Report]:
    """The parts of a composer that sees the cores, out of their basis, and the report."""
    parts, report = _solved(rules, cores, weights, contexts)
    composer = rules[0]
    assert isinstance(composer, Composer)
    assert composer.out_of is not None
    return composer.out_of(parts, cores.u, cores.v), report


def _solved(
    rules: Sequence[Method], cores: Cores, weights: Sequence[Any], contexts: Sequence[Context]
) -> tuple[Any, Report]:
    own = [in_joint(rule, cores.joint) for rule in rules]
    statistic = own[0].init(jnp.zeros((cores.u.shape[1], cores.v.shape[1]), cores.u.dtype))
    for t, (core, weight, context) in enumerate(zip(cores.cores, weights, contexts, strict=True)):
        statistic = own[t].see(statistic, core, weight, context._replace(factors=(cores.lefts[t], cores.rights[t])))
    return own[0].solve(statistic)


def out_of_basis(method: Method, basis: Joint) -> Method:
    """The method of cores, its merge always as `Beyond`, all of one shape."""

    def solve(statistic: Any) -> tuple[Beyond, Report]:
        merged, report = method.solve(statistic)
        if not isinstance(merged, Beyond):
            return Beyond(merged, basis.v.T), report  # type: ignore[arg-type]
        spare = (0, basis.v.shape[1] - merged.left.shape[1])
        return Beyond(jnp.pad(merged.left, ((0, 0), spare)), jnp.pad(merged.right, (spare, (0, 0)))), report

    return dataclasses.replace(method, solve=solve, call=None)  # type: ignore[arg-type]


def merge_factors(
    method: Method,
    lefts: Sequence[Float[Array, "m r"]],
    rights: Sequence[Float[Array, "r n"]],
    weights: Sequence[float] | None = None,
) -> tuple[Float[Array, "m q"], Float[Array, "q n"], Report]:
    """The merged delta of adapters, as factors `(left, right)`, and the method's report; no dense delta is formed.

    Args:
        method: one that commutes with bases, see `Part.joint`.
        lefts, rights: the factors of every expert's delta, `D_t = left_t @ right_t`, scales included; the merge is
            computed in their dtype (the merge of files does so in float64).
        weights: of the experts; none: 1 each.

    Example:
        >>> left, right = jnp.array([[1.0], [2.0], [2.0]]), jnp.array([[3.0, 4.0]])
        >>> merged, rows, _ = methods.merge_factors(methods.average(), [left, 3 * left], [right, right])
        >>> bool(jnp.allclose(merged @ rows, 2 * left @ right, atol=1e-4))
        True
    """
    given = [1.0] * len(lefts) if weights is None else weights
    contexts = [Context(number=number) for number in range(len(lefts))]
    return merged_factors([method] * len(lefts), cores_of(lefts, rights), given, contexts)
