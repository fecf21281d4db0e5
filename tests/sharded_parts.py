"""What tests of sharded trees share: the methods of different kinds that they merge by."""

import jax
import pytest
from jax.sharding import AxisType, Mesh

EXPERTS = 3
METHODS = {
    "ace": 2e-5,
    "actmat": 2e-4,
    "regmean": 2e-5,
    "tsv_m": 2e-5,
    "iso_c": 2e-5,
    "average": 1e-6,
    "ties": 1e-6,
    'ties(scope="tensor")': 1e-6,
    "dare_ties": 1e-6,
    "model_stock": 1e-5,
    "karcher": 1e-5,
}  # and how exactly each agrees with a merge on one device
KINDS = {"explicit": AxisType.Explicit, "auto": AxisType.Auto}


def some(*core: str) -> list:
    """The methods, those that are not named for long runs alone."""
    return [method if method in core else pytest.param(method, marks=pytest.mark.long) for method in METHODS]


def mesh_of(kind: str) -> Mesh:
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(KINDS[kind],) * 2)
