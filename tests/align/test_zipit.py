"""ZipIt!'s greedy matching, the Permute baseline, and the groups that they make."""

import golden_cases
import numpy as np
import pytest

from cfmerge.align import Groups, identity_match, match, permutation_match
from cfmerge.errors import CfmergeError


def correlation(covariance):
    deviation = np.sqrt(np.diagonal(covariance))
    return covariance / np.maximum(np.outer(deviation, deviation), covariance.dtype.type(1e-7))


def similar(seed, total, rank=6):
    """A correlation of random features that lie in few dimensions."""
    generator = np.random.default_rng(seed)
    return np.corrcoef((generator.normal(size=(40, rank)) @ generator.normal(size=(rank, total))).T)


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("name", golden_cases.names("zipit_"))
def test_the_authors_groups_are_made_where_they_are_asked_for(name, precision):
    case = golden_cases.CASES[name]
    arrays, params = golden_cases.load(case), case["params"]
    similarity = correlation(arrays["covariance"].astype(precision))
    models = params["num_models"]
    if name == "zipit_permute":
        groups = permutation_match(similarity, models, compat="official")
    else:
        width = int(len(similarity) * (1 - params["r"]) + 1e-4)
        groups = match(
            similarity, models, width=width, budget=params["beta"], penalty=params["alpha"], compat="official"
        )
        assert (groups.partition < 0).sum() == params["features_dropped"]
    np.testing.assert_array_equal(groups.partition, arrays["expected_partition"])
    for key in ("merge", "unmerge"):
        error = np.abs(getattr(groups, key) - arrays[f"expected_{key}"]).max()
        assert error <= case["tolerance"][f"expected_{key}"][precision]


@pytest.mark.parametrize("name", golden_cases.names("zipit_n2_default", "zipit_n2_small"))
def test_the_authors_groups_are_made_by_default_where_none_of_their_faults_shows(name):
    case = golden_cases.CASES[name]
    arrays, params = golden_cases.load(case), case["params"]
    groups = match(
        correlation(arrays["covariance"]), params["num_models"], budget=params["beta"], penalty=params["alpha"]
    )
    np.testing.assert_array_equal(groups.partition, arrays["expected_partition"])


def plainly(similarity, widths, width, budget, penalty):
    """The rule, on lists: no masks, no maxima that are kept."""
    model_of = np.repeat(np.arange(len(widths)), widths)
    groups = {i: [i] for i in range(len(similarity))}
    values = {(i, j): (1, similarity[i, j]) for i in groups for j in groups if i != j}  # 0 for 1: comes last
    own = int((len(similarity) - width) // len(widths) * budget + 1e-4)
    left = [max(own, size - width) for size in widths]
    while len(groups) > width:

        def shared(i, j):
            return {model_of[k] for k in groups[i]} & {model_of[k] for k in groups[j]}

        full = sum(len(members) > 1 for members in groups.values()) == width
        allowed = [
            (-rank, -value, pair)
            for pair, (rank, value) in values.items()
            if all(left[m] > 0 for m in shared(*pair)) and not (full and len(groups[pair[0]]) == 1)
        ]
        r, c = sorted(min(allowed)[2])
        for model in shared(r, c):
            left[model] -= 1
        groups[r] += groups.pop(c)
        for k in groups:
            if k != r:
                rank, lower = min(values[r, k], values[c, k])
                if penalty > 0:
                    lower *= penalty if lower > 0 else 2 - penalty
                elif shared(r, k):
                    rank = 0
                values[r, k] = values[k, r] = rank, lower
        values = {pair: value for pair, value in values.items() if c not in pair}
    partition = np.empty(len(similarity), int)
    for label, members in enumerate(groups[i] for i in sorted(groups)):
        partition[members] = label
    return partition


@pytest.mark.parametrize("seed", range(30))
def test_groups_are_those_of_the_rule_written_plainly(seed):
    generator = np.random.default_rng(seed)
    widths = [int(size) for size in generator.integers(2, 8, size=generator.integers(1, 5))]
    width = int(generator.integers(1, sum(widths) + 1)) if seed % 3 else max(widths)
    budget, penalty = generator.choice([0, 0.125, 0.5, 1, 3]), generator.choice([0.3, 1, 0.01, 0, -1])
    similarity = similar(seed, sum(widths))
    groups = match(similarity, widths, width=width, budget=budget, penalty=penalty)
    np.testing.assert_array_equal(groups.partition, plainly(similarity, widths, width, budget, penalty))


@pytest.mark.parametrize("models", [2, 3, 5])
@pytest.mark.parametrize("budget", [0, 0.125, 1])
def test_all_features_are_in_n_groups_and_a_model_keeps_to_its_budget(models, budget):
    groups = match(similar(models, 16 * models), models, budget=budget)
    assert sorted(set(groups.partition)) == list(range(16))
    assert max(groups.within) <= int(16 * (models - 1) // models * budget)
    np.testing.assert_allclose(groups.merge @ groups.unmerge, np.eye(16), atol=1e-15)
    np.testing.assert_array_equal(groups.unmerge.sum(axis=1), 1)
    assert groups.is_permutation == (max(groups.within) == 0)


def test_no_budget_gives_one_feature_of_each_model_to_every_group():
    for models in (2, 3, 4):
        assert match(similar(7, 12 * models), models, budget=0).is_permutation
    official = match(similar(7, 24), 2, budget=0, compat="official")
    assert official.within == (1, 1)


def test_the_official_code_loses_features_of_three_models_at_its_defaults_and_this_one_does_not():
    covariance = golden_cases.load(golden_cases.CASES["zipit_n3_drop_quirk"])["covariance"]
    assert (match(correlation(covariance), 3, compat="official").partition < 0).sum() == 2
    groups = match(correlation(covariance), 3)
    assert (groups.partition >= 0).all()
    assert groups.width == 6


def test_the_penalty_makes_no_unlike_pair_more_attractive():
    """0 and 2 become one. It is as unlike 1 as 0.5, before the penalty; 1 and 3 are unlike by 0.4."""
    similarity = np.array([[1, -0.5, 0.9, -0.6], [-0.5, 1, -0.5, -0.4], [0.9, -0.5, 1, -0.6], [-0.6, -0.4, -0.6, 1]])
    assert match(similarity, 2, width=2, budget=1).partition.tolist() == [0, 1, 0, 1]
    assert match(similarity, 2, width=2, budget=1, compat="official").partition.tolist() != [0, 1, 0, 1]


def test_models_of_different_widths_are_matched():
    """Model 1 has each of the four features of model 0 twice."""
    x = np.random.default_rng(0).normal(size=(50, 4))
    groups = match(np.corrcoef(np.hstack([x, x, x]).T), (4, 8), penalty=1)
    assert groups.partition.tolist() == [0, 1, 2, 3] * 3
    assert groups.within == (0, 4)
    wider = match(similar(0, 12), (4, 8), width=6, budget=0)
    assert wider.width == 6
    assert wider.within == (0, 2)


@pytest.mark.parametrize("dropped", [False, True])
def test_groups_are_applied_as_their_matrices_are(dropped):
    generator = np.random.default_rng(0)
    groups = match(similar(3, 12), (5, 7), budget=1)
    if dropped:  # as the official code does
        groups = Groups(np.array([0, -1, 1, 2, 0, 1, 1, -1, 3, 3, 2, 0]), (5, 7), 1e-5)
    for model, (start, size) in enumerate([(0, 5), (5, 7)]):
        values = generator.normal(size=(3, size, 2))
        own = slice(start, start + size)
        merged = np.einsum("ui,aib->aub", groups.merge[:, own], values)
        np.testing.assert_allclose(groups.merged(values, model, 1), merged, atol=1e-14)
        unmerged = np.einsum("iu,aib->aub", groups.unmerge[own], values)
        np.testing.assert_allclose(groups.unmerged(values, model, 1), unmerged, atol=1e-14)


def test_permutations_and_identities_have_one_feature_of_each_model_in_a_group():
    order = np.array([3, 0, 2, 1])
    x = np.random.default_rng(1).normal(size=(50, 4))
    groups = permutation_match(np.corrcoef(np.hstack([x, x[:, order], x[:, :2]]).T), (4, 4, 2))
    assert groups.partition.tolist() == [0, 1, 2, 3, 3, 0, 2, 1, 0, 1]
    assert identity_match((3, 3)).partition.tolist() == [0, 1, 2, 0, 1, 2]
    assert isinstance(groups, Groups)


def test_a_similarity_that_cannot_be_is_refused():
    with pytest.raises(CfmergeError, match=r"square, \(O, O\); found shape \(4, 3\)"):
        match(np.ones((4, 3)), 2)
    with pytest.raises(CfmergeError, match="5 features are not those of 2 models of one width; give widths"):
        match(np.eye(5), 2)
    with pytest.raises(CfmergeError, match=r"is of 5 features, and the models have 2 \+ 2"):
        match(np.eye(5), (2, 2))
    with pytest.raises(CfmergeError, match="similarity of feature 1 is NaN or infinite, of 1 in all"):
        match(np.diag([1, np.nan, 1, 1]), 2)
    with pytest.raises(CfmergeError, match=r"not symmetric: .* differ by 1.0"):
        match(np.triu(np.ones((4, 4))), 2)
    with pytest.raises(CfmergeError, match=r"5 groups of 4 features; expected 1 to 4"):
        match(np.eye(4), 2, width=5)
    with pytest.raises(CfmergeError, match=r"budget is at least 0, penalty at most 1; found 0.125 and 2"):
        match(np.eye(4), 2, penalty=2)
    with pytest.raises(CfmergeError, match=r"compat should be None or 'official', found 'paper'"):
        match(np.eye(4), 2, compat="paper")
    with pytest.raises(CfmergeError, match=r"a model has 3 features, the first 2: .* give the widest model first"):
        permutation_match(np.eye(5), (2, 3))
    with pytest.raises(CfmergeError, match="need one width, found 2 and 3"):
        identity_match((2, 3))
