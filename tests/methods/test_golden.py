"""The peers' own numbers: every case of tests/golden, in float32 and in float64 (see its manifest)."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

import cfmerge
from cfmerge import methods

GOLDEN = Path(__file__).parent.parent / "golden"
CASES = {case["name"]: case for case in json.loads((GOLDEN / "manifest.json").read_text())}
ACE = [name for name in CASES if name.startswith("ace_")]


def load(case):
    with np.load(GOLDEN / case["file"]) as file:
        return {key: file[key] for key in file.files}


def check(case, arrays, method, key="expected", transpose=False):
    experts = [arrays[f"expert_{t}"] for t in range(case["num_experts"])]
    for precision in ("float32", "float64"):
        with jax.enable_x64(precision == "float64"):
            base, *rest = (a.astype(precision).T if transpose else a.astype(precision)
                           for a in (arrays["base"], *experts))  # fmt: skip
            merge = jax.jit(lambda base, rest: cfmerge.merge_tensor(base, rest, method))
            got = np.asarray(merge(base, rest), np.float64)
        got = got.T if transpose else got
        assert got.dtype == np.float64
        assert np.isfinite(got).all()
        error = np.max(np.abs(got - arrays[key]))
        assert error <= case["tolerance"][key][precision], (precision, error)


def ace(case, **options):
    params = case["params"]
    known = {name: params[name] for name in ("eps", "tau", "k_frac") if name in params}
    return methods.ace(**known, **options)


# the k0 case has rank 6 of 10 at a ridge of 1e-6: in float32 the Gram cannot do that, the rows can
FORMS = [(name, form) for name in ACE for form in ("auto", "full") if (name, form) != ("ace_k0_quirk", "full")]


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_ace(name, form):
    case = CASES[name]
    arrays = load(case)
    check(case, arrays, ace(case, form=form), "expected_sane" if "expected_sane" in arrays else "expected")


@pytest.mark.parametrize("name", ["ace_zero_delta_quirk", "ace_one_row_quirk"])
def test_the_published_quirks_are_reachable(name):
    case = CASES[name]
    check(case, load(case), ace(case, zero_delta="keep"))


def test_no_refinement_direction_is_not_nan_in_any_mode():
    """The published code takes the mean of no singular values here, and returns NaN."""
    case = CASES["ace_k0_quirk"]
    arrays = load(case)
    assert np.isnan(arrays["expected"]).all()
    check(case, arrays, ace(case, zero_delta="keep"), "expected_sane")


def test_conv1d_in_both_orientations():
    case = CASES["ace_hf_conv1d"]
    arrays = load(case)
    check(case, arrays, ace(case), "expected_transposed", transpose=True)  # canonical is (out, in)
    check(case, arrays, ace(case, orientation="as_published"), "expected", transpose=True)


def states(arrays, prefix):
    return {k.removeprefix(prefix + "."): v for k, v in arrays.items() if k.startswith(prefix + ".")}


@pytest.mark.parametrize("name", ["fb_simple_average", "fb_task_arithmetic", "fb_weighted_average_norm"])
def test_sums_of_state_dicts(name):
    case = CASES[name]
    arrays, params = load(case), case["params"]
    method = methods.task_arithmetic(params["scaling_factor"]) if "task" in name else methods.average()
    experts = [states(arrays, f"expert_{t}") for t in range(case["num_experts"])]
    for precision in ("float32", "float64"):
        with jax.enable_x64(precision == "float64"):
            cast = [{k: v.astype(precision) for k, v in tree.items()} for tree in (states(arrays, "base"), *experts)]
            merged = cfmerge.merge_params(cast[0], cast[1:], method, weights=params.get("weights"))
            for key, value in states(arrays, "expected").items():
                tolerance = case["tolerance"][f"expected.{key}"][precision]
                assert np.max(np.abs(np.asarray(merged[key], np.float64) - value)) <= tolerance


def test_weighted_task_arithmetic():
    case = CASES["mk_task_arithmetic"]
    arrays = load(case)
    experts = [arrays[f"expert_{t}"].astype(np.float32) for t in range(case["num_experts"])]
    method = methods.task_arithmetic(case["params"]["lambda"])
    merged = cfmerge.merge_tensor(arrays["base"].astype(np.float32), experts, method, weights=case["params"]["weight"])
    assert np.max(np.abs(np.asarray(merged) - arrays["expected"])) <= case["tolerance"]["expected"]["float32"]
