"""Changes of tensors that are one in the base: what changes one changes all, as in peft's `merge_and_unload`."""

from collections.abc import Mapping

import numpy as np

from cfmerge.errors import CfmergeError
from cfmerge.formats.adapter_change import Change
from cfmerge.formats.base import Container, Source


def aliases_of(base: Source, name: str) -> list[str]:
    """Other names of a stored tensor, under which it is not stored."""
    return [alias for alias, other in base.ties.items() if other == name and alias not in base.tensors]


def settle_ties(
    changes: dict[str, Change], base: Source, file: Container, names_of: Mapping[str, set[str]]
) -> list[str]:
    """Notes on changes of tied tensors; those of tensors that are stored twice become changes of both.

    Args:
        changes: by the base's stored names; completed.
        names_of: the names under which the adapter has a tensor that takes the place of the base's.

    Raises:
        CfmergeError: the adapter has one of two tied tensors for itself, which the base cannot hold.
    """
    notes = []
    for alias, name in base.ties.items():
        one, other = changes.get(alias), changes.get(name)
        if alias in base.tensors:
            changed = [change for change in (one, other) if change is not None]
            if not changed or any(change.full for change in changed) or not _are_one(base, alias, name):
                continue
            both = [changes.setdefault(key, Change(base, key, file)) for key in (alias, name)]
            for change, more in zip(both, [list(change.parts) for change in both[::-1]], strict=True):
                for part in more:
                    change.add(part)
        elif other is None:
            continue
        elif other.full is not None:
            if names_of[name] != {name, *aliases_of(base, name)}:
                raise CfmergeError(
                    f"{file.path}: has a {other.full.name!r} of its own, and in the base {alias!r} and {name!r} "
                    "are one tensor: store both in the base, and set tie_word_embeddings to false in its config.json"
                )
            continue
        notes.append(
            f"{alias!r} and {name!r} are one tensor of the base: what changes one changes both, as in peft's "
            "merge_and_unload"
        )
    return notes


def _are_one(base: Source, alias: str, name: str) -> bool:
    """Whether two stored tensors are equal."""
    if name not in base.tensors or base.tensors[alias].shape != base.tensors[name].shape:
        return False
    a, b = base.read(alias), base.read(name)
    return a.dtype == b.dtype and bool(np.array_equal(a, b))
