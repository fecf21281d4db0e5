"""A tiny network with components over it, for the tests of Tangent Model Composition."""

import jax.numpy as jnp
import numpy as np

from cfmerge.compose.tangents import Tangents

X = jnp.asarray(np.random.default_rng(9).standard_normal((4, 3)), jnp.float32)


def base(seed=0):
    """Two layers and a counter: floats of two shapes, and integers that no component may move."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    return {"hidden": {"kernel": draw(3, 5), "bias": draw(5)}, "head": {"kernel": draw(5, 2)}, "steps": jnp.int32(7)}


def network(params, x):
    return jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"]) @ params["head"]["kernel"]


def component(seed):
    """A component of all floats."""
    rng = np.random.default_rng(100 + seed)
    shapes = {"hidden/kernel": (3, 5), "hidden/bias": (5,), "head/kernel": (5, 2)}
    return {name: jnp.asarray(0.1 * rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}


def head_alone(seed):
    """A component of one leaf, as a tree."""
    return {"head": {"kernel": component(seed)["head/kernel"]}}


def three():
    """Components `a` and `b` of all floats and `c` of the head alone, with unequal coefficients."""
    made = Tangents(base()).add("a", component(1), 0.5).add("b", component(2), -0.25)
    return made.add("c", head_alone(3), 2.0)
