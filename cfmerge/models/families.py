"""Families of models and their names of tensors: embeddings, patches, and the experts of a mixture."""

import re
from collections.abc import Mapping
from typing import Any

from cfmerge.models.layouts import Shape

# --- embeddings: the last module of a name decides, not a wrapper that is called `embedder` -------------------------

LEAVES = {"weight", "bias", "kernel", "embedding", "scale"}
TABLE = re.compile(
    r"(?i)embed|^(tok|token|word|char|pos|position|type|input|vocab)\w*_emb[sd]?$|^emb$|^(wte|wpe|shared|lm_head|pos_emb\w*|position_ids_table|relative_attention_bias|output_layer|unembed\w*"
    r"|text_projection|position_bias|relative_position_bias_table|rel_pos_[hw]|\w+_tokens?)$"
)
DENSE = re.compile(r"embedder$|^patch_|proj|linear|dense|mapping|mlp|merger|^fc")
TABLES_IN_A_LIST = re.compile(r"^(embed_tokens|token_embed\w*|embeddings|word_embeddings)$")
POSITIONS = re.compile(r"pos(ition|itional)?_embed\w*$")
PATCH = re.compile(r"(patch_embed\w*|conv_proj|visual[./]conv1|(^|[./])embedding)[./]")


def is_embedding(name: str, axes: int, with_bias: bool) -> bool:
    """Whether a tensor is a table of rows, or the layer that reads it out.

    Args:
        name: the tensor's.
        axes: how many it has, without an axis of stacked layers.
        with_bias: whether a bias lies beside it: a table has none, a dense layer called `x_embedder` does.
    """
    if axes > 3:
        return bool(PATCH.search(name) or POSITIONS.search(name))
    parts = re.split(r"[./]", name)
    leaf = parts.pop() if parts[-1] in LEAVES and len(parts) > 1 else ""
    module = parts[-1]
    parent = parts[-2] if len(parts) > 1 else ""
    if module.isdigit():
        return bool(TABLES_IN_A_LIST.search(parent)) and not with_bias
    if parent == "lm_head" or (parent == "predictions" and module == "decoder"):
        return module == "decoder"
    if leaf == "embedding":
        return True
    if leaf == "kernel":  # Flax calls a table `embedding`; `image_embedding`, `patch_embed` read images
        named = module != "embedding" and TABLE.search(module) and not DENSE.search(module)
        return bool(named) or module.startswith("patch_embed")
    if module in {"lm_head", "text_projection", "conv_proj", "embed_out", "output_layer"}:
        return True
    if not leaf and axes > 1 and re.search(r"token|embed|text_projection|rel_pos|position_bias", module):
        return True
    return bool(TABLE.search(module)) and not DENSE.search(module) and not with_bias


# --- the experts of a mixture, packed in one array ------------------------------------------------------------------

PACKED = re.compile(
    r"^(?P<at>.*[./](?:experts|block_sparse_moe|moe|feed_forward|mlp)[./])"
    r"(?P<what>gate_up_proj|gate_proj|up_proj|down_proj|w1|w2|w3|w13|w13_weight|w2_weight|input_linear|output_linear|fc1|fc2)"
    r"(?P<leaf>[./]weight)?$"
)
BOTH = {"gate_up_proj", "w13", "w13_weight", "input_linear", "fc1"}  # gate and up, one after the other
DOWN = {"down_proj", "w2", "w2_weight", "output_linear", "fc2"}
INPUT_FIRST = {"gpt_oss", "llama4", "llama4_text", "qwen3_vl_moe", "qwen3_vl_moe_text"}  # (experts, in, out)


def packed_layout(name: str, shapes: Mapping[str, tuple[Shape, str]], config: Mapping[str, Any]) -> str:
    """`boi` or `bio` of an array that holds the matrices of all experts; empty where nothing tells.

    Told by its partner (what goes up has the shape of what comes down), else by the hidden size, of the config or of
    the router beside it, else by the family.
    """
    found, shape = PACKED.match(name), shapes[name][0]
    if not found or len(shape) != 3:
        return ""
    down = found["what"] in DOWN
    for what, theirs in _partners(found, shapes).items():
        up, low = (theirs, shape) if down else (shape, theirs)
        halves = 2 if (what if down else found["what"]) in BOTH else 1
        output_first = up[2] == low[1] and up[1] == halves * low[2]
        input_first = up[1] == low[2] and up[2] == halves * low[1]
        if output_first != input_first:
            return "boi" if output_first else "bio"
    _, a, b = shape
    hidden = _hidden_size(config) or _routed_size(found["at"], shapes)
    if hidden in (a, b) and a != b:
        return "boi" if (a == hidden) == down else "bio"
    family = config.get("model_type")
    return "" if not family else "bio" if family in INPUT_FIRST else "boi"


def _partners(found: re.Match[str], shapes: Mapping[str, tuple[Shape, str]]) -> dict[str, Shape]:
    """The shapes of the packed arrays of the other direction in the same layer."""
    others = sorted(BOTH | {"gate_proj", "w1"}) if found["what"] in DOWN else sorted(DOWN)
    names = {what: found["at"] + what + (found["leaf"] or "") for what in others}
    beside = {what: shapes[name][0] for what, name in names.items() if name in shapes}
    return {what: shape for what, shape in beside.items() if len(shape) == 3}


def _routed_size(at: str, shapes: Mapping[str, tuple[Shape, str]]) -> int | None:
    """The size of what the router beside packed arrays reads."""
    where = re.sub(r"experts[./]$", "", at)
    for router in ("router", "gate"):
        for leaf, axis in (("weight", 1), ("kernel", 0)):
            shape = shapes.get(f"{where}{router}{where[-1]}{leaf}", ((), ""))[0]
            if len(shape) == 2:
                return shape[axis]
    return None


def _hidden_size(config: Mapping[str, Any]) -> int | None:
    text = config.get("text_config")
    inner = text if isinstance(text, Mapping) else {}
    return config.get("hidden_size") or inner.get("hidden_size")
