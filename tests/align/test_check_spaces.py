"""Tables of spaces that are wrong are told by the model's outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfmerge.align import check_spaces, parse_spaces
from cfmerge.errors import CfmergeError

SHAPES = {"a": (5, 8), "bias": (8,), "b": (8, 8), "c": (8, 2)}
RIGHT = {"a": "in -, h", "bias": "h", "b": "in h, g", "c": "in g, -"}
X = jax.random.normal(jax.random.key(1), (4, 5))


def model(params, x):
    return {"logits": jnp.tanh(jnp.tanh(x @ params["a"] + params["bias"]) @ params["b"]) @ params["c"]}


@pytest.fixture
def params():
    keys = jax.random.split(jax.random.key(0), len(SHAPES))
    made = {name: jax.random.normal(key, SHAPES[name]) for name, key in zip(SHAPES, keys, strict=True)}
    return {**made, "bias": jnp.zeros(8)}  # of a new model: without noise its order would not be seen


def test_a_table_that_is_right_passes(params):
    check_spaces(parse_spaces(RIGHT, SHAPES), model, params, X)


def test_a_tensor_without_entries_changes_nothing(params):
    params |= {"none": jnp.zeros((0, 8))}
    shapes = SHAPES | {"none": (0, 8)}
    check_spaces(parse_spaces(RIGHT | {"none": "-, -"}, shapes), model, params, X)
    check_spaces(parse_spaces(RIGHT | {"none": "-, h"}, shapes), model, params, X)


@pytest.mark.parametrize(("wrong", "space"), [
    ({"bias": "-"}, "h"),
    ({"bias": "g"}, "h"),
    ({"b": "in h, h", "c": "in h, -"}, ""),
    ({"b": "in g, h"}, "h"),
    ({"b": "in h, -", "c": "in -, -", "a": "in -, h"}, ""),
    ({"c": "in -, -", "b": "in g, g"}, "h"),
    ({"a": "in -, 2 h", "bias": "2 h", "b": "in 2 h, g"}, ""),
    ({"a": "in -, 2 h", "bias": "h 2", "b": "in 2 h, g"}, "h"),
], ids=["left out", "of another", "one for two", "swapped", "fewer", "unread", "blocks", "other blocks"])  # fmt: skip
def test_a_space_that_changes_the_outputs_is_named_with_its_tensors(wrong, space, params):
    """Fewer permutations than there are, with "", are right too."""
    spaces = parse_spaces({**RIGHT, **wrong}, SHAPES)
    if not space:
        check_spaces(spaces, model, params, X)
        return
    with pytest.raises(CfmergeError, match=rf"permutation of '{space}' changes output 'logits' by up to .* is on \w+ "):
        check_spaces(spaces, model, params, X)


def test_tensors_that_the_table_does_not_know_are_refused(params):
    spaces = parse_spaces(RIGHT, SHAPES)
    with pytest.raises(CfmergeError, match="no line for tensor 'extra'"):
        check_spaces(spaces, model, {**params, "extra": jnp.ones(2)}, X)
    with pytest.raises(CfmergeError, match=r"'a': expected shape \(5, 8\), found \(4, 8\)"):
        check_spaces(spaces, model, {**params, "a": jnp.ones((4, 8))}, X)
    with pytest.raises(CfmergeError, match="has no tensor a and 1 more"):
        check_spaces(spaces, model, {name: params[name] for name in ("b", "c")}, X)


def test_outputs_that_are_not_finite_show_nothing(params):
    with pytest.raises(CfmergeError, match="output 'logits' of the model is not finite"):
        check_spaces(parse_spaces(RIGHT, SHAPES), model, {**params, "c": jnp.full((8, 2), np.nan)}, X)


def test_shapes_alone_cannot_be_tried(params):
    shapes = {**params, "c": jax.ShapeDtypeStruct((8, 2), jnp.float32)}
    with pytest.raises(CfmergeError, match="leaf 'c' is not an array"):
        check_spaces(parse_spaces(RIGHT, SHAPES), model, shapes, X)
