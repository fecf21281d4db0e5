r"""C2M3: several models mapped into one universe, so that their permutations agree round every cycle.

Donato Crisostomi, Marco Fumero, Daniele Baieri, Florian Bernard, Emanuele Rodola, "C2M3: Cycle-Consistent Multi-Model
Merging", NeurIPS 2024, https://arxiv.org/abs/2405.17897. Every model m has permutations P_m of its own into the
universe, and models a and b correspond by way of it, P_ab = P_a^-1 P_b. With X_m = P_m W_m,

    maximise    f = sum over a < b  <X_a, X_b>  =  1/2 ( |S|^2 - sum_m |X_m|^2 ),       S = sum_m X_m

over doubly stochastic P, by Frank and Wolfe's method (a step for all models and spaces at once):

    G = df/dP   of model m and space s:   sum over (tensor, axis) of s   (S - X_m)_(axis) (W_m, others mapped)_(axis)^T
    Q = argmax over permutations  <G, Q>                                       (linear assignments)
    P <- (1 - t) P + t Q,       t = argmax over [0, 1]  f

Along a step X_m is a polynomial in t, of the degree D of spaces on one tensor; f is one of degree 2 D, which is known
from X_m at D + 1 points, and maximised exactly. At the end P is rounded to the nearest permutations. The objective
never falls along the way; where rounding would take it below that of the start, the start is returned.
"""

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.polynomial import Polynomial

from cfmerge.align.assignment import assign_space
from cfmerge.align.gains import Tensors, Term, check_model, check_named, inner, product, read, terms_of
from cfmerge.align.permuting import Permutations, compose, identity, inverse, started
from cfmerge.align.soft import Maps, hard, mapped
from cfmerge.align.trees import flat
from cfmerge.align.weight_matching import search as match_weights
from cfmerge.errors import CfmergeError
from cfmerge.models.spaces import Spaces

SMALLEST = 1e-7  # rise of the objective, relative to it, that ends the search


class Universe(NamedTuple):
    """Models in one universe.

    >>> spaces = cfmerge.align.parse_spaces({"up": "h, in -", "down": "-, in h"}, {"up": (2, 2), "down": (1, 2)})
    >>> a = {"up": np.eye(2), "down": np.array([[1.0, 2.0]])}
    >>> b = cfmerge.align.permute(spaces, a, {"h": np.array([1, 0])})
    >>> found = cfmerge.align.universe(spaces, {"a": a, "b": b})
    >>> found.before, found.objective
    (4.0, 7.0)

    Attributes:
        permutations: `{model: {space: permutation}}` into the universe: average the models permuted by these.
        objective: sum over pairs of models of the inner product of their permuted weights.
        before: the same of the models as they are.
        history: the objective of the soft permutations at the start, and after each step.
    """

    permutations: dict[str, dict[str, np.ndarray]]
    objective: float
    before: float
    history: tuple[float, ...]


def universe(
    spaces: Spaces,
    models: Mapping[str, Tensors],
    *,
    seed: int = 0,
    steps: int = 100,
    start: Mapping[str, Permutations] | None = None,
) -> Universe:
    """The permutations of several models into a universe that all of them share: C2M3.

    The maps take memory: for each model and space of n elements an array `(n, n)`.

    Args:
        spaces: of all models.
        models: `{name: {tensor: array}}`, two or more, or trees of arrays. A mapping may read a tensor when it is
            asked for.
        seed: of the weight matching that makes the start.
        steps: of Frank and Wolfe, at most.
        start: permutations of each model to start from; by default each is matched to the first model.

    Raises:
        CfmergeError: fewer than two models; models that do not fit the spaces; a NaN or an infinity.

    Example:
        >>> table = {"up": "h, in -", "down": "-, in h"}
        >>> a = {"up": np.eye(3), "down": np.array([[1.0, 2.0, 3.0]])}
        >>> spaces = cfmerge.align.parse_spaces(table, {name: array.shape for name, array in a.items()})
        >>> b, c = (cfmerge.align.permute(spaces, a, {"h": np.array(p)}) for p in ([2, 0, 1], [0, 2, 1]))
        >>> found = cfmerge.align.universe(spaces, {"a": a, "b": b, "c": c})
        >>> [cfmerge.align.permute(spaces, m, found.permutations[n])["down"].tolist() for n, m in zip("abc", (a, b, c))]
        [[[1.0, 2.0, 3.0]], [[1.0, 2.0, 3.0]], [[1.0, 2.0, 3.0]]]
    """
    check_named(models)
    if len(models) < 2:
        raise CfmergeError(f"universe: takes two or more models, found {len(models)}")
    models = {name: flat(spaces, model)[0] for name, model in models.items()}
    for name, model in models.items():
        check_model(spaces, model, name)
    first, *others = models
    begin = started(spaces, models, start)
    for name in others if start is None else ():
        begin[name] = match_weights(spaces, models[first], models[name], seed=seed).permutations
    with jax.enable_x64(True):
        search = Search(spaces, models)
        found, history = search.run(begin, steps)
        before, at_start, objective = (
            search.objective({name: search.hard(p[name]) for name in models})
            for p in (dict.fromkeys(models, identity(spaces)), begin, found)
        )
    if objective < at_start:
        found, objective = begin, at_start
    return Universe(found, objective, before, history)


def between(spaces: Spaces, one: Permutations, other: Permutations) -> dict[str, np.ndarray]:
    """The permutations that bring one model into the order of another, by way of the universe.

    Args:
        spaces: of both models.
        one: permutations into the universe of the model that is permuted.
        other: those of the model whose order it takes.

    Example:
        >>> spaces = cfmerge.align.parse_spaces({"up": "h, in -", "down": "-, in h"}, {"up": (3, 2), "down": (2, 3)})
        >>> cfmerge.align.between(spaces, {"h": np.array([2, 0, 1])}, {"h": np.array([0, 2, 1])})
        {'h': array([2, 1, 0])}
    """
    return compose(spaces, one, inverse(spaces, other))


class Search:
    """The objective of maps of each model into the universe, its gradient, and its course along a step."""

    def __init__(self, spaces: Spaces, models: Mapping[str, Tensors]):
        self.spaces, self.models = spaces, models
        self.terms: dict[str, list[tuple[str, Term]]] = {name: [] for name in spaces.axes}
        for space in spaces.names:
            for term in terms_of(spaces, space):
                self.terms[term.tensor].append((space, term))
        self.keys: dict[str, set[tuple[str, ...]]] = {space: {()} for space in spaces.names}
        for terms in self.terms.values():
            for space, term in terms:
                self.keys[space].add(term.names[1:])
        self.degree = max(len({(term.axis, space) for space, term in terms}) for terms in self.terms.values())
        stored = {np.dtype(model[name].dtype) for model in models.values() for name in spaces.axes}
        self.dtype = np.float64 if np.dtype(np.float64) in stored else np.float32

    def run(
        self, begin: Mapping[str, Permutations], steps: int
    ) -> tuple[dict[str, dict[str, np.ndarray]], tuple[float, ...]]:
        """The rounded permutations of each model after Frank and Wolfe's steps, and the objective after each."""
        corners = {name: dict(permutations) for name, permutations in begin.items()}
        maps: Mapping[str, Mapping[str, Maps]] = {
            name: self.hard(permutations) for name, permutations in corners.items()
        }
        history = [self.objective(maps)]
        for _ in range(steps):
            corners = {name: self.best(grads, corners[name]) for name, grads in self.gradients(maps).items()}
            ahead = {name: self.hard(permutations) for name, permutations in corners.items()}
            course = self.along(maps, ahead)
            t = highest(course)
            if course(t) - course(0) <= SMALLEST * abs(course(0)):
                break
            maps = blended(maps, ahead, t)
            history.append(float(course(t)))
        return {name: self.best(own, corners[name]) for name, own in maps.items()}, tuple(history)

    def hard(self, permutations: Permutations) -> dict[str, Maps]:
        """The maps that are permutations."""
        return {space: {key: hard(key, space, permutations, self.dtype) for key in keys}
                for space, keys in self.keys.items()}  # fmt: skip

    def best(self, gains: Mapping[str, Maps], current: Permutations) -> dict[str, np.ndarray]:
        """The permutations that gain most in each space."""
        found: dict[str, np.ndarray] = {}
        for space, own in gains.items():
            found |= assign_space(space, {key: np.asarray(gain) for key, gain in own.items()}, current)
        return found

    def weights(self, name: str) -> list[Any]:
        """One tensor of every model."""
        stored = [read(self.spaces, name, model, who) for who, model in self.models.items()]
        return [tensor.astype(self.dtype) for tensor in stored if tensor is not None]

    def objective(self, maps: Mapping[str, Mapping[str, Maps]]) -> float:
        """`sum over a < b <X_a, X_b>`."""
        return float(self.along(maps, maps, points=[0.0])(0.0))

    def gradients(self, maps: Mapping[str, Mapping[str, Maps]]) -> dict[str, dict[str, dict[tuple[str, ...], Any]]]:
        """`df/dP` of each model and space."""
        sums = {name: {space: {key: np.zeros_like(m) for key, m in own.items()} for space, own in each.items()}
                for name, each in maps.items()}  # fmt: skip
        for tensor, terms in self.terms.items():
            if terms:
                axes, weights = self.spaces.axes[tensor], self.weights(tensor)
                there = [mapped(axes, w, maps[name]) for name, w in zip(maps, weights, strict=True)]
                total = sum(there)
                for name, w, x in zip(maps, weights, there, strict=True):
                    for space, term in terms:
                        rest = mapped(axes, w, maps[name], but=(term.axis, space))
                        kept = {"axis": term.axis, "start": term.start, "sizes": term.sizes, "keep": term.keep}
                        sums[name][space][term.names[1:]] += product(total - x, rest, **kept)
        return sums

    def along(
        self, maps: Mapping[str, Mapping[str, Maps]], ahead: Mapping[str, Mapping[str, Maps]], points: Any = None
    ) -> Polynomial:
        """The objective of `(1 - t) maps + t ahead`, a polynomial in t."""
        points = np.linspace(0, 1, self.degree + 1) if points is None else points
        ways, products = [blended(maps, ahead, t) for t in points], np.zeros((len(points), len(points)))
        for tensor, axes in self.spaces.axes.items():
            if weights := self.weights(tensor):
                products += _agreement([[mapped(axes, w, way[name]) for name, w in zip(maps, weights, strict=True)]
                                        for way in ways])  # fmt: skip
        polynomials = lagrange(points)
        pairs = itertools.product(range(len(points)), repeat=2)
        return sum((products[k, l] * polynomials[k] * polynomials[l] for k, l in pairs), Polynomial([0.0]))


def _agreement(there: list[list[Any]]) -> np.ndarray:
    """`sum over a != b <X_a, X'_b> / 2` of one tensor, of all models at every two points of a step."""

    def pair(one: list[Any], other: list[Any]) -> float:
        own = sum(float(inner(x, y)) for x, y in zip(one, other, strict=True))
        return (float(inner(sum(one), sum(other))) - own) / 2

    return np.array([[pair(one, other) for other in there] for one in there])


def blended(
    maps: Mapping[str, Mapping[str, Maps]], ahead: Mapping[str, Mapping[str, Maps]], t: float
) -> dict[str, dict[str, dict[tuple[str, ...], Any]]]:
    """`(1 - t) maps + t ahead`."""
    return jax.tree.map(lambda one, other: ((1 - t) * one + t * other).astype(one.dtype), maps, ahead)


def lagrange(points: Any) -> list[Polynomial]:
    """The polynomials that are 1 at one of the points and 0 at the others."""

    def one(k: int) -> Polynomial:
        others = [point for number, point in enumerate(points) if number != k]
        through = Polynomial.fromroots(others) if others else Polynomial([1.0])
        return through / through(points[k])

    return [one(k) for k in range(len(points))]


def highest(course: Polynomial) -> float:
    """Where in [0, 1] a polynomial is highest."""
    turns = course.deriv().roots() if course.degree() > 1 else np.zeros(0)
    inside = [float(t.real) for t in np.atleast_1d(turns) if abs(t.imag) < 1e-9 and 0 < t.real < 1]
    return max([0.0, 1.0, *inside], key=course)
