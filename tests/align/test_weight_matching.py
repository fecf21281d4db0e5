"""Git Re-Basin's weight matching."""

import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import CASES, load, names, states
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import NETWORKS, Lazy, model_of, spaces_of

from cfmerge.align import identity, parse_spaces, permute, random_permutations, weight_matching
from cfmerge.errors import CfmergeError


def inner(a, b):
    return sum(float(np.vdot(np.asarray(a[name], float), np.asarray(b[name], float))) for name in a)


def golden_spaces(case, shapes):
    layers = case["params"]["hidden_layers"]
    axes = ["-", *(f"P_{layer}" for layer in range(layers)), "-"]
    table = {}
    for layer in range(layers + 1):
        table[f"fc{layer}.weight"] = f"{axes[layer + 1]}, in {axes[layer]}"
        table[f"fc{layer}.bias"] = axes[layer + 1]
    return parse_spaces(table, shapes)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", names("gr_"))
def test_the_authors_matching_is_found_or_a_better_one(name, dtype):
    case, arrays = CASES[name], load(CASES[name])
    a, b = ({key: value.astype(dtype) for key, value in states(arrays, side).items()} for side in "ab")
    spaces = golden_spaces(case, {key: value.shape for key, value in a.items()})
    found = weight_matching(spaces, a, b)
    aligned = permute(spaces, b, found.permutations)
    params, room = case["params"], {"float64": 1e-11, "float32": 1e-6}[dtype]
    assert found.objective >= params["objective_min"] - room
    assert found.before == pytest.approx(params["objective_identity"], abs=room)
    assert found.objective == pytest.approx(inner(a, aligned), abs=room)
    if case["kind"] == "exact":
        assert found.objective == pytest.approx(params["objective"], abs=room)
        for space, permutation in found.permutations.items():
            np.testing.assert_array_equal(permutation, arrays[f"expected_perm_{space}"])
        for key, value in aligned.items():
            for what, result in (("aligned", value), ("merged", (a[key] + value) / 2)):
                error = np.max(np.abs(result.astype(float) - arrays[f"expected_{what}.{key}"]))
                assert error <= case["tolerance"][f"expected_{what}.{key}"][dtype]


@pytest.mark.parametrize("dtype", [np.float64, np.float32, jnp.bfloat16])
@pytest.mark.parametrize("network", NETWORKS)
def test_a_permuted_copy_is_recovered_exactly(network, dtype):
    spaces, model = spaces_of(network), model_of(network, dtype=dtype)
    for seed in range(3):
        copy = permute(spaces, model, random_permutations(spaces, seed))
        found = weight_matching(spaces, model, copy, restarts=0)
        for name, tensor in permute(spaces, copy, found.permutations).items():
            np.testing.assert_array_equal(tensor, model[name])
        assert found.objective == pytest.approx(inner(model, model), rel=1e-6)


@pytest.mark.parametrize("network", NETWORKS)
def test_a_permuted_copy_with_noise_is_recovered(network):
    spaces, model = spaces_of(network), model_of(network)
    generator = np.random.default_rng(1)
    noisy = {name: tensor + 0.02 * generator.normal(size=tensor.shape) for name, tensor in model.items()}
    copy = permute(spaces, noisy, random_permutations(spaces, 4))
    found = weight_matching(spaces, model, copy, restarts=0)
    for name, tensor in permute(spaces, copy, found.permutations).items():
        np.testing.assert_array_equal(tensor, noisy[name])


def test_neurons_of_very_different_size_are_recovered_in_float32():
    spaces, model = spaces_of("MLP"), model_of("MLP", dtype=np.float32)
    scale = np.float32(10) ** -np.arange(12, dtype=np.float32).clip(0, 9)
    model |= {"fc0.weight": model["fc0.weight"] * scale[:, None], "fc0.bias": model["fc0.bias"] * scale,
              "fc1.weight": model["fc1.weight"] * scale}  # fmt: skip
    copy = permute(spaces, model, random_permutations(spaces, 0))
    found = weight_matching(spaces, model, copy, restarts=0)
    for name, tensor in permute(spaces, copy, found.permutations).items():
        np.testing.assert_array_equal(tensor, model[name])


@settings(deadline=None, max_examples=25)
@given(network=st.sampled_from(list(NETWORKS)), seed=st.integers(0, 10**6), started=st.booleans())
def test_the_objective_never_falls(network, seed, started):
    spaces = spaces_of(network)
    a, b = model_of(network, seed), model_of(network, seed + 1)
    start = random_permutations(spaces, seed) if started else None
    found = weight_matching(spaces, a, b, seed=seed, start=start, restarts=0)
    assert found.objective >= found.before
    assert all(later >= earlier for earlier, later in zip(found.history, found.history[1:], strict=False))
    assert found.history[-1] == pytest.approx(found.objective, rel=1e-9, abs=1e-9)
    assert found.objective == pytest.approx(inner(a, permute(spaces, b, found.permutations)), rel=1e-9)
    if started:
        assert found.objective >= inner(a, permute(spaces, b, start)) - 1e-9


@pytest.mark.parametrize("network", ["conv", "attention"])
def test_no_single_space_can_be_permuted_for_more(network):
    spaces, a, b = spaces_of(network), model_of(network, 1), model_of(network, 2)
    found = weight_matching(spaces, a, b, start=identity(spaces))
    assert found.sweeps > 1
    for name in spaces.names:
        for seed in range(20):
            family = {name, *spaces.children(name)}
            other = {space: p for space, p in random_permutations(spaces, seed).items() if space in family}
            assert inner(a, permute(spaces, b, {**found.permutations, **other})) <= found.objective + 1e-9


def test_a_model_that_lies_near_stays_as_it_is():
    spaces, a = spaces_of("attention"), model_of("attention")
    b = {name: tensor + 0.001 for name, tensor in a.items()}
    found = weight_matching(spaces, a, b)
    for name, permutation in identity(spaces).items():
        np.testing.assert_array_equal(found.permutations[name], permutation)
    assert found.objective == found.before


def test_the_same_seed_gives_the_same_permutations_and_restarts_give_no_worse_ones():
    spaces, a, b = spaces_of("attention"), model_of("attention", 1), model_of("attention", 2)
    once, again, more = (weight_matching(spaces, a, b, seed=5, restarts=restarts) for restarts in (2, 2, 6))
    assert once.history == again.history
    for name, permutation in once.permutations.items():
        np.testing.assert_array_equal(permutation, again.permutations[name])
    assert more.objective >= once.objective


def test_a_space_whose_neighbours_have_not_changed_is_not_solved_again():
    spaces, model = spaces_of("MLP"), model_of("MLP")
    copy = Lazy(permute(spaces, model, random_permutations(spaces, 0)))
    found = weight_matching(spaces, model, copy, restarts=0)
    assert found.sweeps == 1
    assert copy.read.count("fc1.weight") <= 6  # three sums, two spaces in the first sweep, one at the start


def test_float64_stays_float64():
    spaces, a = spaces_of("MLP"), model_of("MLP")
    a["fc0.weight"][0] = a["fc0.weight"][1] + 1e-12 * a["fc0.weight"][2]
    b = permute(spaces, a, random_permutations(spaces, 0))
    assert weight_matching(spaces, a, b).objective == pytest.approx(inner(a, a), rel=1e-15)


def test_another_model_is_refused_by_the_name_of_its_tensor():
    spaces, a = spaces_of("MLP"), model_of("MLP")
    with pytest.raises(CfmergeError, match=r"model b: has no tensor fc1\.bias, which the table"):
        weight_matching(spaces, a, {name: tensor for name, tensor in a.items() if name != "fc1.bias"})
    with pytest.raises(CfmergeError, match=r"model a: has a tensor more, for which the table"):
        weight_matching(spaces, {**a, "more": np.zeros(2)}, a)
    with pytest.raises(CfmergeError, match=r"'fc1\.bias': model b has the shape \(8,\), the spaces have \(9,\)"):
        weight_matching(spaces, a, {**a, "fc1.bias": np.zeros(8)})


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_number_that_is_not_finite_is_refused_by_the_name_of_its_tensor(value):
    spaces, a = spaces_of("MLP"), model_of("MLP")
    with pytest.raises(CfmergeError, match=r"'fc2\.bias' of model b: has a NaN or an infinity"):
        weight_matching(spaces, a, {**a, "fc2.bias": np.full(11, value)})


def test_integers_and_complex_numbers_are_refused_where_they_permute():
    spaces, a = spaces_of("MLP"), model_of("MLP")
    for dtype in (np.int32, np.complex64):
        with pytest.raises(CfmergeError, match=rf"'fc2\.bias' of model a: has the dtype {np.dtype(dtype)}; a tensor"):
            weight_matching(spaces, {**a, "fc2.bias": np.zeros(11, dtype)}, a)
    counted = spaces_of({**NETWORKS["MLP"], "steps": ((), "")})
    b = permute(spaces, a, random_permutations(spaces, 0))
    found = weight_matching(counted, {**a, "steps": np.array(3)}, {**b, "steps": np.array(9)})
    assert found.objective == pytest.approx(inner(a, a))


def test_a_space_that_is_twice_in_one_product_is_refused():
    spaces = parse_spaces({"pairs": "h h, in -", "out": "-, in h"}, {"pairs": (9, 2), "out": (2, 3)}, {"h": 3})
    model = {"pairs": np.ones((9, 2)), "out": np.ones((2, 3))}
    with pytest.raises(CfmergeError, match=r"'pairs': 'h' is twice in one product: h h"):
        weight_matching(spaces, model, model)


def test_arrays_of_jax_are_matched_as_those_of_numpy():
    spaces, a, b = spaces_of("grouped"), model_of("grouped", 1, np.float32), model_of("grouped", 2, np.float32)
    found, there = (weight_matching(spaces, a, b), weight_matching(
        spaces, {n: jnp.asarray(t) for n, t in a.items()}, {n: jnp.asarray(t) for n, t in b.items()}))  # fmt: skip
    assert found.history == there.history


def test_a_seed_that_is_none_is_refused():
    spaces = parse_spaces({"up": "h, in -", "down": "-, in h"}, {"up": (2, 2), "down": (1, 2)})
    model = {"up": np.eye(2), "down": np.ones((1, 2))}
    with pytest.raises(CfmergeError, match="the seed must lie in"):
        weight_matching(spaces, model, model, seed=-1)
    with pytest.raises(CfmergeError, match="the seed must lie in"):
        random_permutations(spaces, -1)
