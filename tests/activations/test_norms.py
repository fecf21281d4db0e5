"""Running statistics of BatchNorm, estimated again from batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from activation_parts import draw
from flax import linen as nn
from flax import nnx

from cfmerge.activations import reset_norms_linen, reset_norms_nnx
from cfmerge.errors import CfmergeError


class Normed(nn.Module):
    """Two BatchNorms, one told by place, one by its attribute, and dropout; a third one is called if asked for."""

    @nn.compact
    def __call__(self, x, train=True, extra=False):
        x = nn.Conv(3, (2, 2), name="conv")(x)
        x = nn.relu(nn.BatchNorm(name="first")(x, not train))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        x = nn.Dense(4, name="dense")(x.reshape(len(x), -1))
        x = nn.relu(nn.BatchNorm(use_running_average=not train, axis_name="devices", name="second")(x))
        if extra or self.is_initializing():
            x = nn.BatchNorm(use_running_average=not train, name="third")(x)
        return nn.Dense(2, name="out")(x)


def statistics(rows):
    rows = np.asarray(rows, np.float64).reshape(-1, np.shape(rows)[-1])
    return rows.mean(0), rows.var(0)


def check(found, rows):
    for value, expected in zip((found["mean"], found["var"]), statistics(rows), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5)
        assert value.dtype == jnp.float32


def merged():
    """Of two models with their own statistics: the average of all, whose statistics are wrong."""
    model, x = Normed(), 3 * draw(3, 8, 2, 3, 2) + 1
    own = [model.init(jax.random.key(seed), x, train=False) for seed in range(2)]
    for number, variables in enumerate(own):
        variables["params"]["second"]["scale"] = draw(number, 4)
    return model, jax.tree.map(lambda a, b: (a + b) / 2, *own), x


def by_hand(variables, batches):
    """What each of the two is given, every one normalised by its own batch's statistics."""
    params, first, second = variables["params"], [], []
    for x in batches:
        x = nn.Conv(3, (2, 2)).apply({"params": params["conv"]}, x)
        first.append(x)
        mean, var = statistics(x)
        x = nn.relu((x - mean) / np.sqrt(var + 1e-5))
        second.append(x.reshape(len(x), -1) @ params["dense"]["kernel"] + params["dense"]["bias"])
    return np.concatenate(first), np.concatenate(second)


def test_statistics_of_a_merged_model_are_those_of_what_its_layers_are_given_over_all_batches():
    """Dropout is off, as `train=False` says, and batches of other sizes count by their tokens."""
    model, variables, x = merged()
    batches = [x, x[:3] - 2]
    result = reset_norms_linen(model, variables, iter(batches), match="[!t]*", train=False)
    first, second = by_hand(variables, batches)
    check(result["batch_stats"]["first"], first)
    check(result["batch_stats"]["second"], second)
    assert result["params"] is variables["params"]
    assert jax.tree.structure(result) == jax.tree.structure(variables)
    np.testing.assert_array_equal(result["batch_stats"]["third"]["mean"], variables["batch_stats"]["third"]["mean"])


def test_after_one_batch_the_model_does_on_it_what_it_does_in_training():
    model, variables, x = merged()
    result = reset_norms_linen(model, variables, [x], match="[!t]*", train=False)
    hidden = by_hand(variables, [x])[1]
    mean, var = statistics(hidden)
    scaled = (hidden - mean) / np.sqrt(var + 1e-5) * variables["params"]["second"]["scale"]
    out = nn.relu(scaled + variables["params"]["second"]["bias"]) @ variables["params"]["out"]["kernel"]
    np.testing.assert_allclose(model.apply(result, x, train=False), out, rtol=0, atol=1e-4)
    assert np.max(np.abs(model.apply(variables, x, train=False) - out)) > 0.1


def test_layers_that_do_not_match_use_the_statistics_that_they_have():
    model, variables, x = merged()
    result = reset_norms_linen(model, variables, [x], match="second", train=False)
    conv = nn.Conv(3, (2, 2)).apply({"params": variables["params"]["conv"]}, x)
    mean, var = (variables["batch_stats"]["first"][part] for part in ("mean", "var"))
    dense = variables["params"]["dense"]
    check(result["batch_stats"]["second"],
          nn.relu((conv - mean) / np.sqrt(var + 1e-5)).reshape(8, -1) @ dense["kernel"] + dense["bias"])  # fmt: skip
    np.testing.assert_array_equal(result["batch_stats"]["first"]["mean"], mean)


def test_models_without_batchnorm_and_layers_that_are_not_called_are_told():
    model, variables, x = merged()
    with pytest.raises(CfmergeError, match="layer 'third' was not called on these batches; choose the layers by match"):
        reset_norms_linen(model, variables, [x], train=False)
    with pytest.raises(CfmergeError, match="none matches 'norm'; there is: first, second, third"):
        reset_norms_linen(model, variables, [x], match="norm", train=False)
    with pytest.raises(CfmergeError, match="no batches"):
        reset_norms_linen(model, variables, [], train=False)
    with pytest.raises(CfmergeError, match="batch 2: at layer 'first' the mean or the variance is NaN or infinite"):
        reset_norms_linen(model, variables, [x, x * jnp.nan], train=False)
    dense = nn.Dense(2)
    with pytest.raises(CfmergeError, match=r"cannot be estimated: there is none in variables\['batch_stats'\]"):
        reset_norms_linen(dense, dense.init(jax.random.key(0), x), [x])
    with pytest.raises(CfmergeError, match=r"there is none in nnx\.state\(model, nnx\.BatchStat\)"):
        reset_norms_nnx(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), [x])


class Network(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(5, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, axis_name="devices", rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x, mask=None):
        return self.drop(self.norm(self.dense(x), mask=mask))


def test_nnx_models_masks_and_means_that_are_large():
    model, x = Network(nnx.Rngs(0)), draw(1, 4, 6, 5)
    model.eval()
    model.dense.bias[...] = jnp.array([0.0, 1000.0, -1000.0])
    mask = np.arange(6)[:, None] < np.array([6, 2, 3, 1])[:, None, None]
    state = reset_norms_nnx(model, [(x, mask)])
    rows = np.concatenate([np.asarray(x, np.float64)[n, :count] for n, count in enumerate((6, 2, 3, 1))])
    rows = rows @ np.asarray(model.dense.kernel[...], np.float64) + np.asarray(model.dense.bias[...], np.float64)
    np.testing.assert_array_equal(model.norm.mean[...], 0)
    nnx.update(model, state)
    np.testing.assert_allclose(model.norm.mean[...], rows.mean(0), rtol=1e-5)
    np.testing.assert_allclose(model.norm.var[...], rows.var(0), rtol=1e-3)
    out = model(x)
    assert model.norm.axis_name == "devices"
    np.testing.assert_allclose(np.mean(np.asarray(out)[mask[..., 0]], 0), 0, atol=1e-3)
