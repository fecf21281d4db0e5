"""C2M3: several models in one universe."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import NETWORKS, model_of, spaces_of

from cfmerge.align import between, compose, identity, permute, random_permutations, universe
from cfmerge.align.c2m3 import Search, blended, highest, lagrange
from cfmerge.errors import CfmergeError


def agreement(spaces, models, permutations):
    """The sum over pairs of models of inner products of permuted weights."""
    permuted = [permute(spaces, model, permutations[name]) for name, model in models.items()]
    return sum(float((a[n] * b[n]).sum()) for a, b in itertools.combinations(permuted, 2) for n in a)


@pytest.mark.parametrize("network", NETWORKS)
def test_permuted_copies_of_a_model_are_the_same_model_in_the_universe(network):
    spaces, model = spaces_of(network), model_of(network)
    models = {str(seed): permute(spaces, model, random_permutations(spaces, seed)) for seed in range(3)}
    found = universe(spaces, models)
    there = [permute(spaces, each, found.permutations[name]) for name, each in models.items()]
    for name in model:
        np.testing.assert_array_equal(there[1][name], there[0][name])
        np.testing.assert_array_equal(there[2][name], there[0][name])


@pytest.mark.parametrize("network", ["MLP", "attention", "grouped"])
def test_permutations_agree_round_every_cycle(network):
    spaces = spaces_of(network)
    models = {name: model_of(network, seed) for seed, name in enumerate("abc")}
    found = universe(spaces, models).permutations
    a_to_b, b_to_c, c_to_a = (between(spaces, found[one], found[other]) for one, other in ("ab", "bc", "ca"))
    round_trip = compose(spaces, compose(spaces, a_to_b, b_to_c), c_to_a)
    for space, permutation in identity(spaces).items():
        np.testing.assert_array_equal(round_trip[space], permutation)
    moved = permute(spaces, models["a"], a_to_b)
    there = permute(spaces, models["a"], found["a"])
    for name, tensor in permute(spaces, moved, found["b"]).items():
        np.testing.assert_array_equal(tensor, there[name])


@pytest.mark.parametrize("network", ["MLP", "attention", "grouped", "recurrent"])
def test_the_objective_never_falls(network):
    spaces = spaces_of(network)
    models = {name: model_of(network, seed) for seed, name in enumerate("abc")}
    for start in (None, {name: random_permutations(spaces, seed) for seed, name in enumerate(models)}):
        found = universe(spaces, models, start=start)
        assert all(later > earlier for earlier, later in zip(found.history, found.history[1:], strict=False))
        if start is not None:
            begin = agreement(spaces, models, {name: start.get(name, {}) for name in models})
            assert found.history[0] == pytest.approx(begin)
            assert found.objective >= begin
            assert len(found.history) > 1
        assert found.objective == pytest.approx(agreement(spaces, models, found.permutations))
        assert found.before == pytest.approx(agreement(spaces, models, {name: {} for name in models}))


def test_the_highest_point_of_a_step_is_exact():
    points = np.linspace(0, 1, 5)
    quartic = lambda t: -((t - 0.3) ** 2) * ((t - 2) ** 2) + 4  # noqa: E731
    course = sum(quartic(t) * p for t, p in zip(points, lagrange(points), strict=True))
    assert highest(course) == pytest.approx(0.3)
    assert highest(lagrange([0.0, 1.0])[0]) == 0
    assert highest(lagrange([0.0, 1.0])[1]) == 1


def test_one_model_is_refused():
    spaces, model = spaces_of("MLP"), model_of("MLP")
    with pytest.raises(CfmergeError, match=r"two or more models, found 1"):
        universe(spaces, {"only": model})


def test_arrays_of_jax_have_the_same_universe():
    spaces = spaces_of("grouped")
    models = {name: model_of("grouped", seed, np.float32) for seed, name in enumerate("ab")}
    found = universe(spaces, models)
    there = universe(spaces, {name: {n: jnp.asarray(t) for n, t in model.items()} for name, model in models.items()})
    assert there.objective == pytest.approx(found.objective, rel=1e-6)


@pytest.mark.parametrize("network", ["attention", "grouped", "recurrent"])
def test_the_gradient_is_the_slope_of_a_step_and_the_step_is_a_polynomial(network):
    spaces = spaces_of(network)
    models = {name: model_of(network, seed) for seed, name in enumerate("abc")}
    search = Search(spaces, models)
    begin, middle, ahead = ({name: search.hard(random_permutations(spaces, 10 * part + seed))
                             for seed, name in enumerate(models)} for part in range(3))  # fmt: skip
    begin = blended(begin, middle, 0.3)
    with jax.enable_x64(True):
        course, gradients = search.along(begin, ahead), search.gradients(begin)
        there = search.objective(blended(begin, ahead, 0.7))
    slope = sum(float(np.vdot(gradients[m][space][key], ahead[m][space][key] - begin[m][space][key]))
                for m in models for space in gradients[m] for key in gradients[m][space])  # fmt: skip
    assert course.deriv()(0) == pytest.approx(slope)
    assert course(0.7) == pytest.approx(there)


def test_tensors_without_entries_are_mapped_too():
    network = {"in": ((4, 5), "h, in -"), "none": ((4, 0), "h, in -"), "rest": ((0,), "-"), "out": ((2, 4), "-, in h")}
    spaces, model = spaces_of(network), model_of(network)
    copy = permute(spaces, model, random_permutations(spaces, 1))
    found = universe(spaces, {"a": model, "b": copy, "c": model})
    back = permute(spaces, copy, between(spaces, found.permutations["b"], found.permutations["a"]))
    for name, tensor in back.items():
        np.testing.assert_array_equal(tensor, model[name])
