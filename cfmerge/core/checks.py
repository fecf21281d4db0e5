"""Checks of a factory's arguments."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from cfmerge.errors import CfmergeError


def check(condition: bool, message: str) -> None:
    """Raises `CfmergeError(message)` unless the condition holds; for the parameters of a factory."""
    if not condition:
        raise CfmergeError(message)


def check_number(
    what: str, value: Any, low: float | int = -np.inf, high: float | int = np.inf, *, above: float | int | None = None
) -> None:
    """Raises `CfmergeError` unless the number lies in `[low, high]`, or in `(above, high]`; traced ones pass."""
    if isinstance(value, jax.core.Tracer) or value is None:
        return
    number = float(value)
    if (low <= number <= high) and np.isfinite(number) and (above is None or number > above):
        return
    raise CfmergeError(f"{what} must {_rule(low, high, above)}, got {value}")


def _rule(low: float, high: float, above: float | None) -> str:
    if np.isfinite(high):
        return f"lie in {f'({above:g}' if above is not None else f'[{low:g}'}, {high:g}]"
    if above is not None:
        return "be positive" if above == 0 else f"be above {above:g}"
    if np.isfinite(low):
        return "not be negative" if low == 0 else f"be at least {low:g}"
    return "be finite"


def as_array(value: Any, dtype: Any) -> Array:
    """A number as a scalar of a dtype: one that was traced in another precision may come in."""
    return jnp.asarray(value, dtype)
