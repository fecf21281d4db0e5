"""Every finding is there where it was planted, and is not where it was not."""

import numpy as np
import pytest
from diagnosis_parts import BIASES, IN, MATRICES, OUT, base, found, matrices, normal, numbers, unrelated

from cfmerge.diagnosis.findings import findings_of
from cfmerge.diagnosis.recommending import recommended

NOTHING = [unrelated(0), unrelated(1), unrelated(2)]


def with_first(delta, *others):
    return [delta, *(others or NOTHING[1:])]


def test_unrelated_experts_of_full_rank_give_no_finding():
    assert found(NOTHING) == {}


# --- does it belong to this base, and is it an expert of its own ----------------------------------------------------


def test_a_model_of_another_seed_is_foreign_to_the_base():
    other = {name: normal(7000 + n, *array.shape) for n, (name, array) in enumerate(base().items())}
    told = found(with_first({name: other[name] - base()[name] for name in base()}))["foreign-base"]
    assert told.severity == "grave"
    assert told.experts == ("a",)
    assert abs(told.number) < 0.2  # the cosine
    assert set(told.tensors) == set(MATRICES)


def test_a_long_fine_tuning_is_not_foreign():
    assert "foreign-base" not in found(with_first(unrelated(0, length=0.8)))


def test_one_new_layer_does_not_make_an_expert_foreign():
    delta = dict(NOTHING[0])
    delta[MATRICES[0]] = normal(3, OUT, IN) - base()[MATRICES[0]]
    assert "foreign-base" not in found(with_first(delta))


def test_the_same_training_twice_is_one_expert():
    noisy = {name: delta + 0.02 * NOTHING[2][name] for name, delta in NOTHING[1].items()}
    told = found([NOTHING[0], NOTHING[1], noisy])["same-experts"]
    assert told.experts == ("b", "c")
    assert told.number == pytest.approx(1, abs=1e-3)
    assert "nearly the same" in told.text
    assert "are the same" in found([NOTHING[0], NOTHING[1], NOTHING[1]])["same-experts"].text


def test_one_direction_at_twice_the_length_is_no_copy():
    longer = {name: 2 * delta for name, delta in NOTHING[1].items()}
    assert "same-experts" not in found([NOTHING[0], NOTHING[1], longer])


def test_a_base_among_the_experts_is_told():
    told = found(with_first({name: np.zeros_like(delta) for name, delta in NOTHING[0].items()}))["equals-base"]
    assert told.experts == ("a",)


def test_a_tiny_change_is_an_expert():
    tiny = {name: np.zeros_like(delta) for name, delta in NOTHING[0].items()}
    tiny[BIASES[0]] = 1e-4 * np.ones(OUT, np.float32)
    assert "equals-base" not in found(with_first(tiny))


# --- how experts stand to each other -------------------------------------------------------------------------------


def test_an_expert_five_times_as_long_dominates():
    told = found(with_first(unrelated(0, length=0.5)))["imbalance"]
    assert told.experts == ("a",)
    assert told.number == pytest.approx(5, rel=1e-2)
    assert "a weight of 0.2 " in told.text


def test_an_expert_half_as_long_again_does_not_dominate():
    assert "imbalance" not in found(with_first(unrelated(0, length=0.15)))


def blended(share):
    """The first two experts with so much of a third delta in both."""
    return [{name: delta + share * NOTHING[2][name] for name, delta in one.items()} for one in NOTHING[:2]] + [
        unrelated(4)
    ]


def test_experts_with_half_of_their_deltas_in_common_are_told():
    told = found(blended(1.0))["common"]
    assert told.experts == ("a", "b")
    assert told.number == pytest.approx(0.5, abs=0.05)


def test_experts_with_a_hundredth_in_common_are_not():
    assert "common" not in found(blended(0.1))


def test_experts_of_a_later_base_moved_the_same_way():
    moved = [{name: own[name] + 2 * unrelated(7)[name] for name in own} for own in NOTHING]
    told = found(moved)["one-offset"]
    assert told.number == pytest.approx((4 + 1 / 3) / 5, abs=0.05)
    assert told.severity == "warning"


def test_two_alike_among_three_are_no_offset():
    assert "one-offset" not in found([*blended(2.0)[:2], unrelated(5)])


def opposed(share):
    against = {name: -delta + share * NOTHING[1][name] for name, delta in NOTHING[0].items()}
    return [NOTHING[0], against, NOTHING[2]]


def test_opposite_experts_conflict():
    told = found(opposed(1.0))["conflicts"]
    assert told.experts == ("a", "b")
    assert told.number == pytest.approx(0.75, abs=0.03)


def test_nearly_unrelated_experts_do_not_conflict():
    assert "conflicts" not in found(opposed(20.0))


# --- ranks and starts ----------------------------------------------------------------------------------------------


def adapters(own_inputs=True, own_outputs=True, rank=3):
    """Three experts whose deltas are products; a factor is one for all where it is not their own."""

    def delta(t, n):
        left, right = normal(100 + 10 * n + t * own_outputs, OUT, rank), normal(300 + 10 * n + t * own_inputs, rank, IN)
        return 0.02 * left @ right

    return [matrices(lambda n, name, t=t: delta(t, n)) for t in range(3)]


def test_adapters_have_a_low_rank_and_a_start_of_their_own():
    told = found(adapters())
    assert told["low-rank"].number == 3
    assert told["low-rank"].experts == ("a", "b", "c")
    assert set(told["low-rank"].tensors) == set(MATRICES)
    assert "shared-start" not in told
    assert told["own-start"].number < 0.4


def test_adapters_with_one_random_factor_have_one_start():
    told = found(adapters(own_inputs=False))
    assert "own-start" not in told
    assert told["shared-start"].severity == "warning"
    assert told["shared-start"].experts == ("a", "b", "c")
    assert told["shared-start"].number > 0.7
    assert "input directions come from one space" in told["shared-start"].text


def test_output_directions_in_common_are_no_start():
    told = found(adapters(own_outputs=False))
    assert "shared-start" not in told
    assert "own-start" in told


def test_full_rank_is_not_low():
    told = found([*adapters()[:2], unrelated(0)])
    assert told["low-rank"].experts == ("a", "b")


def test_a_rank_above_a_quarter_is_not_low():
    assert "low-rank" not in found(adapters(rank=9))


# --- tensors -------------------------------------------------------------------------------------------------------


def almost_one_row(t):
    """Deltas of full rank nearly all of whose energy lies along one row, almost the same in all experts."""

    def delta(n, name):
        row = normal(800 + n, 1, IN) + 0.1 * normal(810 + 10 * n + t, 1, IN)
        return 0.01 * (normal(850 + 10 * n + t, OUT, 1) @ row + 0.03 * normal(900 + 10 * n + t, OUT, IN))

    return matrices(delta)


def test_least_squares_grows_where_experts_differ_in_small_directions_alone():
    told = found([almost_one_row(t) for t in range(3)])["growth"]
    assert told.severity == "grave"
    assert told.number > 2
    assert set(told.tensors) == set(MATRICES)


def test_growth_in_a_few_matrices_is_a_warning():
    deltas = [dict(one) for one in NOTHING]
    for t, one in enumerate(deltas):
        one[MATRICES[1]] = almost_one_row(t)[MATRICES[1]]
    told = found(deltas)["growth"]
    assert told.severity == "warning"
    assert told.tensors == (MATRICES[1],)


def test_least_squares_of_unrelated_experts_does_not_grow():
    assert max(one.growth for one in numbers(NOTHING).values() if one.growth is not None) < 2


def test_deltas_that_together_are_half_as_long_as_the_base_are_long():
    told = found([unrelated(seed, length=0.4) for seed in range(3)])["long-deltas"]
    assert told.number == pytest.approx(0.4 * 3**0.5, rel=1e-3)
    assert set(told.tensors) == set(MATRICES)


def test_tensors_that_nobody_changed_do_not_make_deltas_short():
    short = [{name: delta * (name == MATRICES[0]) for name, delta in unrelated(n, 0.4).items()} for n in range(3)]
    assert found(short)["long-deltas"].tensors == (MATRICES[0],)


def test_deltas_that_together_are_a_third_of_the_base_are_not_long():
    assert "long-deltas" not in found([unrelated(seed, length=0.2) for seed in range(3)])


def along(places, share=1.0):
    """An expert whose deltas lie, by so much, in some of the base's right singular directions."""

    def delta(n, name):
        rows = np.linalg.svd(base()[name])[2][places]
        inside = normal(600 + n, OUT, len(rows)) @ rows
        return 0.05 * (share * inside / np.linalg.norm(inside) + (1 - share) * normal(700 + n, OUT, IN) / 28)

    return matrices(delta)


def test_deltas_in_the_base_s_last_directions_are_new_directions():
    told = found(with_first(along(slice(-8, None)), *NOTHING[1:]))
    assert told["new-directions"].experts == ("a",)
    assert told["new-directions"].number < 0.1
    assert "base-directions" not in told


def test_deltas_in_the_base_s_first_directions_follow_it():
    told = found(with_first(along(slice(0, 3)), *NOTHING[1:]))
    assert told["base-directions"].experts == ("a",)
    assert told["base-directions"].number > 2
    assert "new-directions" not in told


def test_deltas_where_the_base_is_zero_are_told():
    """As of inputs that the base never used: its columns for them are zero."""
    used = np.arange(IN) >= 6
    narrow = {name: array * used if name in MATRICES else array for name, array in base().items()}
    told = found(with_first(matrices(lambda n, name: 0.05 * normal(800 + n, OUT, IN) * ~used)), of=narrow)
    assert told["null-directions"].experts == ("a",)
    assert told["null-directions"].number == pytest.approx(1, abs=1e-3)
    assert "by chance 25.0%" in told["null-directions"].text


def test_random_deltas_neither_follow_nor_avoid_it():
    assert not {"new-directions", "base-directions", "null-directions"} & set(found(NOTHING))


def test_tensors_that_nobody_changed_are_listed():
    still = [{name: delta * (name not in BIASES[:2]) for name, delta in one.items()} for one in NOTHING]
    told = found(still)
    assert told["unchanged"].tensors == tuple(BIASES[:2])
    assert told["unchanged"].number == 2
    assert "partly-changed" not in told


def test_tensors_that_one_expert_changed_are_listed():
    some = [
        {name: delta * (t == 0 or name != BIASES[1]) for name, delta in one.items()} for t, one in enumerate(NOTHING)
    ]
    told = found(some)
    assert told["partly-changed"].tensors == (BIASES[1],)
    assert "unchanged" not in told


def test_a_layer_that_moved_far_more_is_told():
    moved = [{name: delta * (20 if ".2." in name else 1) for name, delta in one.items()} for one in NOTHING]
    told = found(moved)["uneven-layers"]
    assert "layer 2" in told.text
    assert told.tensors == (MATRICES[2],)
    assert told.number == pytest.approx(20, rel=0.01)


def test_a_kind_that_moved_far_more_is_told():
    moved = [{name: delta * (20 if name in BIASES else 1) for name, delta in one.items()} for one in NOTHING]
    assert "vector" in found(moved)["uneven-kinds"].text


def test_layers_that_moved_alike_are_not():
    moved = [{name: delta * (3 if ".2." in name else 1) for name, delta in one.items()} for one in NOTHING]
    assert not {"uneven-layers", "uneven-kinds"} & set(found(moved))


# --- what is recommended -------------------------------------------------------------------------------------------


def recommendation(deltas, weights=()):
    tensors = numbers(deltas)
    return recommended(["a", "b", "c"], tensors, findings_of(["a", "b", "c"], tensors), weights)


def test_the_gravest_comes_first():
    tensors = numbers([NOTHING[0], NOTHING[0], unrelated(3, length=0.5)])
    assert [one.severity for one in findings_of("abc", tensors)][:2] == ["grave", "warning"]


@pytest.mark.parametrize(
    ("deltas", "method"),
    [(NOTHING, "tsv_m >> svc(alpha=1)"), (adapters(), "opcm")],
    ids=["full", "adapters"],
)
def test_one_method_fits_all_matrices(deltas, method):
    told = recommendation(deltas)
    assert told.method == method
    assert "docs/results" in told.evidence
    assert told.without == ()


@pytest.mark.parametrize(("weights", "method"), [((1, 1, 1), "opcm"), ((0.5, 1, 1), "dc_merge")])
def test_weights_that_differ_ask_for_a_method_that_has_some(weights, method):
    assert recommendation(adapters(), weights).method == method


def test_one_expert_is_no_merge():
    tensors = numbers([NOTHING[0]])
    told = recommended(["a"], tensors, findings_of(["a"], tensors))
    assert told.reason == "no merge: 1 expert is given, and a merge takes two"


def test_several_methods_are_left_to_auto():
    mixed = [{name: (adapter if ".0." in name else full)[name] for name in base()}
             for adapter, full in zip(adapters(), NOTHING, strict=True)]  # fmt: skip
    told = recommendation(mixed)
    assert told.method == "auto"
    assert "3 have some deltas of full rank" in told.reason


def test_no_merge_is_recommended_for_a_foreign_base():
    foreign = {name: normal(7000 + n, *array.shape) - array for n, (name, array) in enumerate(base().items())}
    told = recommendation([NOTHING[0], foreign, NOTHING[1]])
    assert told.method == ""
    assert told.without == ("b",)


def test_one_of_two_copies_is_left_out():
    told = recommendation([NOTHING[0], NOTHING[1], NOTHING[1]])
    assert told.without == ("c",)
    assert told.method


def test_nothing_is_left_of_copies_alone():
    assert recommendation([NOTHING[0]] * 3).method == ""
