"""The compiled step of a unit whose experts are adapters: base plus `U x V^T`, the merge of cores in a joint basis.

    merged, reports, finite = merge(settings, base, experts, inputs, dtype)

An expert is `(left, right)`, stacks `(stack, rows, r)` and `(stack, r, columns)` of factors whose product is its delta
in the rows and columns of the stored tensor. Bases, cores and the method are computed in float64, which costs little at
these sizes, and only the last product in the computing dtype: it is the one array of the dense shape.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from cfmerge import linalg
from cfmerge.core.joint import composed_factors, cores_of, merged_factors
from cfmerge.core.part import Composer, Context
from cfmerge.core.random import key_from
from cfmerge.engine.compiling import options
from cfmerge.engine.inputs import INPUTS, SETTINGS, SHARED, STACK, Inputs, Settings
from cfmerge.engine.steps import all_finite, as_parts, finite, made, one_after_the_other

Factors = tuple[Array, Array]
WIDE = "float64"


@functools.lru_cache(maxsize=64)
def compiled(
    layout: str, compute: str, as_factors: bool = False, quick: bool = False, mesh: Mesh | None = None
) -> Callable[..., Any]:
    """The step, jitted; call it under `jax.enable_x64(True)`.

    Args:
        layout: of the stored tensors: `oi`, `io`, or `o` and several `i`.
        compute: the dtype of the last product, and of the sum.
        as_factors: the result is `(U x, V^T)`, without the base, as the experts' factors lie.
        quick, mesh: see `cfmerge.engine.steps.compiled`.
    """
    step = functools.partial(merge, layout, compute, as_factors)
    if mesh is not None:
        step = functools.partial(_shared_out, step, mesh)
    return jax.jit(step, static_argnums=4, compiler_options=options(quick))


def merge(
    layout: str,
    compute: str,
    as_factors: bool,
    settings: Sequence[Settings],
    base: Array,
    experts: Sequence[Factors],
    inputs: Sequence[Inputs],
    out: str,
) -> tuple[Any, Any, Array]:
    """The step, not jitted."""
    columns_first = layout == "io"  # a product's transposed is that of the factors', in the other order

    def canonical(factors: Factors) -> Factors:
        left, right = (factor.astype(WIDE) for factor in factors)
        return (right.T, left.T) if columns_first else (left, right)

    def one(calls: Any, tensor: Any, base: Array, experts: list[Factors], weights: Any, digests: Any) -> Any:
        rules = [made(settings[0], call, tensor, WIDE) for call in calls]
        lefts, rights = zip(*map(canonical, experts), strict=True)
        contexts = [
            Context(None if digest is None else key_from(own.seed, digest), own.number)
            for own, digest in zip(inputs, digests, strict=True)
        ]
        if isinstance(rules[0], Composer):
            return composed_factors(rules, cores_of(lefts, rights), weights, contexts)
        left, right, report = merged_factors(rules, cores_of(lefts, rights), weights, contexts)
        right = jnp.broadcast_to(right, (*left.shape[:-2], *right.shape[-2:]))
        if columns_first:
            left, right = jnp.swapaxes(right, -1, -2), jnp.swapaxes(left, -1, -2)
        left, right = left.astype(compute), right.astype(compute)
        if as_factors:
            return (left, right), report
        delta = linalg.matmul(left, right)
        return (base.astype(compute) + delta.reshape(*delta.shape[:-2], *base.shape)).astype(out), report

    calls = [own.call for own in settings]
    weights = [jnp.asarray(own.weight, WIDE) for own in inputs]
    own = calls, settings[0].tensor, base, list(experts), weights, [own.digest for own in inputs]
    merged, reports = one_after_the_other(one, *own)
    if isinstance(settings[0].method, Composer):
        merged = as_parts(merged, base.shape[0], False, out)
    flags = [finite(left) & finite(right) for left, right in experts]
    flags.append(all_finite(merged))
    return merged, jax.tree.map(lambda value: value.reshape(base.shape[0], -1), reports), jnp.stack(flags)


def _shared_out(step: Callable[..., Any], mesh: Mesh, *arguments: Any) -> Any:
    """The step under `shard_map`: each device walks its share of the stack."""
    settings, base, experts, inputs, out = arguments
    specs = [SETTINGS] * len(settings), STACK, [(STACK, STACK)] * len(experts), [INPUTS] * len(inputs)
    results = (STACK, STACK, PartitionSpec(None, SHARED))
    over = functools.partial(jax.shard_map, mesh=mesh, in_specs=specs, out_specs=results, check_vma=False)
    return over(lambda *share: step(*share, out))(settings, base, experts, inputs)
