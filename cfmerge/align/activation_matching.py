r"""Activation matching: neurons matched by how their activations correlate on the same inputs.

Yixuan Li and others, "Convergent Learning: Do different neural networks learn the same representations?", ICLR 2016,
https://arxiv.org/abs/1511.07543; Git Re-Basin, section 3.1; the "permute" baseline of ZipIt!. One assignment for each
space, none of which depends on another:

    C_kl = corr(neuron k of model a, neuron l of model b),       P[space] = argmax_P <C, P>

The correlations come from joint moments: both models see the same inputs. A space with children, such as heads and the
values within, is matched as a whole where its features are those of all children, in order; where it has one feature
for each element, the children keep their order.
"""

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from cfmerge.align.assignment import assign_space, picked
from cfmerge.align.permuting import identity
from cfmerge.align.weight_matching import Matching
from cfmerge.errors import CfmergeError
from cfmerge.models.spaces import Spaces


class HasCorrelations(Protocol):
    """Joint moments of several models' features."""

    def correlation(self, space: str) -> Any:
        """Pearson correlations `(sum of n_i, sum of n_i)` of the models' features, one model after the other."""


def activation_matching(spaces: Spaces, moments: HasCorrelations, *, models: tuple[int, int] = (0, 1)) -> Matching:
    """The permutations of one model that bring its activations near another's, from joint moments.

    Args:
        spaces: of both models.
        moments: with features of every space: joint moments of the models on the same inputs.
        models: numbers of the model that stays and of the one that is permuted, among those of the moments.

    Returns:
        A `Matching` whose objective is the sum of correlations of matched neurons over all spaces.

    Raises:
        CfmergeError: a space without features, or with another number of them; a correlation that is not finite.

    Example:
        >>> class Moments:
        ...     def correlation(self, space):
        ...         return np.array([[1, 0, 0.1, 0.9], [0, 1, 0.8, 0], [0.1, 0.8, 1, 0], [0.9, 0, 0, 1]])
        >>> spaces = cfmerge.align.parse_spaces({"up": "h, in -", "down": "-, in h"}, {"up": (2, 3), "down": (3, 2)})
        >>> matching = cfmerge.align.activation_matching(spaces, Moments())
        >>> matching.permutations["h"], matching.objective
        (array([1, 0]), 1.7)
    """
    permutations, gained = identity(spaces), [0.0, 0.0]
    for space in spaces.names:
        children = spaces.children(space)
        key, gain = _block(spaces, space, children, moments, models)
        found = assign_space(space, {key: gain}, permutations)
        for number, one in enumerate((permutations, {**permutations, **found})):
            gained[number] += float(picked(gain, key, space, one).sum())
        permutations |= found
    return Matching(permutations, gained[1], gained[0], (gained[1],), 1)


def _block(
    spaces: Spaces, space: str, children: Sequence[str], moments: HasCorrelations, models: tuple[int, int]
) -> tuple[tuple[str, ...], np.ndarray]:
    """The correlations of one model's features with another's, `(n, n)`, and `(m, m)` for each child."""
    try:
        joint = np.asarray(moments.correlation(space))
    except KeyError:
        raise CfmergeError(f"moments: there are no features of space {space!r}; collect them for every space") from None
    n, inner = spaces.sizes[space], tuple(spaces.sizes[child] for child in children)
    several = len(getattr(moments, "models", ())) or max(models) + 1
    for key, sizes in (((), (n,)), (tuple(children), (n, *inner))):
        width = math.prod(sizes)
        if joint.shape == (width * several, width * several):
            here, there = (slice(model * width, (model + 1) * width) for model in models)
            gain = joint[here, there].reshape(*sizes, *sizes)
            if not np.isfinite(gain).all():
                raise CfmergeError(f"moments: a correlation of space {space!r} is NaN or infinite")
            return key, gain.transpose([side * len(sizes) + place for place in range(len(sizes)) for side in (0, 1)])
    raise CfmergeError(
        f"moments: space {space!r}: expected correlations of {n} features of each of {several} models, "
        f"{(n * several, n * several)}; found {joint.shape}"
    )
