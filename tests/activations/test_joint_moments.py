"""Joint moments of Flax models, by hand and by cfmerge."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from activation_parts import Block, Mlp, Stacked, draw
from flax import linen as nn
from flax import nnx

from cfmerge import align
from cfmerge.activations import collect_joint_linen, collect_joint_nnx, spaces_of_linen
from cfmerge.align import Moments, parse_spaces, permute, random_permutations
from cfmerge.errors import CfmergeError
from cfmerge.formats.pytree import flatten, unflatten

MLP = {
    "Dense_0/kernel": "in -, h1", "Dense_0/bias": "h1", "Dense_1/kernel": "in h1, h2", "Dense_1/bias": "h2",
    "Dense_2/kernel": "in h2, -", "Dense_2/bias": "-",
}  # fmt: skip


class Convolutions(nn.Module):
    """A convolution, a strided one, flattened outputs into a dense layer, as channels last and as channels first."""

    first: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(3, (3, 3), name="c1")(x))
        x = nn.relu(nn.Conv(5, (2, 2), strides=2, padding="VALID", name="c2")(x))
        x = (jnp.moveaxis(x, -1, 1) if self.first else x).reshape(len(x), -1)
        return nn.Dense(2, name="out")(x)


class Residual(nn.Module):
    """A stream that three layers read, one of them at the end, and attention with heads."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, name="embed")(x)
        x += nn.MultiHeadDotProductAttention(2, name="attention")(nn.LayerNorm(name="norm")(x))
        x += nn.Dense(4, name="down")(nn.relu(nn.Dense(6, name="up")(x)))
        return nn.Dense(3, name="head")(x)


RESIDUAL = {
    "embed/kernel": "in -, h", "embed/bias": "h", "norm/scale": "h", "norm/bias": "h",
    **{f"attention/{part}/kernel": "in h, heads, 2" for part in ("query", "key", "value")},
    **{f"attention/{part}/bias": "heads, 2" for part in ("query", "key", "value")},
    "attention/out/kernel": "in heads, in 2, h", "attention/out/bias": "h", "up/kernel": "in h, mlp", "up/bias": "mlp",
    "down/kernel": "in mlp, h", "down/bias": "h", "head/kernel": "in h, -", "head/bias": "-",
}  # fmt: skip


def spaces_of(table, params, prefix=""):
    shapes = {prefix + name: leaf.shape for name, leaf in flatten(params)[0].items()}
    return parse_spaces({prefix + name: text for name, text in table.items()}, shapes)


def models_of(model, x, number=2):
    return [{"params": model.init(jax.random.key(seed), x)["params"]} for seed in range(number)]


def permuted(spaces, tree, permutations):
    leaves, treedef = flatten(tree)
    return unflatten(treedef, permute(spaces, leaves, permutations))


def same(moments, space, *batches):
    """The moments of the space are those of the features `[one array for each model]` of the batches."""
    by_hand = Moments(moments.models)
    for features in batches:
        by_hand.add("by hand", [np.asarray(own).reshape(-1, own.shape[-1]) for own in features])
    assert moments.widths(space) == by_hand.widths("by hand")
    assert moments.of(space).tokens == by_hand.of("by hand").tokens
    largest = np.max(np.abs(by_hand.second("by hand")))
    np.testing.assert_allclose(moments.second(space), by_hand.second("by hand"), rtol=0, atol=1e-5 * largest)
    np.testing.assert_allclose(moments.of(space).mean, by_hand.of("by hand").mean, rtol=0, atol=1e-5 * largest)


def kept(model, variables, x):
    _, state = model.apply(variables, x, mutable=["intermediates"], capture_intermediates=True)
    return state["intermediates"]


def test_features_are_what_the_readers_of_a_space_are_given():
    model, batches = Mlp(), [draw(1, 7, 6), draw(2, 2, 3, 6)]
    variables = models_of(model, batches[0], 3)
    spaces = spaces_of(MLP, variables[0]["params"])
    moments = collect_joint_linen(model, variables, iter(batches), spaces, names=["x", "y", "z"])
    assert moments.models == ("x", "y", "z")
    assert moments.spaces == ("h1", "h2")

    def hidden(layer, batch):
        return [np.tanh(kept(model, own, batch)[f"Dense_{layer}"]["__call__"][0]) for own in variables]

    same(moments, "h1", *(hidden(0, batch) for batch in batches))
    same(moments, "h2", *(hidden(1, batch) for batch in batches))
    prefixed = spaces_of(MLP, variables[0]["params"], "params/")
    some = collect_joint_linen(model, variables, [{"x": batches[0]}, (batches[1],)], prefixed, match="*2")
    assert some.models == ("a", "b", "c")
    assert some.spaces == ("h2",)
    np.testing.assert_allclose(some.covariance("h2"), moments.covariance("h2"), rtol=1e-12)


def test_a_permuted_twin_has_a_correlation_that_is_the_permutation():
    model, x = Mlp(), draw(1, 40, 6)
    params = models_of(model, x, 1)[0]["params"]
    spaces = spaces_of(MLP, params)
    permutations = random_permutations(spaces, 1)
    moments = collect_joint_linen(
        model, [{"params": params}, {"params": permuted(spaces, params, permutations)}], [x], spaces
    )
    for space, permutation in permutations.items():
        first, second = moments.slices(space)
        block = moments.correlation(space)[second, first]
        assert list(block.argmax(1)) == list(permutation)
        np.testing.assert_allclose(block[np.arange(len(block)), permutation], 1, rtol=1e-5)


@pytest.mark.parametrize(("first", "line"), [(False, "in 4 c2, -"), (True, "in c2 4, -")])
def test_places_of_convolutions_are_tokens_flattened_ones_too(first, line):
    model, x = Convolutions(first), draw(1, 3, 4, 4, 2)
    variables = models_of(model, x)
    table = {"c1/kernel": "-, -, in -, c1", "c1/bias": "c1", "c2/kernel": "-, -, in c1, c2", "c2/bias": "c2",
             "out/kernel": line, "out/bias": "-"}  # fmt: skip
    moments = collect_joint_linen(model, variables, [x], spaces_of(table, variables[0]["params"]))
    for space in ("c1", "c2"):
        same(moments, space, [nn.relu(kept(model, own, x)[space]["__call__"][0]) for own in variables])


def test_all_layers_that_read_a_residual_stream_count_and_heads_are_features_of_their_own():
    model, x = Residual(), draw(1, 2, 3, 5)
    variables = models_of(model, x)
    spaces = spaces_of(RESIDUAL, variables[0]["params"])
    moments = collect_joint_linen(model, variables, [x], spaces)
    assert set(moments.spaces) == {"h", "heads", "mlp"}
    found = [kept(model, own, x) for own in variables]
    out = lambda own, name: own[name]["__call__"][0]  # noqa: E731
    normed = [out(own, "norm") for own in found]
    middle = [out(own, "embed") + out(own, "attention") for own in found]
    end = [a + out(own, "down") for a, own in zip(middle, found, strict=True)]
    same(moments, "h", *[normed] * 3, middle, end)  # queries, keys and values, up, head
    same(moments, "mlp", [nn.relu(out(own, "up")) for own in found])

    def heads(own, params):  # what `out` is given, from what it makes of it: its kernel is (4, 4)
        kernel = np.asarray(params["params"]["attention"]["out"]["kernel"], np.float64).reshape(4, 4)
        given = (np.asarray(out(own, "attention")) - params["params"]["attention"]["out"]["bias"]) @ np.linalg.inv(
            kernel
        )
        return np.moveaxis(given.reshape(2, 3, 2, 2), 2, 3)

    by_hand = Moments()
    by_hand.add("heads", [heads(own, params).reshape(-1, 2) for own, params in zip(found, variables, strict=True)])
    np.testing.assert_allclose(moments.covariance("heads"), by_hand.covariance("heads"), rtol=0, atol=1e-3)


def test_features_of_a_space_with_children_are_those_of_all_children_in_order():
    model, x = Residual(), draw(1, 2, 3, 5)
    variables = models_of(model, x)
    shapes = {name: leaf.shape for name, leaf in flatten(variables[0]["params"])[0].items()}
    hidden = [np.asarray(nn.relu(kept(model, own, x)["up"]["__call__"][0])) for own in variables]
    table = RESIDUAL | {"up/kernel": "in h, g g.v", "up/bias": "g g.v", "down/kernel": "in g g.v, h"}
    same(collect_joint_linen(model, variables, [x], parse_spaces(table, shapes, {"g": 2})), "g", hidden)
    several = {"up/kernel": "in h, g g.a g.b", "up/bias": "g g.a g.b", "down/kernel": "in g g.b g.a, h"}
    three = parse_spaces(RESIDUAL | several, shapes, {"g": 1, "g.a": 3})  # as the table first names them: a, then b
    turned = [own.reshape(2, 3, 2, 3).swapaxes(2, 3).reshape(2, 3, 6) for own in hidden]
    same(collect_joint_linen(model, variables, [x], three), "g", turned)
    part = RESIDUAL | {"up/kernel": "in h, g g.v", "up/bias": "g g.v", "down/kernel": "in g 3, h"}
    message = r"no tensor reads space 'g' together with its children g\.v; leave it out: match=\['h', 'heads'\]"
    parted = parse_spaces(part, shapes)
    assert "g" not in collect_joint_linen(model, variables, [x], parted).spaces
    with pytest.raises(CfmergeError, match=message):
        collect_joint_linen(model, variables, [x], parted, match=["h", "heads", "g"])


def test_layers_stacked_by_scan_all_count():
    model, x = Stacked(), draw(1, 7, 4)
    variables = models_of(model, x)
    table = {"layers/Dense_0/kernel": "-, in h, h", "layers/Dense_0/bias": "-, h",
             "layers/LayerNorm_0/scale": "-, h", "layers/LayerNorm_0/bias": "-, h"}  # fmt: skip
    moments = collect_joint_linen(model, variables, [x], spaces_of(table, variables[0]["params"]))
    rows, normed = [x, x], []
    for layer in range(3):
        own = [jax.tree.map(lambda leaf: leaf[layer], one["params"]["layers"]) for one in variables]  # noqa: B023
        normed.append(
            [nn.LayerNorm().apply({"params": one["LayerNorm_0"]}, h) for one, h in zip(own, rows, strict=True)]
        )
        rows = [Block().apply({"params": one}, h, None)[0] for one, h in zip(own, rows, strict=True)]
    same(moments, "h", *normed)


class Concatenated(nn.Module):
    """Two spaces that lie end to end, one of them twice, in a layer that is called twice."""

    @nn.compact
    def __call__(self, x):
        a, b = nn.Dense(2, name="a")(x), nn.Dense(3, name="b")(x)
        both, layer = jnp.concatenate([a, b, a], -1), nn.Dense(4, name="out")
        return layer(both) + layer(2 * both)


def test_spaces_that_lie_end_to_end_are_taken_apart_and_every_call_counts():
    model, x = Concatenated(), draw(1, 6, 5)
    variables = models_of(model, x)
    table = {"a/kernel": "in -, a", "a/bias": "a", "b/kernel": "in -, b", "b/bias": "b",
             "out/kernel": "in a + b + a, -", "out/bias": "-"}  # fmt: skip
    moments = collect_joint_linen(model, variables, [x], spaces_of(table, variables[0]["params"]))
    for space, times in (("a", 2), ("b", 1)):
        features = [kept(model, own, x)[space]["__call__"][0] for own in variables]
        same(moments, space, *[features, [2 * own for own in features]] * times)


def test_models_of_other_widths_have_modules_and_spaces_of_their_own():
    modules, x = [Mlp(), Mlp((7, 4, 3))], draw(1, 9, 6)
    variables = [{"params": module.init(jax.random.key(0), x)["params"]} for module in modules]
    spaces = [spaces_of(MLP, own["params"]) for own in variables]
    moments = collect_joint_linen(modules, variables, [x], spaces)
    assert moments.widths("h1") == (5, 7)
    assert moments.widths("h2") == (4, 4)
    hidden = [np.tanh(kept(*pair, x)["Dense_0"]["__call__"][0]) for pair in zip(modules, variables, strict=True)]
    same(moments, "h1", hidden)
    message = r"'Dense_0/bias' has shape \(7,\), and \(5,\) in the spaces, where it is 'h1'; .*spaces=\[of_a"
    with pytest.raises(CfmergeError, match=message):
        collect_joint_linen(modules, variables, [x], spaces[0])
    with pytest.raises(CfmergeError, match="2 models and 3 modules"):
        collect_joint_linen([*modules, modules[0]], variables, [x], spaces)


# --- nnx ----------------------------------------------------------------------------------------------------------


class Network(nnx.Module):
    def __init__(self, seed, hidden=5):
        rngs = nnx.Rngs(seed)
        self.inner = nnx.Linear(4, hidden, rngs=rngs)
        self.norm = nnx.LayerNorm(hidden, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(hidden, hidden, rngs=rngs) for _ in range(2)])
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        x = self.drop(nnx.relu(self.norm(self.inner(x))))
        return self.blocks[1](nnx.relu(self.blocks[0](x)))


NETWORK = {
    "inner/kernel": "in -, h", "inner/bias": "h", "norm/scale": "h", "norm/bias": "h",
    "blocks/0/kernel": "in h, g", "blocks/0/bias": "g", "blocks/1/kernel": "in g, -", "blocks/1/bias": "-",
}  # fmt: skip


def test_nnx_models_are_looked_on_alike_and_left_as_they_are():
    models, x = [Network(0), Network(1)], draw(1, 2, 5, 4)
    for model in models:
        model.eval()
    spaces, call = spaces_of(NETWORK, nnx.state(models[0], nnx.Param)), nnx.Linear.__call__
    moments = collect_joint_nnx(models, [x], spaces)
    features = [nnx.relu(model.norm(model.inner(x))) for model in models]
    same(moments, "h", features)
    same(moments, "g", [nnx.relu(m.blocks[0](own)) for m, own in zip(models, features, strict=True)])
    assert nnx.Linear.__call__ is call
    assert not [name for name in flatten(nnx.state(models[0], nnx.Param))[0] if "cfmerge" in name]
    wide = Network(2, 7)
    wide.eval()
    other = spaces_of(NETWORK, nnx.state(wide, nnx.Param))
    assert collect_joint_nnx([models[0], wide], [x], [spaces, other], match="g").widths("g") == (5, 7)


# --- errors -------------------------------------------------------------------------------------------------------


class Hidden(nn.Module):
    """The second layer holds its kernel itself, and the third is called by one of the models alone."""

    third: bool = True

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, name="one")(x)
        kernel = self.param("kernel", nn.initializers.normal(), (4, 3))
        layer = nn.Dense(2, name="three")
        return layer(x @ kernel) if self.third or self.is_initializing() else x @ kernel


HIDDEN = {"one/kernel": "in -, h", "one/bias": "h", "kernel": "in h, g", "three/kernel": "in g, -", "three/bias": "-"}


def test_spaces_that_cannot_be_collected_are_told_with_the_way_out():
    model, x = Hidden(), draw(1, 3, 5)
    variables = models_of(model, x)
    spaces = spaces_of(HIDDEN, variables[0]["params"])
    message = r"no layer was seen to read space 'h'; its readers, 'kernel', were not .* scan .*match=\['g'\], or give"
    with pytest.raises(CfmergeError, match=message):
        collect_joint_linen(model, variables, [x], spaces)
    assert collect_joint_linen(model, variables, [x], spaces, match=["g"]).spaces == ("g",)
    with pytest.raises(CfmergeError, match="no space matches 'f'; there is: h, g"):
        collect_joint_linen(model, variables, [x], spaces, match="f")
    with pytest.raises(CfmergeError, match="model 'a' calls the layer of 'three/kernel', and 'b' does not"):
        collect_joint_linen([model, Hidden(False)], variables, [x], spaces, match="g")
    with pytest.raises(CfmergeError, match="no batches: joint moments need at least one"):
        collect_joint_linen(model, variables, [], spaces, match="g")
    with pytest.raises(CfmergeError, match="2 models and 3 names"):
        collect_joint_linen(model, variables, [x], spaces, match="g", names=["a", "b", "c"])
    with pytest.raises(CfmergeError, match=r"joint moments: expected variables \{'params': ...\}, found a tree of"):
        collect_joint_linen(model, [one["params"] for one in variables], [x], spaces)
    unread = spaces_of(HIDDEN | {"kernel": "in h, g", "three/kernel": "g, -"}, variables[0]["params"])
    with pytest.raises(CfmergeError, match=r"no tensor reads space 'g'; leave it out: match=\['h'\]"):
        collect_joint_linen(model, variables, [x], unread)
    other = spaces_of(MLP, models_of(Mlp(), draw(1, 7, 6))[0]["params"])
    with pytest.raises(
        CfmergeError, match=r"no line for parameter '\w+(/\w+)?' and 3 more; their tensors are 'Dense_0/"
    ):
        collect_joint_linen(model, variables, [x], other)


class Attention(nn.Module):
    """Attention without rotations: queries and keys permute within a head, and so do values, by themselves."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(12, name="embed")(x)
        q, k, v = (nn.Dense(12, name=name)(x).reshape(*x.shape[:-1], 3, 4) for name in "qkv")
        x = x + nn.Dense(12, name="o")(nn.dot_product_attention(q, k, v).reshape(x.shape))
        return nn.Dense(2, name="out")(x)


def test_heads_that_nothing_reads_whole_are_matched_by_weights_and_the_others_by_activations():
    model, x = Attention(), jax.random.normal(jax.random.key(0), (30, 5, 6))
    a = model.init(jax.random.key(1), x)["params"]
    spaces = spaces_of_linen(model, a, x)
    b = align.permute(spaces, a, align.random_permutations(spaces, 2))
    moments = collect_joint_linen(model, [{"params": a}, {"params": b}], [x], spaces)
    heads = [name for name in spaces.names if spaces.children(name)]
    assert len(heads) == 1
    assert set(moments.spaces) == set(spaces.names) - set(heads)
    found = align.activation_matching(spaces, moments, partial=True).permutations
    assert set(found) == set(moments.spaces)
    whole = align.weight_matching(spaces, a, b, hold=found)
    jax.tree.map(np.testing.assert_array_equal, align.permute(spaces, b, whole.permutations), a)
    with pytest.raises(CfmergeError, match=f"none of space '{heads[0]}'"):
        align.activation_matching(spaces, moments)
