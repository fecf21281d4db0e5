"""MergeMany: several models permuted to the mean of the others."""

import numpy as np
import pytest
from networks import NETWORKS, model_of, spaces_of

from cfmerge.align import merge_many, permute, random_permutations, universe
from cfmerge.errors import CfmergeError


def spread(spaces, models, permutations):
    """The sum of squared distances of permuted models from their mean."""
    permuted = [permute(spaces, model, permutations[name]) for name, model in models.items()]
    return sum(
        float(((one[n] - sum(p[n] for p in permuted) / len(permuted)) ** 2).sum()) for one in permuted for n in one
    )


@pytest.mark.parametrize("network", NETWORKS)
def test_permuted_copies_of_a_model_give_the_model_back(network):
    spaces, model = spaces_of(network), model_of(network)
    models = {f"copy {seed}": permute(spaces, model, random_permutations(spaces, seed)) for seed in range(3)}
    many = merge_many(spaces, {"model": model, **models})
    for name, tensor in many.mean.items():
        np.testing.assert_allclose(tensor, model[name], rtol=1e-14)
    assert max(many.distances.values()) < 1e-12


@pytest.mark.parametrize("network", ["MLP", "attention"])
def test_the_spread_never_grows_and_is_what_the_result_says(network):
    spaces = spaces_of(network)
    models = {name: model_of(network, seed) for seed, name in enumerate("abcd")}
    for seed in range(3):
        start = {name: random_permutations(spaces, seed + number) for number, name in enumerate(models)}
        many = merge_many(spaces, models, seed=seed, start=start)
        assert len(many.history) > 2
        assert all(later <= earlier + 1e-12 for earlier, later in zip(many.history, many.history[1:], strict=False))
        assert many.history[0] == pytest.approx(spread(spaces, models, start))
        assert many.history[-1] == pytest.approx(spread(spaces, models, many.permutations))
        assert sum(d**2 for d in many.distances.values()) == pytest.approx(many.history[-1])
        mean = {n: sum(permute(spaces, m, many.permutations[w])[n] for w, m in models.items()) / 4 for n in many.mean}
        for name, tensor in mean.items():
            np.testing.assert_allclose(many.mean[name], tensor, atol=1e-14)


def test_the_same_seed_gives_the_same_mean():
    spaces, models = spaces_of("MLP"), {name: model_of("MLP", seed) for seed, name in enumerate("abc")}
    one, two = (merge_many(spaces, models, seed=4) for _ in range(2))
    assert one.history == two.history
    for name, tensor in one.mean.items():
        np.testing.assert_array_equal(tensor, two.mean[name])


def test_a_mean_has_the_dtype_of_the_first_model_and_keeps_what_is_the_same_in_all():
    spaces = spaces_of({**NETWORKS["MLP"], "steps": ((), "")})
    models = {name: {**model_of("MLP", seed, np.float16), "steps": np.array(7)} for seed, name in enumerate("ab")}
    many = merge_many(spaces, models)
    assert many.mean["fc1.bias"].dtype == np.float16
    assert many.mean["steps"] == 7
    models["b"]["steps"] = np.array(8)
    with pytest.raises(CfmergeError, match=r"'steps': differs between models, and int64 is not averaged"):
        merge_many(spaces, models)


def test_one_model_is_refused_and_a_model_that_does_not_fit_is_named():
    spaces, model = spaces_of("MLP"), model_of("MLP")
    with pytest.raises(CfmergeError, match=r"two or more models, found 1"):
        merge_many(spaces, {"only": model})
    with pytest.raises(CfmergeError, match=r"model late: has no tensor fc0\.weight and 7 more"):
        merge_many(spaces, {"early": model, "late": {}})


def test_a_number_that_is_not_finite_is_told_by_the_name_of_the_model():
    spaces, model = spaces_of("MLP"), model_of("MLP")
    with pytest.raises(CfmergeError, match=r"'fc1\.bias' of model late: has a NaN or an infinity"):
        merge_many(spaces, {"early": model, "late": {**model, "fc1.bias": np.full(9, np.inf)}})
    with pytest.raises(
        CfmergeError, match=r"'fc1\.bias' of model late: has the dtype int64; a tensor whose axes permute"
    ):
        merge_many(spaces, {"early": model, "late": {**model, "fc1.bias": np.zeros(9, int)}})


@pytest.mark.parametrize("find", [merge_many, universe])
def test_a_start_of_another_model_or_that_is_no_permutation_is_refused(find):
    spaces, models = spaces_of("MLP"), {"a": model_of("MLP"), "b": model_of("MLP", 1)}
    with pytest.raises(CfmergeError, match=r"start: there is no model 'c'; there is: a, b"):
        find(spaces, models, start={"c": {}})
    with pytest.raises(CfmergeError, match=r"permutations: space 'a': expected each of 0 \.\. 11 once"):
        find(spaces, models, start={"b": {"a": np.zeros(12, int)}})
