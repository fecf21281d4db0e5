"""Experts whose deltas come as factors: merged as their products would be, without an expert's tensor."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from cfmerge import methods
from cfmerge.engine import run
from cfmerge.models import classify
from cfmerge.models.deltas import Dense, Factors
from cfmerge.planning.assign import assign
from cfmerge.products.leaves import Kept
from cfmerge.products.trees import work_of

SHAPES = {"up.weight": (10, 6), "down.weight": (6, 10), "norm.weight": (6,)}


def tensors(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}


@dataclasses.dataclass
class Adapter:
    """Factors of the matrices, and a tensor of its own for the rest."""

    seed: int

    def delta(self, name: str, first: int = 0, count: int | None = None) -> Any:
        rng = np.random.default_rng(self.seed)
        if len(SHAPES[name]) == 1:
            return Dense(tensors(self.seed)[name])
        rows, columns = SHAPES[name]
        return Factors(rng.standard_normal((rows, 2)), rng.standard_normal((2, columns)), first, count)

    def tensor(self, name: str, base: np.ndarray) -> np.ndarray:
        delta = self.delta(name)
        return base + delta.product if isinstance(delta, Factors) else delta.tensor


@pytest.mark.parametrize("method", ["ace", "average", "ties", "tsv_m"])
def test_factors_are_merged_as_their_products(method):
    base, adapters = tensors(0), [Adapter(1), Adapter(2)]
    experts = [{name: adapter.tensor(name, base[name]) for name in base} for adapter in adapters]
    parameters = classify({name: (shape, "float64") for name, shape in SHAPES.items()})
    assignments = [assign(parameters, methods.make(method))]
    dense = work_of(assignments, [base, *experts], ["a", "b"], None, [], 0)
    taking_part = [
        dataclasses.replace(one, tensors=adapter) for one, adapter in zip(dense.experts, adapters, strict=True)
    ]
    merged = []
    for work in (dense, dataclasses.replace(dense, experts=tuple(taking_part))):
        kept = Kept()
        run.merge(work, [kept])
        merged.append(kept.arrays(base))
    for name, tensor in merged[0].items():
        np.testing.assert_allclose(merged[1][name], tensor, rtol=0, atol=1e-9)


def test_a_piece_of_a_product_is_that_of_the_whole():
    factors = Adapter(1).delta("up.weight")
    whole = factors.product.reshape(-1)
    for first, count in ((0, 60), (7, 20), (11, 1), (54, 6)):
        piece = dataclasses.replace(factors, first=first, count=count)
        np.testing.assert_allclose(piece.product, whole[first : first + count])
