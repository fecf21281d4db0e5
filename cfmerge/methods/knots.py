"""KnOTS and Core Space: experts merged in directions that they share, by a rule of entries or any other.

G. Stoica et al., Model Merging with SVD to Tie the Knots, ICLR 2025 (KnOTS; code gstoica27/KnOTS):

    [D_1 .. D_T] = U diag(s) [V_1^T .. V_T^T],    X = U diag(s) rule(V_1^T .. V_T^T)

`U` and `s^2` come from the m x m Gram `sum_t D_t D_t^T`. With the sum as rule it is task arithmetic. The rule sees the
`V_t^T` without the singular values.

Core Space (arXiv 2509.17786; code apanariello4/core-space-merging), for adapters `D_t = B_t A_t`:

    [B_1 .. B_T] = U_B .. ,  [A_1; ..; A_T] = .. V_A^T,    X = U_B rule(U_B^T D_1 V_A .. U_B^T D_T V_A) V_A^T

with the bases from an SVD or a QR. A rule of entries gives another merge in each basis: so the basis is a parameter.
Dense deltas have no factors: theirs are `U sqrt(s)` and `sqrt(s) V^T` of their SVD. Adapters' factors have the root of
their scale each.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from cfmerge import linalg
from cfmerge.core.checks import as_array, check, check_number
from cfmerge.core.joint import Beyond, Joint
from cfmerge.core.numbers import Number
from cfmerge.core.part import NO_CONTEXT, Context, Method, Needs, Report
from cfmerge.core.registry import register
from cfmerge.methods.consensus import ties


class Expert(NamedTuple):
    """One expert: its delta (or core), weight, the factors of its delta where they are known, key and number."""

    delta: Array
    weight: Array
    factors: tuple[Array, Array] | None
    context: Context


Experts = tuple[Expert, ...]


@register
def knots(method: Method | None = None, rank: int | None = None, rtol: Number = 1e-5) -> Method:
    """A rule applied to the right singular vectors of all deltas side by side.

    Args:
        method: the rule, such as `ties(density=0.3)`, `dare_linear(p=0.5)` or `task_arithmetic(scale=1)`; none: ties.
            What it takes of a whole model it takes of each matrix.
        rank: directions of the outputs that are kept; none: all that the adapters' ranks allow, min(out, in * T) of
            dense deltas.
        rtol: singular values up to this share of the largest count as zero.

    Source: Stoica et al., Model Merging with SVD to Tie the Knots (KnOTS), ICLR 2025, arXiv 2410.19735.
    """
    rule = _rule("knots", method)
    check(rank is None or rank >= 1, f"knots: rank must be at least 1, got {rank}")
    check_number("knots: rtol", rtol, 0, 1)

    def tied(experts: Experts, v: Float[Array, "n q"] | None = None) -> tuple[Any, Report]:
        m, n = experts[0].delta.shape
        most = min(m, n if v is not None else n * len(experts))
        k = min(rank or most, most)
        _, vectors = linalg.symmetric_eigen(sum(linalg.gram(one.delta.T) for one in experts))  # type: ignore[arg-type]
        u = vectors[:, ::-1][:, :k]
        rows = [linalg.matmul(u.T, one.delta) for one in experts]
        s = linalg.norm(jnp.concatenate(rows, axis=1), 1)[:, 0]  # not the eigenvalues: they are squares
        kept = s > as_array(rtol, s.dtype) * jnp.max(s)
        inverse = jnp.where(kept, 1 / jnp.where(kept, s, 1), 0)[:, None]
        wide = [inverse * own if v is None else linalg.matmul(inverse * own, v.T) for own in rows]
        merged, told = _merged(rule, wide, experts)
        left = u * jnp.where(kept, s, 0)
        told = {**told, "directions": jnp.sum(kept), "unused": k - jnp.sum(kept)}
        return (linalg.matmul(left, merged) if v is None else Beyond(left, merged)), told

    def on_cores(basis: Joint) -> Method:
        return _of_all(functools.partial(tied, v=basis.v), needs, notes)

    needs, notes = _needs(rule), {**NOTES, **rule.notes}
    return _of_all(tied, needs, notes, on_cores)


NOTES = {
    "unused": (
        lambda value: value > 0,
        "the deltas have {value:.0f} directions fewer than were to be kept: a rule with a density counts the zeros; "
        "give rank",
    )
}


@register
def core_space(basis: Literal["svd", "qr"] = "svd", method: Method | None = None, rank: int | None = None) -> Method:
    """A rule applied to the cores of adapters in the basis of all their factors.

    Args:
        basis: "svd" or "qr" of the factors side by side.
        method: the rule, such as `ties(density=0.3)` or `tsv_m()`; none: ties. What it takes of a whole model it takes
            of each matrix.
        rank: singular triplets that are kept of each dense delta; none: min(out, in). Adapters have their factors.

    Source: Panariello et al., Accurate and Efficient Low-Rank Model Merging in Core Space, NeurIPS 2025,
        arXiv 2509.17786.
    """
    rule = _rule("core_space", method)
    check(rank is None or rank >= 1, f"core_space: rank must be at least 1, got {rank}")

    def cored(experts: Experts) -> tuple[Array, Report]:
        factors = [one.factors or _balanced(one.delta, rank) for one in experts]
        u, lefts = _side([left for left, _ in factors], basis)
        v, rights = _side([right.T for _, right in factors], basis)
        cores = [linalg.matmul(left, right.T) for left, right in zip(lefts, rights, strict=True)]
        merged, told = _merged(rule, cores, experts)
        return linalg.matmul(linalg.matmul(u, merged), v.T), told

    return _of_all(cored, _needs(rule), rule.notes, lambda joint: _of_all(cored, _needs(rule), rule.notes))


def _balanced(delta: Float[Array, "m n"], rank: int | None) -> tuple[Array, Array]:
    """`U_k sqrt(s_k)` and `sqrt(s_k) V_k^T`."""
    u, s, vt = linalg.leading(delta, min(rank or min(delta.shape), *delta.shape))
    root = linalg.root(s)
    return u * root, root[:, None] * vt


def _side(factors: Sequence[Float[Array, "m k"]], basis: str) -> tuple[Float[Array, "m r"], list[Array]]:
    """An orthonormal basis of what all columns span, and each expert's in it: zero where the basis is a later one's."""
    columns = jnp.concatenate(factors, axis=1)
    side = linalg.thin_svd(columns)[0] if basis == "svd" else linalg.orthonormal(columns[:, : columns.shape[0]])
    inside = linalg.matmul(side.T, columns)
    rounding = linalg.rank_cutoff(columns.shape, columns.dtype) * linalg.norm(columns, 0)
    inside = jnp.where(jnp.abs(inside) > rounding, inside, 0)  # it would have votes in a rule that elects signs
    ends = itertools.accumulate((factor.shape[1] for factor in factors), initial=0)
    return side, [inside[:, a:b] for a, b in itertools.pairwise(ends)]


# --- rules within rules -------------------------------------------------------------------------------------------


def _rule(outer: str, method: Method | None) -> Method:
    """The inner method, checked."""
    rule = ties() if method is None else method
    needs = rule.needs
    asked = [name for name in ("moments", "ranks", "factors") if getattr(needs, name)]
    check(not asked, f"{outer}: {rule.name} asks for {' and '.join(asked)} of each delta, which no basis has")
    numbers = dict(rule.call.values()) if rule.call else {}
    listed = [key for key, value in numbers.items() if isinstance(value, tuple | list | dict)]
    told = f"{outer}: {rule.name} takes one number for all experts and tensors here, found many for {listed}"
    check(not listed, told)
    return rule


def _needs(rule: Method) -> Needs:
    own = rule.needs
    return Needs(
        experts=own.experts, weights=own.weights, normalises=own.normalises, ordered=own.ordered, random=own.random,
        factors="used",
    )  # fmt: skip


def _merged(rule: Method, arrays: Sequence[Array], experts: Experts) -> tuple[Array, Report]:
    statistic = rule.init(jnp.zeros_like(arrays[0]))
    for array, expert in zip(arrays, experts, strict=True):
        statistic = rule.see(statistic, array, expert.weight, expert.context)
    return rule.solve(statistic)


def _of_all(
    function: Callable[[Experts], tuple[Any, Report]],
    needs: Needs,
    notes: Any,
    joint: Callable[[Joint], Method] | bool = False,
) -> Method:
    """The method whose merged delta is a function of all experts."""

    def update(statistic: Experts, delta: Array, weight: float | Array = 1.0, context: Context = NO_CONTEXT) -> Experts:
        own = Context(context.key, context.number)
        return (*statistic, Expert(delta, jnp.asarray(weight, delta.dtype), context.factors, own))

    return Method(
        function.__name__ if hasattr(function, "__name__") else "all",
        lambda base: (),
        update,
        function,
        needs=needs,
        additive=False,
        notes=notes,
        joint=joint,
    )
