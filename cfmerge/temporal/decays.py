"""Decays of the learning rate as weights of checkpoints.

Along a run of constant learning rate, with checkpoints `theta_0 .. theta_k` and updates
`g_i = theta_i - theta_(i-1)`, a decay `1 >= w_1 >= ... >= w_k >= 0` scales the updates after `theta_0`:

    theta_0 + sum_i w_i g_i = sum_j c_j theta_j,   c_0 = 1 - w_1,  c_j = w_j - w_(j+1),  c_k = w_k,   sum_j c_j = 1

so that a decay is a weighted mean of checkpoints. The shapes, over `x_i = i / (k + 1)`:

    linear         w_i = 1 - x_i                   c_j = 1 / (k + 1): the uniform mean
    cosine         w_i = (1 + cos(pi x_i)) / 2
    inverse-sqrt   w_i = 1 - sqrt(x_i)
    ema=D          w_i = 1 - D^(k - i + 1)         c_0 = D^k,  c_j = (1 - D) D^(k - j)

Changxin Tian et al., WSM: Decay-Free Learning Rate Schedule via Checkpoint Merging, ICLR 2026, arXiv 2507.17634. The
places `x_i` are ours: with them a linear decay is the uniform mean.
"""

import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Float64

from cfmerge.errors import CfmergeError, nearest

Weights = Float64[np.ndarray, " k"]  # w_1 .. w_k
Coefficients = Float64[np.ndarray, " k+1"]  # c_0 .. c_k

SHAPES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + np.cos(np.pi * x)) / 2,
    "inverse-sqrt": lambda x: 1 - np.sqrt(x),
}
EMA = "ema"


def decay_weights(decay: str, k: int) -> Weights:
    """The factors `w_1 .. w_k` of the k updates of a window.

        >>> temporal.decay_weights("linear", 3)
        array([0.75, 0.5 , 0.25])

    Args:
        decay: "linear", "cosine", "inverse-sqrt", or "ema=D" with D from 0 on and below 1.
        k: the number of updates: one less than that of checkpoints.

    Raises:
        CfmergeError: there is no such shape, or D is no such number.
    """
    i = np.arange(1, k + 1, dtype=np.float64)
    name, separator, number = decay.partition("=")
    if name == EMA:
        return 1 - _factor(decay, number) ** (k - i + 1)
    if separator or name not in SHAPES:
        raise CfmergeError(f"decay {decay!r} is not known{nearest(name, [*SHAPES, 'ema=D'])}")
    return SHAPES[name](i / (k + 1))


def coefficients(weights: Weights) -> Coefficients:
    """The weights `c_0 .. c_k` of the checkpoints, which sum to 1, from the factors `w_1 .. w_k` of the updates.

        >>> temporal.coefficients(temporal.decay_weights("linear", 3))
        array([0.25, 0.25, 0.25, 0.25])

    Raises:
        CfmergeError: the factors grow, or leave the range from 0 to 1.
    """
    w = np.concatenate([[1.0], np.asarray(weights, np.float64), [0.0]])
    c = w[:-1] - w[1:]
    if not (c >= 0).all():  # NaN too
        raise CfmergeError(f"a decay falls from 1 to 0: 1 >= w_1 >= ... >= w_k >= 0, found {w[1:-1].tolist()}")
    return c


def _factor(decay: str, text: str) -> float:
    """The D of "ema=D"."""
    try:
        d = float(text)
    except ValueError:
        d = math.nan
    if not 0 <= d < 1:
        raise CfmergeError(f"decay {decay!r}: expected ema=D with 0 <= D < 1, such as ema=0.9")
    return d
