"""Spaces of linen and nnx models: as many as there are, and no permutation of theirs changes an output."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from cfmerge.activations import linen_function, nnx_function, spaces_of_linen, spaces_of_nnx
from cfmerge.align import check_spaces

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


def test_channels_permute_within_the_groups_of_a_convolution_and_outputs_within_their_input():
    class Grouped(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = jnp.tanh(nn.Conv(6, (3, 3))(x))
            x = jnp.tanh(nn.Conv(12, (3, 3), feature_group_count=6)(x))  # two outputs of each input
            x = jnp.tanh(nn.Conv(6, (3, 3), feature_group_count=3)(x))  # three groups of four channels
            return nn.Conv(2, (1, 1))(x).mean((1, 2))

    spaces = checked(Grouped(), IMAGES)
    table = spaces.table()
    assert table["Conv_2/kernel"] == "-, -, in 4, Conv_0 Conv_0.Conv_2"
    assert spaces.sizes["Conv_0"] == 3


def test_a_recurrent_cell_has_its_state_and_experts_permute_as_blocks():
    class Cells(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.RNN(nn.OptimizedLSTMCell(8))(x)
            up = self.param("up", nn.initializers.normal(), (3, 8, 6))
            down = self.param("down", nn.initializers.normal(), (3, 6, 8))
            y = jnp.einsum("teh,ehd->ted", jnp.tanh(jnp.einsum("td,edh->teh", x[:, -1], up)), down)
            return nn.Dense(2)(jnp.einsum("ted,te->td", y, nn.softmax(nn.Dense(3)(x[:, -1]))))

    spaces = checked(Cells(), jax.random.normal(KEY, (2, 5, 4)))
    assert sorted(spaces.sizes.values()) == [3, 8, 8]
    assert spaces.table()["up"] == "Dense_1, in OptimizedLSTMCell_0/hf, -"


def test_shapes_alone_give_the_spaces():
    model, x = MLP(), jax.ShapeDtypeStruct((2, 5), jnp.float32)
    params = jax.eval_shape(model.init, KEY, x)["params"]
    assert spaces_of_linen(model, params, x).sizes == {"Dense_0": 8, "Dense_1": 6}
