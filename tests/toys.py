"""Toy methods and transforms, one line of mathematics each, known to recipes only while a test needs them."""

import contextlib
from types import SimpleNamespace
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from cfmerge import linalg
from cfmerge.core import registry
from cfmerge.methods import (
    Context,
    Found,
    Measure,
    Method,
    Needs,
    Number,
    PerExpert,
    Survey,
    Transform,
    chain,
    draws,
    register,
)

NO = Context()


@contextlib.contextmanager
def registered(*factories):
    """The factories, registered for as long as the context lasts, by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
        yield SimpleNamespace(**{factory.__name__: register(factory) for factory in factories})


SMALL = {
    "model.layers.0.mlp.up_proj.weight": (8, 6), "model.layers.1.mlp.up_proj.weight": (8, 6), "model.norm.weight": (8,)
}  # fmt: skip


def small(number=0, dtype=np.float32):
    """Tensors of a very small model, of two shapes: the base for 0, experts for 1, 2, ..."""
    common, own = np.random.default_rng(5), np.random.default_rng(2000 + number)
    scale = 0.3 if number else 0.0
    return {
        name: (common.standard_normal(shape) + scale * own.standard_normal(shape)).astype(dtype)
        for name, shape in SMALL.items()
    }


def small_family(make_model, directory, experts=3, dtype=np.float32):
    """The same on disk: `.base`, `.experts` by name, `.tensors` (the base's first), `.trees` (the experts') by name."""
    tensors = [small(number, dtype) for number in range(1 + experts)]
    paths = [make_model(directory / f"m{number}", tensors[number], None) for number in range(1 + experts)]
    names = [path.name for path in paths[1:]]
    return SimpleNamespace(
        base=paths[0], experts=dict(zip(names, paths[1:], strict=True)), tensors=tensors,
        trees=dict(zip(names, tensors[1:], strict=True)),
    )  # fmt: skip


# --- without a survey ---------------------------------------------------------------------------------------------


def times(factor: PerExpert) -> Transform:
    """Each delta times a number of its expert.

    Args:
        factor: the number.
    """
    return Transform("times", lambda delta: jnp.asarray(factor, delta.dtype) * delta)


def deeper(gain: Number = 1.0, depth: float = 0.0) -> Transform:
    """Each delta times `1 + gain depth`."""
    return Transform("deeper", lambda delta: (1 + jnp.asarray(gain * depth, delta.dtype)) * delta)


def rows(factor: Number = 2.0) -> Transform:
    """Row i of each tensor times `factor + i`: it needs whole tensors, as (out, in)."""

    def apply(delta):
        number = jnp.arange(delta.shape[0], dtype=delta.dtype).reshape(-1, *[1] * (delta.ndim - 1))
        return (jnp.asarray(factor, delta.dtype) + number) * delta

    return Transform("rows", apply, needs=Needs("tensor"))


def toward(share: Number = 0.5) -> Transform:
    """Behind a method: the merged delta moved towards the first expert's own."""

    def apply(merged, seen):
        return merged + jnp.asarray(share, merged.dtype) * (seen.deltas[0] - merged)

    return Transform("toward", apply, needs=Needs("entry", seen=True))


def by_chance(p: PerExpert = 0.5, scope: Literal["entry", "tensor"] = "entry") -> Transform:
    """Entries are dropped at random."""

    def apply(delta, context):
        drawn = draws(context, delta)
        return jnp.where(drawn >= jnp.asarray(p, delta.dtype), delta, 0)

    return Transform("by_chance", apply, needs=Needs(scope, random=True))


def middle(scale: Number = 1.0) -> Method:
    """The median of the deltas, times a number: not additive."""
    return Method(
        "middle", lambda base: (), lambda statistic, delta, weight: (*statistic, delta),
        lambda statistic: (scale * jnp.median(jnp.stack(statistic), axis=0), {}),
        needs=Needs("entry", weights="none"), additive=False,
    )  # fmt: skip


class Normal(NamedTuple):
    """`sum_t w_t D_t^T D_t` and `sum_t w_t D_t D_t^T D_t`."""

    gram: object
    cross: object


def squares(ridge: Number = 0.1, scale: Number = 1.0) -> Method:
    """`scale X` with `X (G + ridge I) = C`, by the eigenvectors of G."""

    def init(base):
        n = base.shape[1]
        return Normal(jnp.zeros((n, n), base.dtype), jnp.zeros(base.shape, base.dtype))

    def update(statistic, delta, weight):
        gram = linalg.matmul(delta.T, delta)
        return Normal(statistic.gram + weight * gram, statistic.cross + weight * linalg.matmul(delta, gram))

    def solve(statistic):
        values, vectors = jnp.linalg.eigh(statistic.gram)
        rotated = linalg.matmul(statistic.cross, vectors)
        merged = scale * linalg.matmul(rotated / (values + ridge), vectors.T)
        return merged, {"trace": jnp.trace(statistic.gram), "ridge": jnp.asarray(ridge, statistic.gram.dtype)}

    return Method("squares", init, update, solve, statistic="toy-squares")


# --- with a survey of the whole model -----------------------------------------------------------------------------


def unit(size: PerExpert = 1.0) -> Transform:
    """Each delta over its expert's norm in the whole model, times a size."""

    def look(entries, own):
        total = yield Measure(lambda delta: jnp.sum(delta**2))
        return np.asarray(own) / np.sqrt(np.asarray(total))

    def informed(found: Found) -> Transform:
        def apply(delta, context):
            return jnp.asarray(found.model, delta.dtype)[context.number] * delta

        return Transform("unit", apply)

    return Transform("unit", lambda delta: delta / jnp.sqrt(jnp.sum(delta**2)), survey=Survey(look, informed, own=size))


def above(power: Number = 1.0) -> Transform:
    """In two passes: each delta times the share of entries in the model that exceed its root mean square."""

    def look(entries, own):
        first = yield Measure(lambda delta: {"sum": jnp.sum(delta**2), "size": jnp.asarray(delta.size)})
        mean_square = first["sum"] / first["size"]

        def measure(delta, context):
            return jnp.sum(delta**2 > jnp.asarray(mean_square, delta.dtype)[context.number])

        return (yield Measure(measure)) / entries

    def informed(found):
        def apply(delta, context):
            share = jnp.asarray(found.model, delta.dtype)[context.number]
            return share ** jnp.asarray(power, delta.dtype) * delta

        return Transform("above", apply)

    return Transform("above", lambda delta: delta, survey=Survey(look, informed))


def unit_sum(size: Number = 1.0) -> Method:
    """The weighted sum of the deltas, over its norm in the whole model: the experts are measured jointly."""

    def add(statistic, delta, weight):
        return statistic + weight * delta

    def measure(seen):
        return jnp.sum(jnp.tensordot(seen.weights, seen.deltas, 1) ** 2)

    def look(entries, own):
        return {"norm": np.sqrt(np.asarray((yield Measure(measure, joint=True))))}

    def informed(found):
        def solve(statistic):
            return size * statistic / jnp.asarray(found.model["norm"], statistic.dtype), {}

        return Method("unit_sum", jnp.zeros_like, add, solve, needs=Needs("entry"))

    return Method(
        "unit_sum", jnp.zeros_like, add, lambda statistic: (size * statistic / jnp.sqrt(jnp.sum(statistic**2)), {}),
        needs=Needs("entry"), survey=Survey(look, informed),
    )  # fmt: skip


def unit_sum_of(factor: PerExpert) -> Method:
    """A chain under a name of its own, with numbers by expert in front of a joint survey."""
    return chain(times(factor), unit_sum(2.0))


def share(by: Literal["name", "place"] = "name", scope: Literal["entry", "tensor"] = "entry") -> Transform:
    """Each delta times its tensor's share of the expert's squared norm; of every piece or layer, `by="place"`."""

    def look(entries, own):
        measures = yield Measure(lambda delta: jnp.sum(delta**2), by_tensor=True)
        total = sum(measures.values())
        of_name = dict.fromkeys(name for name, _ in measures)
        for name in of_name:
            of_name[name] = sum(value for (other, _), value in measures.items() if other == name)
        found = {place: (of_name[place[0]] if by == "name" else value) / total for place, value in measures.items()}
        return Found(None, found)

    def informed(found):
        def apply(delta, context):
            return jnp.asarray(found.tensor, delta.dtype)[context.number] * delta

        return Transform("share", apply, needs=Needs(scope))

    return Transform("share", lambda delta: delta, needs=Needs(scope), survey=Survey(look, informed))


def restore() -> Transform:
    """Behind a method: the merged delta of the whole model gets the mean norm of the experts' deltas."""
    needs = Needs("entry", seen=True)

    def measure(merged, seen):
        axes = tuple(range(1, seen.deltas.ndim))
        return jnp.sum(merged**2), jnp.sum(seen.deltas**2, axis=axes)

    def look(entries, own):
        merged, experts = yield Measure(measure, joint=True)
        return np.mean(np.sqrt(np.asarray(experts))) / np.sqrt(np.asarray(merged))

    def informed(found):
        return Transform("restore", lambda merged, seen: jnp.asarray(found.model, merged.dtype) * merged, needs=needs)

    return Transform("restore", lambda merged, seen: merged, needs=needs, survey=Survey(look, informed))
