"""Transforms of singular values, against their equations in plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from spectral_parts import DELTAS, M, close, merged, of_rank, polar, svd, top

from cfmerge import methods


def applied(transform, delta):
    with jax.enable_x64(True):
        return np.asarray(jax.jit(transform)(jnp.asarray(delta)))


@pytest.mark.parametrize("eta", [0.01, 0.4, 0.9, 1.0])
def test_star(eta):
    u, s, vt = svd(DELTAS[0])
    k = next(k for k in range(1, M + 1) if s[:k].sum() >= eta * s.sum() - 1e-12)
    got = applied(methods.star(eta), DELTAS[0])
    close(got, (u[:, :k] * s[:k]) @ vt[:k] * s.sum() / s[:k].sum())
    close(svd(got)[1].sum(), s.sum())


@pytest.mark.parametrize("beta", [0.0, 0.05, 0.3, 1.0])
@pytest.mark.parametrize("energy", ["values", "squares"])
def test_subspace_boosting(beta, energy):
    u, s, vt = svd(DELTAS[0])
    amount = s if energy == "values" else s**2
    share = np.cumsum(amount) / amount.sum()
    level = s[np.argmax(share > beta)] if beta < 1 else s[-1]
    close(applied(methods.subspace_boosting(beta, energy), DELTAS[0]), (u * np.maximum(s, level)) @ vt)


def test_boosting_leaves_the_null_space_alone():
    low = of_rank(2, 0)
    close(applied(methods.subspace_boosting(0.0), low), svd(low)[1][0] * polar(low))


@pytest.mark.parametrize("q", [0.0, 0.5, 1.0, 2.0])
def test_half_flatten(q):
    u, s, vt = svd(DELTAS[0])
    expected = (u * s**q) @ vt * s.sum() / (s**q).sum()
    close(applied(methods.half_flatten(q), DELTAS[0]), expected)
    if q == 0:
        close(expected, merged(methods.iso_c(), DELTAS[:1]))


def test_low_rank():
    u, s, vt = top(DELTAS[0], 2)
    close(applied(methods.low_rank(2), DELTAS[0]), (u * s) @ vt)
    close(applied(methods.low_rank(fraction=0.3), DELTAS[0]), (u * s) @ vt)
    close(applied(methods.low_rank(99), DELTAS[0]), DELTAS[0])


@pytest.mark.parametrize("alpha", [0.1, 1.0])
def test_svc_is_the_formula(alpha):
    total = 0.4 * sum(DELTAS)
    u, s, vt = svd(total)
    shares = [np.sum((u.T @ total) * (u.T @ d), 1) / np.sum((u.T @ d) ** 2, 1) for d in DELTAS]
    gamma = 3 / np.maximum(alpha, shares).sum(0)
    got = merged(methods.task_arithmetic(0.4) >> methods.svc(alpha), DELTAS)
    close(got, (u * gamma * s) @ vt)


def test_svc_leaves_one_expert_as_it_is():
    close(merged(methods.average() >> methods.svc(), DELTAS[:1]), DELTAS[0])
