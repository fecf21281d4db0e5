"""The moments of one space: of one batch, and of two added."""

from typing import NamedTuple

import numpy as np


class SpaceMoments(NamedTuple):
    """The moments of one space: of `O = sum(widths)` features, over so many tokens.

        >>> moments = cfmerge.align.Moments()
        >>> moments.add("hidden", [np.array([[1.0], [3.0]]), np.array([[0.0, 2.0], [0.0, 4.0]])])
        >>> moments.of("hidden").mean
        array([2., 0., 3.])

    Attributes:
        tokens: their number.
        mean: `(O,)`.
        covariance: `(O, O)`, divided by the number of tokens.
        widths: the number of features of each model.
    """

    tokens: int
    mean: np.ndarray
    covariance: np.ndarray
    widths: tuple[int, ...]


def moments_of(rows: np.ndarray, widths: tuple[int, ...]) -> SpaceMoments:
    """The moments of one batch `(tokens, O)`, which is changed; a feature that is the same in all rows varies by 0."""
    first = rows[0].copy()
    rows -= first
    mean = rows.mean(axis=0)
    rows -= mean
    return SpaceMoments(len(rows), first + mean, rows.T @ rows / len(rows), widths)


def together(one: SpaceMoments, two: SpaceMoments) -> SpaceMoments:
    """The moments of the tokens of both."""
    tokens = one.tokens + two.tokens
    share, apart = two.tokens / tokens, two.mean - one.mean
    covariance = (1 - share) * one.covariance + share * two.covariance
    covariance += share * (1 - share) * np.outer(apart, apart)
    return SpaceMoments(tokens, one.mean + share * apart, covariance, one.widths)
