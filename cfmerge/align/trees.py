"""Models as trees: what takes `{name: array}` takes a Flax tree too, and gives back what it was given."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from cfmerge.formats.pytree import flatten, unflatten
from cfmerge.formats.trees import nested
from cfmerge.models.spaces import Spaces

NESTED = "/"  # the structure of a tree that is known by names alone: dicts, by the parts of names


class Structure(NamedTuple):
    """The structure of a tree, and the names of its leaves in their order."""

    treedef: Any
    names: tuple[str, ...]


def flat(spaces: Spaces, model: Any) -> tuple[Mapping[str, Any], Any]:
    """A model as `{name: array}`, and the structure of its tree; None of what is a mapping by name already.

    Leaves are called as `formats.pytree` calls them: `Dense_0/kernel`.
    """
    if isinstance(model, Mapping) and (not model or any(name in spaces.axes for name in model)):
        return model, None
    named, treedef = flatten(model)
    return named, Structure(treedef, tuple(named))


def built(structure: Any, tensors: Mapping[str, Any]) -> Any:
    """A model in a structure that `flat` has found."""
    if structure is None:
        return dict(tensors)
    if structure == NESTED:
        return nested(tensors)
    return unflatten(structure.treedef, {name: tensors[name] for name in structure.names})
