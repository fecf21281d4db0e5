"""Leaves of trees, by name, as the loop reads and writes them: a source and a sink in memory."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from cfmerge.models.deltas import Delta, Dense
from cfmerge.products.sharded import is_spread


class Tree:
    """Named arrays as the loop reads them.

    Args:
        leaves: the arrays.
        layouts: where to lay those that are merged on several devices, see `sharded`.
    """

    def __init__(self, leaves: Mapping[str, Any], layouts: Mapping[str, Sharding] | None = None) -> None:
        self.leaves, self.layouts = leaves, layouts or {}
        self._last: tuple[str, Any] = "", None

    def read(self, name: str, first: int = 0, count: int | None = None) -> Any:
        leaf = self._laid(name, count is not None)
        if count is None:
            return leaf
        if not is_spread(leaf):
            return leaf.reshape(-1)[first : first + count]
        size = math.prod(leaf.shape[1:])  # whole layers: the flat array would be gathered
        return leaf[first // size : (first + count) // size]

    def _laid(self, name: str, again: bool) -> Any:
        """The whole array, kept where other pieces of it are read next."""
        if name not in self.layouts:
            return self.leaves[name]
        kept, leaf = self._last
        if kept != name:
            leaf = jax.device_put(self.leaves[name], self.layouts[name])
        self._last = (name, leaf) if again else ("", None)
        return leaf

    def delta(self, name: str, first: int = 0, count: int | None = None) -> Delta:
        return Dense(self.read(name, first, count))

    def rank(self, name: str) -> int | None:
        return None


class Kept:
    """A sink that keeps the arrays in memory, those that have a layout as it says."""

    def __init__(self, layouts: Mapping[str, Sharding] | None = None) -> None:
        self._layouts = layouts or {}
        self._pieces: dict[str, list[tuple[int, Any]]] = {}

    def write(self, name: str, values: Any, first: int = 0) -> None:
        if name in self._layouts:
            values = jax.device_put(values, self._layouts[name])
        self._pieces.setdefault(name, []).append((first, values))

    def arrays(self, like: Mapping[str, Any]) -> dict[str, jax.Array]:
        """The arrays by name, in the shapes of those of the same names in `like`."""
        return {name: _joined(pieces, like[name].shape) for name, pieces in self._pieces.items()}


def _joined(pieces: list[tuple[int, Any]], shape: tuple[int, ...]) -> jax.Array:
    parts = [values for _, values in sorted(pieces, key=lambda piece: piece[0])]
    if len(parts) == 1 and isinstance(parts[0], jax.Array):
        return parts[0].reshape(shape)
    with jax.enable_x64(jax.config.read("jax_enable_x64") or parts[0].dtype == np.float64):
        if all(part.shape[1:] == shape[1:] for part in parts):  # layers: flat, they would be gathered
            return jnp.concatenate(parts)
        return jnp.concatenate([jnp.asarray(part).reshape(-1) for part in parts]).reshape(shape)
