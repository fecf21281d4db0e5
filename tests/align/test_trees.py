"""What takes models by the names of their tensors takes trees too, and gives back what it was given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict

from cfmerge import align
from cfmerge.errors import CfmergeError

TABLE = {"last/kernel": "in first, -", "first/kernel": "in -, first", "first/bias": "first"}  # not the leaves' order
SHAPES = {"last/kernel": (6, 2), "first/kernel": (3, 6), "first/bias": (6,)}
SPACES = align.parse_spaces(TABLE, SHAPES)


def tree(seed):
    key = jax.random.split(jax.random.key(seed), 3)
    return {
        "first": {"kernel": jax.random.normal(key[0], (3, 6)), "bias": jax.random.normal(key[1], (6,))},
        "last": {"kernel": jax.random.normal(key[2], (6, 2))},
    }


def twin(model, seed=1):
    return align.permute(SPACES, model, align.random_permutations(SPACES, seed))


def same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-6), found, expected)


def test_a_permuted_tree_is_a_tree():
    model = tree(0)
    other = twin(model)
    assert jax.tree.structure(other) == jax.tree.structure(model)
    x = jnp.ones(3)
    run = lambda p: jnp.tanh(x @ p["first"]["kernel"] + p["first"]["bias"]) @ p["last"]["kernel"]  # noqa: E731
    np.testing.assert_allclose(run(other), run(model), atol=1e-6)


def test_trees_are_matched():
    model = tree(0)
    found = align.weight_matching(SPACES, model, twin(model))
    same(align.permute(SPACES, twin(model), found.permutations), model)
    found = align.universe(SPACES, {"a": model, "b": twin(model)})
    a, b = (align.permute(SPACES, one, found.permutations[name]) for name, one in (("a", model), ("b", twin(model))))
    same(a, b)


def test_the_mean_and_the_fusion_of_trees_are_trees():
    model = tree(0)
    same(align.merge_many(SPACES, {"a": model, "b": twin(model)}).mean, model)
    same(align.ot_fusion(SPACES, twin(model), model).tensors, model)


@pytest.mark.parametrize("several", [align.merge_many, align.universe])
def test_several_models_without_names_are_refused(several):
    with pytest.raises(CfmergeError, match=r"models: expected \{name: model\}, found list; give names"):
        several(SPACES, [tree(0), tree(1)])


def test_a_matching_in_place_of_its_permutations_is_told_the_way_out():
    found = align.weight_matching(SPACES, tree(0), tree(1))
    with pytest.raises(CfmergeError, match=r"found Matching; give its `permutations`"):
        align.permute(SPACES, tree(1), found)


def test_a_tensor_without_a_line_is_refused():
    with pytest.raises(CfmergeError, match=r"permute: the table of spaces has no line for more/kernel"):
        align.permute(SPACES, {**tree(0), "more": {"kernel": np.ones(2)}}, {})


def test_a_tree_of_another_kind_than_dicts_keeps_its_kind():
    """A `PyTreeDef` of JAX is not unequal to a text, so that a comparison the other way round tells nothing."""
    frozen = FrozenDict(tree(0))
    assert isinstance(twin(frozen), FrozenDict)
    assert isinstance(align.merge_many(SPACES, {"a": frozen, "b": twin(frozen)}).mean, FrozenDict)
    assert isinstance(align.ot_fusion(SPACES, twin(frozen), frozen).tensors, FrozenDict)
    zipped = align.zip_models(SPACES, {"a": frozen, "b": twin(frozen)}, "weights")
    assert isinstance(zipped.model("b"), FrozenDict)
    same(zipped.model("a"), frozen)
