"""Sparsifiers, sign consensus, masks, layer scales: the peers' numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import CASES, check, check_states, load, names

from cfmerge import methods
from cfmerge.core.call import of_expert
from cfmerge.methods import Context


def check_precisions(case, method, key="expected", **options):
    """`check` without jit, for methods that survey the model."""
    check(case, method, key, jit=False, **options)


# --- TIES -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", names("mk_ties"))
def test_ties_of_mergekit(name):
    p = CASES[name]["params"]
    method = methods.ties(
        p["density"], p["lambda"], "mergekit", combine="mean" if p["normalize"] else "sum",
        rescale="l1" if p["rescale"] else "none",
    )  # fmt: skip
    check(CASES[name], method, weights=p["weight"])


def test_ties_of_actmat():
    p = CASES["actmat_ties"]["params"]
    check(CASES["actmat_ties"], methods.ties(p["ties_k"], scope="tensor", count="round"))


ELECT = {"mass": "mass", "normfrac": "norm_fraction", "normmass": "norm_mass"}


@pytest.mark.parametrize("name", [n for n in names("of_ties") if CASES[n]["params"]["reset_type"] == "topk"])
def test_ties_of_the_authors(name):
    p = CASES[name]["params"]
    options = {"elect": ELECT[p["resolve_method"]], "combine": p["merge_func"].removeprefix("dis-")}
    check_precisions(CASES[name], methods.ties(p["reset_thresh"] / 100, p["lambda"], "official", **options))


def test_ties_of_the_authors_with_other_thresholds():
    vote = methods.disjoint_mean(zero="majority")
    p = CASES["of_ties_std_mass_mean"]["params"]
    check_precisions(CASES["of_ties_std_mass_mean"], methods.trim_deviation(p["reset_thresh"]) >> vote)
    p = CASES["of_ties_nf_mass"]["params"]
    check_precisions(CASES["of_ties_nf_mass"], methods.trim_energy(p["reset_thresh"], keep_last=True) >> vote)


@pytest.mark.parametrize("name", names("fb_ties"))
def test_ties_of_fusion_bench(name):
    p = CASES[name]["params"]
    method = methods.ties(p["threshold"] / 100, p["scaling_factor"], "fusion_bench", combine=p["merge_func"])
    check_states(CASES[name], method)


# --- Breadcrumbs, DARE, DELLA ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", names("mk_breadcrumbs"))
def test_breadcrumbs(name):
    p = CASES[name]["params"]
    if "ties" in name:
        options = {"combine": "mean" if p["normalize"] else "sum", "zero": "positive"}
        method = methods.breadcrumbs_ties(p["density"], p["gamma"], p["lambda"], **options)
    else:
        method = methods.breadcrumbs(p["density"], p["gamma"], p["lambda"])
    check(CASES[name], method, "expected_sane" if "quirk" in name else "expected", weights=p["weight"])


def draws_of(name, method, count):
    """Mean and standard error over `count` draws of the merged delta."""
    case = CASES[name]
    arrays = load(case)
    deltas = [arrays[f"expert_{t}"].astype(np.float32) - arrays["base"].astype(np.float32)
              for t in range(case["num_experts"])]  # fmt: skip
    weights = case["params"].get("weight", [1.0] * len(deltas))
    parts = [of_expert(method, t) for t in range(len(deltas))]

    def one(key):
        statistic = parts[0].init(jnp.zeros_like(deltas[0]))
        for t, (part, delta, weight) in enumerate(zip(parts, deltas, weights, strict=True)):
            context = Context(jax.random.fold_in(key, t), t)
            statistic = part.see(statistic, jnp.asarray(delta), weight, context)
        return parts[0].solve(statistic)[0]

    drawn = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), count)), np.float64)
    return arrays, drawn.mean(0), drawn.std(0, ddof=1) / np.sqrt(count)


@pytest.mark.parametrize("name", [*names("mk_dare"), *names("mk_della"), *names("fb_dare")])
def test_means_over_draws(name):
    p = CASES[name]["params"]
    rescale = "none" if not p["rescale"] else "l1" if name.startswith("mk_") else "inverse"
    vote = {"combine": "mean" if p.get("normalize") else "sum", "zero": "positive"}
    density = tuple(p["density"]) if "density" in p else ()
    if name == "fb_dare_rescale":
        method = methods.dare_linear(p["sparsity_ratio"], 1.0)
    elif "dare" in name:
        dropped = tuple(1 - d for d in density)
        linear = methods.dare_linear(dropped, 1.0, rescale)
        method = linear if "linear" in name else methods.dare_ties(dropped, 1.0, rescale, **vote)
    else:
        linear = methods.della_linear(density, tuple(p["epsilon"]), 1.0, rescale)
        method = linear if "linear" in name else methods.della(density, tuple(p["epsilon"]), 1.0, rescale, **vote)
    arrays, mean, sem = draws_of(name, method, 4000)
    assert np.all(np.abs(mean - arrays["expected_mean_delta"]) <= 5 * np.hypot(sem, arrays["expected_mean_delta_sem"]))
    if "expected_exact_mean_delta" in arrays:
        assert np.all(np.abs(mean - arrays["expected_exact_mean_delta"]) <= 5 * sem + 1e-6)
    if "expected_exact_var_delta" in arrays:
        np.testing.assert_allclose(sem**2 * 4000, arrays["expected_exact_var_delta"], rtol=0.3)


def test_dare_of_the_paper_is_unbiased():
    p = CASES["mk_dare_linear_rescale"]["params"]
    method = methods.dare_linear(tuple(1 - d for d in p["density"]), 1.0)
    arrays, mean, sem = draws_of("mk_dare_linear_rescale", method, 4000)
    assert np.all(np.abs(mean - arrays["expected_paper_unbiased_mean_delta"]) <= 5 * sem + 1e-6)


def test_keep_probabilities_of_della():
    from cfmerge.methods.sparsify import keep_probabilities, ranks_of

    name = "mk_della_linear_norescale"
    arrays, p = load(CASES[name]), CASES[name]["params"]
    for t in range(2):
        delta = jnp.asarray(arrays[f"expert_{t}"] - arrays["base"], jnp.float32)
        got = keep_probabilities(ranks_of(delta), p["density"][t], p["epsilon"][t])
        np.testing.assert_allclose(got, arrays[f"expected_keep_prob_{t}"], atol=1e-6)


# --- masks, PCB, LiNeS ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", names("mk_sce"))
def test_sce(name):
    density = CASES[name]["params"]["select_topk"]
    check(CASES[name], methods.sce(density), "expected_sane" if "quirk" in name else "expected")


def test_the_fallback_of_mergekits_sce_is_reachable():
    check(CASES["mk_sce_small_quirk"], methods.sce(1.0, uniform_below=1e-6))


def test_ram():
    p = CASES["mk_ram"]["params"]
    check(CASES["mk_ram"], methods.ram(p["epsilon"]))
    p = CASES["mk_ramplus_tl"]["params"]
    check(CASES["mk_ramplus_tl"], methods.ram_plus(p["epsilon"], p["r"], p["alpha"]))


@pytest.mark.parametrize("name", names("fb_magmax"))
def test_magmax(name):
    check_states(CASES[name], methods.magmax(CASES[name]["params"]["scaling_factor"]))


def test_consensus():
    from cfmerge.methods.masks import tall_masks

    case = CASES["fb_tall_mask"]
    arrays, p = load(case), case["params"]
    method = methods.consensus(p["tall_mask_lambda"], p["prun_thre_k"], p["scaling"])
    check(case, method, "expected_consensus_merged")
    deltas = [jnp.asarray(arrays[f"expert_{t}"] - arrays["base"]) for t in range(3)]
    masks = np.asarray(tall_masks(deltas, sum(deltas), p["tall_mask_lambda"]))
    np.testing.assert_array_equal(masks, arrays["expected_masks"])
    np.testing.assert_array_equal(masks.sum(0) >= 2, arrays["expected_consensus_mask"])


def test_pcb():
    p = CASES["pcb_readme"]["params"]
    check_precisions(CASES["pcb_readme"], methods.pcb(p["pcb_ratio"], p["clamp"], p["lambda"]))
    p = CASES["pcb_vision"]["params"]
    check_precisions(CASES["pcb_vision"], methods.pcb(p["att_ratio"], p["clamp"], p["lambda"], "ranks"))


@pytest.mark.parametrize("name", names("lines"))
def test_lines(name):
    p = CASES[name]["params"]
    method = methods.task_arithmetic(1.0) >> methods.lines(p["alpha"], p["beta"])
    check_states(CASES[name], method, "expected_sane" if "quirk" in name else "expected")
