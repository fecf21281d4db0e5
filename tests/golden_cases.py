"""The peers' own numbers (tests/golden, see its manifest): loading cases, and comparing within their tolerances."""

import json
from pathlib import Path

import jax
import numpy as np

import cfmerge

GOLDEN = Path(__file__).parent / "golden"
CASES = {case["name"]: case for case in json.loads((GOLDEN / "manifest.json").read_text())}


def names(*prefixes):
    """Names of the cases that begin with one of the prefixes."""
    return [name for name in CASES if name.startswith(prefixes)]


def load(case):
    """The arrays of a case."""
    with np.load(GOLDEN / case["file"]) as file:
        return {key: file[key] for key in file.files}


def states(arrays, prefix):
    """The state dict `{parameter: array}` stored as `prefix.parameter`."""
    return {k.removeprefix(prefix + "."): v for k, v in arrays.items() if k.startswith(prefix + ".")}


def check(case, method, key="expected", transpose=False, jit=True, experts=None, rules=None, **options):
    """`merge_tensor(base, experts, method, **options)` of a single-tensor case, in float32 and in float64.

    Args:
        experts: names of the arrays that are the experts; none: `expert_0` to `expert_{T-1}`.
        rules: the tensor is merged as a GPT-2's `h.0.mlp.c_fc.weight`, by `merge_params` with these rules.
        options: of `merge_tensor`; arrays in `moments` are cast like the weights.
    """
    arrays = load(case)
    experts = experts or [f"expert_{t}" for t in range(case["num_experts"])]
    base = arrays.get("base", np.zeros_like(arrays[experts[0]]))
    for precision in ("float32", "float64"):
        with jax.enable_x64(precision == "float64"):
            cast = [a.astype(precision).T if transpose else a.astype(precision)
                    for a in (base, *(arrays[name] for name in experts))]  # fmt: skip
            if options.get("moments") is not None:
                options["moments"] = [moment.astype(precision) for moment in options["moments"]]

            def merge(base, rest):
                if rules is not None:
                    trees = [{"h.0.mlp.c_fc.weight": array} for array in (base, *rest)]
                    return cfmerge.merge_params(trees[0], trees[1:], method, rules=rules)["h.0.mlp.c_fc.weight"]
                return cfmerge.merge_tensor(base, rest, method, **options)

            got = np.asarray((jax.jit(merge) if jit else merge)(cast[0], cast[1:]), np.float64)
        got = got.T if transpose else got
        assert np.isfinite(got).all()
        error = np.max(np.abs(got - arrays[key]))
        assert error <= case["tolerance"][key][precision], (precision, error, case["tolerance"][key][precision])


def check_states(case, method, key="expected", **options):
    """`merge_params` of a state-dict case, in float32 and in float64."""
    arrays = load(case)
    trees = [states(arrays, "base"), *(states(arrays, f"expert_{t}") for t in range(case["num_experts"]))]
    for precision in ("float32", "float64"):
        with jax.enable_x64(precision == "float64"):
            cast = [{k: v.astype(precision) for k, v in tree.items()} for tree in trees]
            merged = cfmerge.merge_params(cast[0], cast[1:], method, **options)
            for name, value in states(arrays, key).items():
                tolerance = case["tolerance"][f"{key}.{name}"][precision]
                error = np.max(np.abs(np.asarray(merged[name], np.float64) - value))
                assert error <= tolerance, (precision, name, error, tolerance)
