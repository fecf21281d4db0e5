"""Flax models zipped by joint moments: spaces traced, features collected, statistics of BatchNorm estimated again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from cfmerge.activations import collect_joint_linen, collect_joint_nnx, reset_norms_linen
from cfmerge.activations.spaces import spaces_of_linen, spaces_of_nnx
from cfmerge.align import load_zipped, zip_models
from cfmerge.errors import CfmergeError


class Convolutional(nn.Module):
    classes: int = 3

    @nn.compact
    def __call__(self, x, train=False):
        for number, width in enumerate((4, 6)):
            x = nn.Conv(width, (3, 3), name=f"conv{number}")(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, name=f"norm{number}")(x))
        return nn.Dense(self.classes, name="out")(x.mean(axis=(1, 2)))


@pytest.fixture(scope="module")
def images():
    return jnp.asarray(np.random.default_rng(0).normal(size=(16, 5, 5, 2)), jnp.float32)


def test_convolutional_nets_with_batch_norm_are_zipped_and_their_statistics_estimated_again(images, tmp_path):
    """Of a net and its like with other weights behind the stop, the trunk is the net's."""
    model = Convolutional()
    a = model.init(jax.random.key(0), images)
    a = reset_norms_linen(model, a, [images])
    b = {**a, "params": {**a["params"], "out": jax.tree.map(lambda leaf: leaf + 1, a["params"]["out"])}}
    spaces = spaces_of_linen(model, a, images)
    moments = collect_joint_linen(model, [a, b], [images], spaces, names=["a", "b"])
    with pytest.raises(CfmergeError, match=r"'batch_stats/norm0/mean' and 3 more: running .* reset_norms=True"):
        zip_models(spaces, {"a": a, "b": b}, moments)
    zipped = zip_models(spaces, {"a": a, "b": b}, moments, reset_norms=True)
    assert set(zipped.heads["b"]) == {"params/out/kernel", "params/out/bias"}
    again = load_zipped(zipped.save(tmp_path / "zip"))
    for name, own in (("a", a), ("b", b)):
        reset = reset_norms_linen(model, again.model(name), [images])
        np.testing.assert_allclose(model.apply(reset, images), model.apply(own, images), atol=1e-5)
    with pytest.raises(CfmergeError, match=r"the moments are of a, b, the models are b, a; give them in the order"):
        zip_models(spaces, {"b": b, "a": a}, moments, reset_norms=True)


def test_nnx_models_are_zipped_and_merged_into_their_graph():
    class Network(nnx.Module):
        def __init__(self, seed):
            rngs = nnx.Rngs(seed)
            self.first, self.second = nnx.Linear(5, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.second(self.dropout(jnp.tanh(self.first(x))))

    x = jnp.asarray(np.random.default_rng(1).normal(size=(20, 5)), jnp.float32)
    models = [Network(0), Network(1)]
    for one in models:
        one.eval()
    graph, _ = nnx.split(models[0])
    states = [nnx.state(one, nnx.Param) for one in models]
    table = spaces_of_nnx(models[0], x)
    space = table.names[0]
    moments = collect_joint_nnx(models, [x], table)
    states = [nnx.state(one) for one in models]
    zipped = zip_models(table, states, moments, width={space: 16})
    outputs = zipped.apply(lambda state, x: nnx.merge(graph, state)(x), x)
    for name, one in zip(zipped.models, models, strict=True):
        np.testing.assert_allclose(outputs[name], one(x), atol=1e-5)
