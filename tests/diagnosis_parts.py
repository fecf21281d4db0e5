"""Models made of arrays, diagnosed without files: all matrices have one shape, so that they compile once."""

import functools
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from cfmerge.core.part import Seen
from cfmerge.diagnosis import Finding, Measured
from cfmerge.diagnosis.collecting import collected
from cfmerge.diagnosis.findings import findings_of
from cfmerge.diagnosis.measuring import entry_sums, matrix_numbers
from cfmerge.models import classify

OUT, IN, LAYERS = 32, 24, 4
MATRICES = [f"layers.{layer}.mlp.weight" for layer in range(LAYERS)]
BIASES = [f"layers.{layer}.mlp.bias" for layer in range(LAYERS)]
Tensors = dict[str, np.ndarray]
_of_matrix, _of_other = jax.jit(matrix_numbers), jax.jit(entry_sums)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@functools.cache
def base() -> Mapping[str, np.ndarray]:
    """A base with a spectrum that decays, as trained ones have, and zero biases."""
    decay = np.linspace(3, 0.3, IN, dtype=np.float32)
    turned = {name: np.linalg.qr(normal(90 + n, IN, IN))[0] for n, name in enumerate(MATRICES)}
    weights = {name: normal(n, OUT, IN) * decay @ turned[name].astype(np.float32) for n, name in enumerate(MATRICES)}
    return weights | {name: normal(50 + n, OUT) for n, name in enumerate(BIASES)}


def unrelated(seed: int, length: float = 0.1) -> Tensors:
    """The deltas of an expert: random, of so much of the base's length in every tensor."""
    raw = {name: normal(1000 * (seed + 1) + n, *array.shape) for n, (name, array) in enumerate(base().items())}
    return {
        name: delta * (length * np.linalg.norm(base()[name]) / np.linalg.norm(delta)) for name, delta in raw.items()
    }


def matrices(make) -> Tensors:
    """Deltas `make(number of the layer, name)` of the matrices, and none of the biases."""
    made = {name: np.asarray(make(n, name), np.float32) for n, name in enumerate(MATRICES)}
    return made | {name: np.zeros(OUT, np.float32) for name in BIASES}


def numbers(deltas: Sequence[Tensors], of: Mapping[str, np.ndarray] | None = None) -> dict[str, Measured]:
    """The numbers of every tensor, given the experts' deltas."""
    there = base() if of is None else of
    parameters = classify({name: (array.shape, "float32") for name, array in there.items()})
    found = {}
    for name, array in there.items():
        each = np.stack([own[name] for own in deltas])
        seen = Seen(array, each, np.ones(len(deltas), np.float32))
        measured = jax.tree.map(np.asarray, (_of_matrix if parameters[name].layout else _of_other)(seen))
        found[name] = collected(parameters[name], measured)
    return found


def found(deltas: Sequence[Tensors], of: Mapping[str, np.ndarray] | None = None) -> dict[str, Finding]:
    """`{kind: the first finding of it}` about experts called a, b, c, .., of `base()` or another."""
    names = [chr(ord("a") + t) for t in range(len(deltas))]
    kinds: dict[str, Finding] = {}
    for one in findings_of(names, numbers(deltas, of)):
        kinds.setdefault(one.kind, one)
    return kinds
