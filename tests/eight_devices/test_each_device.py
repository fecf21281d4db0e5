"""Merging on each device: inside `shard_map`, and under `pmap`."""

from typing import Any

import jax
import numpy as np
import pytest
from every_part import PARTS, text_of
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from sharded_parts import EXPERTS, METHODS, mesh_of, some

import cfmerge


def on_each_device(method: str, way: str) -> tuple[np.ndarray, np.ndarray]:
    """Eight layers merged, each on a device, and the first and the last of them alone."""
    rng = np.random.default_rng(0)
    base, *deltas = (rng.standard_normal((8, 6, 9)).astype("f") for _ in range(EXPERTS + 1))
    stacks = [base, *(base + 0.1 * delta for delta in deltas)]
    grams = [np.einsum("boi,boj->bij", delta, delta) + 0.1 * np.eye(9, dtype="f") for delta in deltas]

    def merge(base: Any, experts: Any, moments: Any) -> Any:
        return cfmerge.merge_tensor(base, list(experts), method, moments=moments if method == "regmean" else None)

    if way == "pmap":
        found = jax.pmap(merge)(stacks[0], tuple(stacks[1:]), tuple(grams))
    else:
        mesh = jax.make_mesh((8,), ("data",))
        arrays = jax.device_put((stacks, grams), NamedSharding(mesh, P("data")))
        alone = lambda arrays: jax.tree.map(lambda array: array[0], arrays)  # noqa: E731
        each = lambda stacks, grams: merge(alone(stacks)[0], alone(stacks)[1:], alone(grams))[None]  # noqa: E731
        found = jax.jit(jax.shard_map(each, mesh=mesh, out_specs=P("data")))(*arrays)
    ends = [merge(stacks[0][n], [stack[n] for stack in stacks[1:]], [gram[n] for gram in grams]) for n in (0, -1)]
    assert len(found.sharding.device_set) == 8
    return np.asarray(found)[[0, -1]] - base[[0, -1]], np.stack(ends) - base[[0, -1]]


@pytest.mark.parametrize("method", some("regmean", "iso_c", "ties"))
def test_inside_shard_map(method):
    found, alone = on_each_device(method, "shard_map")
    assert np.linalg.norm(found - alone) <= METHODS[method] * np.linalg.norm(alone)


@pytest.mark.parametrize("method", some("ace"))
def test_under_pmap(method):
    found, alone = on_each_device(method, "pmap")
    assert np.linalg.norm(found - alone) <= METHODS[method] * np.linalg.norm(alone)


def _of_deltas_alone(part: str) -> bool:
    """Whether it needs nothing but deltas, of as many experts as there are."""
    needs = cfmerge.methods.make(text_of(part)).needs
    least, most = needs.experts
    return not needs.moments and least <= EXPERTS <= (most or EXPERTS)


@pytest.mark.long
@pytest.mark.parametrize("part", [part for part in PARTS if _of_deltas_alone(part)])
def test_every_method_inside_shard_map(part):
    """They are traced with varying values."""
    found, alone = on_each_device(text_of(part), "shard_map")
    assert np.linalg.norm(found - alone) <= 1e-4 * np.linalg.norm(alone) + 1e-7


def test_part_of_a_mesh_may_be_manual():
    """Inside a shard_map over one axis, the other stays Explicit."""
    mesh = mesh_of("explicit")
    rng = np.random.default_rng(0)
    stacks = [rng.standard_normal((4, 8, 6)).astype("f") for _ in range(3)]
    there = [jax.device_put(stack, NamedSharding(mesh, P("data", "model"))) for stack in stacks]

    def each(*stacks: jax.Array) -> jax.Array:
        base, *experts = (stack[0] for stack in stacks)
        return cfmerge.merge_tensor(base, experts, "actmat")[None]

    with jax.set_mesh(mesh):
        found = jax.jit(jax.shard_map(each, out_specs=P("data"), axis_names={"data"}))(*there)
    alone = cfmerge.merge_tensor(stacks[0][2], [stack[2] for stack in stacks[1:]], "actmat")
    np.testing.assert_allclose(np.asarray(found)[2], alone, atol=2e-5)
