"""OPCM and OrthoMerge, against their papers step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from spectral_parts import DELTAS, RNG, close, merged, of_rank, polar, report, top

from cfmerge import methods
from cfmerge.errors import CfmergeError
from cfmerge.methods import Found, Seen

# --- OPCM ---------------------------------------------------------------------------------------------------------


def opcm_reference(experts, alpha):
    """As published, step by step: square bases, a division at every step; `experts` are lists of tensors."""

    def size(tensors):
        return np.sqrt(sum(np.sum(tensor**2) for tensor in tensors))

    running, factor, norms = experts[0], 1.0, [size(experts[0])]
    for expert in experts[1:]:
        norms.append(size(expert))
        stepped = []
        for previous, delta in zip(running, expert, strict=True):
            if delta.ndim == 2:
                u, s, vt = np.linalg.svd(previous, full_matrices=True)
                rho = int(np.argmax(np.cumsum(s) / s.sum() > alpha))
                core = u.T @ delta @ vt.T
                np.fill_diagonal(core, 0)
                core[:rho, :rho] = 0
                delta = u @ core @ vt
            stepped.append(factor * previous + delta)
        factor = size(stepped) / np.mean(norms)
        running = [tensor / factor for tensor in stepped]
    return running


def surveyed(method, models):
    """A merge of models that are lists of tensors, survey first."""
    with jax.enable_x64(True):
        seen = [Seen(jnp.zeros(tensors[0].shape), jnp.stack([jnp.asarray(t) for t in tensors]), jnp.ones(len(models)))
                for tensors in zip(*models, strict=True)]  # fmt: skip
        look = method.survey.look(0, [None] * len(models))
        wanted = next(look)
        assert wanted.joint
        measure = jax.jit(wanted.of)
        with pytest.raises(StopIteration) as done:  # after one pass
            look.send(jax.tree.map(lambda *leaves: np.asarray(sum(leaves)), *(measure(one) for one in seen)))
        informed = method.survey.informed(Found(done.value.value))
    return [merged(informed, list(one.deltas)) for one in seen]


@pytest.mark.parametrize("alpha", [0.0, 0.6])
def test_opcm_needs_one_scale_for_the_whole_model(alpha):
    models = [[RNG.standard_normal(shape) for shape in ((5, 7), (6, 4), (8,))] for _ in range(4)]
    for got, expected in zip(surveyed(methods.opcm(alpha), models), opcm_reference(models, alpha), strict=True):
        close(got, expected)


def test_opcm_of_a_tensor_alone_is_the_model_of_that_tensor():
    expected = opcm_reference([[delta] for delta in DELTAS], 0.5)[0]
    close(merged(methods.opcm(), DELTAS), expected)
    close(np.linalg.norm(expected), np.mean([np.linalg.norm(delta) for delta in DELTAS]))
    close(merged(methods.opcm(), DELTAS[:1]), DELTAS[0])
    assert methods.opcm().needs.ordered
    assert np.max(np.abs(merged(methods.opcm(), DELTAS[::-1]) - expected)) > 1e-3


def test_opcm_after_a_low_rank_expert_is_defined():
    first, second = of_rank(2, 1), DELTAS[1]
    u, s, vt = top(first, 2)
    core = u.T @ second @ vt.T
    rho = int(np.sum(np.cumsum(s) / s.sum() <= 0.5))
    zeroed = np.diag(np.diag(core))
    zeroed[:rho, :rho] = core[:rho, :rho]
    total = first + second - u @ zeroed @ vt
    scale = (np.linalg.norm(first) + np.linalg.norm(second)) / 2 / np.linalg.norm(total)
    close(merged(methods.opcm(), [first, second]), scale * total)


# --- OrthoMerge ---------------------------------------------------------------------------------------------------


def rotated(n, size, seed):
    skew = np.random.default_rng(seed).standard_normal((n, n))
    skew = size * (skew - skew.T)
    return np.linalg.solve(np.eye(n) - skew, np.eye(n) + skew)


def orthomerge_reference(base, deltas, scale):
    n = base.shape[1]
    eye = np.eye(n)
    rotations = [polar(base.T @ (base + delta)) for delta in deltas]
    skews = [np.linalg.solve(r + eye, r - eye) for r in rotations]
    total = sum(skews)
    q = total / np.linalg.norm(total) * np.mean([np.linalg.norm(one) for one in skews])
    rotation = np.linalg.solve(eye - q, eye + q)
    residuals = [base + delta - base @ r for delta, r in zip(deltas, rotations, strict=True)]
    return base @ rotation - base + scale * sum(residuals)


def test_orthomerge_is_the_formula():
    base = RNG.standard_normal((12, 6))
    deltas = [0.3 * RNG.standard_normal((12, 6)) for _ in range(3)]
    close(merged(methods.orthomerge(), deltas, base), orthomerge_reference(base, deltas, 0.3), 1e-7)
    close(merged(methods.orthomerge(methods.average()), deltas, base), orthomerge_reference(base, deltas, 1 / 3), 1e-7)


@pytest.mark.parametrize("shape", [(12, 6), (4, 6)])
def test_orthomerge_returns_one_expert(shape):
    base, delta = RNG.standard_normal(shape), 0.1 * RNG.standard_normal(shape)
    close(merged(methods.orthomerge(methods.average()), [delta], base), delta, 1e-8)
    assert np.all(merged(methods.orthomerge(), [0 * delta] * 2, base) == 0)


def test_orthomerge_of_rotations_about_one_axis_is_the_mean_rotation():
    """Rotations that commute have skew parts on a line: their norms are averaged."""
    base, plane = RNG.standard_normal((7, 5)), np.linalg.qr(RNG.standard_normal((5, 2)))[0]
    skew = np.outer(plane[:, 0], plane[:, 1])
    skew = skew - skew.T

    def turned(size):
        return base @ np.linalg.solve(np.eye(5) - size * skew, np.eye(5) + size * skew)

    deltas = [turned(size) - base for size in (0.1, 0.3)]
    close(merged(methods.orthomerge(methods.tsv_m()), deltas, base), turned(0.2) - base, 1e-7)


def test_a_reflection_is_left_to_the_residual():
    base = RNG.standard_normal((7, 5))
    delta = base @ np.diag([-1.0, 1, 1, 1, 1]) - base
    method = methods.orthomerge(methods.average())
    close(merged(method, [delta], base), delta, 1e-8)
    value = report(method, [delta], base)["reflected"]
    assert value == 1
    assert method.notes["reflected"][0](value)


def test_orthomerge_can_be_named_with_an_inner_method():
    method = methods.make("orthomerge(residual=tsv_m(alpha=0.5))")
    assert method.parameters["residual"].parameters["alpha"] == 0.5
    with pytest.raises(CfmergeError, match="residual must be a method"):
        methods.orthomerge(methods.star())
    with pytest.raises(CfmergeError, match="surveys the whole model"):
        methods.orthomerge(methods.opcm())
