"""JAX pytrees as named arrays: dicts, FrozenDicts, `nnx.State`, dataclasses, lists."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cfmerge.errors import CfmergeError


def flatten(tree: Any) -> tuple[dict[str, Any], Any]:
    """`({name: array}, treedef)`, names being the path's parts joined by `/`.

    Raises:
        CfmergeError: a leaf is not an array.
    """
    named, treedef = named_leaves(tree)
    for name, leaf in named.items():
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic | float | int):
            raise CfmergeError(f"leaf {name!r} is not an array, but {type(leaf).__name__}")
    return {name: leaf if hasattr(leaf, "shape") else jnp.asarray(leaf) for name, leaf in named.items()}, treedef


def named_leaves(tree: Any) -> tuple[dict[str, Any], Any]:
    """`({name: leaf}, treedef)`, whatever the leaves are.

    Raises:
        CfmergeError: two have the same path.
    """
    paths, treedef = jax.tree_util.tree_flatten_with_path(tree)
    leaves = {"/".join(_part(key) for key in path).removesuffix("/value"): leaf for path, leaf in paths}
    if len(leaves) != len(paths):
        raise CfmergeError("two leaves of the tree have the same path")
    return leaves, treedef


def unflatten(treedef: Any, leaves: Mapping[str, Any]) -> Any:
    """The inverse of `flatten`; `leaves` in the same order."""
    return jax.tree_util.tree_unflatten(treedef, list(leaves.values()))


def _part(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
