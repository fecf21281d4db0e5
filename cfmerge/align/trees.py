"""Trees of Flax as the mappings by name that everything here takes, and back."""

from collections.abc import Mapping
from typing import Any

from cfmerge.errors import CfmergeError, and_more
from cfmerge.formats import pytree


def flatten(tree: Any) -> dict[str, Any]:
    """The arrays of a tree by the names that spaces traced from it have: `{"Dense_0/kernel": array}`.

        >>> params = {"Dense_0": {"kernel": np.ones((2, 3)), "bias": np.zeros(3)}}
        >>> list(cfmerge.align.flatten(params))
        ['Dense_0/bias', 'Dense_0/kernel']

    Args:
        tree: parameters or variables of linen, `nnx.state(model)` or an nnx model, or any pytree of arrays.

    Raises:
        CfmergeError: a leaf is not an array.
    """
    return pytree.flatten(tree)[0]


def unflatten(tensors: Mapping[str, Any], like: Any) -> Any:
    """Arrays by name in the structure of a tree: the inverse of `flatten`.

        >>> params = {"Dense_0": {"kernel": np.ones((2, 3)), "bias": np.zeros(3)}}
        >>> tree = cfmerge.align.unflatten(cfmerge.align.flatten(params), params)
        >>> tree["Dense_0"]["bias"]
        array([0., 0., 0.])

    Args:
        tensors: `{name: array}`.
        like: a tree with leaves of the same names.

    Raises:
        CfmergeError: the names are others than the tree's.
    """
    leaves, treedef = pytree.named_leaves(like)
    missing, added = [n for n in leaves if n not in tensors], [n for n in tensors if n not in leaves]
    if missing or added:
        told = f"no tensor is called {and_more(missing)}" if missing else f"the tree has no leaf {and_more(added)}"
        raise CfmergeError(f"unflatten: {told}")
    return pytree.unflatten(treedef, {name: tensors[name] for name in leaves})
