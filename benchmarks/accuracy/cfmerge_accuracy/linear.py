"""Linear regression tasks with known input covariances: the excess risk of a merged layer is exact.

Task `t` has inputs `x ~ N(0, Sigma_t)` and targets `E_t x + noise`. Its covariance has a random eigenbasis and the
eigenvalues `1, 1/2, .. 1/n`, scaled to mean 1. A model `W x` is trained from zero, so the delta `D_t` is its weight.
What merging costs is how far the merged layer's outputs are from the experts', on the experts' inputs:

    excess risk(X) = sum_t tr((X - D_t) Sigma_t (X - D_t)^T) / sum_t tr(D_t Sigma_t D_t^T)

RegMean with the true `Sigma_t` minimises it. Methods without data put an estimate of `Sigma_t` from `D_t` in its
place; how good that is depends on how the expert was trained. The nine regimes differ in that alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import cfmerge
from cfmerge import covariance, linalg
from cfmerge.methods import Method
from cfmerge_accuracy.covariances import eigen, eigen_of_rows, measures

INPUTS, OUTPUTS, TASKS = 48, 40, 6
SEEDS = (0, 1, 2)
POWERS = (0.25, 0.5, 0.75, 1.0)

Estimator = Callable[[jax.Array], Any]  # delta (out, in) -> rows (r, in), whose Gram is the covariance
Risks = dict[str, dict[str, list[float]]]  # by regime and method, one number for each seed


@dataclasses.dataclass(frozen=True)
class Regime:
    """How the experts of one setting are trained.

    Attributes:
        optimiser: "gd" and "sgd" are one rule.
        rate, steps: the constant learning rate and the number of steps.
        batch: fresh examples in each step; 0 is all that there could be.
        rank: of the shift `E_t`.
        noise: standard deviation of the targets' noise; an output `E_t x` has one of about 1.
    """

    optimiser: Literal["gd", "sgd", "adam"]
    rate: float
    steps: int
    batch: int = 0
    rank: int = OUTPUTS
    noise: float = 0.0


class Bed(NamedTuple):
    """One draw of a regime: `deltas` and `shifts (T, out, in)`, `sigmas (T, in, in)`."""

    deltas: jax.Array
    sigmas: jax.Array
    shifts: jax.Array


def regimes() -> dict[str, Regime]:
    """The nine settings, by name: deltas from `D ~ E Sigma` (few steps) to `D ~ E` (converged), and in the noise."""
    return {
        "GD, few steps, full rank": Regime("gd", 0.01, 24),
        "GD, many steps, full rank": Regime("gd", 0.02, 1000),
        "GD, few steps, rank 4": Regime("gd", 0.01, 16, rank=4),
        "SGD, batch 4, noisy, full rank": Regime("sgd", 0.01, 400, batch=4, noise=0.3),
        "SGD, batch 32, converged, rank 4": Regime("sgd", 0.05, 500, batch=32, rank=4, noise=0.5),
        "SGD, batch 1, very noisy, rank 4": Regime("sgd", 0.002, 400, batch=1, rank=4, noise=6.0),
        "Adam, batch 32, short, full rank": Regime("adam", 0.003, 40, batch=32, noise=0.1),
        "Adam, batch 32, converged, rank 4": Regime("adam", 0.01, 1000, batch=32, rank=4, noise=0.5),
        "Adam, batch 4, noisy, rank 4": Regime("adam", 0.005, 50, batch=4, rank=4, noise=1.2),
    }


def make(regime: Regime, seed: int) -> Bed:
    """Draws the tasks and trains one expert on each."""
    return Bed(*jax.tree.map(lambda array: array[0], tuple(beds(regime, (seed,)))))


def beds(regime: Regime, seeds: Sequence[int] = SEEDS) -> Bed:
    """The same for several seeds at once: every array has an axis of seeds in front."""
    keys = jnp.stack([jax.random.split(jax.random.key(seed), TASKS) for seed in seeds])
    roots, shifts = _draw(keys, regime.rank)
    training = (regime.optimiser == "adam", regime.batch)
    deltas = _train(*training, keys, roots, shifts, regime.rate, regime.steps, regime.noise)
    return Bed(deltas, linalg.matmul(roots, roots.mT), shifts)


def over_tasks(function: Callable[..., Any]) -> Callable[..., Any]:
    """For arrays `(seeds, tasks, ...)`."""
    return jax.vmap(jax.vmap(function))


@jax.jit
def _draw(keys: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """`Sigma^(1/2)` and the shift of every task, `(seeds, tasks, ...)`."""

    def one(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        of_root, of_shift, _ = jax.random.split(key, 3)
        return draw_root(of_root), draw_shift(of_shift, rank)

    return over_tasks(one)(keys)


def draw_root(key: jax.Array) -> jax.Array:
    """`Sigma^(1/2) (in, in)`: a random eigenbasis, eigenvalues `i^-1` scaled to mean 1."""
    values = 1 / jnp.arange(1, INPUTS + 1)
    basis = jax.random.orthogonal(key, INPUTS)
    return linalg.matmul(basis * jnp.sqrt(values / values.mean()), basis.T)


def draw_shift(key: jax.Array, rank: int | jax.Array) -> jax.Array:
    """`E (out, in)` with Gaussian factors of the given rank; its squared norm is the number of outputs."""
    left_key, right_key = jax.random.split(key)
    left = jax.random.normal(left_key, (OUTPUTS, OUTPUTS))
    right = jax.random.normal(right_key, (OUTPUTS, INPUTS))
    low = linalg.matmul(left * (jnp.arange(OUTPUTS) < rank), right)
    shift = jnp.where(rank == OUTPUTS, right, low)
    return shift * jnp.sqrt(OUTPUTS) / jnp.linalg.norm(shift)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _train(
    adam: bool, batch: int, keys: jax.Array, roots: jax.Array, shifts: jax.Array, rate: float, steps: int, noise: float
) -> jax.Array:
    """The deltas of all tasks, `(seeds, tasks, out, in)`."""
    optimiser = optax.adam(rate) if adam else optax.sgd(rate)

    def gradient(weight: jax.Array, root: jax.Array, shift: jax.Array, key: jax.Array) -> jax.Array:
        """Of the mean of `||W x - y||^2 / 2` over the batch, or over all inputs."""
        if batch == 0:
            return linalg.matmul(linalg.matmul(weight - shift, root), root.T)
        of_inputs, of_noise = jax.random.split(key)
        x = linalg.matmul(root, jax.random.normal(of_inputs, (INPUTS, batch)))
        error = linalg.matmul(weight - shift, x) - noise * jax.random.normal(of_noise, (OUTPUTS, batch))
        return linalg.matmul(error, x.T) / batch

    def one(key: jax.Array, root: jax.Array, shift: jax.Array) -> jax.Array:
        _, _, of_data = jax.random.split(key, 3)

        def step(number: jax.Array, state: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
            weight, moments = state
            slope = gradient(weight, root, shift, jax.random.fold_in(of_data, number))
            updates, moments = optimiser.update(slope, moments)
            return weight + updates, moments

        start = jnp.zeros_like(shift)
        return jax.lax.fori_loop(0, steps, step, (start, optimiser.init(start)))[0]

    return over_tasks(one)(keys, roots, shifts)


def excess_risk(x: jax.Array, bed: Bed) -> jax.Array:
    """What the layer `x (out, in)` loses on all tasks, relative to what a layer of zeros loses: 0 is perfect."""

    def loss(errors: jax.Array) -> jax.Array:
        return jnp.sum(linalg.matmul(errors, bed.sigmas) * errors)

    return loss(x - bed.deltas) / loss(bed.deltas)


def merge(bed: Bed, method: Method) -> jax.Array:
    """The layer `(out, in)` that a method makes of the experts; one that measures inputs is given the true moments."""
    moments = {
        "input_gram": list(bed.sigmas),
        "fisher": [jnp.broadcast_to(jnp.diagonal(sigma), bed.deltas.shape[1:]) for sigma in bed.sigmas],
    }
    base = jnp.zeros_like(bed.deltas[0])
    return cfmerge.merge_tensor(base, list(bed.deltas), method, moments=moments.get(method.needs.moments or ""))


def oracle() -> Method:
    """RegMean without shrinkage: with the true covariances, which it is given here, it has the least risk."""
    return cfmerge.methods.regmean(a=1.0)


def methods() -> dict[str, Method]:
    """The oracle, the mean, powers of the Gram without a ridge and with a fifth of one to the mean, published ones."""
    make = cfmerge.methods.make
    published = ("actmat", "ace", "anchored", "aswudi", "tsv_m", "iso_c")
    return {
        "oracle": oracle(),
        "mean": make("average"),
        **{f"p = {p:g}": make("power", {"exponent": p, "ridge": 0.0}) for p in POWERS},
        **{f"p = {p:g}, ridge 20 %": make("power", {"exponent": p, "ridge": 0.25}) for p in POWERS},
        **{name: make(name) for name in published},
    }


def compare(
    methods: Mapping[str, Method], seeds: Sequence[int] = SEEDS, over: Mapping[str, Regime] | None = None
) -> Risks:
    """The excess risk of every method in every regime, for each seed; `over` are the regimes, by default all."""
    over = regimes() if over is None else over
    drawn = [beds(regime, seeds) for regime in over.values()]
    every = Bed(*(jnp.concatenate(arrays) for arrays in zip(*drawn, strict=True)))
    found = {label: risks(every, method).reshape(len(over), len(seeds)) for label, method in methods.items()}
    return {name: {label: risk[row].tolist() for label, risk in found.items()} for row, name in enumerate(over)}


def risks(every: Bed, method: Method) -> np.ndarray:
    """Of one method in many beds, `(beds,)`. Compiled, unless the method looks at the whole model first."""

    def risk(bed: Bed) -> jax.Array:
        return excess_risk(merge(bed, method), bed)

    if method.survey is None:
        return np.asarray(jax.jit(jax.vmap(risk))(every))
    return np.array([risk(Bed(*(array[number] for array in every))) for number in range(len(every.deltas))])


def estimators() -> dict[str, Estimator]:
    """`C^p` of a delta, for the powers of the table."""
    of_power = jax.jit(lambda delta, exponent: covariance.of_power(delta, exponent).rows)
    return {f"p = {p:g}": functools.partial(of_power, exponent=p) for p in POWERS}


def covariances(
    estimators: Mapping[str, Estimator], seeds: Sequence[int] = SEEDS, over: Mapping[str, Regime] | None = None
) -> dict[str, dict[str, dict[str, float]]]:
    """How near each estimate is to the truth: `{regime: {estimator: {measure: mean over tasks and seeds}}}`."""
    results: dict[str, dict[str, dict[str, float]]] = {}
    for name, regime in (regimes() if over is None else over).items():
        drawn = beds(regime, seeds)
        deltas, sigmas = (array.reshape(-1, *array.shape[2:]) for array in (drawn.deltas, drawn.sigmas))
        true = [eigen(np.asarray(sigma)) for sigma in sigmas]
        results[name] = {}
        for label, rows_of in estimators.items():
            found = [measures(eigen_of_rows(rows_of(delta)), own) for delta, own in zip(deltas, true, strict=True)]
            results[name][label] = {key: float(np.mean([one[key] for one in found])) for key in found[0]}
    return results


def table(
    seeds: Sequence[int] = SEEDS, *, others: Mapping[str, Method] | None = None, quick: bool = False
) -> dict[str, Any]:
    """All of it, as plain numbers.

    Args:
        others: compared besides `methods()`.
        quick: three methods only: most of the time goes into compiling them.

    Returns:
        `{"regimes": {regime: {method: {"mean", "standard deviation"}}}, "covariances": see covariances()}`.
    """
    chosen = {name: method for name, method in methods().items() if not quick or name in ("oracle", "mean", "p = 0.5")}
    chosen |= others or {}
    return {
        "regimes": {
            regime: {method: summary(risks) for method, risks in row.items()}
            for regime, row in compare(chosen, seeds).items()
        },
        "covariances": covariances(estimators(), seeds),
    }


def summary(risks: Sequence[float]) -> dict[str, float]:
    """Mean and sample standard deviation over the seeds."""
    deviation = np.std(risks, ddof=1) if len(risks) > 1 else 0.0
    return {"mean": float(np.mean(risks)), "standard deviation": float(deviation)}
