"""Every method and transform of the registry as a method that can be made, and the measurements that some need."""

import numpy as np

from cfmerge import methods
from cfmerge.methods import Method

BEHIND = {"half_flatten", "larv", "lines", "subspace_boosting", "svc"}  # transforms that stand behind a method
OF_FACTORS = {"peft_linear"}  # methods that take no dense delta
CHOOSING = {"auto"}  # methods that others take the place of: tests/diagnosis/test_choice.py
PARTS = [
    entry.name if entry.kind == "method" else f"average >> {entry.name}" if entry.name in BEHIND
    else f"{entry.name} >> average"
    for entry in methods.registry().values() if entry.name not in OF_FACTORS | CHOOSING
]  # fmt: skip
ARGUMENTS = {  # parameters without a default, and steps enough to show something
    "drop >> average": "drop(p=0.5) >> average", "trim >> average": "trim(density=0.5) >> average",
    "nearswap": "nearswap(t=0.05)", "peft_svd": "peft_svd(rank=2)",
    "low_rank >> average": "low_rank(rank=2) >> average",
}  # fmt: skip


def text_of(part: str) -> str:
    return ARGUMENTS.get(part, part)


def count(method: Method) -> int:
    """How many experts to try it with."""
    least, most = method.needs.experts
    return min(max(3, least), most or 3)


def moments_of(method: Method, deltas: np.ndarray) -> np.ndarray | None:
    """Measurements of a matrix, one for each expert, that go with its delta and not with the delta's size."""
    unit = deltas / np.maximum(np.sqrt(np.sum(deltas**2, axis=(1, 2), keepdims=True)), 1e-300)
    if method.needs.moments == "fisher":
        return np.abs(unit) + 0.1
    return np.einsum("tki,tkj->tij", unit, unit) + 0.1 * np.eye(deltas.shape[2]) if method.needs.moments else None
