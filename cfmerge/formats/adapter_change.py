"""The change that an adapter makes to one tensor of its base: as factors, or the tensor that comes out, by pieces."""

import dataclasses
import functools
import math
from collections.abc import Iterator

import numpy as np

from cfmerge.formats.adapter_parts import Added, Full, Part, Product, Rows
from cfmerge.formats.base import Container, Source, TensorInfo
from cfmerge.models import Shape, is_float
from cfmerge.models.deltas import Factors

AT_ONCE = 1 << 22  # entries, where all of a tensor is looked at


@dataclasses.dataclass
class Change:
    """All parts of an adapter that change one tensor, in the order in which they act.

    Attributes:
        base, name: the tensor's place in the base.
        file: the adapter's.
        full: the tensor that takes the place of the base's.
    """

    base: Source
    name: str
    file: Container
    full: Full | None = None
    products: list[Product] = dataclasses.field(default_factory=list)
    added: list[Added] = dataclasses.field(default_factory=list)
    rows: list[Rows] = dataclasses.field(default_factory=list)

    @property
    def parts(self) -> Iterator[Part | Product]:
        yield from ([self.full] if self.full else [])
        yield from self.products
        yield from self.added
        yield from self.rows

    def add(self, part: Part | Product) -> None:
        if isinstance(part, Full):
            self.full = part
        elif isinstance(part, Product):
            self.products.append(part)
        elif isinstance(part, Added):
            self.added.append(part)
        elif isinstance(part, Rows):
            self.rows.append(part)

    @property
    def shape(self) -> Shape:
        return (self.file.tensors[self.full.name] if self.full else self.base.tensors[self.name]).shape

    @property
    def only_full(self) -> bool:
        return self.full is not None and not (self.products or self.added or self.rows)

    @property
    def info(self) -> TensorInfo:
        """The header of the tensor that comes out: sums are in float32, whatever the base is stored in."""
        stored = self.file.tensors[self.full.name].dtype if self.full else self._wide
        return TensorInfo(self.shape, stored if self.only_full else self._wide, self.file.path)

    @property
    def _wide(self) -> np.dtype:
        stored = [self.base.tensors[self.name].dtype] if self.full is None else []
        return np.dtype(np.float64 if np.dtype(np.float64) in stored else np.float32)

    @property
    def _scaled(self) -> Product | None:
        """The product that has a magnitude (DoRA)."""
        return next((one for one in self.products if one.pair.magnitude), None)

    @property
    def rank(self) -> int | None:
        """The rank of all products together; None where the change is more than they are."""
        more = self.full or self.added or self.rows or self._scaled
        return None if more or any(one.stacked for one in self.products) else sum(p.pair.rank for p in self.products)

    def factors(self, first: int = 0, count: int | None = None) -> Factors:
        """The change as a product of two factors; see `rank`. Several have their scales' roots in both of them."""
        each = [Factors(*one.factors(self.file.read), first, count, one.pair.scale) for one in self.products]
        if len(each) == 1:
            return each[0]
        lefts, rights = zip(*(one.balanced for one in each), strict=True)
        return Factors(np.concatenate(lefts, axis=1), np.concatenate(rights), first, count)

    def read(self, first: int = 0, count: int | None = None) -> np.ndarray:
        """The tensor that comes out; flat entries of it, with a count."""
        if self.only_full:
            return self.file.read(self.full.name, first, count)  # type: ignore[union-attr]
        if count is None:
            return self._flat(0, math.prod(self.shape)).reshape(self.shape)
        return self._flat(first, count)

    def _flat(self, first: int, count: int) -> np.ndarray:
        tensor = self._sum(first, count)
        if self._scaled:
            tensor *= self._ratios[self._axis_index(first, count)]
        for added in self.added:
            tensor += added.scale * self.file.read(added.name).reshape(-1)[first : first + count].astype(tensor.dtype)
        width = math.prod(self.shape[1:])
        for rows in self.rows:
            new = self.file.read(rows.name)
            for place, row in zip(rows.indices, new, strict=True):
                start, end = max(first, place * width), min(first + count, (place + 1) * width)
                if start < end:
                    tensor[start - first : end - first] = row.reshape(-1)[start - place * width : end - place * width]
        return tensor

    def _sum(self, first: int, count: int) -> np.ndarray:
        """`W + s B A`, flat."""
        stored = self.file.read(self.full.name, first, count) if self.full else self.base.read(self.name, first, count)
        total = stored.astype(self._wide)
        for one in self.products:
            if not one.stacked:
                total += Factors(*one.factors(self.file.read), first, count).product
                continue
            size = math.prod(self.shape[1:])
            for number in range(first // size, -(-(first + count) // size)):
                start, end = max(first, number * size), min(first + count, (number + 1) * size)
                factors = one.factors(self.file.read, number)
                total[start - first : end - first] += Factors(*factors, start - number * size, end - start).product
        return total

    # --- DoRA: m (W + s B A) / norms ------------------------------------------------------------------------------

    @property
    def _axis(self) -> int:
        """The axis of the stored tensor that magnitudes belong to: outputs, or inputs where kohya's shape says so."""
        one = self._scaled
        assert one is not None
        shape = self.file.tensors[one.pair.magnitude].shape
        of_inputs = len(shape) > 1 and shape[0] == 1 and math.prod(shape) == shape[1] != 1 and one.pair.input_norms
        return int(one.turned != of_inputs)

    def _axis_index(self, first: int, count: int) -> np.ndarray:
        """The place of flat entries along that axis."""
        inner = math.prod(self.shape[self._axis + 1 :])
        return np.arange(first, first + count) // inner % self.shape[self._axis]

    @functools.cached_property
    def _ratios(self) -> np.ndarray:
        """Magnitude by norm, along the axis."""
        one = self._scaled
        assert one is not None
        size, length = math.prod(self.shape), self.shape[self._axis]
        squares = np.zeros(length)
        for first in range(0, size, AT_ONCE):
            count = min(AT_ONCE, size - first)
            piece = self._sum(first, count).astype(np.float64)
            squares += np.bincount(self._axis_index(first, count), piece**2, length)
        magnitudes = self.file.read(one.pair.magnitude).reshape(-1).astype(np.float64)
        return (magnitudes / np.sqrt(squares)).astype(self._wide)


def is_copy(change: Change) -> bool:
    """Whether the tensor that takes the base's place is a copy of it, in its own precision or rounded."""
    if change.full is None:
        return False
    ours, theirs = change.base.tensors[change.name], change.file.tensors[change.full.name]
    if ours.shape != theirs.shape or not is_float(ours.dtype.name):
        return False
    for first in range(0, ours.size, AT_ONCE):
        count = min(AT_ONCE, ours.size - first)
        base, other = change.base.read(change.name, first, count), change.file.read(change.full.name, first, count)
        if not np.array_equal(base.astype(other.dtype), other):
            return False
    return True
