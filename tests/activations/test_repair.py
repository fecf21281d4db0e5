"""REPAIR: channels of a merged network vary as those of its parents do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from activation_parts import Stacked, draw
from flax import linen as nn
from flax import nnx
from flax.traverse_util import flatten_dict

from cfmerge.activations import repair_linen, repair_nnx
from cfmerge.align import parse_spaces
from cfmerge.errors import CfmergeError
from cfmerge.formats.pytree import flatten


class Network(nn.Module):
    """A convolution, three dense layers in a row, attention with heads, and an output."""

    bias: bool = True

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (2, 2), name="conv")(x))
        x = nn.relu(nn.Dense(6, use_bias=self.bias, name="one")(x.reshape(len(x), -1, 4)))
        x = x + nn.MultiHeadDotProductAttention(2, name="attention")(x)
        x = nn.relu(nn.Dense(5, name="two")(x))
        return nn.Dense(3, name="out")(x)


TABLE = {
    "conv/kernel": "-, -, in -, c", "conv/bias": "c", "one/kernel": "in c, h", "one/bias": "h",
    **{f"attention/{part}/kernel": "in h, heads, 3" for part in ("query", "key", "value")},
    **{f"attention/{part}/bias": "heads, 3" for part in ("query", "key", "value")},
    "attention/out/kernel": "in heads, in 3, h", "attention/out/bias": "h",
    "two/kernel": "in h, g", "two/bias": "g", "out/kernel": "in g, -", "out/bias": "-",
}  # fmt: skip
REPAIRED = [name.removesuffix("/kernel") for name in TABLE if name.endswith("kernel") and name != "out/kernel"]


SHAPE = (3, 2, 3, 2)


def models(bias=True):
    """A model, merged variables, those of its two parents, their spaces."""
    model = Network(bias)
    start = jax.eval_shape(model.init, jax.random.key(0), jnp.ones(SHAPE))
    own = []
    for seed in range(2):
        draws = np.random.default_rng(seed)
        own.append(jax.tree.map(lambda leaf, draws=draws: 0.5 * draws.normal(size=leaf.shape).astype("f"), start))
    shapes = {name: leaf.shape for name, leaf in flatten(own[0]["params"])[0].items()}
    spaces = parse_spaces({name: text for name, text in TABLE.items() if name in shapes}, shapes)
    return model, jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, *own), own, spaces


@functools.cache
def kept_by(model):
    """The model's run that returns what all of its layers make."""
    run = functools.partial(model.apply, mutable=["intermediates"], capture_intermediates=True)
    return jax.jit(lambda variables, x: run(variables, x)[1]["intermediates"])


def channels(model, variables, *batches):
    """`{layer: (mean, deviation) of each channel of its outputs}`."""
    rows = {name: [] for name in REPAIRED}
    for x in batches:
        found = flatten_dict(kept_by(model)(variables, x))
        outputs = {"/".join(path[:-1]): out[0] for path, out in found.items()}
        for name in REPAIRED:
            last = outputs[name].shape[-1 - TABLE[f"{name}/bias"].count(",") :]
            rows[name].append(np.asarray(outputs[name], np.float64).reshape(-1, np.prod(last)))
    whole = {name: np.concatenate(own) for name, own in rows.items()}
    return {name: np.stack([own.mean(0), own.std(0)]) for name, own in whole.items()}


def off(found, goals):
    """How far the statistics are off, as a share of the mean deviation."""
    return max(np.max(np.abs(found[name] - goals[name])) / np.mean(goals[name][1]) for name in REPAIRED)


def goals_of(model, own, *batches):
    one, two = (channels(model, variables, *batches) for variables in own)
    return {name: 0.75 * one[name] + 0.25 * two[name] for name in REPAIRED}


def test_channels_get_the_mean_and_the_deviation_of_the_parents():
    """All layers that write a space, each behind the repaired ones before it; heads too; the output is left."""
    model, merged, own, spaces = models()
    x = draw(5, *SHAPE)
    result = repair_linen(model, merged, own, iter([x]), spaces, weights=[3, 1])
    goals = goals_of(model, own, x)
    assert off(channels(model, merged, x), goals) > 0.3
    assert off(channels(model, result, x), goals) < 1e-3
    np.testing.assert_array_equal(result["params"]["out"]["kernel"], merged["params"]["out"]["kernel"])
    assert jax.tree.structure(result) == jax.tree.structure(merged)
    some = repair_linen(model, merged, own, [x], match=["one/*", "t*"], weights=[3, 1])
    changed = flatten(jax.tree.map(lambda a, b: np.any(a != b), some["params"], merged["params"]))[0]
    assert {name for name, value in changed.items() if value} == {
        f"{n}/{p}" for n in ("one", "two") for p in ("kernel", "bias")
    }
    np.testing.assert_allclose(channels(model, some, x)["two"], goals["two"], atol=1e-3)


def test_over_several_batches_statistics_are_nearly_the_parents():
    model, merged, own, spaces = models()
    batches = [draw(seed, 40, *SHAPE[1:]) for seed in range(3)]
    result = repair_linen(model, merged, own, batches, spaces, weights=[3, 1])
    goals = goals_of(model, own, *batches)
    assert off(channels(model, result, *batches), goals) < 0.1 * off(channels(model, merged, *batches), goals)


def test_a_model_that_is_its_parents_average_already_is_left_as_it_is():
    model, _, own, spaces = models()
    result = repair_linen(model, own[0], [own[0], own[0]], [draw(5, *SHAPE)], spaces)
    for name, leaf in flatten(result["params"])[0].items():
        np.testing.assert_allclose(leaf, flatten(own[0]["params"])[0][name], rtol=1e-3, atol=1e-3)


def test_layers_without_bias_get_their_deviation_alone_and_a_warning_tells():
    model, merged, own, spaces = models(bias=False)
    x = draw(5, *SHAPE)
    with pytest.warns(UserWarning, match="repair: one/kernel has no bias: its channels get their deviation alone"):
        result = repair_linen(model, merged, own, [x], spaces, weights=[3, 1])
    found, goals = channels(model, result, x), goals_of(model, own, x)
    np.testing.assert_allclose(found["one"][1], goals["one"][1], atol=1e-4)
    assert np.max(np.abs(found["one"][0] - goals["one"][0])) > 0.01
    np.testing.assert_allclose(found["two"], goals["two"], atol=1e-3)


def test_channels_that_never_change_get_their_mean_and_a_warning_tells():
    model, merged, own, spaces = models()
    x = draw(5, *SHAPE)
    kernel = merged["params"]["two"]["kernel"]
    merged["params"]["two"]["kernel"] = np.where(np.arange(5) == 2, 0, kernel)
    with pytest.warns(UserWarning, match="repair: two/kernel has channels that never change"):
        result = repair_linen(model, merged, own, [x], spaces, weights=[3, 1])
    found, goals = channels(model, result, x)["two"], goals_of(model, own, x)["two"]
    np.testing.assert_allclose(found[0], goals[0], atol=1e-3)
    np.testing.assert_allclose(np.delete(found[1], 2), np.delete(goals[1], 2), atol=1e-3)
    np.testing.assert_allclose(found[1][2], 0, atol=1e-5)


class Perceptron(nnx.Module):
    def __init__(self, seed, hidden=6, norm=False):
        rngs = nnx.Rngs(seed)
        self.inner, self.outer = nnx.Linear(4, hidden, rngs=rngs), nnx.Linear(hidden, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(hidden, rngs=rngs) if norm else None

    def __call__(self, x):
        return self.outer(nnx.relu(self.inner(x)))


def test_nnx_models_are_repaired_alike_and_left_as_they_are():
    merged, own, x = Perceptron(0), [Perceptron(1), Perceptron(2)], draw(1, 9, 4)
    own[0].inner.bias[...] = draw(2, 6)
    before = np.asarray(merged.inner.kernel[...])
    state = repair_nnx(merged, own, [x], match="*")
    np.testing.assert_array_equal(merged.inner.kernel[...], before)
    nnx.update(merged, state)
    for layer in (lambda model: model.inner(x), lambda model: model(x)):
        for statistic in (np.mean, np.std):
            goal = np.mean([statistic(np.asarray(layer(one)), axis=0) for one in own], axis=0)
            np.testing.assert_allclose(statistic(np.asarray(layer(merged)), axis=0), goal, atol=1e-4)
    with pytest.raises(CfmergeError, match=r"endpoint 1: 'inner/bias' is \(5,\), expected \(6,\)"):
        repair_nnx(merged, [own[0], Perceptron(1, 5)], [x])
    with pytest.raises(CfmergeError, match=r"has BatchNorm.*nnx\.update\(model, .*reset_norms_nnx"):
        repair_nnx(Perceptron(0, norm=True), own, [x])


def test_what_cannot_be_repaired_is_told_with_the_way_out():
    model, merged, own, spaces = models()
    x = draw(5, *SHAPE)
    with pytest.raises(CfmergeError, match=r"2 endpoints and weights \[1\]"):
        repair_linen(model, merged, own, [x], spaces, weights=[1])
    with pytest.raises(CfmergeError, match="no batches"):
        repair_linen(model, merged, own, [], spaces)
    with pytest.raises(CfmergeError, match=r"expected variables \{'params': ...\}, found a tree of .*conv"):
        repair_linen(model, merged, [one["params"] for one in own], [x], spaces)
    with pytest.raises(CfmergeError, match=r"no kernel that writes a space matches 'out\*'"):
        repair_linen(model, merged, own, [x], spaces, match="out*")
    with pytest.raises(CfmergeError, match=r"has BatchNorm.*reset_norms_linen"):
        repair_linen(model, {**merged, "batch_stats": {"norm": {"mean": jnp.zeros(3)}}}, own, [x], spaces)
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, merged)
    with pytest.raises(CfmergeError, match=r"batch 1: at layer '\S+' the mean or the variance is NaN or infinite"):
        repair_linen(model, broken, own, [x], spaces)
    stacked, rows = Stacked(), draw(1, 7, 4)
    layers = stacked.init(jax.random.key(0), rows)
    with pytest.raises(CfmergeError, match="layer 'layers/Dense_0' is stacked by a scan; leave its kernel out"):
        repair_linen(stacked, layers, [layers], [rows])
    unused = {"params": {**merged["params"], "other": {"kernel": jnp.ones((2, 2))}}}
    with pytest.raises(CfmergeError, match="layer 'other' was not called as Dense"):
        repair_linen(model, unused, [unused], [x])
