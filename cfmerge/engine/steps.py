"""The compiled steps of a merge, over a stack of stored tensors of one shape, method and layout.

    statistics = start(base)                                   base (stack, *stored shape), any float dtype
    statistics, finite = step(statistics, base, expert, weight)
    merged, reports, finite = finish(statistics, base, dtype)

Canonical views are taken inside, deltas are formed in the computing dtype. The stack is walked by `lax.map`, one
compiled body for all tensors: so a result does not depend on what it is stacked with.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool

from cfmerge.methods import Method
from cfmerge.parameters import from_canonical, to_canonical


class Steps(NamedTuple):
    start: Callable[[Array], Any]
    step: Callable[..., tuple[Any, Bool[Array, " stack"]]]
    finish: Callable[..., tuple[Array, dict[str, Array], Bool[Array, " stack"]]]


@functools.lru_cache(maxsize=1024)
def compiled(method: Method, layout: str, compute: str) -> Steps:
    """The three steps, jitted; compiled once for every shape that they meet. `step` uses up its statistics.

    Args:
        layout: of the stored tensors, see `cfmerge.parameters`; empty for an entrywise method.
        compute: `float32` or `float64` (then call under `jax.enable_x64(True)`).
    """
    plain = steps(method, layout, compute)
    return Steps(jax.jit(plain.start), jax.jit(plain.step, donate_argnums=0), jax.jit(plain.finish, static_argnums=2))


def steps(method: Method, layout: str, compute: str) -> Steps:
    """The three steps, not jitted."""
    entrywise = method.scope == "entry"
    dtype = jnp.dtype(compute)
    over = _map if not entrywise else _vmap

    def canonical(stack: Array) -> Array:
        """(stack, *stored) to (stack * batch, out, in)."""
        stack = stack.astype(dtype)
        if entrywise:
            return stack
        views = to_canonical(stack, "b" + layout)
        return views

    def finite(stack: Array) -> Bool[Array, " stack"]:
        return jnp.isfinite(stack).all(axis=tuple(range(1, stack.ndim)))

    def start(base: Array) -> Any:
        return over(method.init, canonical(base))

    def step(statistics: Any, base: Array, expert: Array, weight: Array) -> tuple[Any, Array]:
        weight = jnp.asarray(weight, dtype)

        def one(statistic: Any, base: Array, expert: Array) -> Any:
            return method.update(statistic, expert - base, weight)

        return over(one, statistics, canonical(base), canonical(expert)), finite(expert)

    def finish(statistics: Any, base: Array, out: str) -> tuple[Array, dict[str, Array], Array]:
        merged, reports = over(method.solve_with_report, statistics)
        if not entrywise:
            merged = from_canonical(merged, "b" + layout, base.shape)
            reports = {name: value.reshape(base.shape[0], -1) for name, value in reports.items()}
        result = (base.astype(dtype) + merged).astype(out)
        return result, reports, finite(result)

    return Steps(start, step, finish)


def _map(function: Callable[..., Any], *stacks: Any) -> Any:
    def one(arguments: Any) -> Any:  # the barriers: compiled alike whether it is looped over or stands alone
        return lax.optimization_barrier(function(*lax.optimization_barrier(arguments)))

    return lax.map(one, stacks)


def _vmap(function: Callable[..., Any], *stacks: Any) -> Any:
    return jax.vmap(function)(*stacks)
