"""The result of a zip: a trunk that is one for all models, and what stays each model's own; and its directory.

OUT/zip.json                  models, the table of spaces, groups, where the zip stops
OUT/trunk.safetensors         tensors of all models
OUT/heads/MODEL.safetensors   tensors of that model
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cfmerge.align.folding import computing
from cfmerge.align.groups import Groups
from cfmerge.align.permuting import Permutations
from cfmerge.align.trees import built
from cfmerge.align.zipped_files import load, save, write
from cfmerge.errors import CfmergeError, nearest
from cfmerge.models.buffers import is_counter


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Zipped:
    """Several models as one trunk and a head for each.

        >>> spaces = cfmerge.align.parse_spaces({"up": "h, in -", "down": "-, in h"}, {"up": (2, 2), "down": (1, 2)})
        >>> a = {"up": np.eye(2), "down": np.array([[1.0, 2.0]])}
        >>> b = {"up": np.eye(2)[::-1], "down": np.array([[5.0, 7.0]])}
        >>> zipped = cfmerge.align.zip_models(spaces, {"a": a, "b": b}, "weights")
        >>> zipped.model("b")["down"].tolist()
        [[7.0, 5.0]]
        >>> run = lambda model, x: model["down"] @ jnp.maximum(model["up"] @ x, 0)
        >>> {name: y.tolist() for name, y in zipped.apply(run, jnp.array([1.0, 0.0])).items()}
        {'a': [1.0], 'b': [7.0]}
        >>> zipped.save("both").name
        'both'
        >>> cfmerge.align.load_zipped("both").models
        ('a', 'b')

    Attributes:
        models: their names.
        trunk: `{tensor: array}`, of all models.
        heads: `{model: {tensor: array}}`.
        groups: of each zipped space, which features of the models became one.
        blocks: for each model, the permutations of spaces whose elements were permuted as blocks.
        table: the spaces as text, see `parse_spaces`; sizes: `{space: its elements}` after the zip.
        stop_at: the last spaces that are zipped; none: all are.
        notes: notes for the user.
        layout: the structure of the models' trees; None: they are mappings by name.
    """

    models: tuple[str, ...]
    trunk: Mapping[str, Any]
    heads: Mapping[str, Mapping[str, Any]]
    groups: Mapping[str, Groups]
    blocks: tuple[Permutations, ...]
    table: Mapping[str, str]
    sizes: Mapping[str, int]
    stop_at: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    layout: Any = None

    @property
    def is_whole(self) -> bool:
        """Whether all spaces are zipped, so that no head has features of its own."""
        return all(name in self.groups or name in self.blocks[0] for name in self.sizes if "." not in name)

    def tensors(self, name: str) -> dict[str, Any]:
        """All tensors of one model by name: the trunk's and its own.

        Raises:
            CfmergeError: there is no such model.
        """
        if name not in self.models:
            raise CfmergeError(f"zip: there is no model {name!r}{nearest(name, self.models)}")
        return _ordered(self.table, self.trunk, self.heads[name])

    def __repr__(self) -> str:
        own = len(self.heads[self.models[0]])
        where = f" up to {', '.join(self.stop_at)}" if self.stop_at else ""
        return f"<Zipped of {', '.join(self.models)}{where}: {len(self.trunk)} tensors of all, {own} of each>"

    def model(self, name: str) -> Any:
        """One model as the models were given: a mapping by name, or a tree.

        Raises:
            CfmergeError: there is no such model.
        """
        return built(self.layout, self.tensors(name))

    def joint(self) -> Any:
        """The one model of a zip all through: the trunk, and the mean of the models' heads.

        Raises:
            CfmergeError: the zip stops before, or heads have different shapes.
        """
        if not self.is_whole:
            raise CfmergeError(
                f"zip: it stops at {', '.join(self.stop_at)}, and behind it the models' features are not matched: they "
                "have no common head; take model(NAME) or apply"
            )
        if (differs := self.differing) is not None:
            shapes = " and ".join(str(np.shape(self.heads[name][differs])) for name in self.models)
            raise CfmergeError(f"zip: the heads have no mean: {differs!r} has the shapes {shapes}; take model(NAME)")
        heads = [self.heads[model] for model in self.models]
        mean = {name: _mean(name, [own[name] for own in heads]) for name in heads[0]}
        return built(self.layout, _ordered(self.table, self.trunk, mean))

    def apply(self, function: Callable[..., Any], *inputs: Any) -> dict[str, Any]:
        """`{model: function(its parameters, *inputs)}`, the trunk being run once.

        Heads of the same shapes run side by side, by `vmap` over them alone. Others run one after the other in one
        program, in which XLA finds that they share the trunk.

        Args:
            function: of parameters, as `model` gives them, and inputs: pure, and the same object at each call, or it is
                compiled again.
            inputs: arrays or trees of arrays, the same for all models.
        """
        fixed = _Static(self.models, tuple(self.table), self.layout, self.differing is None)
        trunk = {name: jnp.asarray(leaf) for name, leaf in self.trunk.items()}
        return _applied(function, fixed, trunk, {name: dict(own) for name, own in self.heads.items()}, inputs)

    def save(self, directory: str | Path, *, overwrite: bool = False) -> Path:
        """The directory that the result is written into; it appears when it is complete. `load_zipped` reads it.

        Raises:
            CfmergeError: there is something (without `overwrite`), or a model's name cannot be a file's.
        """
        return save(self, Path(directory), overwrite)

    def write(self, output: str | Path, base: str | Path, head: str | None = None, *, overwrite: bool = False) -> Path:
        """The path of a checkpoint of a zip all through, with the config and the other files of its base.

        Args:
            output: the directory, or the file, to make.
            base: the files of one of the models.
            head: the model whose head it has; None: the mean of all.
            overwrite: a model that is there is replaced.

        Raises:
            CfmergeError: the zip stops before, the tensors are not those of the base, or there is something
                (without `overwrite`).
        """
        if head is not None and not self.is_whole:
            raise CfmergeError(f"zip: it stops at {', '.join(self.stop_at)}; write a model by save(tensors(NAME))")
        whole = dataclasses.replace(self, layout=None)
        return write(whole.joint() if head is None else self.tensors(head), Path(output), base, overwrite)

    @property
    def differing(self) -> str | None:
        """A tensor whose shape differs between the heads, so that they have no mean; None: there is none."""
        first = self.heads[self.models[0]]
        for name, leaf in first.items():
            if any(np.shape(self.heads[other][name]) != np.shape(leaf) for other in self.models):
                return name
        return None


def load_zipped(directory: str | Path) -> Zipped:
    """The zip that `save` wrote; its arrays are views of the mapped files, a tree is of dicts.

        >>> spaces = cfmerge.align.parse_spaces({"up": "h, in -", "down": "-, in h"}, {"up": (2, 1), "down": (1, 2)})
        >>> model = {"up": np.array([[1.0], [2.0]]), "down": np.array([[1.0, 1.0]])}
        >>> zipped = cfmerge.align.zip_models(spaces, [model, model], "weights", stop_at="h")
        >>> cfmerge.align.load_zipped(zipped.save("zipped")).stop_at
        ('h',)

    Raises:
        CfmergeError: there is none, its table is none, or its files are not whole.
    """
    return Zipped(**load(Path(directory).expanduser()))


@dataclasses.dataclass(frozen=True)
class _Static:
    """What a compiled `apply` is for, beside shapes."""

    models: tuple[str, ...]
    order: tuple[str, ...]
    layout: Any
    alike: bool


@functools.partial(jax.jit, static_argnames=("function", "fixed"))
def _applied(
    function: Callable[..., Any], fixed: _Static, trunk: Mapping[str, Any], heads: Mapping[str, Any], inputs: Any
) -> dict[str, Any]:
    def run(own: Mapping[str, Any]) -> Any:
        return function(built(fixed.layout, _ordered(fixed.order, trunk, own)), *inputs)

    if not fixed.alike or not heads[fixed.models[0]]:
        return {name: run(heads[name]) for name in fixed.models}
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(heads[name] for name in fixed.models))
    outputs = jax.vmap(run)(stacked)
    return {name: jax.tree.map(lambda leaf, at=at: leaf[at], outputs) for at, name in enumerate(fixed.models)}


def _ordered(order: Any, trunk: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    return {name: trunk[name] if name in trunk else own[name] for name in order}


def _mean(name: str, leaves: list[Any]) -> Any:
    first = leaves[0]
    if not jnp.issubdtype(first.dtype, jnp.floating):
        if not is_counter(name) and any(not np.array_equal(np.asarray(first), np.asarray(leaf)) for leaf in leaves):
            raise CfmergeError(
                f"zip: the heads' {name!r} holds integers that differ and have no mean; take model(NAME)"
            )
        return first
    mean = np.asarray(sum(map(computing, leaves)) / len(leaves)).astype(first.dtype)
    return jnp.asarray(mean) if isinstance(first, jax.Array) else mean
