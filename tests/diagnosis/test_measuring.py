"""The numbers of a tensor are those that NumPy finds by their equations, in float64."""

import jax.numpy as jnp
import numpy as np
import pytest
from diagnosis_parts import MATRICES, base, numbers, unrelated

from cfmerge.diagnosis.measuring import NULL, _long_side

W = MATRICES[0]


def measured(shape):
    """The base, three deltas of unequal spectra, and their numbers; of a tall matrix, or of its transposed."""
    deltas = [{name: d * np.linspace(1, 3 + t, d.shape[-1]) for name, d in unrelated(t).items()} for t in range(3)]
    there = dict(base())
    if shape == "wide":
        there[W] = np.ascontiguousarray(there[W].T)
        deltas = [{**own, W: np.ascontiguousarray(own[W].T)} for own in deltas]
    deltas = [{W: own[W].astype(np.float32)} for own in deltas]
    return there[W].astype(np.float64), [own[W].astype(np.float64) for own in deltas], numbers(deltas, {W: there[W]})[W]


@pytest.fixture(scope="module", params=["tall", "wide"])
def case(request):
    return measured(request.param)


def close(found, wanted, rtol=2e-4):
    np.testing.assert_allclose(found, wanted, rtol=rtol, atol=rtol * np.max(np.abs(wanted)) / 10)


def test_norms_and_inner_products(case):
    weight, deltas, found = case
    close(found.base_norm, np.linalg.norm(weight))
    close(found.norms, [np.linalg.norm(delta) for delta in deltas])
    close(found.inner_base, [np.sum(weight * delta) for delta in deltas], 1e-3)
    close(found.gram, [[np.sum(a * b) for b in deltas] for a in deltas])


def test_conflicts(case):
    _, deltas, found = case
    close(found.conflicts, [[np.mean(a * b < 0) for b in deltas] for a in deltas])


def test_spectra_and_ranks(case):
    weight, deltas, found = case
    each = [np.linalg.svd(delta, compute_uv=False) for delta in deltas]
    close(found.spectra, [s[: found.spectra.shape[1]] for s in each], 1e-3)
    close(found.base_spectrum, np.linalg.svd(weight, compute_uv=False), 1e-3)
    close(found.stable_ranks, [np.sum(s**2) / s[0] ** 2 for s in each])
    shares = [s**2 / np.sum(s**2) for s in each]
    close(found.effective_ranks, [np.exp(-np.sum(p * np.log(p))) for p in shares])
    assert found.ranks.tolist() == [24, 24, 24]
    assert found.sides == weight.shape


def test_overlaps(case):
    _, deltas, found = case
    for name, grams in (("rows", [d.T @ d for d in deltas]), ("columns", [d @ d.T for d in deltas])):
        unit = [gram / np.linalg.norm(gram) for gram in grams]
        close(getattr(found, name), [[np.sum(a * b) for b in unit] for a in unit])


def test_directions_of_the_base(case):
    weight, deltas, found = case
    _, s, vt = np.linalg.svd(weight)
    squares = np.zeros(weight.shape[1])
    squares[: len(s)] = s**2
    null = squares <= NULL * squares[0]
    leading = np.cumsum(squares) - squares < np.sum(squares) / 2
    assert found.directions == (leading.sum(), (~leading & ~null).sum(), null.sum())
    for name, mask in (("leading", leading), ("lesser", ~leading & ~null), ("null", null)):
        wanted = [np.sum((delta @ vt.T[:, mask]) ** 2) / np.sum(delta**2) for delta in deltas]
        np.testing.assert_allclose(getattr(found, name), wanted, atol=1e-4)
    np.testing.assert_allclose(found.leading + found.lesser + found.null, 1, atol=1e-5)


def test_an_expert_that_did_not_change_the_matrix_has_zeros():
    deltas = [{W: unrelated(t)[W] * (t != 1)} for t in range(3)]
    found = numbers(deltas, {W: base()[W]})[W]
    for own in (found.ranks, found.stable_ranks, found.effective_ranks, found.leading, found.lesser, found.null):
        assert own[1] == 0
        assert own[0] > 0 or own is found.null
    assert found.rows[0, 1] == found.rows[1, 1] == found.conflicts[0, 1] == 0
    assert np.isfinite(found.growth)


@pytest.mark.parametrize("shape", [(5, 40, 24), (7, 30, 24)], ids=["products", "Grams"])
def test_the_longer_side_is_measured_without_its_grams_or_with_them(shape):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    wanted = [[np.sum((a.T @ b) ** 2) for b in x] for a in x]
    np.testing.assert_allclose(_long_side(jnp.asarray(x)), wanted, rtol=1e-4)
