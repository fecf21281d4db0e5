"""Adapters of a small model as the loop reads them, beside full models of the same deltas."""

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np

from cfmerge import methods
from cfmerge.engine import run
from cfmerge.models import classify
from cfmerge.models.deltas import Dense, Factors
from cfmerge.planning.assign import assign
from cfmerge.planning.jobs import with_ranks
from cfmerge.products.leaves import Kept
from cfmerge.products.trees import work_of

SHAPES = {
    "layers.0.up.weight": (40, 24), "layers.1.up.weight": (40, 24), "layers.2.up.weight": (40, 24),
    "layers.0.down.kernel": (24, 40), "conv.weight": (20, 6, 3, 3), "norm.weight": (24,), "other.weight": (40, 24),
}  # fmt: skip
RANKS = {"layers.2.up.weight": 1, "norm.weight": None, "other.weight": None}  # of the first adapter; all else 3


def tensors(seed: int, dtype: Any = np.float64) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in SHAPES.items()}


@dataclasses.dataclass
class Adapter:
    """Factors of the matrices, and tensors of its own for the rest."""

    seed: int
    ranks: dict[str, int | None] = dataclasses.field(default_factory=lambda: RANKS)
    read: list[str] = dataclasses.field(default_factory=list)
    broken: str = ""

    def rank(self, name: str) -> int | None:
        return self.ranks.get(name, 3)

    def delta(self, name: str, first: int = 0, count: int | None = None) -> Any:
        self.read.append(name)
        rng, rank = np.random.default_rng(self.seed), self.rank(name)
        if rank is None:
            own = tensors(self.seed)[name]
            return Dense(own if count is None else own.reshape(-1)[first : first + count])
        rows, columns = SHAPES[name][0], int(np.prod(SHAPES[name][1:]))
        left = rng.standard_normal((rows, rank))
        if name == self.broken:
            left[2, 0] = np.nan
        return Factors(left, rng.standard_normal((rank, columns)), first, count)

    def tensor(self, name: str, base: np.ndarray) -> np.ndarray:
        delta = self.delta(name)
        return base + delta.product.reshape(base.shape) if isinstance(delta, Factors) else delta.tensor


def works(method, adapters, dtype="float64", weights=None):
    """`(dense, joint)`: the work of the tensors that the adapters make, and of the adapters themselves."""
    base = tensors(0, np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else dtype)
    experts = [{name: adapter.tensor(name, base[name]) for name in base} for adapter in adapters]
    parameters = classify({name: (shape, dtype) for name, shape in SHAPES.items()})
    names = [f"e{n}" for n in range(len(adapters))]
    each = [methods.make(one) for one in (method if isinstance(method, list) else [method])]
    dense = work_of([assign(parameters, one) for one in each], [base, *experts], names, weights, [], 0)
    own = tuple(dataclasses.replace(o, tensors=a) for o, a in zip(dense.experts, adapters, strict=True))
    jobs = tuple(with_ranks(dense.jobs, own))
    return dense, dataclasses.replace(dense, experts=own, jobs=jobs)


def merged(work, results=1, **options):
    kept = [Kept() for _ in range(results)]
    account = run.merge(work, kept, **options)
    base = {name: work.base.tensors.read(name) for name in SHAPES}
    return [{name: np.asarray(own) for name, own in one.arrays(base).items()} for one in kept], account


ADAPTERS = [Adapter(1), Adapter(2, {**RANKS, "layers.0.up.weight": 2}), Adapter(3, {**RANKS, "conv.weight": 0})]
