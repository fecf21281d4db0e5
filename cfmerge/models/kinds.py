"""Kinds: the roles of parameters in a merge, read off names, shapes and config.json."""

import dataclasses
import enum
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from cfmerge.errors import CfmergeError
from cfmerge.models.buffers import is_buffer
from cfmerge.models.families import PACKED, is_embedding, packed_layout
from cfmerge.models.heads import is_head
from cfmerge.models.jax_families import dense_layout, has_turned_kernels, named_layout, reads_out
from cfmerge.models.layouts import Shape, check_layout
from cfmerge.models.stacks import unstacked


class Kind(enum.StrEnum):
    """The role of a parameter in a merge."""

    MATRIX = "matrix"  # a dense layer: methods of all families apply
    CONVOLUTION = "convolution"  # the same, its window folded into the inputs
    EMBEDDING = "embedding"  # a table of rows, or the layer that reads it out; patch and position embeddings
    VECTOR = "vector"  # biases, norms, scalars, and tensors without a known matrix form
    HEAD = "head"  # a task's own output layer
    OTHER = "other"  # integers, booleans and running statistics


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One tensor of a checkpoint, as the merge sees it.

    Attributes:
        layout: empty where there is no canonical matrix.
        note: why a tensor that may be a matrix is none.
        scanned: it stacks the layers of the model, so that a number in its name is none of theirs.
    """

    name: str
    shape: Shape
    dtype: str
    kind: Kind
    layout: str = ""
    note: str = ""
    scanned: bool = False

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def canonical(self) -> tuple[int, int, int]:
        """`(batch, out, in)` of the canonical view.

        Raises:
            CfmergeError: there is none.
        """
        check_layout(self.name, self.shape, self.layout)
        sizes = dict.fromkeys("boi", 1)
        for letter, size in zip(self.layout, self.shape, strict=True):
            sizes[letter] *= size
        return sizes["b"], sizes["o"], sizes["i"]

    def describe_layout(self) -> str:
        """`(in, out)` and the like, for people."""
        words = {"o": "out", "i": "in", "b": "stack"}
        return "(" + ", ".join(words[letter] for letter in self.layout) + ")" if self.layout else "-"


# --- kinds by name ----------------------------------------------------------------------------------------------

RUNNING = re.compile(r"(running_mean|running_var|moving_mean|moving_variance|num_batches_tracked|batch_stats[./].*)$")
CONV1D = re.compile(r"(^|[./])(attn|crossattention|mlp)[./](c_attn|c_proj|c_fc|q_attn)[./]weight$")
CONV1D_MODELS = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "gpt2-moe"}
TORCH_MATRIX = re.compile(r"(weight|_weight)$")
FLAX_KERNEL = re.compile(r"(^|[./])kernel$")
DEPTHWISE = "one input channel per filter (depthwise, or images of one channel): no common input matrix"
BIAS = re.compile(r"(^|[./_])(bias|scale|A_log)$")  # never a matrix, whatever its shape


def classify(shapes: Mapping[str, tuple[Shape, str]], config: Mapping[str, Any] | None = None) -> dict[str, Parameter]:
    """The kind and layout of every parameter, from names, shapes, dtypes and the model's config.

    Args:
        shapes: `{name: (shape, dtype name)}` of the whole model; name parts are joined by `.` or `/`.
        config: the Hugging Face `config.json`, where there is one.

    Raises:
        CfmergeError: a shape contradicts the layout that the config states.
    """
    short = {name: re.sub(r"[./]value$", "", name) for name in shapes}  # the leaf of an nnx variable
    if len(set(short.values())) < len(short):
        short = {name: name for name in shapes}
    inner, axes = unstacked({short[name]: header for name, header in shapes.items()})
    turned, known = has_turned_kernels(inner), config or {}
    return {
        name: _as_stored(_classify_one(short[name], inner, known, turned), name, shape, axes.get(short[name]))
        for name, (shape, _) in shapes.items()
    }


def _as_stored(parameter: Parameter, name: str, shape: Shape, axis: int | None) -> Parameter:
    """The parameter under its own name, with the axis of the layers that it stacks."""
    layout = parameter.layout
    if layout and axis is not None:
        layout = layout[:axis] + "b" + layout[axis:]
    return dataclasses.replace(parameter, name=name, shape=shape, layout=layout, scanned=axis is not None)


def _classify_one(
    name: str, shapes: Mapping[str, tuple[Shape, str]], config: Mapping[str, Any], turned: bool
) -> Parameter:
    """The kind and layout of one tensor, without an axis of stacked layers."""
    shape, dtype = shapes[name]

    def parameter(kind: Kind, layout: str = "", note: str = "") -> Parameter:
        return Parameter(name, shape, dtype, kind, layout, note)

    if not is_float(dtype) or is_running(name, shapes) or is_buffer(name, shape):
        return parameter(Kind.OTHER)
    head = is_head(name, shapes)
    if len(shape) < 2:
        return parameter(Kind.HEAD if head else Kind.VECTOR)
    if reads_out(name, len(shape)):
        return parameter(Kind.EMBEDDING, "io")
    with_bias = name.rpartition(".")[0] + ".bias" in shapes
    if not head and is_embedding(name, len(shape), with_bias):
        transposed = FLAX_KERNEL.search(name) or name.endswith("text_projection")  # OpenCLIP: x @ projection
        layout = {2: "io" if transposed else "oi"}.get(len(shape), "")
        return parameter(Kind.EMBEDDING, layout)
    named = named_layout(name, shapes)
    if named:
        return parameter(Kind.HEAD if head else Kind.MATRIX, named)
    if CONV1D.search(name) and config.get("model_type", "gpt2") in CONV1D_MODELS:
        return _conv1d(parameter, name, shape, shapes, config)
    layout = _layout(name, shapes, config, turned)
    if not layout:
        is_line = sum(size > 1 for size in shape) < 2  # a probe or a token of shape (1, 1, d)
        note = "its axes are not known from its name: give a rule with a layout to solve it"
        return parameter(Kind.HEAD if head else Kind.VECTOR, note="" if BIAS.search(name) or is_line else note)
    kind = Kind.CONVOLUTION if layout.count("i") > 1 and layout.count("o") == 1 else Kind.MATRIX
    if kind is Kind.CONVOLUTION and FLAX_KERNEL.search(name) and len(shape) == 3 and _is_attention_out(name):
        kind = Kind.MATRIX
    if kind is Kind.CONVOLUTION and _is_depthwise(shape, layout):
        return parameter(Kind.VECTOR, note=DEPTHWISE)
    return parameter(Kind.HEAD if head else kind, layout)


def _layout(name: str, shapes: Mapping[str, tuple[Shape, str]], config: Mapping[str, Any], turned: bool) -> str:
    """The layout of a tensor of two or more axes; empty where nothing tells it."""
    axes = len(shapes[name][0])
    if FLAX_KERNEL.search(name):
        return _kernel_layout(name, shapes, turned)
    if name.endswith("visual.proj"):  # OpenCLIP: x @ proj
        return "io"
    if PACKED.match(name) and axes == 3:
        return packed_layout(name, shapes, config)
    if TORCH_MATRIX.search(name) and (axes != 3 or "conv" in name.lower()):
        return {2: "oi", 3: "oii", 4: "oiii", 5: "oiiii"}.get(axes, "")
    return ""


def is_float(dtype: str) -> bool:
    """Whether a dtype name (`float32`, `bfloat16`, `float8_e4m3fn`, ...) is a floating-point one."""
    return "float" in dtype


def is_running(name: str, shapes: Iterable[str]) -> bool:
    """Whether a tensor is a statistic of a batch norm: PyTorch's, linen's `batch_stats`, nnx's `mean` beside `var`."""
    found = re.search(r"(^|[./])(mean|var)$", name)
    beside = name[: found.start(2)] + {"mean": "var", "var": "mean"}[found[2]] if found else ""
    return bool(RUNNING.search(name)) or (bool(beside) and beside in shapes)


def _is_depthwise(shape: Shape, layout: str) -> bool:
    channels = [size for size, letter in zip(shape, layout, strict=True) if letter == "i"]
    in_channels = channels[0] if layout[0] != "i" else channels[-1]
    out = next(size for size, letter in zip(shape, layout, strict=True) if letter == "o")
    return in_channels == 1 and out > 1


def _conv1d(
    parameter: Any,
    name: str,
    shape: Shape,
    shapes: Mapping[str, tuple[Shape, str]],
    config: Mapping[str, Any],
) -> Parameter:
    """GPT-2's Conv1D stores (in, out); its bias has one entry per output and says so."""
    bias = shapes.get(name.removesuffix("weight") + "bias")
    if len(shape) != 2:
        raise CfmergeError(f"tensor {name!r}: a Conv1D weight has two axes, found shape {shape}")
    if bias is not None and bias[0] != (shape[1],):
        if bias[0] == (shape[0],):
            return parameter(Kind.MATRIX, "oi")
        raise CfmergeError(
            f"tensor {name!r} of shape {shape} does not fit its bias of shape {bias[0]}: "
            "neither (in, out) nor (out, in)"
        )
    return parameter(Kind.MATRIX, "io")


def _kernel_layout(name: str, shapes: Mapping[str, tuple[Shape, str]], turned: bool) -> str:
    """A Flax kernel: dense `io` (of `FlaxConv1D` `oi`), attention `ioo` / `iio`, convolution `i..io`.

    Empty where name, bias and shape leave it open (such as layers stacked along an axis that no norm shows).
    """
    shape = shapes[name][0]
    module = re.split(r"[./]", name)[-2] if name != "kernel" else ""
    bias = shapes.get(name.removesuffix("kernel") + "bias", ((), ""))[0]
    projects = module in {"query", "key", "value", "wq", "wq_b", "wkv_b"}  # the last three: MaxText's latent attention
    if len(shape) == 2:
        return dense_layout(name, shapes, turned)
    if len(shape) == 3 and bias == (shape[0], shape[2]) != shape[1:]:
        return "bio"  # bias (layers, out)
    splits = bias == shape[1:] and bias != (shape[0], shape[2])  # bias (heads, head_dim)
    if len(shape) == 3 and (projects or splits):
        return "ioo"
    window = len(shape) > 3 and max(shape[:-2]) <= 16 and not projects and module != "out"
    read_out = len(shape) == 3 and module == "out"
    if bias == shape[-1:] or "conv" in name.lower() or window or read_out:
        return "i" * (len(shape) - 1) + "o"
    return ""


def _is_attention_out(name: str) -> bool:
    return bool(re.search(r"(^|[./])out[./]kernel$", name))
