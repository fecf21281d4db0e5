r"""Activation matching: neurons matched by how their activations correlate on the same inputs.

Yixuan Li and others, "Convergent Learning: Do different neural networks learn the same representations?", ICLR 2016,
https://arxiv.org/abs/1511.07543; Git Re-Basin, section 3.1; the "permute" baseline of ZipIt!. One assignment for each
space, none of which depends on another:

    C_kl = corr(neuron k of model a, neuron l of model b),       P[space] = argmax_P <C, P>

The correlations are those of joint moments: both models saw the same inputs. A space with children, such as heads and
the values within, is matched as a whole where its features are those of all children, in order; where it has one
feature for each element, the children keep their order.
"""

import math

from cfmerge.align.assignment import Gains, assign_space, difference, picked
from cfmerge.align.moments import Moments
from cfmerge.align.permuting import identity
from cfmerge.align.weight_matching import Matching
from cfmerge.errors import CfmergeError, nearest
from cfmerge.models.spaces import Spaces


def activation_matching(
    spaces: Spaces, moments: Moments, *, models: tuple[int | str, int | str] = (0, 1), partial: bool = False
) -> Matching:
    """The permutations of one model that bring its activations near another's, from joint moments.

    Args:
        spaces: of both models.
        moments: joint moments `(n + n, n + n)` of the models' features on the same inputs, of every space.
        partial: a space with children, such as heads, may have no features; then it is left out of the result, for
            `weight_matching(hold=...)` to find.
        models: names or numbers, among those of the moments, of the model that stays and of the one that is permuted.

    Returns:
        A `Matching` whose objective is the sum of correlations of matched neurons over all spaces.

    Raises:
        CfmergeError: a space without features, or with another number of them; a model that the moments do not have.

    Example:
        >>> table = {"up": "h, in -", "down": "-, in h"}
        >>> spaces = cfmerge.align.parse_spaces(table, {"up": (2, 3), "down": (3, 2)})
        >>> x = np.array([[1.0, 0.0], [2.0, 5.0], [3.0, 1.0]])
        >>> moments = cfmerge.align.Moments()
        >>> moments.add("h", [x, x[:, ::-1]])
        >>> cfmerge.align.activation_matching(spaces, moments).permutations["h"]
        array([1, 0])
    """
    numbers = [_number(moments, model) for model in models]
    permutations, gained = identity(spaces), [0.0, 0.0]
    names = [s for s in spaces.names if s in moments.spaces or not (partial and spaces.children(s))]
    for space in names:
        gains = _gains(spaces, space, moments, *numbers)
        found = {**permutations, **assign_space(space, gains, permutations)}
        better, noise = difference(gains, space, permutations, found)
        for key, values in gains.items():
            gained[0] += float(picked(values, key, space, permutations).sum())
        permutations, gained[1] = (found, gained[1] + better) if better > noise else (permutations, gained[1])
    there = {name: own for name, own in permutations.items() if name.partition(".")[0] in names}
    return Matching(there, sum(gained), gained[0], (sum(gained),), 1)


def _gains(spaces: Spaces, space: str, moments: Moments, stays: int, moves: int) -> Gains:
    """The correlations of one model's features with another's, `(n, n)`, and `(m, m)` for each child."""
    children = spaces.children(space)
    slices = moments.slices(space)
    found = tuple(slices[model].stop - slices[model].start for model in (stays, moves))
    for key, sizes in {
        (): (spaces.sizes[space],),
        children: tuple(spaces.sizes[n] for n in (space, *children)),
    }.items():
        if found == (math.prod(sizes),) * 2:
            block = moments.correlation(space)[slices[stays], slices[moves]].reshape(*sizes, *sizes)
            sides = [side * len(sizes) + place for place in range(len(sizes)) for side in (0, 1)]
            return {key: block.transpose(sides)}
    raise CfmergeError(
        f"moments: space {space!r}: expected {spaces.sizes[space]} features of each model"
        + (f", or those of {' '.join((space, *children))}" if children else "")
        + f"; found {found[0]} and {found[1]}"
    )


def _number(moments: Moments, model: int | str) -> int:
    if model in moments.models:
        return moments.models.index(model)
    if not isinstance(model, int) or not 0 <= model < len(moments.models):
        raise CfmergeError(f"moments: there is no model {model!r}{nearest(str(model), moments.models)}")
    return model
