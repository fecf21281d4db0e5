"""The data of a diagnosis."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

Severity = Literal["grave", "warning", "fact"]
SEVERITIES: tuple[Severity, ...] = ("grave", "warning", "fact")  # gravest first


@dataclasses.dataclass(frozen=True)
class Measured:
    """The numbers of one tensor, or of one layer of a tensor that stacks layers; arrays are NumPy's, in float64.

    `W_0` is the base's tensor, `D_t` the delta of expert t of T. See docs/diagnose.md for the equations.

    Attributes:
        kind: see `cfmerge.models.Kind`.
        shape: of the tensor as it is stored; of a layer of a stack, of its canonical matrix.
        layer: its number in the model, where its name tells one.
        base_norm: `||W_0||`, Frobenius.
        norms: `||D_t||`; 0 where the expert does not have or does not change it.
        inner_base: `<W_0, D_t>`.
        gram: `<D_s, D_t>`.
        conflicts: the share of opposite signs among the entries that both experts changed; 0 where there are none.
        stable_ranks: `||D_t||^2 / s_1^2`, s the singular values of `D_t`. This and all that follow are of canonical
            matrices that are not too large; of other tensors None.
        effective_ranks: the exponential of the entropy of `s^2 / sum s^2`.
        ranks: the number of singular values above what rounding makes.
        spectra: the leading singular values of each delta, largest first; `K = min(m, n, 32)`.
        base_spectrum: those of the base.
        rows, columns: `<A_s, A_t> / (||A_s|| ||A_t||)` with `A = D^T D` (inputs) and `A = D D^T` (outputs).
        leading, lesser, null: the shares of `||D_t||^2` in the base's leading, lesser and null input directions.
        directions: how many input directions are leading, lesser and null.
        sides: `(out, in)` of the canonical matrix.
        growth: how long ACE's merge is, at its defaults, see `cfmerge.least_squares.growth`.
    """

    kind: str
    shape: tuple[int, ...]
    layer: int | None
    base_norm: float
    norms: Float[np.ndarray, " T"]
    inner_base: Float[np.ndarray, " T"]
    gram: Float[np.ndarray, "T T"]
    conflicts: Float[np.ndarray, "T T"]
    stable_ranks: Float[np.ndarray, " T"] | None = None
    effective_ranks: Float[np.ndarray, " T"] | None = None
    ranks: Float[np.ndarray, " T"] | None = None
    spectra: Float[np.ndarray, "T K"] | None = None
    base_spectrum: Float[np.ndarray, " K"] | None = None
    rows: Float[np.ndarray, "T T"] | None = None
    columns: Float[np.ndarray, "T T"] | None = None
    leading: Float[np.ndarray, " T"] | None = None
    lesser: Float[np.ndarray, " T"] | None = None
    null: Float[np.ndarray, " T"] | None = None
    directions: tuple[int, int, int] | None = None
    sides: tuple[int, int] | None = None
    growth: float | None = None

    @property
    def is_matrix(self) -> bool:
        """Whether it has the numbers of a canonical matrix."""
        return self.spectra is not None


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something that the numbers tell.

    Attributes:
        kind: which finding it is, such as "foreign-base"; docs/diagnose.md lists them.
        text: a sentence with the number in it.
        number: the number behind it.
        experts: those that it is about.
        tensors: those that it is about, the worst first.
    """

    kind: str
    severity: Severity
    text: str
    number: float
    experts: tuple[str, ...] = ()
    tensors: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Recommendation:
    """The method that the experts ask for.

    Attributes:
        method: as a recipe has it; empty where no merge is recommended.
        reason: why, in a sentence.
        evidence: what was measured for it.
        without: experts that are to be left out.
    """

    method: str
    reason: str
    evidence: str
    without: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """All that a base and its experts tell before they are merged; `cfmerge.diagnose` makes it.

    Attributes:
        base: the base, as messages tell it.
        experts: the experts' names, in order.
        tensors: the numbers of every tensor by the base's names, in the base's order; of tensors that stack layers
            each layer by itself, as `name[layer]`.
        findings: gravest first.
        notes: the plan's notes, and what was not measured.
        weights: the experts', as they were given for the first of the tensors.
    """

    base: str
    experts: tuple[str, ...]
    tensors: Mapping[str, Measured]
    findings: tuple[Finding, ...]
    recommendation: Recommendation
    notes: tuple[str, ...]
    weights: tuple[float, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The diagnosis as plain values: numbers that are not finite are None."""
        return _plain(self)  # type: ignore[no-any-return]


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, np.ndarray | tuple | list):
        return [_plain(one) for one in (value.tolist() if isinstance(value, np.ndarray) else value)]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
