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
from jax import lax

import cfmerge
from cfmerge import methods
from cfmerge.methods import Method

BEHIND = {"half_flatten", "larv", "lines", "subspace_boosting", "svc"}  # transforms that stand behind a method
PARTS = [
    entry.name if entry.kind == "method" else f"average >> {entry.name}" if entry.name in BEHIND
    else f"{entry.name} >> average"
    for entry in methods.registry().values()
]  # fmt: skip
ARGUMENTS = {  # parameters without a default, and steps enough to show something
    "drop >> average": "drop(p=0.5) >> average", "trim >> average": "trim(density=0.5) >> average",
    "nearswap": "nearswap(t=0.05)", "low_rank >> average": "low_rank(rank=2) >> average",
}  # fmt: skip

# --- where an identity does not hold, and why ---------------------------------------------------------------------

SUM = "a sum of the deltas, or a scaled one"
FLAT = "the spectrum is changed"
SPARSE = "entries are dropped"
NOT_IDEMPOTENT: dict[str, str] = {}
NOT_SCALED: dict[str, str] = {}
COARSE: dict[str, float] = {}  # float32 against float64, relative to the largest entry, where it is more than 1e-4


def text_of(part):
    return ARGUMENTS.get(part, part)


def count(method: Method) -> int:
    least, most = method.experts
    return min(max(3, least), most or 3)


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
    return {
        "plain": (base, deltas), "reversed": (base, deltas[::-1]), "zero": (base, zero),
        "identical": (base, np.stack([deltas[0]] * experts)), "one zero": (base, one_zero),
        "eighth": (base, deltas / 8), "1e-8": (1e-6 * base, 1e-8 * deltas), "1e8": (1e8 * base, 1e8 * deltas),
        "denormal": (0 * base, 1e-40 * deltas), "rank one": (base, rank_one), "condition 1e12": (base, spread),
        "from zero": (0 * base, deltas), "zero model": (0 * base, zero), "opposite": (base, deltas[0] * (-1.0) ** np.arange(experts)[:, None, None]),
    }  # fmt: skip


def moments_of(method, problem):
    base, deltas = problem
    if method.moments == "fisher":
        return np.abs(deltas) + 0.1
    if method.moments == "input_gram":
        rng = np.random.default_rng(5)
        x = rng.standard_normal((len(deltas), 40, base.shape[1]))
        return np.einsum("tki,tkj->tij", x, x) / 40
    return None


@functools.lru_cache(maxsize=None)
def merged(part, m=6, n=5, precision="float32", experts=None):
    """`{problem: merged delta}`, and whether warnings were given; one compiled call where the method can be traced."""
    method = methods.make(text_of(part))
    cases = problems(m, n, experts or count(method))
    names = [str(t) for t in range(experts or count(method))]
    dtype = np.dtype(precision)
    results = {}
    with jax.enable_x64(precision == "float64"), warnings.catch_warnings():
        warnings.simplefilter("ignore")

        def delta(base, deltas, moments, names):
            # the experts are formed in the dtype, as they would be stored
            merged = cfmerge.merge_tensor(base, [base + d for d in deltas], method, moments=moments, names=names)
            return merged

        stacked = [np.stack([case[k] for case in cases.values()]).astype(dtype) for k in (0, 1)]
        moments = None
        if method.moments:
            moments = np.stack([moments_of(method, case) for case in cases.values()]).astype(dtype)
        if method.survey is None:
            if moments is None:
                run = jax.jit(lambda b, d: lax.map(lambda bd: delta(bd[0], bd[1], None, names), (b, d)))
                out = run(*stacked)
            else:
                run = jax.jit(lambda b, d, mo: lax.map(lambda x: delta(x[0], x[1], list(x[2]), names), (b, d, mo)))
                out = run(*stacked, moments)
        else:
            out = [delta(b, list(d), None, names) for b, d in zip(*stacked, strict=True)]
        for name, base, value in zip(cases, stacked[0], out, strict=True):
            results[name] = np.asarray(value, np.float64) - base.astype(np.float64)
    return results


def size(array):
    return max(float(np.max(np.abs(array))), 1e-300)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("shape", [(6, 5), (4, 9)])
def test_finite_whatever_comes(part, shape):
    for name, result in merged(part, *shape).items():
        assert np.isfinite(result).all(), name


@pytest.mark.parametrize("part", PARTS)
def test_no_change_gives_the_base_exactly(part):
    results = merged(part)
    assert not results["zero"].any()
    assert not results["zero model"].any()


@pytest.mark.parametrize("part", PARTS)
def test_more_experts_than_the_rank(part):
    method = methods.make(text_of(part))
    if method.experts[1] is not None:
        pytest.skip("takes a fixed number of experts")
    for name, result in merged(part, 3, 4, experts=6).items():
        assert np.isfinite(result).all(), name
    assert merged(part, 3, 4, experts=6)["plain"].any(), "the deltas got lost"


@pytest.mark.parametrize("part", PARTS)
def test_order_does_not_matter(part):
    method = methods.make(text_of(part))
    if method.ordered or method.random:
        pytest.skip("ordered, or random by the experts' names")
    results = merged(part)
    np.testing.assert_allclose(results["reversed"], results["plain"], atol=2e-5 * size(results["plain"]), rtol=0)


@pytest.mark.parametrize("part", [part for part in PARTS if part not in NOT_IDEMPOTENT])
def test_one_expert_and_identical_experts_give_the_expert(part):
    least, most = methods.make(text_of(part)).experts
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
    for name in ("plain", "one zero", "opposite"):
        error = np.max(np.abs(single[name] - double[name])) / size(double["plain"])
        assert error < COARSE.get(part, 1e-4), (name, error)


@pytest.mark.parametrize("part", PARTS)
def test_bfloat16_is_computed_in_float32_and_rounded(part):
    method = methods.make(text_of(part))
    base, deltas = problems(6, 5, count(method))["plain"]
    stored = [jnp.asarray(array, jnp.bfloat16) for array in (base, *(base + delta for delta in deltas))]
    moments = moments_of(method, (base, deltas))
    moments = None if moments is None else jnp.asarray(moments, jnp.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        low = cfmerge.merge_tensor(stored[0], stored[1:], method, moments=moments)
        wide = [array.astype(jnp.float32) for array in stored]
        high = cfmerge.merge_tensor(wide[0], wide[1:], method, moments=moments)
    assert low.dtype == jnp.bfloat16
    np.testing.assert_array_equal(low, high.astype(jnp.bfloat16))


def test_every_exception_is_about_a_part():
    for exceptions in (NOT_IDEMPOTENT, NOT_SCALED, COARSE):
        assert set(exceptions) <= set(PARTS)
