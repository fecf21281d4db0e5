"""Other names of the same tensor: renames from version to version of a library, and wrappers of a model.

A name is brought to a canonical spelling; base and expert are paired where their canonical names are one. What is
left is paired through a prefix that all names of a part have in one of the two models.
"""

import functools
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from cfmerge.models.layouts import Shape

# Modules that frameworks put around a model or a part of it, at any depth.
WRAPPERS = re.compile(
    r"(^|(?<=[./]))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module|module|base_layer)[./]"
)
# (pattern, canonical spelling), applied in order; the comments name who writes which. The new names of transformers 5
# are those of its conversion_mapping.py.
RENAMES: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = tuple(
    (re.compile(pattern), canonical)
    for pattern, canonical in (
        # wrappers that training frameworks put in front of a whole model
        (r"^(base_model\.model|(\d+\.)?auto_model|backbone)\.", ""),
        (r"^embedding\.weight$", "embeddings.weight"),  # Mamba
        # TensorFlow's BERT, as it is on the hub
        (r"(\w*[Nn]orm\w*)\.gamma$", r"\1.weight"),
        (r"(\w*[Nn]orm\w*)\.beta$", r"\1.bias"),
        # torch.nn.utils.weight_norm and its successor torch.nn.utils.parametrizations.weight_norm
        (r"weight_g$", "parametrizations.weight.original0"),
        (r"weight_v$", "parametrizations.weight.original1"),
        # vision and audio language models: a text model in `language_model`, towers at the root or in `model`
        (r"^(model\.)?language_model\.lm_head\.", "lm_head."),
        (r"^(model\.)?language_model\.(model\.)?", "model."),
        (r"^text_model\.lm_head\.", "lm_head."),
        (r"^(text_model\.model|model\.text_model)\.", "text_model."),
        (
            r"^model\.(visual|vision_tower|vision_model|image_tower|video_tower|audio_tower|vision_embed_tokens"
            r"|multi_modal_projector|image_newline|vqmodel|embed_vision|embed_audio|connector)(?=\.|$)",
            r"\1",
        ),
        (r"^(vision_tower|image_tower|video_tower)\.vision_model\.", r"\1."),
        (r"^thinker\.(model\.)?(visual|audio_tower)\.", r"thinker.\2."),
        (r"^thinker\.model\.language_model\.", "thinker.model."),
        # mixtures: Mixtral, PhiMoE, Granite
        (r"\.block_sparse_moe\.(experts\.)?", r".mlp.\1"),
        (r"\.experts\.(\d+)\.w1\.", r".experts.\1.gate_proj."),
        (r"\.experts\.(\d+)\.w2\.", r".experts.\1.down_proj."),
        (r"\.experts\.(\d+)\.w3\.", r".experts.\1.up_proj."),
        (r"\.mlp\.input_linear\.weight$", ".mlp.experts.gate_up_proj"),
        (r"\.mlp\.output_linear\.weight$", ".mlp.experts.down_proj"),
        (r"\.mlp\.router(\.layer)?\.weight$", ".mlp.gate.weight"),
        (r"\.experts\.fc1\.weight$", ".experts.gate_up_proj"),  # Aria
        (r"\.experts\.fc2\.weight$", ".experts.down_proj"),
        (r"\.mlp\.gate\.moe_statics\.", ".mlp.moe_statics."),  # ERNIE
        # GPT-NeoX
        (r"^embed_out\.", "lm_head."),
        # vision transformers: ViT, DeiT, BEiT, AST, DINOv2, Swin, SegFormer
        (r"\.attention\.attention\.([qv])_bias$", r".attention.\1_proj.bias"),
        (
            r"\.attention\.self\.relative_position_bias_table$",
            r".attention.relative_position_bias.relative_position_bias_table",
        ),
        (r"(^|\.)encoder\.patch_embeddings\.(\d+)\.", r"\1stages.\2.patch_embeddings."),
        (r"(^|\.)encoder\.block\.(\d+)\.", r"\1stages.\2.blocks."),
        (r"(^|\.)encoder\.layer_norm\.(\d+)\.", r"\1stages.\2.layer_norm."),
        (r"\.attention\.self\.sr\.", ".attention.sequence_reduction.sequence_reduction."),
        (r"\.attention\.self\.layer_norm\.", ".attention.sequence_reduction.layer_norm."),
        (r"(stages\.\d+\.blocks\.\d+\.mlp\.)dense(\d)\.", r"\1fc\2."),
        (r"(stages\.\d+\.blocks\.\d+\.)layer_norm_1\.", r"\1layernorm_before."),
        (r"(stages\.\d+\.blocks\.\d+\.)layer_norm_2\.", r"\1layernorm_after."),
        (r"\.attention\.(attention|self)\.(query|key|value)\.", lambda found: f".attention.{found[2][0]}_proj."),
        (r"\.attention\.output\.dense\.", ".attention.o_proj."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"(?<!attention)\.output\.dense\.", ".mlp.fc2."),
        (r"(^|\.)encoder\.layers?\.(\d+)\.", r"\1layers.\2."),
    )
)


class Pairs(NamedTuple):
    """`sources` maps the base's names to the expert's, `told` is one line for each way that they were found."""

    sources: dict[str, str]
    told: list[str]
    ambiguous: list[str]


@functools.lru_cache(1 << 16)
def canonical(name: str) -> str:
    """The spelling that all known names of a tensor are brought to."""
    name = WRAPPERS.sub("", name)
    for pattern, spelling in RENAMES:
        name = pattern.sub(spelling, name)
    return name


def pair(base: Mapping[str, Shape], expert: Mapping[str, Shape]) -> Pairs:
    """The tensor of the expert for each of the base: by name, by a known rename, by a prefix.

    Args:
        base, expert: `{name: shape}`; shapes decide between prefixes that fit equally well.
    """
    sources = {name: name for name in base if name in expert}
    told: list[str] = []
    if len(sources) == len(base) == len(expert):
        return Pairs(sources, told, [])
    ours, theirs = _canonical_names(base, sources), _canonical_names(expert, sources.values())
    renamed = {ours[key]: theirs[key] for key in ours if key in theirs}
    if renamed:
        told.append(_describe(renamed))
    sources |= renamed
    ours = {key: name for key, name in ours.items() if name not in renamed}
    taken = set(renamed.values())
    theirs = {key: name for key, name in theirs.items() if name not in taken}
    ambiguous: list[str] = []
    while ours and theirs:
        best = _best_prefix(ours, theirs, base, expert)
        if best is None:
            break
        prefixes, found = best
        if len(prefixes) > 1:
            ambiguous = [describe_prefix(prefix) for prefix in prefixes]
            break
        told.append(f"its names are the base's with {describe_prefix(prefixes[0])} ({len(found)} tensors)")
        sources |= {ours.pop(a): theirs.pop(b) for a, b in found.items()}
    return Pairs({name: sources[name] for name in base if name in sources}, told, ambiguous)


def _canonical_names(names: Mapping[str, Shape], paired: object) -> dict[str, str]:
    """`{canonical: name}` of the names that are not paired; two that would be one keep their own spelling."""
    done = set(paired)  # type: ignore[call-overload]
    found: dict[str, list[str]] = defaultdict(list)
    for name in names:
        found[canonical(name)].append(name)
    single = {key: same[0] for key, same in found.items() if len(same) == 1}
    several = {name: name for same in found.values() if len(same) > 1 for name in same}
    return {key: name for key, name in {**several, **single}.items() if name not in done}


def _describe(renamed: Mapping[str, str]) -> str:
    ours, theirs = next(iter(renamed.items()))
    return f"{len(renamed)} tensors are known under another name, such as {theirs!r} for the base's {ours!r}"


Prefix = tuple[str, str]  # (taken off, put in front), which turns the base's names into the expert's


def describe_prefix(prefix: Prefix) -> str:
    removed, added = prefix
    return f"{added!r} in front" if added else f"{removed!r} taken off"


def _best_prefix(
    ours: Mapping[str, str], theirs: Mapping[str, str], base: Mapping[str, Shape], expert: Mapping[str, Shape]
) -> tuple[list[Prefix], dict[str, str]] | None:
    """The prefix that pairs most names; all of those that pair as many, if others do too."""
    found: dict[Prefix, dict[str, str]] = defaultdict(dict)
    for key in theirs:
        for end, tail in _tails(key):
            if tail in ours:
                found["", key[:end]][tail] = key
    for key in ours:
        for end, tail in _tails(key):
            if tail in theirs:
                found[key[:end], ""][key] = tail
    scores = {
        prefix: (sum(base[ours[a]] == expert[theirs[b]] for a, b in pairs.items()), len(pairs))
        for prefix, pairs in found.items()
    }
    enough = min(3, (min(len(ours), len(theirs)) + 1) // 2)  # one tensor alone may be like another by chance
    scores = {prefix: score for prefix, score in scores.items() if score[0] and score[1] >= enough}
    if not scores:
        return None
    best = max(scores.values())
    prefixes = sorted(prefix for prefix, score in scores.items() if score == best)
    return _of_one_part(prefixes, found), found[prefixes[0]]


def _of_one_part(prefixes: Sequence[Prefix], found: Mapping[Prefix, Mapping[str, str]]) -> list[Prefix]:
    """Prefixes that pair the first one's names otherwise; others of the same score concern other parts."""
    first = found[prefixes[0]]
    ours, theirs = set(first), set(first.values())
    clash = [p for p in prefixes[1:] if ours & set(found[p]) or theirs & set(found[p].values())]
    return [prefixes[0], *clash]


def _tails(name: str) -> list[tuple[int, str]]:
    """The ends of a name after each of its parts, with where they begin; no end is a leaf alone."""
    starts = [match.end() for match in re.finditer(r"[./]", name)]
    return [(start, name[start:]) for start in starts if re.search(r"[./]", name[start:]) or len(starts) == 1]


def apply_renames(names: Sequence[str], rules: Sequence[tuple[str, str]]) -> dict[str, str]:
    """`{name: new name}` by regular expressions, each applied to what the one before it gave."""
    renamed = {name: name for name in names}
    for pattern, to in rules:
        renamed = {name: re.sub(pattern, to, current) for name, current in renamed.items()}
    return renamed
