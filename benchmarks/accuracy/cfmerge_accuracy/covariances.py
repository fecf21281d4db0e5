"""How far an estimated covariance is from the true one: four measures, none of which sees the scale.

The estimate comes first, the truth second: symmetric positive semi-definite matrices `(n, n)`, or their eigenvalues
and eigenvectors where these are at hand:

    true = eigen(sigma)                      once for all estimates of it
    measures(eigen_of_rows(delta), true)     of D^T D, whose matrix is not built
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

FLOOR = 1e-3  # of the mean eigenvalue: the least that the log-spectral distance tells apart


class Eigen(NamedTuple):
    """`vectors diag(values) vectors^T`: `values (r,)` not negative, largest first, `vectors (n, r)` orthonormal."""

    values: np.ndarray
    vectors: np.ndarray


Covariance = np.ndarray | Eigen


def eigen(matrix: Covariance) -> Eigen:
    """Of a symmetric matrix `(n, n)`, in float64; negative eigenvalues are rounding, and count as zero."""
    if isinstance(matrix, Eigen):
        return matrix
    values, vectors = np.linalg.eigh(np.asarray(matrix, np.float64))
    return Eigen(np.maximum(values[::-1], 0), vectors[:, ::-1])


def eigen_of_rows(rows: Any) -> Eigen:
    """Of `rows^T rows`, for rows `(r, n)`: cheap where they are few, and exact where it is nearly singular."""
    _, s, vt = np.linalg.svd(np.asarray(rows, np.float64), full_matrices=False)
    return Eigen(s**2, vt.T)


def cosine(a: Covariance, b: Covariance) -> float:
    """`<a, b> / (||a|| ||b||)` of the entries: 1 if they are the same but for a scale; 0 if either is zero."""
    a, b = eigen(a), eigen(b)
    size = np.linalg.norm(a.values) * np.linalg.norm(b.values)
    return float(inner(a, b) / size) if size > 0 else 0.0


def relative_error(a: Covariance, b: Covariance) -> float:
    """`||a' - b|| / ||b||` with `a'` the estimate, scaled to the trace of the truth."""
    a, b = with_sum_one(eigen(a)), with_sum_one(eigen(b))
    square = np.sum(a.values**2) + np.sum(b.values**2) - 2 * inner(a, b)
    return float(np.sqrt(max(square, 0) / np.sum(b.values**2)))


def principal_angles(a: Covariance, b: Covariance, share: float = 0.5) -> np.ndarray:
    """Angles between the subspaces where most of either covariance is, in radians, ascending, `(k,)`.

    `k` is the number of leading eigenvectors of `b` that hold `share` of its trace; the other subspace is spanned
    by as many of `a`, or by all that there are. All angles are 0 where the subspaces are the same, pi/2 where they
    have nothing in common.
    """
    a, b = eigen(a), eigen(b)
    held = np.cumsum(b.values)
    count = min(int(np.searchsorted(held, share * held[-1] * (1 - 1e-12))) + 1, len(held))
    overlaps = np.linalg.svd(a.vectors[:, :count].T @ b.vectors[:, :count], compute_uv=False)
    missing = np.zeros(count - len(overlaps))
    return np.arccos(np.clip(np.concatenate([overlaps, missing]), 0, 1))


def log_spectral(a: Covariance, b: Covariance, floor: float = FLOOR) -> float:
    """Root mean square of `log(eigenvalue of a / eigenvalue of b)`, both in descending order and of mean 1.

    1 is a factor e for a typical eigenvalue. It compares spectra only, not where their eigenvectors point.

    Args:
        floor: smaller eigenvalues count as this much of the mean one: an estimate from few rows has many zeros.
    """
    a, b = with_sum_one(eigen(a)), with_sum_one(eigen(b))
    size = len(b.vectors)
    spectra = np.full((2, size), floor)
    for spectrum, values in zip(spectra, (a.values, b.values), strict=True):
        spectrum[: len(values)] = np.maximum(size * values, floor)
    return float(np.sqrt(np.mean(np.diff(np.log(spectra), axis=0) ** 2)))


def measures(a: Covariance, b: Covariance) -> dict[str, float]:
    """All four of one estimate `a` of `b`; of the angles, in degrees, the mean."""
    a, b = eigen(a), eigen(b)
    return {
        "cosine": cosine(a, b),
        "relative_error": relative_error(a, b),
        "angle": float(np.degrees(principal_angles(a, b).mean())),
        "log_spectral": log_spectral(a, b),
    }


def inner(a: Eigen, b: Eigen) -> float:
    """`<a, b> = trace(a b)`."""
    return float(a.values @ (a.vectors.T @ b.vectors) ** 2 @ b.values)


def with_sum_one(a: Eigen) -> Eigen:
    """Scaled to trace 1; zero stays zero."""
    total = a.values.sum()
    return Eigen(a.values / total, a.vectors) if total > 0 else a
