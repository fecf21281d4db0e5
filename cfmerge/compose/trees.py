"""Composed results of trees in memory: pure, so that they are made under `jit` and `vmap` too."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cfmerge.compose.artifact import Artifact, digest_of
from cfmerge.compose.entries import PACKED, About, Entry
from cfmerge.compose.kept import entry_of
from cfmerge.compose.planned import scales_of
from cfmerge.compose.systems import choice, without_lone_biases
from cfmerge.core.part import Composer
from cfmerge.engine import run
from cfmerge.errors import CfmergeError
from cfmerge.planning.jobs import as_method
from cfmerge.products.in_memory import NO_EXPERTS
from cfmerge.products.sharded import automatic, is_spread
from cfmerge.products.trees import Arrays, Problem


def build_trees(base: Any, experts: Any, system: Any, parameters: Mapping[str, Any] | None, rules: Any) -> Artifact:
    """The composed result of trees; see `build`."""
    method = as_method(system, parameters, composing=True)
    if not isinstance(method, Composer):
        raise CfmergeError(f"{method.name} makes one tree of parameters: use cfmerge.merge_params")
    trees = list(experts.values()) if isinstance(experts, Mapping) else list(experts)
    if not trees:
        raise CfmergeError(NO_EXPERTS)
    problem = Problem.of(base, experts, [method], rules, choice(len(trees), method))
    assignments = [without_lone_biases(each) for each in problem.assignments]
    entries: dict[str, Entry] = {}

    def made(arrays: Arrays) -> tuple[Any, Any]:
        work = arrays.work(assignments, problem.names, 0)
        entries.update({job.name: entry_of(job) for job in work.merged})
        sink = KeptParts(entries)
        account = run.merge(work, [sink])
        return sink.arrays(), scales_of(account, method, entries, len(trees))

    arrays = Arrays.of(assignments, problem.trees, None, [None] * len(trees))
    parts, scales = automatic(made, arrays, lambda result, mesh: jax.tree.map(lambda leaf: None, result))
    told = {name: _plain(value) for name, value in method.parameters.items()}
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in problem.trees[0].values())
    about = About(method.name, tuple(problem.names), told, entries, _digests(problem.trees[0]), "", size)
    return Artifact(about, parts, None if scales is None else jnp.asarray(scales))


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def _digests(leaves: Mapping[str, Any]) -> dict[str, str]:
    """The digests of the base's leaves; none where values are not at hand, or lie on several devices."""

    def at_hand(leaf: Any) -> bool:
        key = isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return not (isinstance(leaf, jax.core.Tracer) or is_spread(leaf) or key)

    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves.values()):
        return {}
    return {name: digest_of(np.asarray(leaf)) for name, leaf in leaves.items() if at_hand(leaf)}


class KeptParts:
    """A sink that keeps the parts in memory."""

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self._entries = entries
        self._pieces: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}

    def write(self, name: str, values: Any, first: int = 0) -> None:
        """Nothing: a tensor that stays as it is in the base is not kept."""

    def write_parts(self, name: str, parts: Mapping[str, Any], first: int) -> None:
        self._pieces.setdefault(name, []).append((first, parts))

    def arrays(self) -> dict[str, dict[str, jax.Array]]:
        """`{tensor: {part: array}}`, as the entries tell."""
        return {
            name: {part: self._joined(name, part) for part in entry.parts}
            for name, entry in self._entries.items() if name in self._pieces
        }  # fmt: skip

    def _joined(self, name: str, part: str) -> jax.Array:
        entry, pieces = self._entries[name], sorted(self._pieces[name], key=lambda piece: piece[0])
        values: Sequence[Any] = [own[part] for _, own in pieces]
        shape, dtype = entry.parts[part]
        if len(values) > 1:
            values = [jnp.concatenate(values, axis=-1 if entry.by_entry else 0)]
        if dtype == PACKED and entry.by_entry:
            return jnp.packbits(jnp.asarray(values[0]).reshape(shape[0], -1), axis=1)
        return jnp.asarray(values[0]).reshape(shape)
