"""What can be said of a merge layer by layer, when the true input covariances are known."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from cfmerge import covariance
from cfmerge.formats.pytree import flatten
from cfmerge.parameters import classify, to_canonical
from cfmerge_accuracy import covariances
from cfmerge_accuracy.zoo import Params, Zoo

Grams = Mapping[str, Mapping[str, np.ndarray]]  # {task: {kernel's name: (in, in)}}
Deltas = Mapping[str, Sequence[np.ndarray]]  # {kernel's name: one (out, in) for each task}

ESTIMATORS: dict[str, Callable[[Array], Array]] = {
    "identity": lambda delta: jnp.eye(delta.shape[1], dtype=delta.dtype),
    "D^T D (ACTMat)": lambda delta: _gram(covariance.of_delta(delta)),
    "centred D^T D (ACE)": lambda delta: _gram(covariance.of_delta(covariance.centred(delta))),
    "trimmed D^T D (TACT)": lambda delta: _gram(covariance.of_largest(delta, 0.2)),
    "(D^T D)^1/2": lambda delta: _gram(covariance.of_power(delta, 0.5)),
}
LARGEST = 512  # inputs of the layers whose estimates are judged: beyond, decompositions take minutes


def _gram(estimate: covariance.Estimate) -> Array:
    return estimate.rows.T @ estimate.rows


def matrices(params: Params) -> dict[str, np.ndarray]:
    """The matrices and convolutions of a tree as `(out, in)`, by name; stacked ones are not among them."""
    leaves, _ = flatten(params)
    found = {}
    for name, parameter in classify({n: (tuple(a.shape), str(a.dtype)) for n, a in leaves.items()}).items():
        if parameter.layout and parameter.canonical[0] == 1:
            found[name] = np.asarray(to_canonical(np.asarray(leaves[name]), parameter.layout)).reshape(
                parameter.canonical[1:]
            )
    return found


def deltas(zoo: Zoo) -> Deltas:
    """The experts' deltas of every matrix, in the order of the tasks."""
    base = matrices(zoo.base)
    each = [matrices(zoo.experts[task]) for task in zoo.tasks]
    return {name: [expert[name] - base[name] for expert in each] for name in base}


class Output(NamedTuple):
    """Of one matrix: sums over the tasks of what their experts' deltas `D_t` do to the inputs of covariance `Sigma_t`.

    Attributes:
        covariance: `sum_t Sigma_t`, `(in, in)`.
        cross: `sum_t D_t Sigma_t`, `(out, in)`.
        energy: `sum_t tr(D_t Sigma_t D_t^T)`.
    """

    covariance: np.ndarray
    cross: np.ndarray
    energy: float


Outputs = Mapping[str, Output]  # by the kernel's name


def outputs(deltas: Deltas, grams: Grams) -> Outputs:
    """Of every matrix whose covariances are known, in float64; both have the tasks in the same order."""
    found = {}
    for name, rows in deltas.items():
        if all(name in own for own in grams.values()):
            known = [np.asarray(own[name], np.float64) for own in grams.values()]
            crosses = [row.astype(np.float64) @ gram for row, gram in zip(rows, known, strict=True)]
            energy = sum(np.vdot(row, cross) for row, cross in zip(rows, crosses, strict=True))
            found[name] = Output(sum(known), sum(crosses), float(energy))  # type: ignore[arg-type]
    return found


def excess(base: Params, merged: Params, known: Outputs) -> dict[str, float]:
    """`sum_t tr((X - D_t) Sigma_t (X - D_t)^T) / sum_t tr(D_t Sigma_t D_t^T)` of every matrix, with true `Sigma_t`.

    The error of each layer's outputs on the inputs that the task's own expert sees: 0 if all experts' outputs are kept,
    1 for the base.
    """
    before, after = matrices(base), matrices(merged)
    found = {}
    for name, output in known.items():
        x = after[name].astype(np.float64) - before[name]
        wrong = np.vdot(x @ output.covariance - 2 * output.cross, x) + output.energy
        found[name] = float(max(wrong, 0) / max(output.energy, np.finfo(np.float32).tiny))
    return found


def estimates(zoo: Zoo, grams: Grams) -> list[dict[str, Any]]:
    """Each estimator against the truth: means of the measures of `covariances` over matrices and tasks."""
    compiled = {label: jax.jit(estimate) for label, estimate in ESTIMATORS.items()}
    found: dict[str, list[dict[str, float]]] = {label: [] for label in ESTIMATORS}
    for name, rows in deltas(zoo).items():
        for task, delta in zip(zoo.tasks, rows, strict=True):
            if name not in grams[task] or delta.shape[1] > LARGEST or not np.any(delta):
                continue
            true = covariances.eigen(np.asarray(grams[task][name]))
            for label, estimate in compiled.items():
                found[label].append(covariances.measures(np.asarray(estimate(delta)), true))
    return [
        {"estimator": label, **{key: float(np.mean([one[key] for one in each])) for key in each[0]}}
        for label, each in found.items()
        if each
    ]
