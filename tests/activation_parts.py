"""Builders for tests of activations: a small network, draws, Grams in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from cfmerge.formats.pytree import flatten
from cfmerge.models import classify


def gram(rows):
    rows = np.asarray(rows, np.float64).reshape(-1, np.shape(rows)[-1])
    return rows.T @ rows / len(rows)


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.max(np.abs(b)))


def draw(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def fit(tree, grams):
    """Every Gram fits the kernel of its name, as `merge_params` sees it."""
    leaves = flatten(tree)[0]
    parameters = classify({name: (leaf.shape, str(leaf.dtype)) for name, leaf in leaves.items()})
    for name, found in grams.items():
        batch, _, inputs = parameters[name].canonical
        assert found.shape == ((inputs, inputs) if batch == 1 else (batch, inputs, inputs))


class Mlp(nn.Module):
    widths: tuple[int, ...] = (5, 4, 3)

    @nn.compact
    def __call__(self, x):
        for number, width in enumerate(self.widths):
            x = nn.Dense(width, name=f"Dense_{number}")(jnp.tanh(x) if number else x)
        return x


class Many(nn.Module):
    """Attention, a convolution, a dense layer that is called twice, a normed one, an embedding."""

    @nn.compact
    def __call__(self, image, token, train=True):
        x = nn.Conv(4, (3, 2), strides=(2, 1), name="conv")(image)
        x = x.reshape(x.shape[0], -1, 4) + nn.Embed(3, 4)(token)[:, None]
        x = nn.MultiHeadDotProductAttention(2, name="attention")(x, nn.LayerNorm()(x))
        shared = nn.Dense(4, name="shared")
        x = shared(jnp.tanh(shared(nn.Dropout(0.5, deterministic=not train)(x))))
        return nn.BatchNorm(use_running_average=not train)(nn.Conv(8, (3,), feature_group_count=4, name="grouped")(x))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + jnp.tanh(nn.Dense(4)(nn.LayerNorm()(x))), None


class Stacked(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            nn.remat(Block), variable_axes={"params": 0, "intermediates": 0}, split_rngs={"params": True}, length=3
        )
        return layers(name="layers")(x, None)[0]
