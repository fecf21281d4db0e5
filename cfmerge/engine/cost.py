"""What a method's statistic takes, found out by tracing it."""

import functools

import jax
import jax.numpy as jnp

from cfmerge.engine.steps import Like
from cfmerge.methods import Context, Method


def statistic_size(method: Method, shape: tuple[int, ...], experts: int) -> int:
    """Numbers in the statistic of one tensor of that shape when all experts were seen."""
    return _size(Like(method), shape, experts)


@functools.lru_cache(maxsize=4096)
def _size(like: Like, shape: tuple[int, ...], experts: int) -> int:
    method = like.method
    array = jax.ShapeDtypeStruct(shape, jnp.float32)
    moment = array
    if method.moments == "input_gram":
        moment = jax.ShapeDtypeStruct((shape[-1], shape[-1]), jnp.float32)

    def all_seen(base: jax.Array, delta: jax.Array, moment: jax.Array) -> object:
        statistic = method.init(base)
        for number in range(experts):
            context = Context(jax.random.key(0), number, moment)
            statistic = method.see(statistic, delta, jnp.ones((), base.dtype), context)
        return statistic

    leaves = jax.tree.leaves(jax.eval_shape(all_seen, array, array, moment))
    return sum(leaf.size for leaf in leaves)
