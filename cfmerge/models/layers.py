"""Layers: which tensor belongs to which layer, and what a config says of them.

A tensor's layer is the first number among the parts of its name (`h.3.attn`, `layers/3/...`, `encoderblock_3/...`).
"""

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from cfmerge.errors import CfmergeError

LAYER = re.compile(r"(?:^|[./]|_)(\d+)(?=[./]|$)")
SECTIONS = ("", "text_config", "llm_config", "language_config", "decoder")  # where a config says it; "": at its top
COUNTS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers", "decoder_layers", "encoder_layers",
)  # fmt: skip
AS_MANY = ("max_window_layers",)  # numbers that follow the count where they equal it
NUMBERS = ("mlp_only_layers", "cross_attention_layers", "full_attn_idxs", "attn_layer_indices")  # lists of layers
BY_NUMBER = (  # rules that say what a layer is by its number, unless they are 0 or 1
    "sliding_window_pattern", "full_attention_interval", "first_k_dense_replace", "decoder_sparse_step",
    "moe_layer_freq", "attn_layer_period", "attn_layer_offset", "expert_layer_period", "expert_layer_offset",
    "global_attn_every_n_layers", "hybrid_override_pattern", "interleave_moe_layer_step", "num_kv_shared_layers",
    "no_rope_layer_interval",
)  # fmt: skip
TOWERS = re.compile(r"visual|vision|image|audio|speech|vit\b")
BEFORE = re.compile(r"emb(?!ed_out)|wte|wpe|shared|patch|conv\d|_pre\b|slopes")


class Named(NamedTuple):
    """A tensor's name in three parts, `f"{stem}{layer}{rest}"`."""

    stem: str
    layer: int
    rest: str


def named(name: str) -> Named | None:
    """The parts of the name of a tensor in a layer; None for one outside the layers."""
    match = LAYER.search(name)
    return Named(name[: match.start(1)], int(match[1]), name[match.end(1) :]) if match else None


def comes_before(name: str) -> bool:
    """Whether a tensor outside the layers stands before them (embeddings), and not behind (last norm, head)."""
    return bool(BEFORE.search(name) or named(name))


class Counted(NamedTuple):
    """The layers of a model: what their names begin with, how many, and the section of the config that says so."""

    stem: str
    number: int
    section: str


def stated_count(config: Mapping[str, Any]) -> int | None:
    """The number of layers that a config states first; None: it states none."""
    counts = (_section(config, section).get(key) for section in SECTIONS for key in COUNTS)
    return next((count for count in counts if isinstance(count, int)), None)


def layers_of(names: Iterable[str], config: Mapping[str, Any], who: str) -> Counted:
    """The layers that the config counts.

    Raises:
        CfmergeError: the config does not tell, or layers of two parts of the model fit.
    """
    found: dict[str, set[int]] = {}
    for parts in filter(None, map(named, names)):
        found.setdefault(parts.stem, set()).add(parts.layer)
    sizes = {stem: len(layers) for stem, layers in found.items() if layers == set(range(len(layers)))}
    fits = [
        Counted(stem, size, section)
        for section in SECTIONS
        for stem, size in sizes.items()
        if any(_section(config, section).get(key) == size for key in COUNTS)
    ]
    fits = [one for one in fits if not TOWERS.search(one.stem)] or fits
    stems = list(dict.fromkeys(one.stem for one in fits))
    if len(stems) == 1:
        return fits[0]
    told = ", ".join(f"{size} of {stem + '*'!r}" for stem, size in sizes.items()) or "none in the tensors' names"
    if stems:
        raise CfmergeError(
            f"{who}: {' and '.join(repr(stem + '*') for stem in stems)} both are as many layers as its config says, "
            "and `layers` is for models with one stack of layers"
        )
    raise CfmergeError(
        f"{who}: its config.json does not say how many layers it has ({', '.join(COUNTS[:4])}, ... at the top or in "
        f"text_config); layers there are: {told}. Add the number to its config.json"
    )


def restacked(
    config: Mapping[str, Any], layers: Counted, origins: Sequence[tuple[Mapping[str, Any], int]]
) -> dict[str, Any]:
    """The keys of the section that change in the config of a model that is made of other layers.

    Args:
        config: of the model that gives the config.
        layers: its layers.
        origins: for each new layer the config of its model, and its number there.

    Raises:
        CfmergeError: a key says by number what a layer is, so that it would say something else of a layer that moves.
    """
    ours, sections = _section(config, layers.section), [_section(one, layers.section) for one, _ in origins]
    moved = [layer for _, layer in origins] != list(range(len(origins)))
    changed: dict[str, Any] = {}
    for key, value in ours.items():
        if key in (*COUNTS, *AS_MANY) and value == layers.number:
            changed[key] = len(origins)
        elif key in NUMBERS and isinstance(value, list) and value:
            changed[key] = [new for new, (own, (_, old)) in enumerate(zip(sections, origins, strict=True))
                            if old in (own.get(key) or [])]  # fmt: skip
        elif isinstance(value, list) and len(value) == layers.number and layers.number > 1:
            changed[key] = [
                _item(own, key, old) for own, (_, old) in zip(sections, origins, strict=True)
            ]  # fmt: skip
        elif key in BY_NUMBER and value not in (None, 0, 1, False) and moved and "layer_types" not in ours:
            raise CfmergeError(
                f"config.json: {key!r} ({value!r}) says by its number what a layer is, so that layers cannot change "
                "their numbers; write it out as a list with one entry a layer (layer_types) if the model's code takes "
                "one, or keep these layers where they are"
            )
    return {key: value for key, value in changed.items() if value != ours[key]}


def edited(config: Mapping[str, Any], section: str, changed: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a config, with new values, of which `changed` are those of one section."""
    if not section or not changed:
        return dict(changed)
    return {section: {**copy.deepcopy(dict(_section(config, section))), **changed}}


def _item(config: Mapping[str, Any], key: str, layer: int) -> Any:
    value = config.get(key)
    if not isinstance(value, list) or layer >= len(value):
        raise CfmergeError(
            f"config.json: {key!r} has one entry a layer in the base, and no entry for layer {layer} in another model "
            "of the stack; write it there"
        )
    return value[layer]


def _section(config: Mapping[str, Any], section: str) -> Mapping[str, Any]:
    inner = config.get(section) if section else config
    return inner if isinstance(inner, Mapping) else {}
