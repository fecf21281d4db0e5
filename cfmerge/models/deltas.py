"""The forms in which a source has an expert's delta: a tensor beside the base's, or a product of two factors."""

import dataclasses
import math
from typing import Any, NamedTuple


class Dense(NamedTuple):
    """An expert's tensor; its delta is formed by taking off the base's."""

    tensor: Any


@dataclasses.dataclass(frozen=True)
class Factors:
    """A delta as a product, `left @ right` in the rows and columns of the stored tensor, or of a piece of it.

    Attributes:
        scale: the number by which `left` is the adapter's own (its `alpha / r`): methods that take the factors see each
            with the root of it.
    """

    left: Any
    right: Any
    first: int = 0
    count: int | None = None
    scale: float = 1.0

    @property
    def balanced(self) -> tuple[Any, Any]:
        """The factors, each with the root of the scale."""
        root = abs(self.scale) ** 0.5 or 1.0
        return self.left / math.copysign(root, self.scale), self.right * math.copysign(root, self.scale)

    @property
    def product(self) -> Any:
        """The delta itself, `(rows, columns)`; flat for a piece."""
        if self.count is None:
            return self.left @ self.right
        columns = self.right.shape[1]
        above, below = self.first // columns, -(-(self.first + self.count) // columns)  # rows that the piece touches
        flat = (self.left[above:below] @ self.right).reshape(-1)
        return flat[self.first - above * columns :][: self.count]


Delta = Dense | Factors
