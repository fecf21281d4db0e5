"""Models with their neurons in another order."""

import numpy as np
import pytest

from cfmerge.align import (
    check_permutations,
    compose,
    identity,
    inverse,
    parse_spaces,
    permute,
    random_permutations,
)
from cfmerge.errors import CfmergeError

ATTENTION = {
    "q": "kv kv.q 4, in h",
    "k": "kv 4, in h",
    "v": "kv kv.v, in h",
    "o": "h, in kv kv.q kv.v",
    "all": "kv kv.q 4 + kv 4 + kv kv.v, in h",
    "norm": "h",
    "scale": "",
}
SHAPES = {"q": (24, 10), "k": (8, 10), "v": (8, 10), "o": (10, 24), "all": (40, 10), "norm": (10,), "scale": ()}


@pytest.fixture
def spaces():
    return parse_spaces(ATTENTION, SHAPES)


@pytest.fixture
def model():
    generator = np.random.default_rng(0)
    return {name: generator.normal(size=shape) for name, shape in SHAPES.items()}


def attention(model, x):
    """What grouped-query attention with two groups of three heads makes of tokens `(t, 10)`, less the rotations."""
    q = (x @ model["q"].T).reshape(-1, 2, 3, 4)
    k, v = ((x @ model[name].T).reshape(-1, 2, 4) for name in "kv")
    scores = np.einsum("tgqd,sgd->gqts", q, k)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    return np.einsum("gqts,sgd->tgqd", weights, v).reshape(-1, 24) @ model["o"].T


def test_attention_whose_groups_heads_and_values_are_permuted_gives_the_same_outputs(spaces, model):
    permutations = random_permutations(spaces, 1)
    other = permute(spaces, model, permutations)
    x = np.random.default_rng(2).normal(size=(5, 10)) * 0.3
    np.testing.assert_allclose(attention(other, x[:, permutations["h"]]), attention(model, x)[:, permutations["h"]])
    assert not np.allclose(other["q"], model["q"])


def test_parts_that_lie_end_to_end_are_permuted_each_by_itself(spaces, model):
    joined = {**model, "all": np.concatenate([model["q"], model["k"], model["v"]])}
    other = permute(spaces, joined, random_permutations(spaces, 1))
    np.testing.assert_array_equal(other["all"], np.concatenate([other["q"], other["k"], other["v"]]))


def test_the_inverse_undoes_a_permutation(spaces, model):
    permutations = random_permutations(spaces, 3)
    back = permute(spaces, permute(spaces, model, permutations), inverse(spaces, permutations))
    for name, tensor in model.items():
        np.testing.assert_array_equal(back[name], tensor)
    again = compose(spaces, permutations, inverse(spaces, permutations))
    for name, permutation in identity(spaces).items():
        np.testing.assert_array_equal(again[name], permutation)


def test_a_composition_does_one_permutation_after_the_other(spaces, model):
    first, second = random_permutations(spaces, 4), random_permutations(spaces, 5)
    steps = permute(spaces, permute(spaces, model, first), second)
    once = permute(spaces, model, compose(spaces, first, second))
    for name, tensor in steps.items():
        np.testing.assert_array_equal(once[name], tensor)


def test_an_array_that_is_no_permutation_is_refused(spaces):
    with pytest.raises(CfmergeError, match=r"no space 'heads'; there is: kv, h, kv.q, kv.v"):
        check_permutations(spaces, {"heads": np.arange(3)})
    with pytest.raises(CfmergeError, match=r"'h': expected each of 0 \.\. 9 once.* \(10,\); found .*\(9,\)"):
        check_permutations(spaces, {"h": np.arange(9)})
    with pytest.raises(CfmergeError, match="with other values"):
        check_permutations(spaces, {"kv": np.array([1, 1])})


def test_lists_are_permutations_and_numbers_that_are_no_integers_are_not(spaces, model):
    orders = random_permutations(spaces, 0)
    expected = permute(spaces, model, orders)
    for name, tensor in permute(spaces, model, {space: order.tolist() for space, order in orders.items()}).items():
        np.testing.assert_array_equal(tensor, expected[name])
    with pytest.raises(CfmergeError, match=r"permutations: space 'kv': .* of numbers that are no integers"):
        permute(spaces, model, {"kv": np.array([1.0, 0.0])})
