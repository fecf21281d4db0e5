"""TSV-M, Iso-C, Iso-CTS, DC-Merge, CART, and what holds for all spectral methods."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import CASES, check, check_states, load, names
from spectral_parts import DELTAS, RNG, M, N, close, merged, of_rank, polar, report, svd, top

import cfmerge
from cfmerge import methods
from cfmerge.errors import CfmergeError
from cfmerge.methods import _blocks

# --- the peers' numbers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in names("fb_tsvm_") if "quirk" not in name])
def test_tsv_m_is_fusion_bench(name):
    check(CASES[name], methods.tsv_m(CASES[name]["params"]["alpha"]))


def test_more_experts_than_directions_do_not_give_zero():
    """The peer keeps floor(3 / 4) = 0 triplets and silently returns the base."""
    arrays = load(CASES["fb_tsvm_T_gt_rank_quirk"])
    deltas = [arrays[f"expert_{t}"].astype(float) - arrays["base"] for t in range(4)]
    assert np.all(arrays["expected"] == arrays["base"])
    assert report(methods.tsv_m(), deltas)["crowded"] == 1
    triplets = [top(delta, 1) for delta in deltas]
    us, s, vts = (
        np.concatenate(parts, axis) for parts, axis in zip(zip(*triplets, strict=True), (1, 0, 0), strict=True)
    )
    close(merged(methods.tsv_m(), deltas), (polar(us) * s) @ polar(vts))


@pytest.mark.parametrize("name", names("fb_iso_c_"))
def test_iso_c_is_fusion_bench(name):
    check(CASES[name], methods.iso_c(CASES[name]["params"]["scaling_factor"]))


@pytest.mark.parametrize("name", names("fb_iso_cts_"))
def test_iso_cts_is_fusion_bench(name):
    params = CASES[name]["params"]
    check(CASES[name], methods.iso_cts(params["scaling_factor"], params["common_space_fraction"]))


def test_svc_is_fusion_bench():
    params = CASES["fb_svc_ta"]["params"]
    scaled = methods.task_arithmetic(params["task_arithmetic_scaling"])
    check(CASES["fb_svc_ta"], scaled >> methods.svc(params["alpha"]))


def test_opcm_is_fusion_bench():
    check_states(CASES["fb_opcm"], methods.opcm(CASES["fb_opcm"]["params"]["alpha"]))


# --- TSV-M --------------------------------------------------------------------------------------------------------


def test_tsv_m_variants():
    parts = [svd(delta) for delta in DELTAS]
    us, s, vts = np.concatenate([p[0] for p in parts], 1), np.concatenate([p[1] for p in parts]), parts
    vts = np.concatenate([p[2] for p in parts])
    close(merged(methods.tsv_m(variant="lossless"), DELTAS), (polar(us) * s) @ polar(vts))
    truncated = [(u * s) @ vt for u, s, vt in (top(delta, M // 3) for delta in DELTAS)]
    close(merged(methods.tsv_m(0.5, variant="low_rank"), DELTAS), 0.5 * sum(truncated))


@pytest.mark.parametrize("variant", ["merge", "lossless"])
def test_tsv_m_of_one_expert_returns_it(variant):
    close(merged(methods.tsv_m(variant=variant), DELTAS[:1]), DELTAS[0])


def test_tsv_m_of_identical_experts_is_the_expert_cut():
    """The published code fills the null space with arbitrary directions; the partial isometry has none there."""
    u, s, vt = top(DELTAS[0], 3)
    close(merged(methods.tsv_m(), [DELTAS[0]] * 3), (u * s) @ vt)
    assert report(methods.tsv_m(), [DELTAS[0]] * 3)["dependent"] == 6
    assert report(methods.tsv_m(), DELTAS)["dependent"] == 0


def test_an_expert_that_did_not_change_takes_no_part():
    zero = np.zeros((M, N))
    u, s, vt = top(DELTAS[0], 3)
    close(merged(methods.tsv_m(), [DELTAS[0], zero, zero]), (u * s) @ vt)
    two = [top(delta, 3) for delta in DELTAS[:2]]
    us, s, vts = (np.concatenate(parts, axis) for parts, axis in zip(zip(*two, strict=True), (1, 0, 0), strict=True))
    close(merged(methods.tsv_m(), [DELTAS[0], zero, DELTAS[1]]), (polar(us) * s) @ polar(vts))


def test_tsv_m_of_orthogonal_experts_is_their_sum():
    q = np.linalg.qr(RNG.standard_normal((M, M)))[0]
    p = np.linalg.qr(RNG.standard_normal((N, N)))[0]
    experts = [(q[:, 3 * t : 3 * t + 3] * [3.0, 2.0, 1.0]) @ p[:, 3 * t : 3 * t + 3].T for t in range(3)]
    close(merged(methods.tsv_m(), experts), sum(experts))


SPECTRAL = {
    "tsv_m": methods.tsv_m(),
    "lossless": methods.tsv_m(variant="lossless"),
    "iso_c": methods.iso_c(),
    "iso_cts": methods.iso_cts(common=0.5),
    "dc_merge": methods.dc_merge(density=0.05),
    "cart": methods.cart(rank_fraction=0.3),
    "star": methods.star() >> methods.average(),
    "boosted": methods.average() >> methods.subspace_boosting(0.2),
    "flattened": methods.average() >> methods.half_flatten(),
    "svc": methods.task_arithmetic() >> methods.svc(),
    "opcm": methods.opcm(),
}


@pytest.mark.parametrize("name", SPECTRAL)
def test_rotations_and_scales_commute(name):
    """Everything is U f(s) V^T: rotating rows and columns, or scaling the deltas, does the same to the result."""
    method = SPECTRAL[name]
    left = np.linalg.qr(RNG.standard_normal((M, M)))[0]
    right = np.linalg.qr(RNG.standard_normal((N, N)))[0]
    plain = merged(method, DELTAS)
    close(merged(method, [left @ delta @ right for delta in DELTAS]), left @ plain @ right, 1e-8)
    for scale in (1e-6, -1e6):
        close(merged(method, [scale * delta for delta in DELTAS]), scale * plain, 1e-8)
    close(merged(method, [delta.T for delta in DELTAS]), plain.T, 1e-8) if name not in ("iso_cts", "svc") else None


@pytest.mark.parametrize("name", [name for name in SPECTRAL if name != "opcm"])
def test_order_does_not_matter(name):
    close(merged(SPECTRAL[name], DELTAS[::-1]), merged(SPECTRAL[name], DELTAS), 1e-8)


# --- Iso ----------------------------------------------------------------------------------------------------------


def test_iso_c_targets():
    total = sum(DELTAS)
    s = svd(total)[1]
    for target, value in (("mean", s.mean()), ("rms", np.sqrt(np.mean(s**2))), ("largest", s[0]), ("one", 1)):
        close(merged(methods.iso_c(1.5, target), DELTAS), 1.5 * value * polar(total))


def test_iso_c_returns_a_multiple_of_an_isometry_and_flattens_the_rest():
    isometry = 3.0 * polar(DELTAS[0])
    close(merged(methods.iso_c(), [isometry]), isometry)
    s = svd(merged(methods.iso_c(), DELTAS[:1]))[1]
    close(s, np.full(M, svd(DELTAS[0])[1].mean()))


def test_iso_c_streams_and_forgets():
    method = methods.iso_c()
    assert method.additive
    assert method.statistic == methods.average().statistic
    close(merged(method, [*DELTAS, DELTAS[1]], weights=[1, 1, 1, -1]), merged(method, [DELTAS[0], DELTAS[2]]))


def test_iso_c_of_low_rank_stays_in_its_space():
    low = of_rank(2, 0)
    assert report(methods.iso_c(), [low])["null_space"] == M - 2
    close(merged(methods.iso_c(), [low]), svd(low)[1].sum() / M * polar(low))


def iso_cts_reference(deltas, common):
    m, n = deltas[0].shape
    r, total = min(m, n), sum(deltas)
    nt = round((r - int(r * common)) / len(deltas))
    u_c, s_c, vt_c = top(total, r - nt * len(deltas))
    blocks = [top(delta - u_c @ (u_c.T @ delta), nt) for delta in deltas] + [(u_c, s_c, vt_c)]
    us, s, vts = (np.concatenate(p, axis) for p, axis in zip(zip(*blocks, strict=True), (1, 0, 0), strict=True))
    return s.mean() * polar(us) @ polar(vts)


@pytest.mark.parametrize("common", [0.0, 0.5, 0.9, 1.0])
def test_iso_cts_is_the_formula(common):
    close(merged(methods.iso_cts(common=common), DELTAS), iso_cts_reference(DELTAS, common))


def test_iso_cts_with_all_of_it_common_is_iso_c():
    close(merged(methods.iso_cts(common=1.0), DELTAS), merged(methods.iso_c(), DELTAS))


# --- DC-Merge, CART -----------------------------------------------------------------------------------------------


def dc_reference(deltas, k, smoothing, density, rho=5.0):
    parts = [top(delta, k) for delta in deltas]
    uhat = polar(np.concatenate([p[0] for p in parts], 1))
    vhat = polar(np.concatenate([p[2] for p in parts])).T
    cores = []
    for u, s, vt in parts:
        if smoothing == "average":
            s = np.full(k, s.mean())
        if smoothing == "linear":
            profile = np.linspace(min(rho, s[0] / s[-1]), 1, k)
            s = profile * s.sum() / profile.sum()
        core = uhat.T @ ((u * s) @ vt) @ vhat
        size = np.sort(np.abs(core).ravel())[::-1]
        cores.append(np.where(np.abs(core) >= size[max(1, int(density * core.size)) - 1], core, 0))
    sign = np.sign(sum(cores))
    agree = [(np.sign(core) == sign) & (sign != 0) for core in cores]
    mean = sum(core * a for core, a in zip(cores, agree, strict=True)) / np.maximum(sum(agree), 1)
    blocks = np.arange(len(mean)) // k
    return uhat @ (mean * (blocks[:, None] == blocks[None])) @ vhat.T


@pytest.mark.parametrize(
    ("smoothing", "rank", "density"),
    [("none", None, 0.001), ("none", 2, 0.3), ("average", None, 0.3), ("linear", 2, 0.1)],
)
def test_dc_merge_is_the_formula(smoothing, rank, density):
    method = methods.dc_merge(rank=rank, smoothing=smoothing, density=density, rho=3.0)
    close(merged(method, DELTAS), dc_reference(DELTAS, rank or 3, smoothing, density, 3.0))


def test_dc_merge_of_one_expert_keeps_what_is_dense_enough():
    close(merged(methods.dc_merge(density=1.0), DELTAS[:1]), DELTAS[0])


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.5]])
def test_cart_is_the_formula(weights):
    w = weights or [1.0] * 3
    mean = sum(a * delta for a, delta in zip(w, DELTAS, strict=True)) / sum(w)
    own = [(u * s) @ vt for u, s, vt in (top(delta - mean, 2) for delta in DELTAS)]
    expected = mean + 0.7 * sum(a * o for a, o in zip(w, own, strict=True))
    close(merged(methods.cart(0.7, rank_fraction=0.3), DELTAS, weights=weights), expected)


def test_cart_at_full_rank_is_the_mean():
    close(merged(methods.cart(2.0, rank_fraction=1.0), DELTAS), sum(DELTAS) / 3)
    close(merged(methods.cart(), [DELTAS[0]] * 3), DELTAS[0])


# --- all of them --------------------------------------------------------------------------------------------------
EVERY = {**SPECTRAL, "low_rank": methods.low_rank(2) >> methods.average(), "orthomerge": methods.orthomerge()}
DIFFERENTIATED = ["tsv_m", "iso_c", "svc", "opcm", "orthomerge"]


@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_derivatives(name):
    """Along a random direction, against differences; numbers that select (signs, ranks) stay where they are."""
    rng = np.random.default_rng(3)
    base, direction = rng.standard_normal((M, N)), np.stack([rng.standard_normal((M, N)) for _ in DELTAS])
    shape = (M, N) if name != "orthomerge" else (N, M)
    base, direction = base.reshape(shape), direction.reshape(3, *shape)
    experts, probe = np.stack(DELTAS).reshape(3, *shape), rng.standard_normal(shape)
    with jax.enable_x64(True):

        @jax.jit
        def loss(experts):
            return jnp.sum(probe * cfmerge.merge_tensor(jnp.asarray(base), list(base + experts), EVERY[name]))

        gradient = float(jnp.sum(jax.grad(loss)(jnp.asarray(experts)) * direction))
        step = 1e-6
        finite = float(loss(experts + step * direction) - loss(experts - step * direction)) / (2 * step)
    np.testing.assert_allclose(gradient, finite, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["iso_c", "dc_merge", "svc"])
def test_vmap_and_traced_numbers(name):
    experts = jnp.asarray(np.stack(DELTAS), jnp.float32)
    base = jnp.zeros((M, N))

    def merge(experts, number):
        made = {
            "iso_c": methods.iso_c,
            "dc_merge": methods.dc_merge,
            "svc": lambda alpha: methods.average() >> methods.svc(alpha),
        }[name](number)
        return cfmerge.merge_tensor(base, list(experts), made)

    both = jax.jit(jax.vmap(merge))(jnp.stack([experts, 2 * experts]), jnp.asarray([0.5, 1.5]))
    for got, scale, number in zip(both, (1, 2), (0.5, 1.5), strict=True):
        np.testing.assert_allclose(got, merge(scale * experts, number), atol=1e-4)


@pytest.mark.parametrize("name", EVERY)
def test_zero_deltas_change_nothing(name):
    """Exactly; and a matrix of one row or column is no special case."""
    assert np.all(merged(EVERY[name], [np.zeros((M, N))] * 3, base=DELTAS[0]) == 0)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("shape", [(1, 4), (4, 1)])
def test_single_rows_and_columns(name, shape):
    deltas = [RNG.standard_normal(shape) for _ in range(3)]
    assert np.isfinite(merged(EVERY[name], deltas, base=np.ones(shape))).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: methods.tsv_m(float("inf")), "alpha must be finite"),
        (lambda: methods.iso_cts(common=1.2), r"common must lie in \[0, 1\]"),
        (lambda: methods.dc_merge(rank=0), "rank must be at least 1"),
        (lambda: methods.dc_merge(rho=0.5), "rho must be at least 1"),
        (lambda: methods.cart(rank_fraction=0.0), r"rank_fraction must lie in \(0, 1\]"),
        (lambda: methods.star(0.0), r"eta must lie in \(0, 1\]"),
        (lambda: methods.subspace_boosting(-0.1), r"beta must lie in \[0, 1\]"),
        (lambda: methods.half_flatten(-1.0), "q must not be negative"),
        (lambda: methods.svc(0.0), "alpha must be positive"),
        (lambda: methods.low_rank(0), "rank must be at least 1"),
        (lambda: methods.opcm(2.0), r"alpha must lie in \[0, 1\]"),
    ],
)
def test_bad_parameters(call, message):
    with pytest.raises(CfmergeError, match=message):
        call()


def test_every_parameter_is_explained():
    for name in ("tsv_m", "iso_c", "iso_cts", "dc_merge", "cart", "star", "subspace_boosting", "half_flatten", "svc",
                 "low_rank", "opcm", "orthomerge"):  # fmt: skip
        entry = methods.registry()[name]
        assert entry.summary
        assert entry.source
        assert all(entry.describe(key) for key in entry.signature)


def test_vectors_that_nearly_fill_the_space_are_all_used():
    """Small singular values of the vectors side by side are no rounding: without one the merge is off by percents."""
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.standard_normal((64, 64)))[0] for _ in "ab")
    crowded = jnp.asarray((left * np.geomspace(2.6, 5e-4, 64)) @ right, jnp.float32)
    bases = _blocks.orthonormal(crowded, jnp.asarray(right, jnp.float32), jnp.asarray(64.0))
    assert _blocks.told(bases)["dependent"] == 0
    np.testing.assert_allclose(bases.u, left @ right, atol=2e-3)
