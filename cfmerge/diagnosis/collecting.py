"""Numbers that a pass has found, as `Measured`."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from cfmerge.diagnosis.result import Measured
from cfmerge.errors import CfmergeError
from cfmerge.models import Parameter
from cfmerge.models.layers import named

OF_MATRICES = (
    "stable_ranks", "effective_ranks", "ranks", "spectra", "base_spectrum", "rows", "columns", "leading", "lesser",
    "null",
)  # fmt: skip
TINY = float(np.finfo(np.float32).tiny)


def collected(parameter: Parameter, found: Mapping[str, Any], place: int | None = None) -> Measured:
    """The numbers of a tensor, or of one of the matrices that it stacks.

    Args:
        found: the sums over its entries (`measuring.entry_sums`), of a matrix all its numbers.
        place: which of the stacked matrices; none: there is one.

    Raises:
        CfmergeError: sums of squares overflow float32.
    """
    gram = np.asarray(found["gram"], np.float64)
    both = np.asarray(found["both"], np.float64)
    if not (np.isfinite(gram).all() and np.isfinite(found["base"]) and np.isfinite(found["inner"]).all()):
        raise CfmergeError(
            f"tensor {parameter.name!r}: sums of squares of its values do not fit float32, so it cannot be diagnosed; "
            "values of this size (1e18 and more) are hardly those of a model"
        )
    lost = (np.diagonal(both) > 0) & (np.diagonal(gram) <= 0)  # a change whose squares are too small for float32
    gram = gram + np.diag(np.where(lost, TINY, 0))
    conflicts = np.divide(found["opposite"], both, out=np.zeros_like(both), where=both > 0)
    parts = named(parameter.name)
    by_place = parameter.scanned and parameter.layout.count("b") == 1  # it stacks layers, and nothing else
    layer = place if by_place else parts.layer if parts else None
    own: dict[str, Any] = {name: np.asarray(found[name], np.float64) for name in OF_MATRICES if name in found}
    if "growth" in found:
        own["growth"] = float(found["growth"])
        own["directions"] = tuple(map(int, found["directions"]))
        own["sides"] = parameter.canonical[1:]
    return Measured(
        kind=str(parameter.kind),
        shape=parameter.shape if place is None else parameter.canonical[1:],
        layer=layer,
        base_norm=float(np.sqrt(found["base"])),
        norms=np.sqrt(np.maximum(np.diagonal(gram), 0)),
        inner_base=np.asarray(found["inner"], np.float64),
        gram=gram,
        conflicts=np.clip(conflicts, 0, 1),
        **own,
    )
