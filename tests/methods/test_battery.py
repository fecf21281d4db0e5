"""One battery for every method and transform in the registry: what all of them must stand, and which identities hold.

A method's results on all problems of one size come from one compiled call. The lists below state where an identity
does not hold; a new method is in the battery as soon as it is registered.
"""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from every_part import PARTS, count, moments_of, text_of
from jax import lax
from lowered import lapack_calls

import cfmerge
from cfmerge import methods

pytestmark = pytest.mark.slow

# --- where an identity does not hold, and why ---------------------------------------------------------------------

SUM = "a scaled sum of the deltas, or of what is left of them: T identical experts give a multiple"
FLAT = "the spectrum is changed, or cut"
SPARSE = "entries are dropped"
NEAR_SUM = "where the deltas say nothing it is at their sum, which of identical experts is not the expert"
NOT_IDEMPOTENT = {
    **dict.fromkeys([
        "task_arithmetic", "dare_linear", "della_linear", "breadcrumbs", "consensus", "expo", "peft_cat", "peft_svd",
    ], SUM),
    **dict.fromkeys(["wudi", "wudi_adam", "swudi", "aswudi", "optmerge"], NEAR_SUM),
    **dict.fromkeys([
        "iso_c", "iso_cts", "tsv_m", "dc_merge", "average >> half_flatten", "average >> subspace_boosting",
        "low_rank >> average", "star >> average",
    ], FLAT),
    **dict.fromkeys([
        "ties", "dare_ties", "della", "breadcrumbs_ties", "pcb", "arcee_fusion", "nearswap", "drop >> average",
        "drop_by_rank >> average", "outliers >> average", "trim >> average", "trim_deviation >> average",
        "trim_energy >> average", "knots", "core_space",
    ], SPARSE),
    "ace": "centres the rows, and halves the all-ones direction",
    "magmax": "has a scale, 1/2 by default",
    "cauchy_poe": "its jitter shrinks",
    "orthomerge": "what is not a rotation is merged by task arithmetic, with its scale",
}  # fmt: skip
NOT_SCALED = {
    "cauchy_poe": "its jitter is absolute", "pcb": "its tanh is of raw products", "wudi_adam": "steps of a fixed size",
    **dict.fromkeys(["slerp", "karcher"], "they work on the full weights"),
    "nearswap": "clips at an absolute size", "orthomerge": "rotations of the full weights",
}  # fmt: skip
COARSE = {  # float32 against float64, relative to the largest entry, where it is more than 1e-4
    "cauchy_poe": 1e-3,  # its weights are quotients of small residuals
    "dc_merge": 0.3,  # of opposite deltas: the signs' votes cancel but for rounding
}

COMPARED = ("plain", "one zero", "opposite")

pytestmark = pytest.mark.usefixtures("compiled_in_full")  # the code that users run has to stand what is extreme


def problems(m, n, experts):
    """`{name: (base, deltas)}` in float64, each an exact multiple of 2^-20 where it is of ordinary size."""
    rng = np.random.default_rng(m * 100 + n)
    base = rng.standard_normal((m, n))
    deltas = 0.1 * rng.standard_normal((experts, m, n))
    base, deltas = np.round(base * 2**20) / 2**20, np.round(deltas * 2**20) / 2**20
    u, _, vt = np.linalg.svd(deltas[0], full_matrices=False)
    spread = np.stack([u * np.geomspace(1, 1e-12, min(m, n)) @ vt * (t + 1) for t in range(experts)])
    rank_one = np.stack([np.outer(d[:, 0], d[0]) for d in deltas])
    one_zero = deltas.copy()
    one_zero[-1] = 0
    zero = np.zeros_like(deltas)
    low = bfloat16(base)
    return {
        "plain": (base, deltas), "reversed": (base, deltas[::-1]), "zero": (base, zero),
        "identical": (base, np.stack([deltas[0]] * experts)), "one zero": (base, one_zero),
        "eighth": (base, deltas / 8), "1e-8": (1e-6 * base, 1e-8 * deltas), "1e8": (1e8 * base, 1e8 * deltas),
        "denormal": (0 * base, 1e-40 * deltas), "rank one": (base, rank_one), "condition 1e12": (base, spread),
        "from zero": (0 * base, deltas), "zero model": (0 * base, zero), 
        "opposite": (base, deltas[0] * (-1.0) ** np.arange(experts)[:, None, None]),
        "rounded": (low, bfloat16(base + deltas) - low),
    }  # fmt: skip


def bfloat16(array):
    return np.asarray(jnp.asarray(array, jnp.bfloat16), np.float64)


@functools.cache
def merged(part, m=6, n=5, precision="float32", experts=None):
    """`{problem: merged - base}`; one compiled call."""
    method = methods.make(text_of(part))
    cases = problems(m, n, experts or count(method))
    if precision != "float32":
        cases = {name: cases[name] for name in (["rounded"] if precision == "bfloat16" else COMPARED)}
    dtype = jnp.dtype(precision)
    bases = np.stack([base for base, _ in cases.values()])
    stacks = [bases.astype(dtype), np.stack([base + deltas for base, deltas in cases.values()]).astype(dtype)]
    if method.needs.moments:
        stacks.append(np.stack([moments_of(method, case[1]) for case in cases.values()]).astype(np.float32))

    with jax.enable_x64(precision == "float64"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = jax.jit(lambda arrays: lax.map(functools.partial(merge, method), arrays))(stacks)
    stored = stacks[0].astype(np.float64)
    return {name: np.asarray(value, np.float64) - base for name, base, value in zip(cases, stored, out, strict=True)}


def merge(method, arrays):
    base, experts, *moments = arrays
    return cfmerge.merge_tensor(base, list(experts), method, moments=list(moments[0]) if moments else None)


def size(array):
    return max(float(np.max(np.abs(array))), 1e-300)


@pytest.mark.parametrize("part", PARTS)
def test_finite_whatever_comes(part):
    for name, result in merged(part).items():
        assert np.isfinite(result).all(), name


@pytest.mark.parametrize("part", PARTS)
def test_under_vmap_decompositions_are_not_batched(part):
    """Two batches at once can wait for each other, see `linalg.one_by_one`."""
    method = methods.make(text_of(part))
    moments = {"": [], "fisher": [(11, count(method), 6, 5)]}.get(method.needs.moments, [(11, count(method), 5, 5)])
    shapes = [(11, 6, 5), (11, count(method), 6, 5), *moments]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    _, batched = lapack_calls(functools.partial(merge, method), arrays)
    assert not batched


@pytest.mark.parametrize("part", PARTS)
def test_no_change_gives_the_base_exactly(part):
    results = merged(part)
    assert not results["zero"].any()
    assert not results["zero model"].any()


@pytest.mark.parametrize("part", PARTS)
def test_wide_with_more_experts_than_the_rank(part):
    method = methods.make(text_of(part))
    if method.needs.experts[1] is not None:
        pytest.skip("takes a fixed number of experts")
    results = merged(part, 2, 5, experts=3)
    for name, result in results.items():
        assert np.isfinite(result).all(), name
    if part != "model_stock":  # these deltas point away from each other: nothing is left of them
        assert results["plain"].any(), "the deltas got lost"


@pytest.mark.parametrize("part", PARTS)
def test_order_does_not_matter(part):
    method = methods.make(text_of(part))
    if method.needs.ordered or method.needs.random:
        pytest.skip("ordered, or random by the experts' names")
    results = merged(part)
    np.testing.assert_allclose(results["reversed"], results["plain"], atol=2e-5 * size(results["plain"]), rtol=0)


@pytest.mark.parametrize("part", [part for part in PARTS if part not in NOT_IDEMPOTENT])
def test_one_expert_and_identical_experts_give_the_expert(part):
    least, most = methods.make(text_of(part)).needs.experts
    (_, deltas) = problems(6, 5, count(methods.make(text_of(part))))["identical"]
    np.testing.assert_allclose(merged(part)["identical"], deltas[0], atol=1e-5, rtol=0)
    if least == 1 and most is None:
        np.testing.assert_allclose(merged(part, experts=1)["identical"], problems(6, 5, 1)["plain"][1][0], atol=1e-5)


@pytest.mark.parametrize("part", [part for part in PARTS if part not in NOT_SCALED])
def test_scaling_the_deltas_scales_the_merge(part):
    results = merged(part)
    np.testing.assert_allclose(8 * results["eighth"], results["plain"], atol=3e-5 * size(results["plain"]), rtol=0)


@pytest.mark.parametrize("part", PARTS)
def test_float32_is_close_to_float64(part):
    single, double = merged(part), merged(part, precision="float64")
    for name in COMPARED:
        error = np.max(np.abs(single[name] - double[name])) / size(double["plain"])
        assert error < COARSE.get(part, 1e-4), (name, error)


@pytest.mark.parametrize("part", PARTS)
def test_bfloat16_is_computed_in_float32_and_rounded(part):
    rounded = problems(6, 5, count(methods.make(text_of(part))))["rounded"][0]
    low, high = merged(part, precision="bfloat16")["rounded"], merged(part)["rounded"]
    np.testing.assert_array_equal(low + rounded, np.asarray(jnp.asarray(high + rounded, jnp.bfloat16), np.float64))


def test_every_exception_is_about_a_part():
    for exceptions in (NOT_IDEMPOTENT, NOT_SCALED, COARSE):
        assert set(exceptions) <= set(PARTS)
