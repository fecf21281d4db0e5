"""Input Grams of Flax models, by hand and by cfmerge; RegMean++ against a loop written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.traverse_util import flatten_dict

import cfmerge
from cfmerge import activations
from cfmerge.activations import collect_linen, collect_nnx, gram_of, regmean_pp
from cfmerge.activations.regmean_pp import _grouping
from cfmerge.errors import CfmergeError
from cfmerge.formats.pytree import flatten
from cfmerge.methods import average, lot, regmean
from cfmerge.models import classify, to_canonical


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


# --- linen --------------------------------------------------------------------------------------------------------


class Mlp(nn.Module):
    widths: tuple[int, ...] = (5, 4, 3)

    @nn.compact
    def __call__(self, x):
        for number, width in enumerate(self.widths):
            x = nn.Dense(width, name=f"Dense_{number}")(jnp.tanh(x) if number else x)
        return x


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


# --- RegMean and RegMean++ ----------------------------------------------------------------------------------------


def experts_of(base, count=2, scale=0.5):
    return [jax.tree.map(lambda a, t=t: a + scale * draw(10 * t + a.size, *a.shape), base) for t in range(1, count + 1)]


def solved(kernels, base, grams, a=0.95):
    """RegMean of Dense kernels `(in, out)`, in plain NumPy."""
    boosted = [a * g + (1 - a) * np.diag(np.diag(g)) for g in grams]
    return np.linalg.solve(sum(boosted), sum(g @ k for g, k in zip(boosted, kernels, strict=True)))


def test_regmean_of_a_tree():
    model = Mlp((4,))
    data = [[draw(1, 50, 6) * jnp.arange(1, 7)], [draw(2, 50, 6), draw(3, 10, 6)]]
    base = model.init(jax.random.key(0), data[0][0])["params"]
    experts = experts_of(base)
    grams = [collect_linen(model, {"params": e}, own) for e, own in zip(experts, data, strict=True)]
    merged = cfmerge.merge_params(base, experts, regmean(0.95), moments=grams)
    kernels = [e["Dense_0"]["kernel"] for e in experts]
    close(merged["Dense_0"]["kernel"], solved(kernels, base, [gram(np.concatenate(own)) for own in data]), 1e-4)
    close(merged["Dense_0"]["bias"], np.mean([e["Dense_0"]["bias"] for e in experts], axis=0))
    one_layer = regmean_pp(model, base, experts, data)
    jax.tree.map(lambda a, b: close(a, b, 1e-5), one_layer, merged)


def mlp_by_hand(base, experts, data, layers=3):
    """RegMean++ of `Mlp`, layer by layer."""
    merged = {}
    hidden = [np.concatenate([np.asarray(batch).reshape(-1, 6) for batch in own]) for own in data]
    for n in range(layers):
        name = f"Dense_{n}"
        inputs = [np.tanh(h) if n else h for h in hidden]
        kernel = solved([e[name]["kernel"] for e in experts], base, [gram(x) for x in inputs])
        bias = np.mean([e[name]["bias"] for e in experts], axis=0)
        merged[name] = {"kernel": kernel, "bias": bias}
        hidden = [x @ kernel + bias for x in inputs]
    return merged


def test_regmean_pp_of_linen_is_the_loop():
    data = [[draw(1, 50, 6) * jnp.arange(1, 7)], [draw(2, 50, 6), draw(3, 5, 2, 6)]]
    model = Mlp()
    base = model.init(jax.random.key(0), data[0][0])["params"]
    experts = experts_of(base)
    merged = regmean_pp(model, base, experts, data)
    jax.tree.map(lambda a, b: close(a, b, 2e-4), merged, mlp_by_hand(base, experts, data))
    plain = cfmerge.merge_params(
        base, experts, regmean(0.95),
        moments=[collect_linen(model, {"params": e}, own) for e, own in zip(experts, data, strict=True)],
    )  # fmt: skip
    close(merged["Dense_0"]["kernel"], plain["Dense_0"]["kernel"])
    assert np.max(np.abs(merged["Dense_2"]["kernel"] - plain["Dense_2"]["kernel"])) > 1e-3


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["Dense_0/kernel", "Dense_1/kernel"], ["Dense_0", "Dense_1"]),
        (["patch/kernel", "layers/0/a/kernel", "layers/10/a/kernel"], ["patch", "layers/0", "layers/10"]),
        (["Encoder_0/Block_0/a/kernel", "Encoder_0/Block_1/a/kernel"], ["Encoder_0/Block_0", "Encoder_0/Block_1"]),
        (["layers/0/a/kernel", "layers/0/b/kernel"], ["layers/0", "layers/0"]),
        (["fc1/kernel", "fc2/kernel"], ["fc1", "fc2"]),
    ],
)
def test_blocks(names, expected):
    assert [_grouping("block", names)(name) for name in names] == expected
    assert [_grouping("layer", names)(name) for name in names] == [name.removesuffix("/kernel") for name in names]


class Residual(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.up = nnx.Linear(4, 6, rngs=rngs)
        self.down = nnx.Linear(6, 4, rngs=rngs)

    def __call__(self, x):
        return x + self.down(jnp.tanh(self.up(self.norm(x))))


class Transformerish(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(7, 4, rngs=rngs)
        self.blocks = nnx.List([Residual(rngs) for _ in range(2)])
        self.read = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.read(x)


def test_regmean_pp_of_nnx_goes_block_by_block():
    """The prefix is merged, the block that is collected is the expert's own."""
    model = Transformerish(nnx.Rngs(0))
    graph, base = nnx.split(model, nnx.Param)
    experts = experts_of(base)
    data = [[jax.random.randint(jax.random.key(t), (9, 5), 0, 7)] for t in range(2)]
    merged = regmean_pp(model, base, experts, data, weights=[1.0, 0.5])
    assert isinstance(merged, nnx.State)

    def mean(leaves):
        return jax.tree.map(lambda a, b: (a + 0.5 * b) / 1.5, *leaves)

    flat = [flatten(e)[0] for e in experts]
    result = mean(flat)
    for prefix in ("blocks/0/", "blocks/1/", "read/"):
        grams = []
        for own, batches in zip(flat, data, strict=True):
            later = ("blocks/0/", "blocks/1/", "read/")[("blocks/0/", "blocks/1/", "read/").index(prefix) :]
            mixed = {name: own[name] if name.startswith(later) else result[name] for name in own}
            state = jax.tree.unflatten(jax.tree.structure(base), list(mixed.values()))
            grams.append(collect_nnx(nnx.merge(graph, state), batches, match=prefix + "*"))
        for name in grams[0]:
            found = [w * np.asarray(g[name], np.float64) for w, g in zip((1, 0.5), grams, strict=True)]
            result[name] = solved([own[name] for own in flat], None, found)
    for name, value in flatten(merged)[0].items():
        close(value, result[name], 2e-4)


def test_regmean_pp_takes_other_methods_rules_and_collections():
    model = Many()
    image, token = draw(1, 2, 6, 5, 3), jnp.array([0, 2])
    variables = model.init(jax.random.key(0), image, token, train=False)
    base, experts = variables["params"], experts_of(variables["params"])
    rules = [{"match": "shared/*", "method": "keep-base"}, {"match": "grouped/*", "method": "average"}]
    merged = regmean_pp(
        model, base, experts, [[(image, token)]] * 2, lot(), rules=rules,
        collections={"batch_stats": variables["batch_stats"]}, train=False,
    )  # fmt: skip
    assert np.array_equal(merged["shared"]["kernel"], base["shared"]["kernel"])
    close(merged["grouped"]["kernel"], np.mean([e["grouped"]["kernel"] for e in experts], axis=0))
    assert np.isfinite(merged["conv"]["kernel"]).all()
    with pytest.raises(CfmergeError, match="average takes no input Grams"):
        regmean_pp(model, base, experts, [[(image, token)]] * 2, average())


def test_stacked_layers_are_merged_at_once_and_told():
    model, x = Stacked(), draw(1, 7, 4)
    base = model.init(jax.random.key(0), x)["params"]
    experts = experts_of(base)
    with pytest.warns(UserWarning, match="hold layers that are stacked"):
        merged = regmean_pp(model, base, experts, [[x], [2 * x]], groups=lambda name: "all")
    grams = [collect_linen(model, {"params": e}, [s * x]) for e, s in zip(experts, (1, 2), strict=True)]
    plain = cfmerge.merge_params(base, experts, regmean(0.95), moments=grams)
    jax.tree.map(lambda a, b: close(a, b, 1e-5), merged, plain)
