"""Rules of JAX's primitives: which axes of results are which axes of operands, and which keep their order.

A rule sees an equation's operands and returns its results. It is right if the results of operands that are permuted
along their atoms are the results permuted along theirs. A primitive without a rule fixes all that it sees.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from cfmerge.align.atoms import Atom, between, fix, join, joined_parts, refactored

Origin = tuple[str, int]  # a tensor of the model, and its axis


class Along(NamedTuple):
    """One axis of an array: its atom, None if the array is constant along it; the tensors' axes that it comes from."""

    atom: Atom | None = None
    origins: frozenset[Origin] = frozenset()


class Value(NamedTuple):
    """An array of a trace. `data` says that it depends on the model's inputs; origins are of other arrays alone."""

    axes: tuple[Along, ...]
    data: bool = False


class Facts:
    """What a trace finds, beside the atoms.

    Attributes:
        read: axes of tensors that are contracted.
        looked_up: axes of tensors that remain where rows of them are looked up.
        arrays: the axes of all arrays.
        contractions: the contracted axes of each product, and those that run along in both its operands.
    """

    def __init__(self) -> None:
        self.read: set[Origin] = set()
        self.looked_up: set[Origin] = set()
        self.arrays: dict[tuple[int, ...], tuple[Atom, ...]] = {}
        self.contractions: list[tuple[list[Atom], list[Atom]]] = []

    def note(self, value: Value) -> None:
        atoms = tuple(axis.atom for axis in value.axes if axis.atom is not None)
        self.arrays[tuple(map(id, atoms))] = atoms

    def reads(self, left: Along, right: Along) -> None:
        self.read |= right.origins or left.origins


Rule = Callable[[Facts, Any, Sequence[Value]], list[Value]]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    def add(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return add


def fixed(size: int, why: str) -> Along:
    return Along(Atom(size, why) if size > 1 else None)


def fix_axis(axis: Along, why: str) -> None:
    if axis.atom is not None:
        fix(axis.atom, why)


def fix_all(facts: Facts, equation: Any, operands: Sequence[Value]) -> list[Value]:
    """The results of a primitive that is not known, or not followed."""
    why = f"`{equation.primitive.name}` is not followed"
    for axis in itertools.chain.from_iterable(value.axes for value in operands):
        fix_axis(axis, why)
    data = any(value.data for value in operands)
    return [Value(tuple(fixed(n, why) for n in shape(out)), data) for out in equation.outvars]


def shape(variable: Any) -> tuple[int, ...]:
    return tuple(getattr(variable.aval, "shape", ()))


def meet(axes: Sequence[Along]) -> Along:
    """One axis of several arrays that are combined entry by entry."""
    atoms = [axis.atom for axis in axes if axis.atom is not None]
    for atom in atoms[1:]:
        join(atoms[0], atom)
    return Along(atoms[0] if atoms else None, frozenset().union(*(axis.origins for axis in axes)))


def result(axes: Sequence[Along], operands: Sequence[Value]) -> Value:
    """An array made of the operands; one of data comes from no tensor."""
    data = any(value.data for value in operands)
    return Value(tuple(Along(axis.atom) for axis in axes) if data else tuple(axes), data)


ELEMENTWISE = """
    abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp clz complex conj convert_element_type
    copy copy_p cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt imag integer_pow is_finite le lgamma
    log log1p logistic lt max min mul name ne neg nextafter not or population_count pow real reduce_precision rem
    round rsqrt select_n shift_left shift_right_arithmetic shift_right_logical sharding_constraint sign sin sinh sqrt
    square stop_gradient sub tan tanh xor
"""


@rule(*ELEMENTWISE.split())
def elementwise(facts: Facts, equation: Any, operands: Sequence[Value]) -> list[Value]:
    arrays = [value.axes for value in operands if value.axes]
    return [result([meet(axes) for axes in zip(*arrays, strict=True)], operands)]


@rule("optimization_barrier", "device_put")
def unchanged(facts: Facts, equation: Any, operands: Sequence[Value]) -> list[Value]:
    return list(operands)


@rule("broadcast_in_dim")
def broadcast(facts: Facts, equation: Any, operands: Sequence[Value]) -> list[Value]:
    axes = [Along()] * len(shape(equation.outvars[0]))
    for axis, place in zip(operands[0].axes, equation.params["broadcast_dimensions"], strict=True):
        axes[place] = axis
    return [Value(tuple(axes), operands[0].data)]


@rule("transpose")
def transpose(facts: Facts, equation: Any, operands: Sequence[Value]) -> list[Value]:
    return [operands[0]._replace(axes=tuple(operands[0].axes[place] for place in equation.params["permutation"]))]


@rule("squeeze")
def squeeze(facts: Facts, equation: Any, operands: Sequence[Value]) -> list[Value]:
    return [_without(operands[0], equation.params["dimensions"])]


@rule("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "reduce_xor")
def reduce(facts: Facts, equation: Any, operands: Sequence[Value]) -> list[Value]:
    return [_without(operands[0], equation.params["axes"])]


@rule("argmax", "argmin")
def argument(facts: Facts, equation: Any, operands: Sequence[Value]) -> list[Value]:
    for place in equation.params["axes"]:
        fix_axis(operands[0].axes[place], f"`{equation.primitive.name}` over it")
    return [_without(operands[0], equation.params["axes"])]


def _without(value: Value, places: Sequence[int]) -> Value:
    return value._replace(axes=tuple(axis for place, axis in enumerate(value.axes) if place not in places))


@rule("reshape")
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


@rule("dot_general")
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


@rule("conv_general_dilated")
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


@rule("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
def cumulative(facts: Facts, equation: Any, operands: Sequence[Value]) -> list[Value]:
    return _in_order(equation, operands, [equation.params["axis"]])


@rule("rev")
def reverse(facts: Facts, equation: Any, operands: Sequence[Value]) -> list[Value]:
    return _in_order(equation, operands, equation.params["dimensions"])


@rule("pad")
def pad(facts: Facts, equation: Any, operands: Sequence[Value]) -> list[Value]:
    padded = [place for place, padding in enumerate(equation.params["padding_config"]) if any(padding)]
    return _in_order(equation, operands, padded)


@rule("reduce_window_sum", "reduce_window_max", "reduce_window_min", "reduce_window")
def pool(facts: Facts, equation: Any, operands: Sequence[Value]) -> list[Value]:
    names = ("window_dimensions", "window_strides", "base_dilation", "window_dilation")
    windows = zip(*(equation.params[name] for name in names), equation.params["padding"], strict=True)
    moved = [place for place, (*steps, padding) in enumerate(windows) if any(n != 1 for n in steps) or any(padding)]
    return _in_order(equation, operands, moved)


@rule("sort", "top_k")
def sort(facts: Facts, equation: Any, operands: Sequence[Value]) -> list[Value]:
    return _in_order(equation, operands, [equation.params.get("dimension", len(operands[0].axes) - 1)])


def _in_order(equation: Any, operands: Sequence[Value], places: Sequence[int]) -> list[Value]:
    """Results along some of whose axes the order counts; all operands have the same axes."""
    why = f"`{equation.primitive.name}` along it"
    arrays = [value.axes for value in operands if value.axes]
    axes = [meet(axes) for axes in zip(*arrays, strict=True)]
    for place in places:
        fix_axis(axes[place], why)
    made = []
    for out in equation.outvars:
        own = [Along(axis.atom) if i not in places else fixed(shape(out)[i], why) for i, axis in enumerate(axes)]
        made.append(result(own, operands))
    return made


@rule("iota")
def iota(facts: Facts, equation: Any, operands: Sequence[Value]) -> list[Value]:
    sizes, place = shape(equation.outvars[0]), equation.params["dimension"]
    return [Value(tuple(fixed(n, "positions") if i == place else Along() for i, n in enumerate(sizes)))]


@rule("slice")
def slice_(facts: Facts, equation: Any, operands: Sequence[Value]) -> list[Value]:
    (value,), p = operands, equation.params
    steps = p["strides"] or (1,) * len(value.axes)
    ranges = zip(value.axes, p["start_indices"], p["limit_indices"], steps, shape(equation.invars[0]), strict=True)
    return [Value(tuple(_sliced(*one) for one in ranges), value.data)]


def _sliced(axis: Along, start: int, stop: int, step: int, size: int) -> Along:
    if axis.atom is None or (start, stop, step) == (0, size, 1):
        return axis
    if step != 1:
        fix(axis.atom, "every other element of it is taken")
        return Along(fixed(-(-(stop - start) // step), "every other element of an axis").atom, axis.origins)
    atom = between(axis.atom, start, stop)
    return Along(atom if stop - start > 1 else None, axis.origins)


@rule("split")
def split(facts: Facts, equation: Any, operands: Sequence[Value]) -> list[Value]:
    (value,), place = operands, equation.params["axis"]
    made, start, size = [], 0, sum(equation.params["sizes"])
    for length in map(int, equation.params["sizes"]):
        axes = list(value.axes)
        axes[place] = _sliced(axes[place], start, start + length, 1, size)
        made.append(Value(tuple(axes), value.data))
        start += length
    return made


@rule("concatenate")
def concatenate(facts: Facts, equation: Any, operands: Sequence[Value]) -> list[Value]:
    place = equation.params["dimension"]
    filled = [value for value, variable in zip(operands, equation.invars, strict=True) if shape(variable)[place]]
    lengths = [n for variable in equation.invars if (n := shape(variable)[place])]
    axes = [
        meet(axes) for axes in zip(*(value.axes[:place] + value.axes[place + 1 :] for value in filled), strict=True)
    ]
    own = [value.axes[place] for value in filled]
    pieces = [axis.atom or Atom(n, "" if n > 1 else "a single element") for axis, n in zip(own, lengths, strict=True)]
    axes.insert(place, Along(joined_parts(pieces), frozenset().union(*(axis.origins for axis in own))))
    return [result(axes, operands)]


@rule("dynamic_slice")
def dynamic_slice(facts: Facts, equation: Any, operands: Sequence[Value]) -> list[Value]:
    value, sizes = operands[0], equation.params["slice_sizes"]
    axes = []
    for axis, n, size in zip(value.axes, sizes, shape(equation.invars[0]), strict=True):
        if n == size:
            axes.append(axis)
            continue
        fix_axis(axis, "an index into it")
        axes.append(fixed(n, "an index into it")._replace(origins=axis.origins))
    return [result(axes, operands)]


@rule("dynamic_update_slice")
def dynamic_update_slice(facts: Facts, equation: Any, operands: Sequence[Value]) -> list[Value]:
    value, update = operands[:2]
    axes = []
    for axis, own, n, size in zip(value.axes, update.axes, *map(shape, equation.invars[:2]), strict=True):
        if n == size:
            axes.append(meet([axis, own]))
            continue
        fix_axis(axis, "an index into it")
        fix_axis(own, "an index into it")
        axes.append(fixed(n, "an index into it"))
    return [result(axes, operands)]


@rule("gather")
def gather(facts: Facts, equation: Any, operands: Sequence[Value]) -> list[Value]:
    """Rows that are looked up: axes that are taken whole remain, the others keep their order."""
    (table, places), p = operands, equation.params
    numbers, sizes = p["dimension_numbers"], shape(equation.invars[0])
    kept = []
    for i, (axis, n, size) in enumerate(zip(table.axes, p["slice_sizes"], sizes, strict=True)):
        whole = n == size and i not in (*numbers.start_index_map, *numbers.operand_batching_dims)
        if not whole:
            fix_axis(axis, "an index into it")
        if i not in (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims):
            kept.append(axis if whole else fixed(n, "an index into it"))
    *batch, index = places.axes
    for i in numbers.start_indices_batching_dims:
        fix_axis(places.axes[i], "an index into it")
    fix_axis(index, "coordinates of an index")
    if batch:
        facts.looked_up |= frozenset().union(*(axis.origins for axis in kept))
        kept = [Along(axis.atom) for axis in kept]
    rows, columns = iter(batch), iter(kept)
    axes = [next(columns if i in numbers.offset_dims else rows) for i in range(len(shape(equation.outvars[0])))]
    return [result(axes, operands)]
