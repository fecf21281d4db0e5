"""Spaces of chains of layers, by names and shapes: the permuted model computes the same, in Flax and in PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as nn

from cfmerge.align import chain_spaces, check_spaces, permute, random_permutations
from cfmerge.errors import CfmergeError


class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        for width, groups in ((6, 1), (6, 6), (4, 1)):
            x = nn.Conv(width, (3, 3), feature_group_count=groups)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        x = nn.relu(nn.Dense(10)(nn.max_pool(x, (2, 2), (2, 2)).reshape(len(x), -1)))
        return nn.Dense(2)(x)


def test_a_convnet_of_flax_has_a_space_for_each_layer_but_depthwise_ones():
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
    shapes = jax.eval_shape(ConvNet().init, jax.random.key(0), x)
    generator = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: jnp.asarray(generator.uniform(0.1, 1, leaf.shape), "f"), shapes)
    spaces = chain_spaces(variables)
    check_spaces(spaces, ConvNet().apply, variables, x)
    assert spaces.sizes == {"Conv_0": 6, "Conv_2": 4, "Dense_0": 10}
    assert spaces.table()["params/Dense_0/kernel"] == "in 4 Conv_2, Dense_0"
    assert spaces.table()["batch_stats/BatchNorm_1/var"] == "Conv_0"
    assert chain_spaces(shapes["params"]).sizes == spaces.sizes


def test_a_convnet_of_pytorch_has_its_channels_in_front_of_the_places():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 6, 3, padding=1), torch.nn.BatchNorm2d(6), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
        torch.nn.Conv2d(6, 6, 3, padding=1, groups=6), torch.nn.Conv2d(6, 4, 1, bias=False), torch.nn.ReLU(),
        torch.nn.Flatten(), torch.nn.Linear(16, 10), torch.nn.LayerNorm(10), torch.nn.ReLU(), torch.nn.Linear(10, 2),
    ).eval()  # fmt: skip
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.1, 1)
    images = torch.randn(2, 3, 4, 4)
    before = model(images).detach().numpy()
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    spaces = chain_spaces(state)
    other = permute(spaces, state, random_permutations(spaces, 1))
    assert spaces.sizes == {"_0": 6, "_5": 4, "_8": 10}
    assert spaces.table()["8.weight"] == "_8, in _5 4"
    assert not np.array_equal(other["8.weight"], state["8.weight"])
    model.load_state_dict({name: torch.tensor(array) for name, array in other.items()})
    np.testing.assert_allclose(model(images).detach().numpy(), before, rtol=1e-5)


def test_an_order_that_is_given_is_taken():
    shapes = {"out/kernel": (6, 2), "mid/kernel": (8, 6), "norm/scale": (6,), "first/kernel": (3, 8)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    table = chain_spaces(params, ["first", "mid", "norm", "out"]).table()
    assert table["out/kernel"] == "in mid, -"
    assert table["norm/scale"] == "mid"


TWO = {"a/kernel": (3, 6), "b/kernel": (6, 2)}


@pytest.mark.parametrize(("shapes", "layers", "message"), [
    ({**TWO, "b/kernel": (8, 2)}, None, r"layer 'b' reads 8 inputs, and layer 'a' before it writes 6"),
    ({**TWO, "n/scale": (5,)}, None, r"tensor 'n/scale': expected shape \(6,\), as layer 'a' writes; found \(5,\)"),
    ({**TWO, "GroupNorm_0/scale": (6,)}, None, r"layer 'GroupNorm_0': a chain has no groups"),
    ({**TWO, "n1/scale": (6,), "n2/scale": (6,)}, None, r"n1, n2 lie behind\? .*\(params, \['a', 'b', 'n1', 'n2'\]\)"),
    (TWO, ["a"], r"the order leaves out layer b; the model's layers: a, b"),
    (TWO, ["a", "b", "c"], r"the model has no layer c"),
], ids=["inputs", "norm", "groups", "norms", "left out", "unknown"])  # fmt: skip
def test_what_is_no_chain_is_refused(shapes, layers, message):
    with pytest.raises(CfmergeError, match=message):
        chain_spaces({name: np.ones(shape) for name, shape in shapes.items()}, layers)


def test_names_by_the_alphabet_as_files_have_them_are_no_order_of_calls():
    layers = [*(f"layers.{number}" for number in range(12)), "out"]
    state = {f"{name}.weight": np.ones((2 if name == "out" else 8, 3 if name == "layers.0" else 8)) for name in layers}
    assert chain_spaces(state).table()["layers.10.weight"] == "layers/10, in layers/9"
    by_alphabet = dict(sorted(state.items()))
    with pytest.raises(CfmergeError, match=r"no order of calls; .*'layers/9', 'layers/10', 'layers/11', 'out'"):
        chain_spaces(by_alphabet)
    assert chain_spaces(by_alphabet, layers).table()["layers.10.weight"] == "layers/10, in layers/9"
    normed = {"conv1.weight": (8, 8, 3, 3), "bn1.weight": (8,), "conv2.weight": (8, 8, 3, 3), "bn2.weight": (8,)}
    state = {name: np.ones(shape) for name, shape in (normed | {"fc.weight": (8, 8)}).items()}
    assert chain_spaces(state).table()["bn2.weight"] == "conv2"
    for order in (sorted(state), ["conv1.weight", "conv2.weight", "fc.weight", "bn1.weight", "bn2.weight"]):
        with pytest.raises(CfmergeError, match=r"the layers come as .*, which is no order of calls; give it"):
            chain_spaces({name: state[name] for name in order})
