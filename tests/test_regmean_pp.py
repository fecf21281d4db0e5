"""RegMean by activations, and RegMean++ against a loop written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from activation_parts import Many, Mlp, Stacked, close, draw, gram
from flax import nnx

import cfmerge
from cfmerge.activations import collect_linen, collect_nnx, regmean_pp
from cfmerge.activations.regmean_pp import _grouping
from cfmerge.errors import CfmergeError
from cfmerge.formats.pytree import flatten
from cfmerge.methods import average, lot, regmean


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
