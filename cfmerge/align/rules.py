"""Rules of JAX's primitives: which axes of results are which axes of operands, and which meet.

A rule sees an equation's operands and returns its results. It is right if the results of operands that are permuted
along their atoms are the results permuted along theirs. A primitive without a rule fixes all that it sees (`fix_all`).
Rules of what takes some elements of an axis, or uses their order, are in `indexing`.
"""

import itertools
from collections.abc import Sequence
from typing import Any

from cfmerge.align.atoms import Atom, join, refactored
from cfmerge.align.values import Along, Facts, Rule, Value, fix_all, fix_axis, fixed, meet, result, shape

ELEMENTWISE = """
    abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp clz complex
    conj convert_element_type copy copy_p cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt imag
    integer_pow is_finite le lgamma log log1p logistic lt max min mul name ne neg nextafter not or population_count
    pow real reduce_precision rem round rsqrt select_n sharding_constraint shift_left shift_right_arithmetic
    shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh xor
"""


def elementwise(facts: Facts, equation: Any, operands: Sequence[Value]) -> list[Value]:
    arrays = [value.axes for value in operands if value.axes]
    return [result([meet(axes) for axes in zip(*arrays, strict=True)], operands)]


def unchanged(facts: Facts, equation: Any, operands: Sequence[Value]) -> list[Value]:
    return list(operands)


def broadcast(facts: Facts, equation: Any, operands: Sequence[Value]) -> list[Value]:
    axes = [Along()] * len(shape(equation.outvars[0]))
    for axis, place in zip(operands[0].axes, equation.params["broadcast_dimensions"], strict=True):
        axes[place] = axis
    return [Value(tuple(axes), operands[0].data)]


def transpose(facts: Facts, equation: Any, operands: Sequence[Value]) -> list[Value]:
    return [operands[0]._replace(axes=tuple(operands[0].axes[place] for place in equation.params["permutation"]))]


def squeeze(facts: Facts, equation: Any, operands: Sequence[Value]) -> list[Value]:
    return [_without(operands[0], equation.params["dimensions"])]


def reduce(facts: Facts, equation: Any, operands: Sequence[Value]) -> list[Value]:
    return [_without(operands[0], equation.params["axes"])]


def argument(facts: Facts, equation: Any, operands: Sequence[Value]) -> list[Value]:
    for place in equation.params["axes"]:
        fix_axis(operands[0].axes[place], f"`{equation.primitive.name}` over it")
    return [_without(operands[0], equation.params["axes"])]


def _without(value: Value, places: Sequence[int]) -> Value:
    return value._replace(axes=tuple(axis for place, axis in enumerate(value.axes) if place not in places))


def reshape(facts: Facts, equation: Any, operands: Sequence[Value]) -> list[Value]:
    (value,), old, new = operands, shape(equation.invars[0]), shape(equation.outvars[0])
    if equation.params["dimensions"] is not None:
        return fix_all(facts, equation, operands)
    if all(axis.atom is None for axis in value.axes) or 0 in old:
        return [Value((Along(),) * len(new), value.data)]
    atoms = [axis.atom or Atom(n) for axis, n in zip(value.axes, old, strict=True) if n > 1]
    made = iter(refactored(atoms, [n for n in new if n > 1]))
    ends = list(itertools.accumulate(old, lambda a, b: a * b))
    axes, reached = [], 1
    for n in new:  # an axis comes from those whose elements it steps over
        before, reached = reached, reached * n
        own = [
            axis.origins
            for axis, end, m in zip(value.axes, ends, old, strict=True)
            if n > 1 and m > 1 and end // m < reached and before < end
        ]
        axes.append(Along(next(made), frozenset().union(*own)) if n > 1 else Along())
    return [Value(tuple(axes), value.data)]


def dot(facts: Facts, equation: Any, operands: Sequence[Value]) -> list[Value]:
    (left_in, right_in), (left_batch, right_batch) = equation.params["dimension_numbers"]
    left, right = (value.axes for value in operands)
    batch = [meet([left[i], right[j]]) for i, j in zip(left_batch, right_batch, strict=True)]
    along = [meet([left[i], right[j]]).atom for i, j in _both(left, right, left_batch, right_batch)]
    pairs = list(zip(left_in, right_in, strict=True))
    for i, j in pairs:
        facts.reads(left[i], right[j])
    inner = [meet([left[i], right[j]]).atom for i, j in _both(left, right, left_in, right_in)]
    facts.contractions.append(([a for a in inner if a], [a for a in along if a]))
    free = [axis for place, axis in enumerate(left) if place not in (*left_in, *left_batch)]
    free += [axis for place, axis in enumerate(right) if place not in (*right_in, *right_batch)]
    return [result([*batch, *free], operands)]


def _both(left: Sequence[Along], right: Sequence[Along], i: Sequence[int], j: Sequence[int]) -> list[tuple[int, int]]:
    """The pairs along which neither operand is constant."""
    return [(a, b) for a, b in zip(i, j, strict=True) if left[a].atom is not None and right[b].atom is not None]


def convolution(facts: Facts, equation: Any, operands: Sequence[Value]) -> list[Value]:
    """Channels `groups x inner` meet a kernel `(groups x outer, inner)`: a depthwise one has one inner channel."""
    numbers, groups = equation.params["dimension_numbers"], equation.params["feature_group_count"]
    if equation.params["batch_group_count"] != 1:
        return fix_all(facts, equation, operands)
    images, kernel = operands
    (batch, channel, *space), (out, inner, *window) = numbers.lhs_spec, numbers.rhs_spec
    for axis in [*(images.axes[i] for i in space), *(kernel.axes[i] for i in window)]:
        fix_axis(axis, "a window of a convolution")
    inputs, outputs, own = images.axes[channel].atom, kernel.axes[out].atom, kernel.axes[inner]
    facts.reads(Along(), own)
    along = []
    if groups > 1 and inputs is not None and outputs is not None:
        group, *rest = refactored([inputs], [n for n in (groups, inputs.size // groups) if n > 1])
        head, *_ = refactored([outputs], [n for n in (groups, outputs.size // groups) if n > 1])
        join(group, head)
        inputs, along = (rest[0] if rest else None), [group]
    elif groups > 1:
        for axis in (images.axes[channel], kernel.axes[out], own):
            fix_axis(axis, "a grouped convolution over constants")
        inputs = None
    meet([Along(inputs), own])
    facts.contractions.append(([atom for atom in (inputs,) if atom and own.atom], along))
    sizes, axes = shape(equation.outvars[0]), [Along()] * len(images.axes)
    axes[numbers.out_spec[0]], axes[numbers.out_spec[1]] = images.axes[batch], kernel.axes[out]
    for place in numbers.out_spec[2:]:
        axes[place] = fixed(sizes[place], "a place in an image")
    return [result(axes, operands)]


RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE.split(), elementwise),
    "optimization_barrier": unchanged,
    "device_put": unchanged,
    "broadcast_in_dim": broadcast,
    "transpose": transpose,
    "squeeze": squeeze,
    **dict.fromkeys(
        ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "reduce_xor"), reduce
    ),
    "argmax": argument,
    "argmin": argument,
    "reshape": reshape,
    "dot_general": dot,
    "conv_general_dilated": convolution,
}
