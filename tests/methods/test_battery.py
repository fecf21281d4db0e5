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

SCALED_SUM = "a scaled sum of deltas, or of what is left of them"
FLATTENED = "its spectrum is made flat, or otherwise changed"
SPARSE = "entries are dropped"
NOT_IDEMPOTENT = {  # one expert, or identical experts, do not give the expert
    **dict.fromkeys(["task_arithmetic", "dare_linear", "della_linear", "breadcrumbs", "consensus", "magmax",
                     "average >> lines", "average >> larv", "opcm", "expo"], SCALED_SUM),
    **dict.fromkeys(["iso_c", "iso_cts", "half_flatten", "average >> subspace_boosting", "average >> half_flatten",
                     "average >> svc", "star >> average", "dc_merge", "cart", "tsv_m", "low_rank >> average",
                     "optmerge"], FLATTENED),
    **dict.fromkeys(["ties", "dare_ties", "della", "breadcrumbs_ties", "trim >> average", "drop >> average", "pcb",
                     "drop_by_rank >> average", "outliers >> average", "trim_deviation >> average",
                     "trim_energy >> average", "sce", "arcee_fusion", "nearswap"], SPARSE),
    "ace": "centres the rows, and halves the all-ones direction",
}  # fmt: skip


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
