"""Boxes of a tensor's entries: ranges on every axis, that tile it, or that make up a range of its flat entries."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

from cfmerge.models import Shape

MAX_CORNERS = 10_000_000


class Box(NamedTuple):
    """Entries from `start` to before `stop` on every axis."""

    start: tuple[int, ...]
    stop: tuple[int, ...]

    @property
    def shape(self) -> Shape:
        return tuple(b - a for a, b in zip(self.start, self.stop, strict=True))

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def within(self, origin: tuple[int, ...]) -> tuple[slice, ...]:
        """Where it lies in an array whose first entry is `origin`."""
        return tuple(slice(a - o, b - o) for a, b, o in zip(self.start, self.stop, origin, strict=True))


def common(one: Box, other: Box) -> Box | None:
    """The entries that lie in both; None if there are none."""
    start = tuple(map(max, one.start, other.start))
    stop = tuple(map(min, one.stop, other.stop))
    return Box(start, stop) if all(a < b for a, b in zip(start, stop, strict=True)) else None


def boxes_of(shape: Shape, first: int, count: int) -> Iterator[Box]:
    """The boxes, in order, that hold so many entries of the flat tensor from one on.

    >>> [(box.start, box.stop) for box in boxes_of((3, 4), 2, 8)]
    [((0, 2), (1, 4)), ((1, 0), (2, 4)), ((2, 0), (3, 2))]
    """
    if count <= 0:
        return
    if len(shape) < 2:
        yield Box((first,), (first + count,)) if shape else Box((), ())
        return
    inner = math.prod(shape[1:])
    low, high = -(-first // inner), (first + count) // inner  # rows that are wanted whole
    if low > high:
        yield from _in_row(high, shape, first - high * inner, count)
        return
    if low * inner > first:
        yield from _in_row(low - 1, shape, first - (low - 1) * inner, low * inner - first)
    if low < high:
        yield Box((low, *(0,) * (len(shape) - 1)), (high, *shape[1:]))
    yield from _in_row(high, shape, 0, first + count - high * inner)


def _in_row(row: int, shape: Shape, first: int, count: int) -> Iterator[Box]:
    for box in boxes_of(shape[1:], first, count):
        yield Box((row, *box.start), (row + 1, *box.stop))


def tile(boxes: Sequence[Box], shape: Shape) -> bool:
    """Whether the boxes make up the tensor exactly: no entry is missing, none lies in two of them.

    Each box is a product of differences of steps, so the sum of the signed corners of all boxes is that of the whole
    tensor if and only if they tile it.

    >>> tile([Box((0, 0), (1, 4)), Box((1, 0), (3, 4))], (3, 4)), tile([Box((0, 0), (2, 4))] * 2, (4, 4))
    (True, False)
    """
    full = Box((0,) * len(shape), tuple(shape))
    if any(a < 0 or b > n for box in boxes for a, b, n in zip(box.start, box.stop, shape, strict=True)):
        return False
    if sum(box.size for box in boxes) != full.size:
        return False
    if not full.size:
        return True
    cut = [i for i, n in enumerate(shape) if any(box.start[i] != 0 or box.stop[i] != n for box in boxes)]
    if len(boxes) << len(cut) > MAX_CORNERS:
        return False
    corners: Counter[tuple[int, ...]] = Counter()
    for sign, box in [(-1, full), *((1, box) for box in boxes if box.size)]:
        for corner in product(*(((box.start[i], 1), (box.stop[i], -1)) for i in cut)):
            corners[tuple(at for at, _ in corner)] += sign * math.prod(own for _, own in corner)
    return not any(corners.values())
