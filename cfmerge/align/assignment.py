r"""Linear assignment: the permutation of a space, and of its children, that gains most.

A space of n elements has a gain matrix `A`, `A[k, l]` what it gains when element l of the model comes to place k:

    sigma = argmax_sigma  sum_k A[k, sigma(k)]                                          (Jonker and Volgenant, by scipy)

Children permute within the elements. Their gain is an array for each combination of children on one axis,
`A[k, l, i, j]` for one child, where i and j are the child's elements in k and in l. The best children of all pairs
(k, l) are assignments by themselves, and the space is assigned by their totals:

    B[k, l] = max_tau  A[k, l] + sum_i A[k, l, i, tau(i)],        sigma = argmax_sigma  sum_k B[k, sigma(k)]

That is exact for one child, and for several that share no axis. Where two share one, each is assigned with the other
held, by turns.
"""

from collections.abc import Mapping

import numpy as np

from cfmerge.errors import CfmergeError

Gains = Mapping[tuple[str, ...], np.ndarray]
"""`{children on the axis: gains}` of shape (n, n), followed by (m, m) for each child of m elements."""

TURNS = 10  # of children that share an axis: each of them is assigned as often, at most


def assign(gain: np.ndarray) -> np.ndarray:
    """The permutation that maximises `sum_k gain[k, permutation[k]]`.

        >>> assign(np.array([[1.0, 5.0], [2.0, 1.0]]))
        array([1, 0])

    Raises:
        CfmergeError: a gain that is not finite.
    """
    if not np.isfinite(gain).all():
        raise CfmergeError("assignment: a gain is NaN or infinite")
    return assigned(gain)[1]


def assigned(gain: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the entries, no two in one row or column, whose sum is largest; of a wide or tall matrix too.

    >>> assigned(np.array([[1.0, 5.0, 0.0], [2.0, 1.0, 0.0]]))
    (array([0, 1]), array([1, 0]))
    """
    from scipy.optimize import linear_sum_assignment  # a quarter of a second, which a merge without it does not pay

    return linear_sum_assignment(gain, maximize=True)


def assign_space(space: str, gains: Gains, current: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The permutations of a space and of its children that gain most, `{name: permutation}`.

    Args:
        space: its name.
        gains: of shape (n, n) for `()`, (n, n, m, m) for `("heads.v",)`, and so on.
        current: permutations. What is found gains no less than they do, but for rounding.
    """
    children = tuple(dict.fromkeys(child for key in gains for child in key))
    n = next(iter(gains.values())).shape[0]
    total = np.array(gains[()], np.float64) if () in gains else np.zeros((n, n))
    if not children:
        return {space: assign(total)}
    inner = {key: gain for key, gain in gains.items() if key}
    taus = np.empty((n, n), object)
    for k, l in np.ndindex(n, n):
        cells = {key: gain[k, l] for key, gain in inner.items()}
        held = {child: current[child][k] for child in children} if current[space][k] == l else None
        taus[k, l] = _children(children, cells, held)
        total[k, l] += sum(matched(cell, [taus[k, l][child] for child in key]).sum() for key, cell in cells.items())
    sigma = assign(total)
    best = {child: np.stack([taus[k, l][child] for k, l in enumerate(sigma)]) for child in children}
    return {space: sigma, **best}


def matched(cell: np.ndarray, permutations: list[np.ndarray]) -> np.ndarray:
    """The entries `cell[i, p(i), j, q(j), ...]` of an array of shape (m, m, ...): an array (m, ...).

    >>> matched(np.arange(9).reshape(3, 3), [np.array([2, 0, 1])])
    array([2, 3, 7])
    """
    index = []
    for axis, permutation in enumerate(permutations):
        shape = [-1 if axis == other else 1 for other in range(len(permutations))]
        index += [np.arange(len(permutation)).reshape(shape), permutation.reshape(shape)]
    return cell[tuple(index)]


def difference(
    gains: Gains, space: str, old: Mapping[str, np.ndarray], new: Mapping[str, np.ndarray]
) -> tuple[float, float]:
    """How much more the new permutations gain than the old ones, and how much of that may be rounding."""
    gain = noise = 0.0
    for key, values in gains.items():
        before, after = (picked(values, key, space, permutations) for permutations in (old, new))
        gain += float(np.sum(after - before))
        noise += float(np.sum(np.where(after == before, 0, abs(after) + abs(before)))) * np.finfo(values.dtype).eps
    return gain, noise


def picked(gain: np.ndarray, key: tuple[str, ...], space: str, permutations: Mapping[str, np.ndarray]) -> np.ndarray:
    """The entries of one array of gains that permutations pick, of shape (n, m, ...), in float64."""
    chosen = gain[np.arange(len(gain)), permutations[space]]
    if key:
        chosen = np.stack([matched(cell, [permutations[child][k] for child in key]) for k, cell in enumerate(chosen)])
    return chosen.astype(np.float64)


def _children(names: tuple[str, ...], cells: Gains, held: Mapping[str, np.ndarray] | None) -> Mapping[str, np.ndarray]:
    """The best permutations of the children of one pair of elements; no worse than `held`."""
    alone = {name: assign(cells[name,]) if (name,) in cells else np.arange(_size(name, cells)) for name in names}
    if all(len(key) == 1 for key in cells):
        return alone
    tries = [_by_turns(names, cells, start) for start in (alone, held) if start is not None]
    return max(tries, key=lambda taus: sum(matched(c, [taus[name] for name in key]).sum() for key, c in cells.items()))


def _by_turns(names: tuple[str, ...], cells: Gains, taus: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """Children that share axes: each is assigned with the others held, until none gains."""
    taus = dict(taus)
    for _ in range(TURNS):
        changed = False
        for name in names:
            gain = np.sum([_for(name, key, cell, taus) for key, cell in cells.items() if name in key], axis=0)
            tau = assign(gain)
            if matched(gain, [tau]).sum() > matched(gain, [taus[name]]).sum():
                taus[name], changed = tau, True
        if not changed:
            break
    return taus


def _for(name: str, key: tuple[str, ...], cell: np.ndarray, taus: Mapping[str, np.ndarray]) -> np.ndarray:
    """The gain (m, m) of one child, with the other children on the axis held."""
    place = key.index(name)
    others = [taus[other] for other in key if other != name]
    rest = np.moveaxis(cell, (2 * place, 2 * place + 1), (-2, -1))
    return matched(rest, others).reshape(-1, *rest.shape[-2:]).sum(0) if others else cell


def _size(name: str, cells: Gains) -> int:
    return next(cell.shape[2 * key.index(name)] for key, cell in cells.items() if name in key)
