"""EMR and TALL: the peers' numbers, the papers' formulas, identities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from composed_parts import deltas_of, emr, models
from golden_cases import CASES, load, states

from cfmerge import compose
from cfmerge.compose.emr import unify
from cfmerge.errors import CfmergeError


def made_of(arrays, count, system, precision):
    """The composed result of a golden case's trees."""
    flat = "base" in arrays
    trees = [{"x": arrays["base"]}] if flat else [states(arrays, "base")]
    for t in range(count):
        trees.append({"x": arrays[f"expert_{t}"]} if flat else states(arrays, f"expert_{t}"))
    trees = [{name: value.astype(precision) for name, value in tree.items()} for tree in trees]
    return compose.build(trees[0], {str(t): tree for t, tree in enumerate(trees[1:])}, system), trees[0]


def unpacked(made, name):
    entry = made.about.entries[name]
    bits = np.unpackbits(np.asarray(made.parts[name]["masks"]), axis=1, count=entry.size)
    return bits.reshape(-1, *entry.shape).astype(bool)


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("name", ["of_emr_flat", "of_emr_counterexample", "fb_emr_tensor_mean"])
def test_emr_is_as_the_authors_code(name, precision):
    case, arrays = CASES[name], load(CASES[name])
    system = "emr(scope='tensor_mean')" if "tensor_mean" in name else "emr"
    with jax.enable_x64(precision == "float64"):
        made, base = made_of(arrays, case["num_experts"], system, precision)
        models = [made.materialise(str(t), base) for t in range(case["num_experts"])]

    def near(key, got):
        assert np.max(np.abs(np.asarray(got, np.float64) - arrays[key])) <= case["tolerance"][key][precision], key

    near("expected_rescalers", made.scales)
    for tensor in base:
        suffix = "" if tensor == "x" else f".{tensor}"
        near(f"expected_unified{suffix}", made.parts[tensor]["shared"])
        for t, model in enumerate(models):
            assert np.array_equal(unpacked(made, tensor)[t], arrays[f"expected_mask_{t}{suffix}"])
            if f"expected_model_{t}{suffix}" in arrays:
                near(f"expected_model_{t}{suffix}", model[tensor])


def test_tall_masks_are_as_the_authors_code():
    case, arrays = CASES["fb_tall_mask"], load(CASES["fb_tall_mask"])
    threshold = case["params"]["tall_mask_lambda"]
    made, base = made_of(arrays, case["num_experts"], f"tall(threshold={threshold})", "float32")
    assert np.array_equal(unpacked(made, "x"), arrays["expected_masks"])
    summed = sum(arrays[f"expert_{t}"] - arrays["base"] for t in range(3))
    expected = arrays["base"] + arrays["expected_masks"][1] * summed
    np.testing.assert_allclose(made.materialise("1", base)["x"], expected, rtol=1e-6, atol=1e-7)


def test_each_task_may_have_a_threshold_of_its_own():
    trees = models(2)
    deltas = deltas_of(trees)["model.norm.weight"]
    made = compose.build(trees[0], {"a": trees[1], "b": trees[2]}, "tall", parameters={"threshold": [0.1, 2.0]})
    for task, threshold in enumerate((0.1, 2.0)):
        expected = np.abs(deltas[task]) > threshold * np.abs(deltas[1 - task])
        assert np.array_equal(unpacked(made, "model.norm.weight")[task], expected)


def test_one_task_alone_is_its_expert_exactly():
    base, expert = models(1)
    made = compose.build(base, {"only": expert}, "emr")
    assert made.scales.tolist() == [1.0]
    for name, value in made.materialise("only", base).items():
        np.testing.assert_array_equal(value, base[name] + (expert[name] - base[name]))


def test_the_order_of_experts_changes_nothing():
    trees = models(5, seed=3)
    names = list("abcde")
    made = compose.build(trees[0], dict(zip(names, trees[1:], strict=True)), "emr")
    again = compose.build(trees[0], dict(reversed(list(zip(names, trees[1:], strict=True)))), "emr")
    for name in trees[0]:
        assert np.array_equal(made.parts[name]["shared"], again.parts[name]["shared"])
    for task in names:
        here, there = made.materialise(task, trees[0]), again.materialise(task, trees[0])
        assert all(np.array_equal(here[name], there[name]) for name in here)


def test_the_sign_of_a_sum_that_cancels_does_not_depend_on_the_order():
    values = jnp.array([1e8, 3.0, -1e8, -2.5, 1e-3], jnp.float32)
    unified = [
        unify(list(values[jnp.array(order)][:, None]))[0]
        for order in ([0, 1, 2, 3, 4], [4, 3, 1, 2, 0], [2, 0, 3, 1, 4])
    ]
    assert [float(one[0]) for one in unified] == [1e8] * 3


def test_no_other_scale_is_nearer_than_l2_and_masks_never_go_away_from_the_expert():
    trees = models(4, seed=1)
    deltas, names = deltas_of(trees), ["a", "b", "c", "d"]
    experts = dict(zip(names, trees[1:], strict=True))

    def distances(rescale):
        made = compose.build(trees[0], experts, "emr", parameters={"rescale": rescale})
        return np.array([
            sum(np.sum((made.delta(task, name, dtype=np.float64) - deltas[name][t]) ** 2) for name in deltas)
            for t, task in enumerate(names)
        ])  # fmt: skip

    l1, l2, none = (distances(rescale) for rescale in ("l1", "l2", "none"))
    assert (l2 <= l1 + 1e-6).all()
    assert (l2 <= none + 1e-6).all()
    unified = emr(deltas)[0]
    whole = np.array([sum(np.sum((unified[n] - deltas[n][t]) ** 2) for n in deltas) for t in range(4)])
    assert (none <= whole).all()


def test_the_result_is_the_formula_in_numpy():
    trees = models(3, seed=2)
    deltas, experts = deltas_of(trees), dict(zip("abc", trees[1:], strict=True))
    unified, masks, scales = emr(deltas)
    made = compose.build(trees[0], experts, "emr")
    np.testing.assert_allclose(made.scales, scales, rtol=1e-5)
    for t, task in enumerate("abc"):
        for name, value in made.materialise(task, trees[0]).items():
            np.testing.assert_allclose(value, trees[0][name] + scales[t] * masks[name][t] * unified[name], atol=1e-6)


def test_it_is_made_under_jit_and_the_materialised_model_has_derivatives():
    trees = models(2)
    made = compose.build(trees[0], {"a": trees[1], "b": trees[2]}, "emr")
    traced = jax.jit(lambda base, one, two: compose.build(base, {"a": one, "b": two}, "emr"))(*trees)
    for here, there in zip(jax.tree.leaves(made), jax.tree.leaves(traced), strict=True):
        np.testing.assert_allclose(here, there, rtol=1e-6)

    def loss(base):
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(traced.materialise("b", base)))

    grads = jax.grad(loss)({name: jnp.asarray(leaf) for name, leaf in trees[0].items()})
    expected = {name: 2 * leaf for name, leaf in made.materialise("b", trees[0]).items()}
    for name in grads:
        np.testing.assert_allclose(grads[name], expected[name], rtol=1e-5)


def test_a_rule_may_keep_a_tensor_at_the_base_and_name_no_other_system():
    trees = models(2)
    experts = {"a": trees[1], "b": trees[2]}
    kept = compose.build(trees[0], experts, "emr", rules=[{"match": "*norm*", "method": "keep-base"}])
    assert "model.norm.weight" not in kept.parts
    assert np.array_equal(kept.materialise("a", trees[0])["model.norm.weight"], trees[0]["model.norm.weight"])
    for rule in ({"method": "average"}, {"method": "tall"}, {"method": "emr", "parameters": {"rescale": "l2"}}):
        with pytest.raises(CfmergeError, match=r"model.norm.weight.*keep-base"):
            compose.build(trees[0], experts, "emr", rules=[{"match": "*norm*", **rule}])


def test_a_tree_of_another_base_and_an_unknown_task_are_told():
    trees = models(2)
    made = compose.build(trees[0], {"math": trees[1], "code": trees[2]}, "tall")
    other = {**trees[0], "model.norm.weight": trees[0]["model.norm.weight"] + 1}
    with pytest.raises(CfmergeError, match=r"'model.norm.weight' is not that of the base.*SHA-256"):
        made.materialise("math", other)
    with pytest.raises(CfmergeError, match=r"'model.norm.weight' has shape \(3,\), expected \(8,\)"):
        made.materialise("math", {**trees[0], "model.norm.weight": np.zeros(3, np.float32)})
    with pytest.raises(CfmergeError, match=r"has no 'model.norm.weight'"):
        made.materialise("math", {name: leaf for name, leaf in trees[0].items() if "norm" not in name})
    with pytest.raises(CfmergeError, match=r"unknown task 'maths'.*math"):
        made.materialise("maths", trees[0])
