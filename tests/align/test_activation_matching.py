"""Neurons matched by joint moments of their activations."""

import numpy as np
import pytest
from networks import model_of, spaces_of

from cfmerge.align import Moments, activation_matching, permute, random_permutations
from cfmerge.errors import CfmergeError


def activations(model, x):
    """The hidden activations of an MLP, by space."""
    found = {}
    for layer, space in enumerate("abc"):
        x = np.maximum(x @ model[f"fc{layer}.weight"].T + model[f"fc{layer}.bias"], 0)
        found[space] = x
    return found


def test_a_permuted_copy_is_recovered_from_activations():
    spaces, model = spaces_of("MLP"), model_of("MLP")
    permutations = random_permutations(spaces, 1)
    copy = permute(spaces, model, permutations)
    x = np.random.default_rng(0).normal(size=(200, 6))
    moments = Moments(("model", "copy"))
    for space, features in activations(model, x).items():
        moments.add(space, [features, activations(copy, x)[space]])
    found = activation_matching(spaces, moments)
    for name, tensor in permute(spaces, copy, found.permutations).items():
        np.testing.assert_array_equal(tensor, model[name])
    assert found.objective == pytest.approx(sum((~moments.dead(space)).sum() / 2 for space in moments.spaces))
    assert found.before < found.objective
    back = activation_matching(spaces, moments, models=("copy", 0))
    for space, permutation in back.permutations.items():
        np.testing.assert_array_equal(permutation, permutations[space])


def test_heads_are_matched_with_the_values_within_or_alone():
    spaces = spaces_of("attention")
    permutations = random_permutations(spaces, 2)
    generator = np.random.default_rng(0)
    h, m, values = (generator.normal(size=(60, width)) for width in (10, 14, 12))
    order = (permutations["heads"][:, None] * 4 + permutations["heads.v"]).ravel()
    whole, alone = Moments(), Moments()
    for moments in (whole, alone):
        moments.add("h", [h, h[:, permutations["h"]]])
        moments.add("m", [m, m[:, permutations["m"]]])
    whole.add("heads", [values, values[:, order]])
    alone.add("heads", [values[:, :3], values[:, permutations["heads"]]])
    found = activation_matching(spaces, whole, models=(1, 0)).permutations
    for space, permutation in permutations.items():
        np.testing.assert_array_equal(found[space], permutation)
    found = activation_matching(spaces, alone, models=(1, 0)).permutations
    np.testing.assert_array_equal(found["heads"], permutations["heads"])
    np.testing.assert_array_equal(found["heads.v"], np.tile(np.arange(4), (3, 1)))


def test_moments_that_do_not_fit_are_refused():
    spaces = spaces_of("attention")
    moments = Moments(("left", "right"))
    features = np.random.default_rng(0).normal(size=(5, 10))
    with pytest.raises(CfmergeError, match=r"no model 'up'"):
        activation_matching(spaces, moments, models=("left", "up"))
    with pytest.raises(CfmergeError, match=r"there are none of space 'h'"):
        activation_matching(spaces, moments)
    moments.add("h", [features, features])
    moments.add("heads", [features[:, :5], features[:, :5]])
    with pytest.raises(CfmergeError, match=r"'heads': expected 3 features of each model, or .* heads\.v; found 5"):
        activation_matching(spaces, moments)
