"""The linear testbed against plain NumPy, its rankings, and the measures' identities."""

import jax.numpy as jnp
import numpy as np
import pytest

import cfmerge
from cfmerge_accuracy import linear
from cfmerge_accuracy.covariances import (
    cosine,
    eigen,
    eigen_of_rows,
    log_spectral,
    measures,
    principal_angles,
    relative_error,
)  # fmt: skip

RIDGE_FREE = [f"p = {p:g}" for p in linear.POWERS]


@pytest.fixture(scope="module")
def risks() -> dict[str, dict[str, float]]:
    """Mean over two seeds."""
    wanted = {"oracle", "mean", *RIDGE_FREE}
    methods = {name: method for name, method in linear.methods().items() if name in wanted}
    found = linear.compare(methods, seeds=(0, 1))
    return {regime: {name: float(np.mean(values)) for name, values in row.items()} for regime, row in found.items()}


@pytest.fixture(scope="module")
def bed() -> linear.Bed:
    return linear.make(linear.regimes()["SGD, batch 4, noisy, full rank"], seed=3)


def least_squares(deltas: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
    """`(sum D_t Sigma_t) (sum Sigma_t)^-1` in float64."""
    deltas, sigmas = np.asarray(deltas, np.float64), np.asarray(sigmas, np.float64)
    return np.linalg.solve(sigmas.sum(axis=0), np.einsum("tmn,tnk->mk", deltas, sigmas).T).T


def plain_risk(x: np.ndarray, deltas: np.ndarray, sigmas: np.ndarray) -> float:
    lost = sum(np.trace((x - d) @ s @ (x - d).T) for d, s in zip(deltas, sigmas, strict=True))
    return float(lost / sum(np.trace(d @ s @ d.T) for d, s in zip(deltas, sigmas, strict=True)))


def test_tasks_are_what_is_said(bed: linear.Bed) -> None:
    expected = 1 / np.arange(1, linear.INPUTS + 1)
    expected /= expected.mean()
    for sigma in bed.sigmas:
        np.testing.assert_allclose(np.linalg.eigvalsh(sigma)[::-1], expected, rtol=1e-3)
    low = linear.make(linear.regimes()["GD, few steps, rank 4"], seed=0)
    assert [int(np.linalg.matrix_rank(np.asarray(shift))) for shift in low.shifts] == [4] * linear.TASKS
    np.testing.assert_allclose(np.sum(np.asarray(low.shifts) ** 2, axis=(1, 2)), linear.OUTPUTS, rtol=1e-5)


def test_gradient_descent_has_its_closed_form() -> None:
    bed = linear.make(linear.Regime("gd", rate=0.02, steps=30), seed=1)
    for delta, sigma, shift in zip(*(np.asarray(array, np.float64) for array in bed), strict=True):
        left = np.linalg.matrix_power(np.eye(linear.INPUTS) - 0.02 * sigma, 30)
        np.testing.assert_allclose(delta, shift - shift @ left, atol=1e-5)


def test_seeds_do_not_depend_on_each_other(bed: linear.Bed) -> None:
    together = linear.beds(linear.regimes()["SGD, batch 4, noisy, full rank"], (1, 3))
    np.testing.assert_allclose(together.deltas[1], bed.deltas, atol=1e-5)
    assert not np.allclose(together.deltas[0], together.deltas[1])


def test_solver_reproduces_the_oracle(bed: linear.Bed) -> None:
    optimum = least_squares(bed.deltas, bed.sigmas)
    merged = linear.merge(bed, linear.oracle())
    np.testing.assert_allclose(merged, optimum, atol=1e-4)
    expected = plain_risk(optimum, *(np.asarray(array, np.float64) for array in bed[:2]))
    assert float(linear.excess_risk(merged, bed)) == pytest.approx(expected, rel=1e-5)
    nothing = jnp.zeros_like(merged)
    assert float(linear.excess_risk(nothing, bed)) == pytest.approx(1)


def test_no_method_beats_the_oracle(risks: dict[str, dict[str, float]]) -> None:
    for row in risks.values():
        assert min(row, key=lambda name: row[name]) == "oracle"


def test_half_power_beats_the_gram(risks: dict[str, dict[str, float]]) -> None:
    assert sum(row["p = 0.5"] < row["p = 1"] - 1e-3 for row in risks.values()) >= 7
    assert all(row["p = 0.5"] < row["p = 1"] + 1e-2 for row in risks.values())


def test_no_power_is_safe_on_few_directions(risks: dict[str, dict[str, float]]) -> None:
    quiet = [name for name in risks if "rank 4" in name and "noisy" not in name]
    assert len(quiet) == 3
    for name in quiet:
        assert min(risks[name][power] for power in RIDGE_FREE) > risks[name]["mean"]
    for name in [name for name in quiet if "converged" in name]:
        assert risks[name]["p = 1"] > 10 * risks[name]["mean"]


def test_early_drift_is_the_square_of_the_covariance(risks: dict[str, dict[str, float]]) -> None:
    row = risks["GD, few steps, full rank"]
    assert row["p = 0.5"] < row["oracle"] + 0.06
    assert min(row, key=lambda name: row[name] if name.startswith("p") else np.inf) == "p = 0.5"


def test_table_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    few = dict(list(linear.regimes().items())[:1])
    monkeypatch.setattr(linear, "regimes", lambda: few)
    found = linear.table((0, 1), quick=True)
    (name,) = few
    assert set(found["regimes"][name]["mean"]) == {"mean", "standard deviation"}
    assert set(found["covariances"][name]) == set(RIDGE_FREE)
    assert 0.8 < found["covariances"][name]["p = 0.5"]["cosine"] < 1


def test_surveying_methods_are_merged_one_by_one(bed: linear.Bed) -> None:
    every = linear.Bed(*(array[None] for array in bed))
    (risk,) = linear.risks(every, cfmerge.methods.make("ties"))
    assert 0 < risk < 4


# --- measures -----------------------------------------------------------------------------------------------------


def covariance_of(seed: int, rank: int, size: int = 12) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((rank, size))
    return rows.T @ rows


def test_measures_do_not_see_the_scale() -> None:
    a, b = covariance_of(0, 30), covariance_of(1, 20)
    once, again = measures(a, b), measures(1e-6 * a, 1e3 * b)
    assert once == pytest.approx(again, rel=1e-6)
    assert measures(7 * b, b) == pytest.approx(
        {"cosine": 1, "relative_error": 0, "angle": 0, "log_spectral": 0}, abs=1e-5
    )


def test_measures_of_matrices_are_the_plain_formulas() -> None:
    a, b = covariance_of(0, 5), covariance_of(1, 20)
    assert cosine(a, b) == pytest.approx(np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b))
    scaled = a * np.trace(b) / np.trace(a)
    assert relative_error(a, b) == pytest.approx(np.linalg.norm(scaled - b) / np.linalg.norm(b))
    assert cosine(a, np.zeros_like(b)) == 0


def test_rows_are_their_gram() -> None:
    rows = np.random.default_rng(2).standard_normal((5, 12))
    true = covariance_of(1, 20)
    assert measures(eigen_of_rows(rows), eigen(true)) == pytest.approx(measures(rows.T @ rows, true))


def test_angles_of_known_subspaces() -> None:
    b = np.diag([4.0, 3.0, 2.0, 1.0])
    turn = np.eye(4)
    turn[np.ix_([1, 3], [1, 3])] = [[np.cos(0.3), -np.sin(0.3)], [np.sin(0.3), np.cos(0.3)]]
    np.testing.assert_allclose(principal_angles(turn @ b @ turn.T, b), [0, 0.3], atol=1e-7)
    assert principal_angles(b, b, share=0.4).shape == (1,)
    assert principal_angles(b, b, share=1).shape == (4,)
    one = np.diag([0.0, 0.0, 0.0, 1.0])
    np.testing.assert_allclose(principal_angles(eigen_of_rows(one[3:]), b), [np.pi / 2] * 2)


def test_log_spectral_compares_spectra_alone() -> None:
    b = np.diag([4.0, 1.0, 1.0, 2.0])
    assert log_spectral(np.diag([1.0, 2.0, 4.0, 1.0]), b) == pytest.approx(0)
    halves, ends = np.diag([1.5, 1.5, 0.5, 0.5]), np.eye(4)
    assert log_spectral(halves, ends) == pytest.approx(np.sqrt((np.log(1.5) ** 2 + np.log(2) ** 2) / 2))
    assert np.isfinite(log_spectral(np.diag([1.0, 0, 0, 0]), b))


def test_two_sided_stops_where_its_system_is_singular():
    """Conjugate gradients that went on into rounding once gave a delta of 145 times the mean's norm here."""
    made = linear.make(linear.regimes()["GD, few steps, rank 4"], seed=1)
    deltas = np.asarray(made.deltas)
    merged = cfmerge.merge_tensor(np.zeros_like(deltas[0]), list(deltas), cfmerge.methods.two_sided())
    assert np.linalg.norm(merged) < 10 * np.linalg.norm(deltas.mean(axis=0))
