"""Linearised fine-tuning (Liu, Golatkar and Soatto, arXiv 2307.08122): a component trained by any optimiser of Optax.

    z  =  f(x; W_0) + J(x) V                                     f_lin, linear in V; V the tangent that is trained
    loss(V)  =  mean((z - kappa y)^2)  +  penalty |V|_2          y: targets, one-hot; the norm is not squared

kappa is 15 where components learn classes of their own, 5 where they learn shards of the data, and the penalty 1e-5.
All components start from the same base, and their tangents at 1e-12.
"""

import fnmatch
import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from cfmerge.compose.tangents import Function, Tangent, linearised
from cfmerge.errors import CfmergeError, nearest
from cfmerge.formats.pytree import flatten

START, PENALTY = 1e-12, 1e-5


class State(NamedTuple):
    """The state of a training: the tangent by name of leaf, and the optimiser's own state."""

    tangent: Tangent
    optimiser: Any


def start(base: Any, trains: str | Sequence[str] = "*", value: float = START) -> dict[str, jax.Array]:
    """The tangent that training starts from: `value` in every leaf that trains, by name.

        >>> list(start({"stem": {"kernel": jnp.ones((2, 2))}, "head": {"kernel": jnp.ones((2, 1))}}, "head/*"))
        ['head/kernel']

    Args:
        trains: patterns of the leaves that train; the others are frozen, and so are integers.

    Raises:
        CfmergeError: a pattern matches no leaf.
    """
    wanted = [trains] if isinstance(trains, str) else list(trains)
    leaves = {name: leaf for name, leaf in flatten(base)[0].items() if jnp.issubdtype(leaf.dtype, jnp.inexact)}
    for pattern in wanted:
        if not fnmatch.filter(leaves, pattern):
            raise CfmergeError(f"trains: {pattern!r} matches no leaf of floats in the base{nearest(pattern, leaves)}")
    return {
        name: jnp.full_like(leaf, value)
        for name, leaf in leaves.items()
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in wanted)
    }


def loss(
    function: Function,
    base: Any,
    tangent: Tangent,
    inputs: Any,
    targets: Any,
    kappa: float = 15.0,
    penalty: float = PENALTY,
) -> jax.Array:
    """`mean((f_lin(x; V) - kappa y)^2) + penalty |V|_2`.

    Args:
        inputs: the network's input, or a tuple of several.
        targets: `y`, of the outputs' shape.
    """
    outputs = linearised(function, base, tangent, *(inputs if isinstance(inputs, tuple) else (inputs,)))
    return jnp.mean((outputs - kappa * targets) ** 2) + penalty * norm(tangent)


def norm(tangent: Tangent) -> jax.Array:
    """`|V|_2` over all leaves; its gradient at zero is zero."""
    squares = sum(jnp.sum(jnp.abs(leaf.astype(jnp.float32)) ** 2) for leaf in tangent.values())
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)


@functools.partial(jax.jit, static_argnames=("function", "optimiser"))
def step(
    function: Function,
    optimiser: optax.GradientTransformation,
    base: Any,
    state: State,
    inputs: Any,
    targets: Any,
    kappa: float = 15.0,
    penalty: float = PENALTY,
) -> tuple[State, jax.Array]:
    """The state after one batch, and the batch's loss."""

    def of(tangent: Tangent) -> jax.Array:
        return loss(function, base, tangent, inputs, targets, kappa, penalty)

    value, gradient = jax.value_and_grad(of)(state.tangent)
    updates, moments = optimiser.update(gradient, state.optimiser, state.tangent)
    return State(optax.apply_updates(state.tangent, updates), moments), value


def fit(
    function: Function,
    base: Any,
    batches: Iterable[tuple[Any, Any]],
    optimiser: optax.GradientTransformation,
    *,
    trains: str | Sequence[str] = "*",
    kappa: float = 15.0,
    penalty: float = PENALTY,
    initial: float | Tangent = START,
) -> Tangent:
    """The tangent `{leaf: array}` after one step for each batch, to be added to `Tangents`.

        >>> base = {"w": jnp.zeros(2)}
        >>> batches = [(jnp.eye(2), jnp.array([1.0, -1.0]))] * 50
        >>> fit(lambda p, x: x @ p["w"], base, batches, optax.sgd(0.5), kappa=2.0)["w"].round(2)
        Array([ 2., -2.], dtype=float32)

    Args:
        function: `f(parameters, inputs)`; the same object in every call, so that a step is compiled once.
        batches: pairs `(inputs, targets)`.
        optimiser: the authors take AdamW at 1e-4, a tenth of it after half of the epochs and again after 4/5.
        trains: patterns of the leaves that train.
        initial: every entry's value at the start; or a tangent to go on from.
    """
    tangent = dict(initial) if not isinstance(initial, int | float) else start(base, trains, initial)
    state = State(tangent, optimiser.init(tangent))
    for inputs, targets in batches:
        state, _ = step(function, optimiser, base, state, inputs, targets, kappa, penalty)
    return state.tangent
