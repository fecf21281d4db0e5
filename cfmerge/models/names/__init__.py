"""Other namings of models: tables of what a tensor is called elsewhere, and how it lies there, read both ways."""

from collections.abc import Mapping
from typing import Any

from cfmerge.errors import CfmergeError, nearest
from cfmerge.models.names import flax, tunix
from cfmerge.models.names.rules import Family as Family
from cfmerge.models.names.translate import Move as Move
from cfmerge.models.names.translate import Translation as Translation
from cfmerge.models.names.translate import translate as translate
from cfmerge.models.names.translate import unchanged as unchanged

FAMILIES: dict[str, Family] = {**tunix.FAMILIES, **flax.FAMILIES}


def family_of(name: str) -> Family:
    """The family of a name. Raises `CfmergeError` if there is none."""
    if name not in FAMILIES:
        raise CfmergeError(f"unknown family of names {name!r}{nearest(name, FAMILIES)}")
    return FAMILIES[name]


def sizes_of(family: Family, config: Mapping[str, Any]) -> dict[str, int]:
    """The sizes of a family's axes, by a model's config.

    Raises:
        CfmergeError: the config does not tell one of them.
    """
    config = {**config, **(config.get("text_config") or {})}
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    usual = {"num_key_value_heads": heads, "head_dim": hidden // heads if heads and hidden else None}
    told = {key: config.get(key) or usual.get(key) for key in family.sizes.values()}
    found = {key: value for key, value in told.items() if isinstance(value, int)}
    missing = [key for key in told if key not in found]
    if missing:
        raise CfmergeError(f"a config with {', '.join(missing)} is needed; name its config.json with --config")
    return {axis: found[key] for axis, key in family.sizes.items()}
