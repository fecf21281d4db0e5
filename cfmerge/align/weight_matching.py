r"""Weight matching: two models' neurons matched by their weights alone.

Samuel K. Ainsworth, Jonathan Hayase, Siddhartha Srinivasa, "Git Re-Basin: Merging Models modulo Permutation
Symmetries", ICLR 2023, https://arxiv.org/abs/2209.04836, algorithm 1. It finds the permutations P of the spaces that
bring model b near model a:

    maximise    sum over tensors  <W^A, P W^B>          which is to minimise   sum |W^A - P W^B|^2

by one space at a time, the others held (`gains`, `assignment`), spaces in random order, until none gains:

    A = sum over (tensor, axis) of the space   W^A_(axis) (W^B_(axis), other axes permuted)^T
    P[space] = argmax_P <A, P>

A space is solved again only after one that shares a tensor with it has changed. A space on two axes of one tensor makes
the sum quadratic in P; then A is its gradient, and P is kept where the sum does not rise. So the objective never falls.

The search starts from permutations that are found in order of knowledge, not from the identity as the authors' does:
first the space most of whose weights touch no other space (a first layer reads inputs that do not permute), then the
one most of whose weights touch none that is unknown, and so on, by these weights alone. From there a permuted copy of
a model is found exactly, however deep it is.
"""

from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from typing import NamedTuple

import jax
import numpy as np

from cfmerge.align.assignment import Gains, assign_space, difference
from cfmerge.align.gains import Tensors, Term, check_model, gain_of, objective, pair_of, terms_of
from cfmerge.align.permuting import Permutations, check_permutations, identity, random_permutations
from cfmerge.align.trees import flat
from cfmerge.core.random import check_seed
from cfmerge.models.spaces import Spaces

TINY = 1e7  # products of a sweep; such a model is searched RESTARTS times more
RESTARTS = 20


class Matching(NamedTuple):
    """How model b is permuted to match model a.

    >>> spaces = cfmerge.align.parse_spaces({"up": "h, in -", "down": "-, in h"}, {"up": (2, 2), "down": (1, 2)})
    >>> a = {"up": np.eye(2), "down": np.array([[1.0, 2.0]])}
    >>> b = cfmerge.align.permute(spaces, a, {"h": np.array([1, 0])})
    >>> found = cfmerge.align.weight_matching(spaces, a, b)
    >>> found.before, found.objective, found.history[-1]
    (4.0, 7.0, 7.0)

    Attributes:
        permutations: `{space: permutation}` for `permute(spaces, b, permutations)`.
        objective: `sum of <W^A, permuted W^B>` over all tensors.
        before: the same of b as it is.
        history: the objective where the search started, and after each sweep over the spaces.
        sweeps: how many there were.
    """

    permutations: dict[str, np.ndarray]
    objective: float
    before: float
    history: tuple[float, ...]
    sweeps: int


def weight_matching(
    spaces: Spaces,
    a: Tensors,
    b: Tensors,
    *,
    seed: int = 0,
    sweeps: int = 100,
    start: Permutations | None = None,
    hold: Permutations | None = None,
    restarts: int | None = None,
) -> Matching:
    """The permutations of model b that bring its weights near those of model a: Git Re-Basin's weight matching.

    Args:
        spaces: of both models.
        a: `{name: array}` or a tree of arrays, which stays as it is.
        b: the same, of the same shapes. Both may read a tensor when it is asked for.
        seed: of the order of the spaces in each sweep.
        sweeps: over all spaces, at most.
        start: permutations to start from; by default they are found in order of knowledge (see the module).
        hold: permutations of spaces that are known, by activations say, and stay as they are.
        restarts: further searches, from the identity and from random permutations; the best of all is returned. By
            default 20 for a tiny model, which has many optima, and none for others or where there is a start.

    Raises:
        CfmergeError: another set of tensors, other shapes, a NaN or an infinity, integers or complex numbers.

    Example:
        >>> table = {"up": "h, in -", "bias": "h", "down": "-, in h"}
        >>> a = {"up": np.eye(3), "bias": np.array([1.0, 2.0, 3.0]), "down": np.ones((2, 3))}
        >>> spaces = cfmerge.align.parse_spaces(table, {name: array.shape for name, array in a.items()})
        >>> b = cfmerge.align.permute(spaces, a, {"h": np.array([2, 0, 1])})
        >>> matching = cfmerge.align.weight_matching(spaces, a, b)
        >>> matching.permutations["h"], matching.before, matching.objective
        (array([1, 2, 0]), 17.0, 23.0)
    """
    a, b = (flat(spaces, model)[0] for model in (a, b))
    check_seed(seed)
    for given in (start, hold):
        check_permutations(spaces, given or {})
    for tensors, who in ((a, "a"), (b, "b")):
        check_model(spaces, tensors, who)
    return search(spaces, a, b, seed=seed, sweeps=sweeps, start=start, hold=hold, restarts=restarts)


def search(
    spaces: Spaces, a: Tensors, b: Tensors, *, seed: int, sweeps: int = 100, start: Permutations | None = None,
    hold: Permutations | None = None, restarts: int | None = None,
) -> Matching:  # fmt: skip
    """`weight_matching` of models that have been checked."""
    with jax.enable_x64(True):  # float64 stays so
        descent, generator = _Descent(spaces, a, b, hold or {}), np.random.default_rng(seed)
        before = objective(spaces, a, b, {})
        tries = [descent.run(*one, generator, sweeps) for one in _starts(descent, start, restarts, seed)]
        best = max(tries, key=lambda found: found.objective)
        if best.objective < before:  # b lies near a already
            best = descent.run({**identity(spaces), **descent.held}, descent.free, generator, sweeps)
    return best._replace(before=before)


def _starts(
    descent: "_Descent", start: Permutations | None, restarts: int | None, seed: int
) -> Iterator[tuple[Permutations, Iterable[str]]]:
    """Permutations to start from, and the spaces that are not the best for these."""
    if restarts is None:
        restarts = RESTARTS if start is None and descent.work <= TINY else 0
    plain = identity(descent.spaces)
    yield descent.first() if start is None else ({**plain, **start, **descent.held}, descent.free)
    for number in range(restarts):
        drawn = random_permutations(descent.spaces, seed + number) if number else plain
        yield {**drawn, **descent.held}, descent.free


class _Descent:
    """Coordinate descent over the spaces of two models."""

    def __init__(self, spaces: Spaces, a: Tensors, b: Tensors, held: Permutations):
        self.spaces, self.a, self.b, self.held = spaces, a, b, held
        self.free = [space for space in spaces.names if space not in held]
        self.terms = {space: terms_of(spaces, space) for space in spaces.names}
        self.work = sum(term.features * term.size**2 for terms in self.terms.values() for term in terms)
        self.kept = {space: self.constant(space) for space in spaces.names}

    def first(self) -> tuple[dict[str, np.ndarray], set[str]]:
        """Permutations found in order of knowledge, and the spaces that were found before all about them was known."""
        permutations, known, early = {**identity(self.spaces), **self.held}, set(self.held), set[str]()
        while left := [space for space in self.spaces.names if space not in known]:
            told = {s: sum(term.features for term in self.terms[s] if term.others <= known) for s in left}
            space = max(left, key=told.__getitem__)
            if told[space]:
                gains = self.gains(space, permutations, known)
                permutations |= assign_space(space, gains, permutations)
            if any(not term.others <= known for term in self.terms[space]):
                early.add(space)
            known.add(space)
        return permutations, early

    def run(self, start: Permutations, dirty: Iterable[str], generator: np.random.Generator, sweeps: int) -> Matching:
        """The permutations after sweeps over the spaces until none gains; at first over the dirty ones."""
        permutations, dirty, gains = dict(start), set(dirty), list[float]()
        while dirty and len(gains) < sweeps:
            gains.append(0.0)
            for space in generator.permutation(self.free):
                if space in dirty:
                    dirty.remove(space)
                    gains[-1] += (gain := self.improve(space, permutations))
                    dirty |= set().union(*(term.others for term in self.terms[space])) if gain else set()
            dirty -= set(self.held)
        found = objective(self.spaces, self.a, self.b, permutations)
        history = found - np.cumsum([0.0, *reversed(gains)])[::-1]
        return Matching(permutations, found, float(history[0]), tuple(history.tolist()), len(gains))

    def improve(self, space: str, permutations: dict[str, np.ndarray]) -> float:
        """Solves one space with the others held; the gain, 0 where the permutations stay."""
        gains = self.gains(space, permutations)
        found = {**permutations, **assign_space(space, gains, permutations)}
        gain, noise = difference(gains, space, permutations, found)
        if any(space in term.others for term in self.terms[space]):
            names = {term.tensor for term in self.terms[space]}
            old, new = (objective(self.spaces, self.a, self.b, p, names) for p in (permutations, found))
            gain, noise = new - old, float(np.finfo(np.float32).eps) * abs(old)
        if gain <= noise:
            return 0.0
        permutations |= found
        return gain

    def gains(self, space: str, permutations: Permutations, known: AbstractSet[str] | None = None) -> Gains:
        """The gains of a space by its weights, or by those that touch known spaces alone."""
        sums = dict(self.kept.get(space, {}))
        for term in self.terms[space]:
            if not _is_kept(term) and (known is None or term.others <= known):
                _add(sums, term, self.term(term, permutations))
        return {key: np.asarray(gain) for key, gain in sums.items()}

    def constant(self, space: str) -> dict[tuple[str, ...], jax.Array]:
        """The part of the gains that no other space changes, such as an embedding's."""
        sums: dict[tuple[str, ...], jax.Array] = {}
        for term in filter(_is_kept, self.terms[space]):
            _add(sums, term, self.term(term, {}))
        return sums

    def term(self, term: Term, permutations: Permutations) -> jax.Array:
        pair = pair_of(self.spaces, term.tensor, self.a, self.b)
        assert pair is not None
        return gain_of(self.spaces, term, *pair, permutations)


def _is_kept(term: Term) -> bool:
    """Whether its gain never changes, and takes no more memory than its tensor."""
    return not term.others and term.features >= term.size


def _add(sums: dict[tuple[str, ...], jax.Array], term: Term, gain: jax.Array) -> None:
    sums[term.names[1:]] = sums[term.names[1:]] + gain if term.names[1:] in sums else gain
