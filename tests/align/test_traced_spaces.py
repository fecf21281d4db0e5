"""Spaces that a trace of a model finds: as many as there are, and no permutation of theirs changes an output."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from cfmerge.activations import linen_function, nnx_function, spaces_of_linen, spaces_of_nnx
from cfmerge.align import check_spaces, trace_spaces, why_fixed

KEY = jax.random.key(0)
IMAGES = jax.random.normal(KEY, (2, 4, 4, 3))
IDS = jnp.array([[1, 4, 2, 9, 0], [3, 3, 8, 7, 5]])


def checked(model, *inputs, **options):
    """The spaces of a linen model, of its parameters alone if it has no others; they were tried."""
    shapes = jax.eval_shape(model.init, KEY, *inputs)
    shapes = shapes if "batch_stats" in shapes else shapes["params"]
    generator = np.random.default_rng(0)
    low = {1: 0.5}  # of norms
    params = jax.tree.map(lambda leaf: generator.uniform(low.get(leaf.ndim, -1), 1, leaf.shape).astype("f"), shapes)
    spaces = spaces_of_linen(model, params, *inputs, **options)
    check_spaces(spaces, linen_function(model, params, **options), params, *inputs)
    return spaces


def weights(**shapes):
    generator = np.random.default_rng(0)
    return {name: (generator.normal(size=shape) / shape[0] ** 0.5).astype(np.float32) for name, shape in shapes.items()}


def tried(f, params, *inputs):
    """The table of a function's spaces; they were tried."""
    spaces = trace_spaces(f, params, *inputs)
    check_spaces(spaces, f, params, *inputs)
    return spaces.table()


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        for width in (8, 6):
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(3)(x)


class ConvNet(nn.Module):
    norm: type = nn.LayerNorm

    @nn.compact
    def __call__(self, x):
        x = nn.relu(self.norm()(nn.Conv(8, (3, 3))(x)))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Conv(8, (3, 3), feature_group_count=8)(x))
        x = nn.relu(nn.Conv(6, (3, 3))(x)).reshape(len(x), -1)
        x = nn.relu(nn.Dense(10)(x))
        return nn.Dense(2)(x)


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        for width, stride in ((4, 1), (4, 1), (6, 2)):
            y = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(width, (3, 3), stride)(x)))
            y = nn.BatchNorm(use_running_average=True)(nn.Conv(width, (3, 3))(y))
            if x.shape != y.shape:
                x = nn.Conv(width, (1, 1), stride, name=f"short_{width}")(x)
            x = nn.relu(x + y)
        return nn.Dense(2)(x.mean((1, 2)))


class Transformer(nn.Module):
    """Pre-LN, causal, with learned positions and tied embeddings."""

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(11, 12)
        x = embed(ids) + self.param("positions", nn.initializers.normal(), (7, 12))[: ids.shape[1]]
        for _ in range(2):
            attend = nn.MultiHeadDotProductAttention(4, qkv_features=8)
            x = x + attend(nn.LayerNorm()(x), mask=nn.make_causal_mask(ids))
            x = x + nn.Dense(12)(nn.gelu(nn.Dense(10)(nn.LayerNorm()(x))))
        return embed.attend(nn.LayerNorm()(x))


def test_an_mlp_has_a_space_for_each_hidden_layer():
    assert checked(MLP(), jnp.ones((2, 5))).table() == {
        "Dense_0/bias": "Dense_0",
        "Dense_0/kernel": "in 5, Dense_0",
        "Dense_1/bias": "Dense_1",
        "Dense_1/kernel": "in Dense_0, Dense_1",
        "Dense_2/bias": "-",
        "Dense_2/kernel": "in Dense_1, -",
    }


def test_a_convnet_keeps_its_windows_and_channels_lie_within_the_places_of_a_flattened_image():
    spaces = checked(ConvNet(), IMAGES)
    table = spaces.table()
    assert spaces.sizes == {"Conv_0": 8, "Conv_2": 6, "Dense_0": 10}
    assert table["LayerNorm_0/scale"] == "Conv_0"
    assert table["Conv_1/kernel"] == "-, -, in 1, Conv_0"  # depthwise
    assert table["Conv_2/kernel"] == "-, -, in Conv_0, Conv_2"
    assert table["Dense_0/kernel"] == "in 4 Conv_2, Dense_0"


def test_channels_permute_within_the_groups_of_a_norm_and_the_groups_as_blocks():
    class Grouped(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.GroupNorm(2)(nn.Conv(8, (3, 3))(x)))
            return nn.Conv(2, (1, 1))(x).mean((1, 2))

    spaces = checked(Grouped(), IMAGES)
    assert spaces.sizes == {"Conv_0": 2, "Conv_0.Conv_0": 4}
    assert spaces.table()["GroupNorm_0/scale"] == "Conv_0 Conv_0.Conv_0"


def test_a_residual_stream_is_one_space_and_running_statistics_are_on_it():
    spaces = checked(ResNet(), IMAGES)
    table = spaces.table()
    assert spaces.sizes == {
        "params/Conv_0": 4,
        "params/Conv_1": 4,
        "params/Conv_2": 4,
        "params/Conv_4": 6,
        "params/Conv_5": 6,
    }
    assert table["params/Conv_3/kernel"] == "-, -, in params/Conv_2, params/Conv_1"
    assert table["params/short_6/kernel"] == "-, -, in params/Conv_1, params/Conv_5"
    assert table["batch_stats/BatchNorm_4/var"] == "params/Conv_4"


def test_a_linen_transformer_has_its_stream_its_heads_and_its_hidden_units():
    spaces = checked(Transformer(), IDS)
    table, attention = spaces.table(), "MultiHeadDotProductAttention_1"
    assert sorted(spaces.sizes.values()) == [4, 4, 10, 10, 12]
    stream = table["LayerNorm_4/scale"]
    assert table["positions"] == table["Embed_0/embedding"] == f"-, {stream}"  # tied: it writes the stream
    assert table[f"{attention}/query/kernel"] == f"in {stream}, {attention}/key, -"
    assert table[f"{attention}/out/kernel"] == f"in {attention}/key, in 2, {stream}"
    assert table["Dense_2/kernel"] == f"in Dense_3, {stream}"


def test_an_nnx_transformer_has_its_stream_its_heads_and_its_hidden_units():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(11, 12, rngs=rngs)
            self.attend = nnx.MultiHeadAttention(4, 12, 8, decode=False, rngs=rngs)
            self.norms = nnx.List([nnx.RMSNorm(12, rngs=rngs) for _ in range(2)])
            self.up, self.down = nnx.Linear(12, 10, rngs=rngs), nnx.Linear(10, 12, rngs=rngs)

        def __call__(self, ids):
            x = self.embed(ids)
            x = x + self.attend(self.norms[0](x), mask=nnx.make_causal_mask(ids))
            return self.embed.attend(x + self.down(nnx.gelu(self.up(self.norms[1](x)))))

    model = Block(nnx.Rngs(0))
    spaces = spaces_of_nnx(model, IDS)
    check_spaces(spaces, nnx_function(model), nnx.state(model), IDS)
    assert spaces.sizes == {"embed": 12, "attend/key": 4, "up": 10}
    assert spaces.table()["norms/1/scale"] == "embed"


def rotated(x):
    """Rotary embedding `(t, heads, d)`, of halves."""
    angles = jnp.arange(x.shape[0])[:, None, None] / 10.0 ** jnp.arange(x.shape[-1] // 2)
    one, other = jnp.split(x, 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([one * cos - other * sin, other * cos + one * sin], axis=-1)


def rms(x, scale):
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale


def llama(p, ids):
    """A block with two key-value heads, each of three queries' heads of four, and a gated MLP."""
    x = p["embed"][ids]
    y = rms(x, p["norm"])
    q, k, v = (y @ p[name] for name in "qkv")
    q, k = rotated(q.reshape(-1, 6, 4)), rotated(k.reshape(-1, 2, 4))
    k, v = (jnp.repeat(array, 3, axis=1) for array in (k, v.reshape(-1, 2, 4)))
    scores = jnp.where(jnp.tri(len(ids))[None] > 0, jnp.einsum("thd,shd->hts", q, k), -jnp.inf)
    x = x + jnp.einsum("hts,shd->thd", jax.nn.softmax(scores), v).reshape(-1, 24) @ p["o"]
    y = rms(x, p["norm2"])
    return rms(x + (jax.nn.silu(y @ p["gate"]) * (y @ p["up"])) @ p["down"], p["norm3"]) @ p["embed"].T


LLAMA = weights(
    embed=(11, 12), norm=(12,), q=(12, 24), k=(12, 8), v=(12, 8), o=(24, 12),
    norm2=(12,), gate=(12, 10), up=(12, 10), down=(10, 12), norm3=(12,),
)  # fmt: skip


def test_query_heads_permute_within_their_group_and_rotary_keys_keep_their_order():
    assert tried(llama, LLAMA, IDS[0]) == {
        "embed": "-, embed",
        "norm": "embed",
        "q": "in embed, k k.q 4",
        "k": "in embed, k 4",
        "v": "in embed, k k.v",
        "o": "in k k.q k.v, embed",
        "norm2": "embed",
        "gate": "in embed, gate",
        "up": "in embed, gate",
        "down": "in gate, embed",
        "norm3": "embed",
    }


def test_what_lies_between_queries_and_keys_permutes_within_heads_unless_it_is_rotated():
    def attention(p, x):
        q, k, v = ((x @ p[name]).reshape(-1, 3, 4) for name in "qkv")
        return jnp.einsum("hts,shd->thd", jnp.einsum("thd,shd->hts", q, k), v).reshape(-1, 12) @ p["o"]

    table = tried(attention, weights(q=(5, 12), k=(5, 12), v=(5, 12), o=(12, 2)), jax.random.normal(KEY, (4, 5)))
    assert table == {"q": "in 5, k k.k", "k": "in 5, k k.k", "v": "in 5, k k.v", "o": "in k k.v, -"}


@pytest.mark.parametrize("fused", [
    lambda x: [part.reshape(-1, 3, 4) for part in jnp.split(x, 3, -1)],
    lambda x: [part.reshape(-1, 3, 4) for part in (x[:, :12], x[:, 12:24], x[:, 24:])],
    lambda x: list(jnp.moveaxis(x.reshape(-1, 3, 3, 4), 1, 0)),
], ids=["split", "slices", "reshaped"])  # fmt: skip
def test_a_fused_projection_of_queries_keys_and_values_has_heads_in_each_part(fused):
    def attention(p, x):
        q, k, v = fused(x @ p["qkv"] + p["bias"])
        weights = jax.nn.softmax(jnp.einsum("thd,shd->hts", rotated(q), rotated(k)))
        return jnp.einsum("hts,shd->thd", weights, v).reshape(-1, 12) @ p["out"]

    table = tried(attention, weights(qkv=(5, 36), bias=(36,), out=(12, 2)), jax.random.normal(KEY, (4, 5)))
    assert table["out"].startswith("in qkv ")
    assert table["qkv"] in ("in 5, qkv 4 + qkv 4 + qkv qkv.qkv", "in 5, 3 qkv 4")


def test_a_fused_projection_of_gates_and_values_has_the_hidden_units_twice():
    def gated(p, x):
        gate, value = jnp.split(x @ p["up"], 2, axis=-1)
        return (jax.nn.silu(gate) * value) @ p["down"]

    table = tried(gated, weights(up=(5, 16), down=(8, 2)), jax.random.normal(KEY, (4, 5)))
    assert table == {"up": "in 5, up + up", "down": "in up, -"}


def test_features_that_are_joined_end_to_end_permute_each_by_themselves():
    def skipped(p, x):
        y = jnp.tanh(x @ p["a"])
        return jnp.concatenate([y, jnp.sin(y @ p["b"]), x], -1) @ p["c"]

    table = tried(skipped, weights(a=(5, 6), b=(6, 7), c=(18, 2)), jax.random.normal(KEY, (4, 5)))
    assert table == {"a": "in 5, a", "b": "in a, b", "c": "in a + b + 5, -"}


def test_a_scan_over_layers_keeps_their_order_and_its_carry_is_one_space():
    def stacked(p, x):
        def layer(h, own):
            up, down = own
            return h + jax.nn.relu(h @ up) @ down, h.mean()

        return jax.lax.scan(jax.checkpoint(layer), x @ p["in"], (p["up"], p["down"]))[0] @ p["out"]

    params = {
        **weights(**{"in": (5, 6), "out": (6, 2)}),
        "up": jax.random.normal(KEY, (3, 6, 8)),
        "down": jax.random.normal(KEY, (3, 8, 6)),
    }
    assert tried(stacked, params, jax.random.normal(KEY, (4, 5))) == {
        "in": "in 5, down",
        "out": "in down, -",
        "up": "-, in down, up",
        "down": "-, in up, down",
    }


def test_loops_and_branches_are_followed():
    def looped(p, x):
        h = jax.lax.fori_loop(0, 3, lambda _, h: jnp.tanh(h @ p["w"]), jnp.zeros((4, 6)) + x @ p["in"])
        h = jax.lax.cond(x[0, 0] > 0, lambda h: h @ p["a"], lambda h: h @ p["b"] + p["c"], h)
        return jax.lax.while_loop(lambda h: h.sum() > 9, lambda h: h / 2, h) @ p["out"]

    params = weights(**{"in": (5, 6), "w": (6, 6), "a": (6, 7), "b": (6, 7), "c": (7,), "out": (7, 2)})
    assert tried(looped, params, jax.random.normal(KEY, (4, 5))) == {
        "in": "in 5, in_",  # `in` is a word of the table
        "w": "in in_, in_",
        "a": "in in_, a",
        "b": "in in_, a",
        "c": "a",
        "out": "in a, -",
    }


IN_ORDER = {
    "fft": (lambda h: jnp.fft.rfft(h).real, "`fft` is not followed"),
    "sort": (lambda h: jnp.sort(h, axis=-1), "`sort` along it"),
    "rev": (lambda h: h[:, ::-1], "`rev` along it"),
    "cumsum": (lambda h: jnp.cumsum(h, axis=-1), "`cumsum` along it"),
    "argmax": (lambda h: jax.nn.one_hot(h.argmax(-1), 8), "`argmax` over it"),
    "iota": (lambda h: h * jnp.arange(8.0), "positions"),
    "constant": (lambda h: h * np.arange(8.0), "a constant of the model"),
    "stride": (lambda h: h[:, ::2], "every other element of it is taken"),
    "pad": (lambda h: jnp.pad(h, ((0, 0), (1, 0))), "`pad` along it"),
    "gather": (lambda h: h @ h.T @ h[:, [3, 1, 2]], "an index into it"),
    "roll": (lambda h: jnp.roll(h, 1, axis=-1) + h, "a single element"),
}


@pytest.mark.parametrize(("use", "reason"), IN_ORDER.values(), ids=IN_ORDER)
def test_an_axis_whose_order_counts_is_fixed_and_the_reason_is_told(use, reason):
    x = jax.random.normal(KEY, (4, 5))
    width = jax.eval_shape(use, jnp.ones((4, 8))).shape[1]
    params = weights(w=(5, 8), v=(width, 6), u=(6, 2))

    def model(p, x):
        return jnp.tanh(use(x @ p["w"]) @ p["v"]) @ p["u"]

    table = tried(model, params, x)
    assert table == {"w": "in 5, -", "v": f"in {width}, v", "u": "in v, -"}
    assert reason in why_fixed(model, params, x)["w"][1]
    assert list(why_fixed(model, params, x)["v"]) == [0]


ALONG_ANOTHER = {
    "stack": lambda h: jnp.stack([h, jnp.sin(h)], 1).max(1),
    "unstack": lambda h: sum(jnp.unstack(jnp.stack([h, jnp.sin(h)]))),
    "tile": lambda h: jnp.tile(h[:, :], (2, 1))[:4],
    "set": lambda h: h.at[2].set(jnp.ones(8)),
    "add": lambda h: h.at[jnp.array([0, 2])].add(h[:2]),
    "update": lambda h: jax.lax.dynamic_update_slice(h, h[:1] ** 2, (2, 0)),
    "slice": lambda h: jax.lax.dynamic_slice_in_dim(h, 1, 2) + h[0],
    "top_k": lambda h: jax.lax.top_k(h.T, 2)[0].T,
    "take": lambda h: jnp.take_along_axis(h, jnp.argsort(h.sum(-1))[:, None], axis=0),
    "pool": lambda h: jax.lax.reduce_window(h, -jnp.inf, jax.lax.max, (2, 1), (1, 1), "SAME"),
    "join": lambda h: jnp.concatenate([h, jnp.zeros((1, 8))]),
    "norm": lambda h: jnp.linalg.norm(h, axis=0, keepdims=True) * jax.nn.standardize(h) + jnp.where(h > 0, h.mean(), 0),
    "vmap": jax.vmap(lambda row: jax.lax.optimization_barrier(jnp.where(row > 0, row, -row))),
}


@pytest.mark.parametrize("use", ALONG_ANOTHER.values(), ids=ALONG_ANOTHER)
def test_an_axis_is_followed_through_what_is_done_along_another(use):
    params = weights(w=(5, 8), v=(8, 2))
    table = tried(lambda p, x: use(jnp.tanh(x @ p["w"])) @ p["v"], params, jax.random.normal(KEY, (4, 5)))
    assert table == {"w": "in 5, w", "v": "in w, -"}


def test_an_axis_with_one_element_taken_out_permutes_among_the_others():
    def first(p, x):
        h = jnp.tanh(x @ p["w"])
        return h[:, :1] + h @ p["v"]

    table = tried(first, weights(w=(5, 8), v=(8, 2)), jax.random.normal(KEY, (4, 5)))
    assert table == {"w": "in 5, 1 + w", "v": "in 1 + w, -"}


def test_tensors_that_are_products_of_others_are_read_where_they_are_contracted():
    def adapted(p, x):
        return jnp.tanh(x @ (p["w"] + p["a"] @ p["b"])) @ p["v"].astype(jnp.float32).T

    table = tried(adapted, weights(w=(5, 8), a=(5, 3), b=(3, 8), v=(2, 8)), jax.random.normal(KEY, (4, 5)))
    assert table == {"w": "in 5, b", "a": "in 5, a", "b": "in a, b", "v": "-, in b"}


def test_shapes_alone_give_the_spaces():
    model, x = MLP(), jax.ShapeDtypeStruct((2, 5), jnp.float32)
    params = jax.eval_shape(model.init, KEY, x)["params"]
    assert spaces_of_linen(model, params, x).sizes == {"Dense_0": 8, "Dense_1": 6}
