"""Models as trees: what takes `{name: array}` takes a Flax tree too, and gives back what it was given."""

from collections.abc import Mapping
from typing import Any

from cfmerge.formats.pytree import flatten, unflatten
from cfmerge.models.spaces import Spaces

NESTED = "/"  # the structure of a tree that is known by names alone: dicts, by the parts of names


def flat(spaces: Spaces, model: Any) -> tuple[Mapping[str, Any], Any]:
    """A model as `{name: array}`, and the structure of its tree; None of what is a mapping by name already.

    Leaves are called as `formats.pytree` calls them: `Dense_0/kernel`.
    """
    if isinstance(model, Mapping) and (not model or any(name in spaces.axes for name in model)):
        return model, None
    return flatten(model)


def built(structure: Any, tensors: Mapping[str, Any]) -> Any:
    """A model in a structure that `flat` has found; `tensors` in the order of its leaves, or in any order of names."""
    if structure is None:
        return dict(tensors)
    if structure != NESTED:
        return unflatten(structure, tensors)
    tree: dict[str, Any] = {}
    for name, leaf in tensors.items():
        *path, last = name.split("/")
        place = tree
        for part in path:
            place = place.setdefault(part, {})
        place[last] = leaf
    return tree
