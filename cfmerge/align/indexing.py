"""Rules of the primitives that take some elements of an axis, join axes end to end, or use the order of elements."""

from collections.abc import Sequence
from typing import Any

from cfmerge.align.atoms import Atom, between, fix, joined_parts, product
from cfmerge.align.values import Along, Facts, Rule, Value, fix_axis, fixed, meet, result, shape


def cumulative(facts: Facts, equation: Any, operands: Sequence[Value]) -> list[Value]:
    return _in_order(equation, operands, [equation.params["axis"]])


def reverse(facts: Facts, equation: Any, operands: Sequence[Value]) -> list[Value]:
    return _in_order(equation, operands, equation.params["dimensions"])


def pad(facts: Facts, equation: Any, operands: Sequence[Value]) -> list[Value]:
    padded = [place for place, padding in enumerate(equation.params["padding_config"]) if any(padding)]
    return _in_order(equation, operands, padded)


def pool(facts: Facts, equation: Any, operands: Sequence[Value]) -> list[Value]:
    names = ("window_dimensions", "window_strides", "base_dilation", "window_dilation")
    windows = zip(*(equation.params[name] for name in names), equation.params["padding"], strict=True)
    moved = [place for place, (*steps, padding) in enumerate(windows) if any(n != 1 for n in steps) or any(padding)]
    return _in_order(equation, operands, moved)


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


def iota(facts: Facts, equation: Any, operands: Sequence[Value]) -> list[Value]:
    sizes, place = shape(equation.outvars[0]), equation.params["dimension"]
    return [Value(tuple(fixed(n, "positions") if i == place else Along() for i, n in enumerate(sizes)))]


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


def split(facts: Facts, equation: Any, operands: Sequence[Value]) -> list[Value]:
    (value,), place = operands, equation.params["axis"]
    made, start, size = [], 0, sum(equation.params["sizes"])
    for length in map(int, equation.params["sizes"]):
        axes = list(value.axes)
        axes[place] = _sliced(axes[place], start, start + length, 1, size)
        made.append(Value(tuple(axes), value.data))
        start += length
    return made


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


def stack(facts: Facts, equation: Any, operands: Sequence[Value]) -> list[Value]:
    axes = [meet(axes) for axes in zip(*(value.axes for value in operands), strict=True)]
    axes.insert(equation.params["axis"], fixed(len(operands), "a stack along it"))
    return [result(axes, operands)]


def unstack(facts: Facts, equation: Any, operands: Sequence[Value]) -> list[Value]:
    (value,), place = operands, equation.params["axis"]
    fix_axis(value.axes[place], "a stack along it")
    return [value._replace(axes=value.axes[:place] + value.axes[place + 1 :])] * len(equation.outvars)


def tile(facts: Facts, equation: Any, operands: Sequence[Value]) -> list[Value]:
    """Repeats, end to end: a first factor along which the array is constant."""
    (value,) = operands
    axes = []
    for axis, count in zip(value.axes, equation.params["reps"], strict=True):
        if axis.atom is not None and count > 1:
            axis = axis._replace(atom=product([Atom(count), axis.atom]))
        axes.append(axis)
    return [Value(tuple(axes), value.data)]


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


def scatter(facts: Facts, equation: Any, operands: Sequence[Value]) -> list[Value]:
    """Rows that are changed: axes that the changes have whole remain, the others keep their order."""
    table, places, update = operands
    numbers, why = equation.params["dimension_numbers"], "an index into it"
    apart = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    window = iter(numbers.update_window_dims)
    sizes, lengths = shape(equation.invars[0]), shape(equation.invars[2])
    axes, whole = [], set()
    for i, (axis, size) in enumerate(zip(table.axes, sizes, strict=True)):
        place = None if i in apart else next(window)
        if place is not None and lengths[place] == size and i not in numbers.scatter_dims_to_operand_dims:
            axes.append(meet([axis, update.axes[place]]))
            whole.add(place)
        else:
            fix_axis(axis, why)
            axes.append(fixed(size, why))
    for axis in (*places.axes, *(axis for place, axis in enumerate(update.axes) if place not in whole)):
        fix_axis(axis, why)
    return [result(axes, operands)]


RULES: dict[str, Rule] = {
    **dict.fromkeys(("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"), cumulative),
    "rev": reverse,
    "pad": pad,
    **dict.fromkeys(("reduce_window_sum", "reduce_window_max", "reduce_window_min", "reduce_window"), pool),
    "sort": sort,
    "top_k": sort,
    "iota": iota,
    "slice": slice_,
    "split": split,
    "concatenate": concatenate,
    "dynamic_slice": dynamic_slice,
    "dynamic_update_slice": dynamic_update_slice,
    "stack": stack,
    "unstack": unstack,
    "tile": tile,
    "gather": gather,
    **dict.fromkeys(("scatter", "scatter-add", "scatter-max", "scatter-min", "scatter-mul", "scatter-sub"), scatter),
}
