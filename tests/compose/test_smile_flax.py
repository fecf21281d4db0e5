"""SMILE in models of NNX and linen: the formula, the untouched base, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from smile_parts import layer_of, numpy_added

from cfmerge import CfmergeError, merge_params
from cfmerge.compose import smile, smile_flax, smile_layers

RANK, GATE = 3, 2


class Net(nnx.Module):
    """Two linear layers in a list, the first of which is called twice, and a head."""

    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(6, 6, rngs=rngs), nnx.Linear(6, 5, rngs=rngs, use_bias=False)])
        self.again = self.layers[0]
        self.head = nnx.Linear(5, 4, rngs=rngs)

    def __call__(self, x):
        return self.head(jnp.tanh(self.layers[1](self.again(jnp.tanh(self.layers[0](x))))))


def experts_of(kernels, biases=(), seed=0):
    """`({name: (deltas, bias deltas)}, {name: Layer})` of three experts, random, for `{name: kernel's shape}`."""
    rng = np.random.default_rng(seed)
    known = {}
    for name, (n, m) in kernels.items():
        deltas = rng.standard_normal((3, m, n)).astype(np.float32)
        known[name] = deltas, rng.standard_normal((3, m)).astype(np.float32) if name in biases else None
    layers = {name: layer_of(deltas, RANK, GATE, bias) for name, (deltas, bias) in known.items()}
    return known, layers


@pytest.fixture(scope="module")
def net():
    return Net(nnx.Rngs(0))


@pytest.fixture(scope="module")
def made():
    """Experts of all layers but the head."""
    return experts_of({"again/kernel": (6, 6), "layers/1/kernel": (6, 5)}, ["again/kernel"])


@pytest.fixture(scope="module")
def x():
    return jnp.asarray(np.random.default_rng(7).standard_normal((4, 3, 6)), jnp.float32)


def numpy_net(net, known, x, top_k):
    """The network with its experts by the formula."""

    def linear(layer, x, experts=None):
        out = x @ np.asarray(layer.kernel[...]) + (0 if layer.bias is None else np.asarray(layer.bias[...]))
        return out if experts is None else out + numpy_added(x, experts[0], RANK, GATE, top_k, experts[1])

    first, second = known["again/kernel"], known["layers/1/kernel"]
    hidden = linear(net.layers[0], np.tanh(linear(net.layers[0], np.asarray(x), first)), first)
    return linear(net.head, np.tanh(linear(net.layers[1], hidden, second)))


@pytest.mark.parametrize("top_k", [1, 2])
def test_an_nnx_model_is_the_formula_wherever_its_layers_are_used(net, made, x, top_k):
    before = jax.tree.map(np.array, nnx.state(net))
    model = smile_flax.upscale(net, made[1], top_k)
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(model, x), numpy_net(net, made[0], x, top_k), atol=1e-4)
    assert model.again is model.layers[0]
    assert type(model.head) is nnx.Linear
    assert type(net.layers[1]) is nnx.Linear
    jax.tree.map(np.testing.assert_array_equal, nnx.state(net), before)


def test_names_are_those_of_merge_params(net, made):
    """A shared layer has the name of its first place, in the merge as here."""
    state = nnx.state(net)
    assert jax.tree.structure(merge_params(state, [state], "average")) == jax.tree.structure(state)
    names = {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(state)}
    assert made[1].keys() <= names


def test_an_upscaled_model_is_split_merged_and_differentiated(net, made, x):
    model = smile_flax.upscale(net, made[1])
    graph, params, experts = nnx.split(model, nnx.Param, smile_flax.Expert)
    again = jax.jit(lambda params, experts, x: nnx.merge(graph, params, experts)(x))
    np.testing.assert_allclose(again(params, experts, x), model(x), atol=1e-5)
    gradient = jax.grad(lambda x: model(x).sum())(x)
    step, point = 1e-2, np.array(x)
    point[1, 2, 3] += step
    change = (numpy_net(net, made[0], point, 1).sum() - numpy_net(net, made[0], x, 1).sum()) / step
    assert gradient[1, 2, 3] == pytest.approx(change, rel=0.05, abs=0.05)


def test_an_optimiser_of_parameters_leaves_experts_alone(net, made, x):
    model = smile_flax.upscale(net, made[1])
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    before = np.array(model.again.experts.up[...]), np.array(model.head.kernel[...]), np.array(net.head.kernel[...])
    optimizer.update(model, nnx.grad(lambda model: (model(x) ** 2).mean())(model))
    np.testing.assert_array_equal(model.again.experts.up[...], before[0])
    assert np.any(np.asarray(model.head.kernel[...]) != before[1])
    np.testing.assert_array_equal(net.head.kernel[...], before[2])


def test_variables_are_shared_where_that_is_wished(net, made):
    shared, own = (smile_flax.upscale(net, made[1], copy=copy) for copy in (False, True))
    assert shared.again.kernel is net.again.kernel
    assert own.again.kernel is not net.again.kernel
    assert own.again.bias[...] is net.again.bias[...]
    assert type(net.again) is nnx.Linear


def test_a_bfloat16_layer_stays_one(made, x):
    linear = nnx.Linear(6, 6, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    (layer,) = (layer for name, layer in made[1].items() if name == "again/kernel")
    out = smile_flax.SmileLinear(linear, layer)(x)
    assert out.dtype == jnp.bfloat16
    wide = nnx.Linear(6, 6, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(out, smile_flax.SmileLinear(wide, layer)(x), atol=0.3)


ATTENTION = {"query/kernel": (8, 8), "out/kernel": (8, 8)}


def test_attention_of_nnx_and_of_linen_agree_with_the_formula():
    """Their layers have two axes of outputs, or of inputs, that count as one."""
    known, layers = experts_of(ATTENTION, ATTENTION)
    x = jnp.asarray(np.random.default_rng(3).standard_normal((2, 5, 8)), jnp.float32)
    attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))
    model = smile_flax.upscale(attention, layers)
    found = nnx.jit(lambda m, x: m(x))(model, x)
    variables = {"params": nnx.to_pure_dict(nnx.state(attention, nnx.Param))}
    module = linen.MultiHeadDotProductAttention(2)
    same = jax.jit(lambda variables, x: smile_flax.apply(module, variables, layers, x))(variables, x)
    np.testing.assert_allclose(found, same, atol=1e-5)
    query = model.query(x)
    deltas, bias = known["query/kernel"]
    expected = attention.query(x).reshape(2, 5, 8) + numpy_added(x, deltas, RANK, GATE, 1, bias)
    np.testing.assert_allclose(query.reshape(2, 5, 8), expected, atol=1e-5)
    deltas, bias = known["out/kernel"]
    expected = attention.out(query) + numpy_added(query.reshape(2, 5, 8), deltas, RANK, GATE, 1, bias)
    np.testing.assert_allclose(model.out(query), expected, atol=1e-5)


def test_stacked_layers_are_scanned_over_with_their_experts():
    """Arrays stacked as the kernel is; each layer has experts of its own."""

    @nnx.split_rngs(splits=2)
    @nnx.vmap
    def stacked(rngs):
        return nnx.Linear(6, 6, rngs=rngs)

    linear = stacked(nnx.Rngs(0))
    holder = nnx.Sequential(linear)
    each = [experts_of({"k": (6, 6)}, seed=seed) for seed in (1, 2)]
    layer = jax.tree.map(lambda *parts: jnp.stack(parts), *(layers["k"] for _, layers in each))
    model = smile_flax.upscale(holder, {"layers/0/kernel": layer}).layers[0]
    x = jnp.asarray(np.random.default_rng(3).standard_normal((4, 6)), jnp.float32)
    found = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, model)
    expected = np.asarray(x)
    for i, (known, _) in enumerate(each):
        out = expected @ np.asarray(linear.kernel[i]) + np.asarray(linear.bias[i])
        expected = out + numpy_added(expected, known["k"][0], RANK, GATE, 1)
    np.testing.assert_allclose(found, expected, atol=1e-4)


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.Conv(6, (1,), name="conv")(x)
        x = jnp.tanh(linen.Dense(5, use_bias=False)(x))
        return linen.Dense(4)(x)


@pytest.fixture(scope="module")
def params(x):
    return Linen().init(jax.random.key(0), x)["params"]


def test_a_linen_model_is_the_formula(params, x):
    known, layers = experts_of({"Dense_0/kernel": (6, 5), "Dense_1/kernel": (5, 4)}, ["Dense_1/kernel"])
    run = jax.jit(lambda params, layers, x: smile_flax.apply(Linen(), params, layers, x, top_k=2))
    found = run(params, layers, x)
    hidden = np.asarray(x @ params["conv"]["kernel"][0] + params["conv"]["bias"])
    hidden = hidden @ params["Dense_0"]["kernel"] + numpy_added(hidden, known["Dense_0/kernel"][0], RANK, GATE, 2)
    hidden, head = np.tanh(hidden), params["Dense_1"]
    deltas, bias = known["Dense_1/kernel"]
    expected = hidden @ head["kernel"] + head["bias"] + numpy_added(hidden, deltas, RANK, GATE, 2, bias)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    function = smile_flax.apply(lambda params, x: Linen().apply({"params": params}, x), params, layers, x, top_k=2)
    np.testing.assert_allclose(function, found, atol=1e-5)
    assert np.max(np.abs(found - Linen().apply({"params": params}, x))) > 0.1


def test_a_name_that_is_no_linear_layers_is_refused(net, made, params, x):
    (layer, *_) = made[1].values()
    with pytest.raises(CfmergeError, match=r"'layers/9/kernel' is not the kernel.*did you mean 'layers/1/kernel'"):
        smile_flax.upscale(net, {"layers/9/kernel": layer})
    with pytest.raises(CfmergeError, match=r"'a/kernel' \(and 1 more\) is not the kernel"):
        smile_flax.upscale(net, {"a/kernel": layer, "z/kernel": layer, **made[1]})
    with pytest.raises(CfmergeError, match=r"'layers/0/kernel' is a Conv's kernel.*leave it out"):
        smile_flax.upscale(nnx.Sequential(nnx.Conv(6, 6, (1,), rngs=nnx.Rngs(0))), {"layers/0/kernel": layer})
    with pytest.raises(CfmergeError, match=r"'Dense_7/kernel' is not the kernel.*did you mean 'Dense_"):
        smile_flax.apply(Linen(), params, {"Dense_7/kernel": layer}, x)
    with pytest.raises(CfmergeError, match="'conv/kernel' is a Conv's kernel"):
        smile_flax.apply(Linen(), params, {"conv/kernel": layer}, x)


def test_arrays_that_do_not_fit_are_refused(net, made, params, x):
    layer = made[1]["again/kernel"]
    with pytest.raises(
        CfmergeError, match=r"'head/kernel'.*\(5, 4\).*'up' must have shape \(3, 4, 3\), found \(3, 6, 3\)"
    ):
        smile_flax.upscale(net, {"head/kernel": layer})
    cut = layer._replace(router=layer.router[:2])
    with pytest.raises(CfmergeError, match=r"'up' must have shape \(2, 6, 3\), found \(3, 6, 3\)"):
        smile_flax.upscale(net, {"again/kernel": cut})
    with pytest.raises(CfmergeError, match="'Dense_0/kernel'"):
        smile_flax.apply(Linen(), params, {"Dense_0/kernel": layer}, x)
    with pytest.raises(CfmergeError, match="from 1 to the number of experts, 3, not 4"):
        smile_flax.upscale(net, made[1], top_k=4)


def test_the_cost_is_that_of_the_arrays(net, made):
    found = smile_layers.cost(made[1], nnx.state(net))
    arrays = sum(part.size for part in jax.tree.leaves(made[1]))
    assert found.parameters.base == 6 * 6 + 6 + 6 * 5 + 5 * 4 + 4
    assert found.parameters.total == found.parameters.base + arrays
    each = [smile.flops(6, 6, 3, RANK, GATE), smile.flops(5, 6, 3, RANK, GATE, bias=False)]
    assert found.flops == tuple(map(sum, zip(*each, strict=True)))


def test_layers_are_made_of_the_parts_of_a_composed_result(made):
    parts = {"norm/scale": {"mean": np.zeros(6)}}
    for name, layer in made[1].items():
        parts[name] = {key: value for key, value in layer._asdict().items() if value is not None and key != "bias"}
    parts["again/bias"] = {"bias": made[1]["again/kernel"].bias.reshape(3, 2, 3)}  # of two axes of outputs
    found = smile_layers.layers_of(parts)
    assert found.keys() == made[1].keys()
    jax.tree.map(np.testing.assert_array_equal, found, made[1])
    stack = [jnp.stack([part] * 2) for part in made[1]["again/kernel"][:3]]  # two layers, biases (3, 2, 6)
    bias = np.arange(36.0).reshape(3, 2, 6)
    layer = smile_layers.layers_of(
        {"h/kernel": dict(zip(("up", "down", "router"), stack, strict=True)), "h/bias": {"bias": bias}}
    )
    np.testing.assert_array_equal(layer["h/kernel"].bias, bias.swapaxes(0, 1))
    with pytest.raises(CfmergeError, match="the bias 'x/bias' has experts, and the weight beside it has none"):
        smile_layers.layers_of({"x/bias": {"bias": bias}})
