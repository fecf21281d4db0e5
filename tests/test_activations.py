"""Input Grams of Flax models, by hand and by cfmerge."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from activation_parts import Block, Many, Mlp, Stacked, close, draw, fit, gram
from flax import linen as nn
from flax import nnx
from flax.traverse_util import flatten_dict

from cfmerge import activations
from cfmerge.activations import collect_linen, collect_nnx, gram_of, regmean_pp
from cfmerge.errors import CfmergeError
from cfmerge.formats.pytree import flatten
from cfmerge.models import to_canonical

# --- linen --------------------------------------------------------------------------------------------------------


def test_linen_dense():
    model, batches = Mlp(), [draw(1, 7, 6), draw(2, 2, 3, 6)]
    params = model.init(jax.random.key(0), batches[0])["params"]
    grams = collect_linen(model, {"params": params}, batches)
    assert list(grams) == ["Dense_0/kernel", "Dense_1/kernel", "Dense_2/kernel"]
    rows = np.concatenate([np.asarray(batch).reshape(-1, 6) for batch in batches])
    close(grams["Dense_0/kernel"], gram(rows))
    hidden = np.tanh(rows @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"])
    close(grams["Dense_1/kernel"], gram(hidden))
    fit(params, grams)
    named = collect_linen(model, {"params": params}, iter(batches), match="*_1/*", prefix="params/")
    assert list(named) == ["params/Dense_1/kernel"]
    close(named["params/Dense_1/kernel"], gram(hidden))


def test_linen_layers_of_all_kinds():
    model = Many()
    image, token = draw(1, 2, 6, 5, 3), jnp.array([0, 2])
    variables = model.init(jax.random.key(0), image, token, train=False)
    batches = [(image, token), {"image": image + 1, "token": token}]
    grams = collect_linen(model, variables, batches, train=False)
    attention = [f"attention/{part}/kernel" for part in ("key", "out", "query", "value")]
    assert sorted(grams) == sorted([*attention, "conv/kernel", "shared/kernel"])
    fit(variables["params"], grams)

    def intermediates(image):
        _, kept = model.apply(
            variables, image, token, train=False, mutable=["intermediates"], capture_intermediates=True
        )
        return {"/".join(key): np.asarray(value[0]) for key, value in flatten_dict(kept["intermediates"]).items()}

    outputs = [intermediates(image), intermediates(image + 1)]
    close(grams["attention/key/kernel"], gram(np.concatenate([o["LayerNorm_0/__call__"] for o in outputs])))
    assert grams["attention/out/kernel"].shape == (4, 4)
    first = np.concatenate([o["attention/__call__"] for o in outputs]).reshape(-1, 4)
    dense = variables["params"]["shared"]
    second = np.tanh(first @ dense["kernel"] + dense["bias"])
    close(grams["shared/kernel"], gram(np.concatenate([first, second])))  # called twice: both are added
    kernel = to_canonical(np.asarray(variables["params"]["conv"]["kernel"]), "iiio")[0]
    responses = np.stack([o["conv/__call__"] for o in outputs]) - variables["params"]["conv"]["bias"]
    energy = np.mean(responses**2, axis=(0, 1, 2, 3))
    close(np.einsum("oi,ij,oj->o", kernel, grams["conv/kernel"], kernel), energy)


@pytest.mark.parametrize(
    "options",
    [
        {"padding": "VALID"},
        {"padding": "CIRCULAR", "kernel_dilation": (1, 2)},
        {"padding": [(1, 0), (2, 1)], "strides": (1, 2)},
    ],
)
def test_patches_are_what_the_kernel_is_multiplied_with(options):
    """`kernel Gram kernel^T` is the outputs' second moment, in the order of the canonical view."""
    model, x = nn.Conv(4, (3, 2), use_bias=False, **options), draw(1, 2, 6, 5, 3)
    variables = model.init(jax.random.key(0), x)
    found = collect_linen(model, variables, [x])["kernel"]
    kernel = to_canonical(np.asarray(variables["params"]["kernel"]), "iiio")[0]
    close(kernel @ found @ kernel.T, gram(model.apply(variables, x)))
    layer = nnx.Conv(3, 4, (3, 2), use_bias=False, rngs=nnx.Rngs(0), **options)
    close(collect_nnx(layer, [x])["kernel"], found)


def test_dense_general_over_several_axes():
    model, x = nn.DenseGeneral((2, 5), axis=(-1, 1)), draw(1, 2, 3, 6, 4)
    params = model.init(jax.random.key(0), x)["params"]
    assert params["kernel"].shape == (3, 4, 2, 5)
    found = collect_linen(model, {"params": params}, [x])["kernel"]
    close(found, gram(np.moveaxis(np.asarray(x), 1, 2).reshape(-1, 12)))
    kernel = to_canonical(np.asarray(params["kernel"]), "iioo")[0]
    outputs = np.asarray(model.apply({"params": params}, x) - params["bias"]).reshape(-1, 10)
    close(kernel @ found @ kernel.T, gram(outputs))


def test_linen_layers_stacked_by_scan():
    model, x = Stacked(), draw(1, 7, 4)
    params = model.init(jax.random.key(0), x)["params"]
    grams = collect_linen(model, {"params": params}, [x, 2 * x])
    assert list(grams) == ["layers/Dense_0/kernel"]
    fit(params, grams)
    rows = np.concatenate([x, 2 * x])
    for layer in range(3):
        own = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["layers"])
        close(grams["layers/Dense_0/kernel"][layer], gram(nn.LayerNorm().apply({"params": own["LayerNorm_0"]}, rows)))
        rows = Block().apply({"params": own}, rows, None)[0]


# --- nnx ----------------------------------------------------------------------------------------------------------


class Network(nnx.Module):
    def __init__(self, rngs):
        self.zero = nnx.Linear(4, 4, rngs=rngs)
        self.alias = self.zero
        self.attention = nnx.MultiHeadAttention(2, 4, 8, 4, decode=False, rngs=rngs)
        self.general = nnx.LinearGeneral((4,), (2, 2), rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def features(self, x):
        x = self.attention(self.alias(jnp.tanh(self.zero(x))))
        x = self.general(x).reshape(x.shape)
        for block in self.blocks:
            x = self.drop(jnp.tanh(block(x)))
        return x

    def __call__(self, x, scale=1.0):
        return self.features(scale * x)


def test_nnx_layers():
    model, x = Network(nnx.Rngs(0)), draw(1, 2, 5, 4)
    model.eval()
    call = nnx.Linear.__call__
    before = flatten(nnx.state(model, nnx.Param))[0]
    grams = collect_nnx(model, [x, (3 * x,), {"x": x, "scale": 2.0}])
    attention = [f"attention/{part}/kernel" for part in ("key", "out", "query", "value")]
    assert sorted(grams) == ["alias/kernel", *attention, "blocks/0/kernel", "blocks/1/kernel", "general/kernel"]
    fit(nnx.state(model, nnx.Param), grams)
    assert set(grams) < set(before)
    inputs = np.concatenate([s * np.asarray(x) for s in (1, 3, 2)])
    close(grams["alias/kernel"], gram(np.concatenate([inputs, np.tanh(np.asarray(model.zero(inputs)))])))
    attended = model.attention(model.zero(jnp.tanh(model.zero(inputs))))
    close(grams["general/kernel"], gram(attended))
    hidden = model.general(attended).reshape(attended.shape)
    close(grams["blocks/1/kernel"], gram(jnp.tanh(model.blocks[0](hidden))))
    assert nnx.Linear.__call__ is call
    after = flatten(nnx.state(model))[0]
    assert not [name for name in after if "cfmerge" in name]
    twice = collect_nnx(model, [x], method="features", match="blocks/*")
    close(twice["blocks/0/kernel"], collect_nnx(model, [x])["blocks/0/kernel"])
    assert len(twice) == 2


def test_nnx_layers_stacked_by_scan():
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def make(rngs):
        return nnx.Linear(4, 4, rngs=rngs)

    class Scanned(nnx.Module):
        def __init__(self, rngs):
            self.layers = make(rngs)

        def __call__(self, x):
            @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            @nnx.remat
            def forward(x, layer):
                return jnp.tanh(layer(x))

            return forward(x, self.layers)

    model, rows = Scanned(nnx.Rngs(0)), draw(1, 7, 4)
    found = collect_nnx(model, [rows])["layers/kernel"]
    for layer in range(3):
        close(found[layer], gram(rows))
        rows = np.tanh(rows @ model.layers.kernel[layer] + model.layers.bias[layer])


def test_low_precision_inputs_are_summed_in_float32():
    model, x = nn.Dense(3, dtype=jnp.bfloat16), draw(1, 500, 4).astype(jnp.bfloat16)
    variables = model.init(jax.random.key(0), x)
    found = collect_linen(model, variables, [x])["kernel"]
    assert found.dtype == jnp.float32
    close(found, gram(x))


# --- saved activations, and files ---------------------------------------------------------------------------------


def test_saved_activations(tmp_path):
    x = np.asarray(draw(1, 3, 5, 4))
    close(gram_of(x), gram(x))
    close(gram_of({"a.weight": x})["a.weight"], gram(x))
    activations.save({"a.weight": x[0], "b.weight": x[1]}, tmp_path / "inputs.safetensors")
    grams = gram_of(tmp_path / "inputs.safetensors")
    close(grams["b.weight"], gram(x[1]))
    activations.save(grams, tmp_path / "grams.safetensors")
    again = activations.load(str(tmp_path / "grams.safetensors"))
    assert all(np.array_equal(again[name], grams[name]) for name in grams)
    with pytest.raises(CfmergeError, match="exists already"):
        activations.save(grams, tmp_path / "grams.safetensors")
    with pytest.raises(CfmergeError, match=r"must be called \.safetensors"):
        activations.save(grams, tmp_path / "grams.npz")
    with pytest.raises(CfmergeError, match=r"shape \(tokens, in\), found \(4,\)"):
        gram_of(np.zeros(4))


def test_bad_input():
    model, x = Mlp(), draw(1, 7, 6)
    variables = model.init(jax.random.key(0), x)
    with pytest.raises(CfmergeError, match="no batches"):
        collect_linen(model, variables, [])
    with pytest.raises(CfmergeError, match="no layer that is wanted was called"):
        collect_linen(model, variables, [x], match="other*")
    with pytest.raises(CfmergeError, match="2 experts and 1 lists of batches"):
        regmean_pp(model, variables["params"], [variables["params"]] * 2, [[x]])
    with pytest.raises(CfmergeError, match="an expert has no batches"):
        regmean_pp(model, variables["params"], [variables["params"]], [[]])
    with pytest.raises(CfmergeError, match="neither of linen nor of nnx, but function"):
        regmean_pp(lambda x: x, variables["params"], [variables["params"]], [[x]])
