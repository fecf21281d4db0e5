"""Trees of Flax as mappings by name, and what is said where a tree is given in place of one."""

import jax
import numpy as np
import pytest
from flax import nnx

from cfmerge import align
from cfmerge.errors import CfmergeError

TABLE = {"up/kernel": "in -, h", "up/bias": "h", "down/kernel": "in h, -"}
TREE = {
    "down": {"kernel": np.arange(8.0).reshape(4, 2)},
    "up": {"kernel": np.arange(12.0).reshape(3, 4), "bias": np.ones(4)},
}


@pytest.fixture
def spaces():
    return align.parse_spaces(TABLE, {name: leaf.shape for name, leaf in align.flatten(TREE).items()})


def test_a_tree_and_its_arrays_by_name_are_each_other_s_inverse():
    named = align.flatten(TREE)
    assert set(named) == set(TABLE)
    shapes = jax.eval_shape(lambda: TREE)  # a structure without arrays does
    back = align.unflatten(dict(reversed(named.items())), shapes)
    assert jax.tree.structure(back) == jax.tree.structure(TREE)
    assert back["up"]["kernel"] is TREE["up"]["kernel"]


def test_an_nnx_model_has_the_names_of_its_state():
    model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    named = align.flatten(nnx.state(model))
    assert set(named) == {"kernel", "bias"}
    nnx.update(model, align.unflatten({**named, "bias": named["bias"] + 1}, nnx.state(model)))
    np.testing.assert_allclose(model.bias[...], np.ones(4))


def test_other_names_than_the_tree_s_are_refused():
    named = align.flatten(TREE)
    with pytest.raises(CfmergeError, match=r"unflatten: the tree has no leaf more"):
        align.unflatten({**named, "more": np.ones(1)}, TREE)
    del named["up/bias"]
    with pytest.raises(CfmergeError, match=r"unflatten: no tensor is called up/bias"):
        align.unflatten(named, TREE)


@pytest.mark.parametrize(
    "call",
    [
        lambda spaces: align.weight_matching(spaces, TREE, TREE),
        lambda spaces: align.merge_many(spaces, {"a": TREE, "b": TREE}),
        lambda spaces: align.universe(spaces, {"a": TREE, "b": TREE}),
        lambda spaces: align.ot_fusion(spaces, TREE, TREE),
        lambda spaces: align.permute(spaces, TREE, {}),
        lambda spaces: align.weight_matching(spaces, nnx.Linear(3, 4, rngs=nnx.Rngs(0)), {}),
    ],
    ids=["weight_matching", "merge_many", "universe", "ot_fusion", "permute", "module"],
)
def test_a_tree_in_place_of_arrays_by_name_is_told_the_way_out(spaces, call):
    with pytest.raises(CfmergeError, match=r"becomes `\{name: array\}` by cfmerge\.align\.flatten"):
        call(spaces)


def test_other_tensors_than_the_table_s_are_not_taken_for_a_tree(spaces):
    with pytest.raises(CfmergeError, match=r"has no line for head$"):
        align.permute(spaces, {**align.flatten(TREE), "head": np.ones(2)}, {})


@pytest.mark.parametrize("several", [align.merge_many, align.universe])
def test_several_models_without_names_are_refused(spaces, several):
    with pytest.raises(CfmergeError, match=r"expected \{name: \{tensor: array\}\}, found list"):
        several(spaces, [align.flatten(TREE)] * 2)


def test_a_matching_in_place_of_its_permutations_is_told_the_way_out(spaces):
    found = align.weight_matching(spaces, align.flatten(TREE), align.flatten(TREE))
    with pytest.raises(CfmergeError, match=r"found Matching; give its `permutations`"):
        align.permute(spaces, align.flatten(TREE), found)
