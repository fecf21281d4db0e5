"""Rules of merging over time, on trees: the published code's numbers, the unrolled equations, refusals."""

import re

import jax
import numpy as np
import pytest
from golden_cases import CASES, load, names
from toys import small

import cfmerge
from cfmerge import temporal
from cfmerge.temporal.rules import BY_TIME, PROTOCOLS

EXPERTS = 4
BASE, *TREES = [small(number) for number in range(1 + EXPERTS)]


def published(case):
    """The rule of a golden case."""
    own, kind = case["params"], case["method"].removeprefix("time.ema_")
    technique = {"interpolation": "average", "magmax": "magmax(scale=1.0)"}.get(kind)
    technique = technique or f"task_arithmetic(scale={own['scaling']})"
    weight = f"weight={own['w_new']}, " if "w_new" in own else ""
    return f"ema({weight}seed={own['seed']}, technique={technique})"


@pytest.mark.parametrize("name", names("time_"))
def test_a_running_merge_has_the_published_codes_numbers(name):
    case, arrays = CASES[name], load(CASES[name])
    experts = [arrays[f"expert_{t}"] for t in range(case["num_experts"])]
    for precision in ("float32", "float64"):
        with jax.enable_x64(precision == "float64"):
            trees = [{"layer.weight": array.astype(precision)} for array in (arrays["base"], *experts)]
            got = temporal.combined(published(case), trees[0], trees[1:])["layer.weight"]
        error = np.max(np.abs(np.asarray(got, np.float64) - arrays["expected"]))
        assert error <= case["tolerance"]["expected"][precision], precision


def close(tree, other):
    for name in other:
        np.testing.assert_allclose(tree[name], other[name], rtol=1e-5, atol=1e-5)


def summed(weights, trees):
    return {name: sum(w * tree[name] for w, tree in zip(weights, trees, strict=True)) for name in trees[0]}


@pytest.mark.parametrize("seed", ["base", "first"])
@pytest.mark.parametrize("w", [0.2, 0.5, 1.0])
def test_a_running_mean_equals_its_unrolled_sum(seed, w):
    weights = [w * (1 - w) ** (EXPERTS - t) for t in range(EXPERTS + 1)]
    weights[0] = (1 - w) ** EXPERTS if seed == "base" else 0
    if seed == "first":
        weights[1] = (1 - w) ** (EXPERTS - 1)
    close(temporal.combined(f"ema(weight={w}, seed={seed})", BASE, TREES), summed(weights, [BASE, *TREES]))


def test_a_running_sum_equals_its_unrolled_sum():
    scale = 0.4
    weights = [0.0, *(scale ** (EXPERTS - t + 1) for t in range(1, EXPERTS + 1))]
    weights[0] = 1 - sum(weights)
    rule = f"ema(technique=task_arithmetic(scale={scale}))"
    close(temporal.combined(rule, BASE, TREES), summed(weights, [BASE, *TREES]))


def test_magmax_is_the_same_one_by_one_and_all_at_once():
    close(
        temporal.combined("ema(technique=magmax(scale=1.0))", BASE, TREES),
        temporal.combined("all(technique=magmax(scale=1.0))", BASE, TREES),
    )


@pytest.mark.parametrize(
    ("by_time", "backwards"),
    [("uniform", False), *((name, turned) for name in list(BY_TIME)[1:] for turned in (False, True))],
)
@pytest.mark.parametrize("with_base", [False, True])
def test_weights_by_time_are_a_weighted_mean(by_time, backwards, with_base):
    elements = [BASE, *TREES] if with_base else TREES
    i = np.arange(1, len(elements) + 1.0)
    weights = {
        "uniform": i**0, "linear": i, "sqrt": i**0.5, "squared": i**2, "cubed": i**3, "fifth": i**5, "tenth": i**10,
        "exponential": 2 ** (i - 1), "log": np.log(i + 1),
    }[by_time]  # fmt: skip
    weights = weights[::-1] if backwards else weights
    got = temporal.combined(f"all(by_time={by_time}, backwards={backwards}, with_base={with_base})", BASE, TREES)
    close(got, summed(weights / weights.sum(), elements))


@pytest.mark.parametrize(
    "rule", ["last", "all", "ema(weight=0.3, seed=first)", "paint(weight=1)", "ema(weight=1)", "all(by_time=log)"]
)
def test_one_expert_is_itself(rule):
    close(temporal.combined(rule, BASE, TREES[:1]), TREES[0])


def test_one_expert_of_a_scaled_technique_or_a_running_mean_of_the_base_is_its_own():
    half = summed([0.7, 0.3], [BASE, TREES[0]])
    close(temporal.combined("ema(weight=0.3)", BASE, TREES[:1]), half)
    close(temporal.combined("all(technique=task_arithmetic(scale=0.3))", BASE, TREES[:1]), half)
    close(temporal.combined("paint(weight=0.3)", BASE, TREES[:1]), half)


@pytest.mark.parametrize("rule", ["base", "last", "ema(weight=0.5)", "all", "paint(weight=0.5)"])
def test_without_an_expert_every_rule_gives_the_base(rule):
    close(temporal.combined(rule, BASE, []), BASE)


@pytest.mark.parametrize("rule", ["all", "all(with_base=True)", "all(technique=ties(density=0.3))"])
def test_another_order_changes_nothing_of_a_merge_of_all(rule):
    close(temporal.combined(rule, BASE, TREES), temporal.combined(rule, BASE, TREES[::-1]))


@pytest.mark.parametrize("rule", ["last", "paint(weight=0.5)"])
def test_another_order_of_the_experts_before_changes_nothing_of_a_rule_without_history(rule):
    close(temporal.combined(rule, BASE, TREES), temporal.combined(rule, BASE, [*TREES[2::-1], TREES[3]]))


def test_slerp_goes_from_the_running_model_to_the_newest():
    got = temporal.combined("ema(technique=slerp(t=0.25, threshold=1.0), seed=first)", BASE, TREES[:2])
    close(got, cfmerge.merge_params(BASE, TREES[:2], "slerp(t=0.25, threshold=1.0)"))


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_protocol_is_named(name):
    init, deploy = temporal.protocol(name)
    assert (init.name, deploy.name) == PROTOCOLS[name]


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        ("all(by_time=linear, technique=ties)", "weights by time are for interpolation"),
        ("all(technique=slerp)", "slerp takes 2 experts at most"),
        ("all(backwards=True)", "backwards turns weights by time round"),
        ("ema", "name the weight of the newest expert"),
        ("ema(weight=1.5)", "lies in [0, 1], found 1.5"),
        ("ema(weight=0.5, technique=slerp)", "slerp knows no weights"),
        ("ema(technique=model_stock)", "use ema(seed=first)"),
        ("paint(technique=regmean)", "regmean needs measurements"),
        ("ema(wieght=0.5)", "has no 'wieght'; did you mean 'weight'"),
        ("all(by_time=later)", "later"),
        ("emma(weight=0.5)", "unknown rule 'emma'; did you mean 'ema'"),
        ("ema(0.5)", "write NAME(key=value)"),
        ("all(technique=tise)", "unknown method 'tise'"),
        ("all(technique=emr)", "not one checkpoint"),
    ],
)
def test_rules_that_disagree_are_refused_by_name(rule, told):
    with pytest.raises(cfmerge.CfmergeError, match=re.escape(told)):
        temporal.combined(rule, BASE, TREES)


def test_a_rules_text_is_read_back():
    for text in ("ema(weight=0.5, seed='first')", "all(technique='ties(density=0.2)', with_base=True)", "base"):
        assert temporal.rule(text).text == text
        assert temporal.rule(temporal.rule(text).text) == temporal.rule(text)
