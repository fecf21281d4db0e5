"""Layouts of JAX families, whose names say what their axes are: Gemma's einsums, tunix, MaxText, HF's Flax GPT-2.

q_einsum/w        (heads, in, head_dim)           one matrix: all heads' outputs, head by head
kv_einsum/w       (2, heads, in, head_dim)        two matrices: keys and values
attn_vec_einsum/w (heads, head_dim, out)
gating_einsum     (2, hidden, in) or (2, in, hidden), as `linear` beside it, (hidden, out), tells
q_proj/w          (in, heads, head_dim)           tunix; o_proj/w (heads, head_dim, out); lm_head/w (in, vocabulary)
"""

import re
from collections.abc import Mapping

from cfmerge.models.layouts import Shape

Shapes = Mapping[str, tuple[Shape, str]]

NAMED = (  # (the end of a name, the layout of its tensor)
    (r"(q|k|v)_einsum(_\d+)?([./](w|kernel))?", "oio"),
    (r"(kv|qkv)_einsum(_\d+)?([./](w|kernel))?", "boio"),
    (r"attn_vec_einsum(_\d+)?([./](w|kernel))?", "iio"),
    (r"(q|k|v)_proj[./]w", "ioo"),
    (r"o_proj[./]w", "iio"),
    (r"mm_input_projection([./]w|_weight)", "io"),  # Gemma's images, in JAX and in PyTorch: x @ w
    (r"MoeBlock_\d+[./](wi(_\d+)?|wo)", "bio"),  # MaxText's experts
    (r"router_logits", "io"),
)
ENDS = tuple((re.compile(rf"(?:^|[./]){end}$"), layout) for end, layout in NAMED)
GATING = re.compile(r"^(?P<at>(?:.*[./])?)(?P<what>gating_einsum|linear)(?P<leaf>[./](?:w|kernel))?$")
OUTPUT = re.compile(r"(^|[./])(lm_head[./]w|logits_dense[./]kernel)$")
CONV1D = re.compile(r"(^|[./])(attn|crossattention|mlp)[./](c_attn|c_proj|c_fc|q_attn)[./]kernel$")


def named_layout(name: str, shapes: Shapes) -> str:
    """The layout that a JAX family's name gives a tensor; empty where the name is none, or the shape another."""
    axes = len(shapes[name][0])
    for end, layout in ENDS:
        if end.search(name) and axes == len(layout):
            return layout
    return _gated_layout(name, shapes)


def reads_out(name: str, axes: int) -> bool:
    """Whether a tensor is `(in, vocabulary)`: the layer that reads tokens out, of tunix and MaxText."""
    return axes == 2 and bool(OUTPUT.search(name))


def _gated_layout(name: str, shapes: Shapes) -> str:
    """The layout of Gemma's `gating_einsum` or of `linear` beside it, with a first axis of experts in a mixture."""
    found = GATING.match(name)
    if not found:
        return ""
    gating, linear = (
        shapes.get(f"{found['at']}{what}{found['leaf'] or ''}", ((), ""))[0] for what in ("gating_einsum", "linear")
    )
    if not 2 <= len(linear) <= 3 or len(gating) != len(linear) + 1:
        return ""
    experts, halves, rows = "b" * (len(linear) - 2), gating[len(linear) - 2], linear[-2:]
    output_first, input_first = gating[-2:] == rows, gating[-2:] == rows[::-1]
    if halves != 2 or not (output_first or input_first):
        return ""
    if found["what"] == "linear":
        return experts + "io"
    return "" if rows[0] == rows[1] else experts + ("boi" if output_first else "bio")


# --- kernels (out, in) ------------------------------------------------------------------------------------------------


def has_turned_kernels(shapes: Shapes) -> bool:
    """Whether a model has GPT-2's `FlaxConv1D`, whose kernels are `(out, in)`: their biases show it."""
    return any(CONV1D.search(name) and _bias_tells(name, shapes) == "oi" for name in shapes)


def dense_layout(name: str, shapes: Shapes, turned: bool) -> str:
    """`io` of a kernel of two axes, or `oi` where the bias beside it says so.

    Args:
        turned: the model has `FlaxConv1D`: of a square one, or of one without a bias, the name decides.
    """
    return _bias_tells(name, shapes) or ("oi" if turned and CONV1D.search(name) else "io")


def _bias_tells(name: str, shapes: Shapes) -> str:
    """The layout that a bias, one entry for each output, gives the kernel beside it; empty where it fits both."""
    shape = shapes[name][0]
    bias = shapes.get(name.removesuffix("kernel") + "bias", ((), ""))[0]
    if len(shape) != 2 or shape[0] == shape[1]:
        return ""
    return "oi" if bias == shape[:1] else "io" if bias == shape[1:] else ""
