"""Merging trees that lie on several devices: under Explicit and Auto axes, eagerly and compiled.

Every expected value is the merge of the same numbers on one device.
"""

import contextlib
import gc
import warnings
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from sharded_parts import EXPERTS, METHODS, mesh_of, some

import cfmerge
from cfmerge.engine import cutting
from cfmerge.engine.units import Unit

SHAPES = {
    "embed": {"embedding": (16, 8)},
    "up": {"kernel": (8, 16), "bias": (16,)},
    "down": {"kernel": (16, 8)},
    "layers": {"kernel": (4, 8, 16)},
}
SPECS = {
    "embed": {"embedding": P(None, "model")},
    "up": {"kernel": P("data", "model"), "bias": P("model")},  # by FSDP and by tensor
    "down": {"kernel": P(("data", "model"))},  # fully
    "layers": {"kernel": P("data", None, "model")},  # the stacked axis too
}
RULES = [{"match": "layers/*", "layout": "bio"}]
Tree = Any


def numbers(seed: int, size: float = 1.0, dtype: Any = np.float32) -> Tree:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda shape: (size * rng.standard_normal(shape)).astype(dtype), SHAPES, is_leaf=is_shape)


def is_shape(value: Any) -> bool:
    return isinstance(value, tuple)


def trees(dtype: Any = np.float32) -> list[Tree]:
    """The base's, then the experts'."""
    base = numbers(0, 1.0, dtype)
    sizes = (0.01, 0.3, 0.05)  # heterogeneous, for ACE
    return [base, *(jax.tree.map(np.add, base, numbers(t + 1, sizes[t], dtype)) for t in range(EXPERTS))]


def laid(tree: Tree, mesh: Mesh, specs: Tree = SPECS) -> Tree:
    return jax.tree.map(lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), tree, specs)


def moments_of(method: str) -> list[Tree] | None:
    """Input Grams of the matrices, for RegMean."""
    if method != "regmean":
        return None

    def gram(seed: int, *shape: int) -> np.ndarray:
        rows = np.random.default_rng(seed).standard_normal((*shape[:-1], 32, shape[-1])).astype("f")
        return np.einsum("...ri,...rj->...ij", rows, rows)

    return [
        {"up/kernel": gram(t, 8), "down/kernel": gram(t, 16), "layers/kernel": gram(t, 4, 8)} for t in range(EXPERTS)
    ]


def merged_by(method: str, base: Tree, experts: list[Tree], **options: Any) -> Tree:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*")
        return cfmerge.merge_params(base, experts, method, rules=RULES, moments=moments_of(method), **options)


def assert_same(found: Tree, expected: Tree, base: Tree, tolerance: float) -> None:
    """The same deltas, up to the tolerance times their norm, leaf by leaf."""
    for leaf, wanted, start in zip(*map(jax.tree.leaves, (found, expected, base)), strict=True):
        change = np.asarray(wanted, np.float64) - np.asarray(start, np.float64)
        away = np.linalg.norm(np.asarray(leaf, np.float64) - np.asarray(wanted, np.float64))
        assert away <= tolerance * np.linalg.norm(change)


def assert_laid_as(found: Tree, base: Tree) -> None:
    for leaf, start in zip(jax.tree.leaves(found), jax.tree.leaves(base), strict=True):
        assert leaf.sharding.is_equivalent_to(start.sharding, leaf.ndim)
        assert leaf.sharding.mesh == start.sharding.mesh  # Explicit or Auto as well


@pytest.fixture(scope="module")
def alone() -> Any:
    """`alone(method)`: merged on one device."""
    known: dict[str, Tree] = {}

    def merged(method: str) -> Tree:
        if method not in known:
            base, *experts = trees()
            known[method] = merged_by(method, base, experts)
        return known[method]

    return merged


# --- as they lie --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", some("regmean", "ties"))
def test_eagerly_under_explicit_axes(method, alone):
    mesh = mesh_of("explicit")
    base, *experts = (laid(tree, mesh) for tree in trees())
    with jax.set_mesh(mesh):
        found = merged_by(method, base, experts)
    assert_laid_as(found, base)
    assert_same(found, alone(method), base, METHODS[method])


@pytest.mark.parametrize("method", some("ace", "ties", "dare_ties"))
def test_compiled_under_explicit_axes(method, alone):
    mesh = mesh_of("explicit")
    base, *experts = (laid(tree, mesh) for tree in trees())
    with jax.set_mesh(mesh):
        found = jax.jit(lambda base, experts: merged_by(method, base, experts))(base, experts)
    assert_laid_as(found, base)
    assert_same(found, alone(method), base, METHODS[method])


AXES = [  # compiled or not, in a context or not: each once here, all of them in the long run
    ("actmat", True, True), ("ties", False, False),
    *(pytest.param(method, context, compiled, marks=pytest.mark.long)
      for method in ("actmat", "ties") for context in (True, False) for compiled in (True, False)),
]  # fmt: skip


@pytest.mark.parametrize(("method", "context", "compiled"), AXES)
def test_under_auto_axes(method, context, compiled, alone):
    mesh = mesh_of("auto")
    base, *experts = (laid(tree, mesh) for tree in trees())
    with jax.set_mesh(mesh) if context else contextlib.nullcontext():
        merge = lambda base, experts: merged_by(method, base, experts)  # noqa: E731
        homes = jax.tree.map(lambda leaf: leaf.sharding, base)  # under jit XLA decides, if it is not told
        found = (jax.jit(merge, out_shardings=homes) if compiled else merge)(base, experts)
    assert_laid_as(found, base)
    assert_same(found, alone(method), base, METHODS[method])


@pytest.mark.parametrize("compiled", [True, pytest.param(False, marks=pytest.mark.long)], ids=["jit", "eager"])
def test_explicit_axes_without_a_context(compiled, alone):
    mesh = mesh_of("explicit")
    base, *experts = (laid(tree, mesh) for tree in trees())
    merge = lambda base, experts: merged_by("actmat", base, experts)  # noqa: E731
    found = (jax.jit(merge) if compiled else merge)(base, experts)
    assert_laid_as(found, base)
    assert_same(found, alone("actmat"), base, METHODS["actmat"])


@pytest.mark.parametrize(
    "method", [*(pytest.param(m, marks=pytest.mark.long) for m in ("ace", "tsv_m", "average")), "actmat"]
)
def test_float64_agrees_to_a_millionth(method):
    base, *experts = trees(np.float64)
    mesh = mesh_of("explicit")
    with jax.enable_x64(True):
        expected = merged_by(method, base, experts)
        there = [laid(tree, mesh) for tree in (base, *experts)]
        found = merged_by(method, there[0], there[1:])
        assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype(np.float64)}
        assert_same(found, expected, base, 1e-6)


def test_numbers_and_weights_that_are_traced(alone):
    """Weights and a method's numbers lie on the caller's mesh too."""
    mesh = mesh_of("explicit")
    host = trees()
    base, *experts = (laid(tree, mesh) for tree in host)

    def merge(base: Tree, experts: list[Tree], scale: jax.Array, weights: jax.Array) -> Tree:
        return merged_by(cfmerge.methods.task_arithmetic(scale), base, experts, weights=list(weights))

    with jax.set_mesh(mesh):
        found = jax.jit(merge)(base, experts, 0.5, jnp.array([1.0, 2.0, 3.0]))
        slope = jax.jit(jax.grad(lambda scale: jnp.sum(merge(base, experts, scale, jnp.ones(3))["up"]["bias"])))(0.5)
    expected = merged_by(cfmerge.methods.task_arithmetic(0.5), host[0], host[1:], weights=[1.0, 2.0, 3.0])
    assert_laid_as(found, base)
    assert_same(found, expected, base, 1e-6)
    wanted = sum(np.sum(expert["up"]["bias"] - host[0]["up"]["bias"]) for expert in host[1:])
    assert float(slope) == pytest.approx(float(wanted), rel=1e-4)


def test_experts_may_lie_elsewhere(alone):
    """On the host, or sharded in another way: each tensor is laid out as the base's is."""
    mesh = mesh_of("explicit")
    base, first, second, third = trees()
    turned = jax.tree.map(lambda spec: P(None, *spec[:1]), SPECS["up"] | {"bias": P("model")})
    moved = laid(second, mesh) | {"up": laid(second["up"], mesh, {"kernel": turned["kernel"], "bias": P("data")})}
    found = merged_by("ace", laid(base, mesh), [first, moved, jax.device_put(third, jax.devices()[3])])
    assert_laid_as(found, laid(base, mesh))
    assert_same(found, alone("ace"), base, METHODS["ace"])


def test_a_base_on_the_host_comes_back_spread_as_the_experts(alone):
    mesh = mesh_of("explicit")
    base, *experts = trees()
    there = [laid(expert, mesh) for expert in experts]
    found = merged_by("average", base, there)
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(found)} == {8}
    assert_same(found, alone("average"), base, 1e-6)


# --- no whole model on one device -----------------------------------------------------------------------------------


@contextlib.contextmanager
def most_held(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """`{"bytes": the most that one device has held}` of live arrays, looked at whenever a unit is read or returned."""
    most = {"bytes": 0}

    def look() -> None:
        buffers = {  # an array and its shards, which are arrays as well, have one buffer
            (shard.device, shard.data.unsafe_buffer_pointer()): shard.data.nbytes
            for array in jax.live_arrays() if not array.is_deleted() for shard in array.addressable_shards
        }  # fmt: skip
        held = dict.fromkeys(jax.devices(), 0)
        for (device, _), size in buffers.items():
            held[device] += size
        most["bytes"] = max(most["bytes"], *held.values())

    read, parts = Unit.read, Unit.parts
    with monkeypatch.context() as patch:
        patch.setattr(Unit, "read", lambda *arguments: (look(), read(*arguments))[1])
        patch.setattr(Unit, "parts", lambda *arguments: (look(), parts(*arguments))[1])
        look()
        most["before"] = most["bytes"]
        yield most
        look()


@pytest.mark.parametrize("method", ["average", "ace", pytest.param("tsv_m", marks=pytest.mark.long)])
def test_no_device_holds_a_whole_model(method, monkeypatch):
    """64 matrices, and four stacked layers: shares of all trees and of the result, and a few whole tensors."""
    monkeypatch.setattr(cutting, "STACKED", 32 * 32)  # layer by layer
    mesh = jax.make_mesh((8,), ("data",))
    rng = np.random.default_rng(0)
    shape, spec = (32, 32), P("data")
    host = [
        {f"{n}": {"kernel": rng.standard_normal(shape).astype("f")} for n in range(64)}
        | {"layers": {"kernel": rng.standard_normal((8, *shape)).astype("f")}}
        for _ in range(3)
    ]
    base, *experts = (jax.tree.map(lambda leaf: jax.device_put(leaf, NamedSharding(mesh, spec)), tree) for tree in host)
    gc.collect()
    model = sum(leaf.nbytes for leaf in jax.tree.leaves(base))
    with most_held(monkeypatch) as most:
        found = merged_by(method, base, experts)
    assert_laid_as(found, base)
    assert 3 * model / 8 <= most["before"]
    assert most["before"] + model / 8 <= most["bytes"] <= most["before"] + 0.6 * model


def test_layers_stacked_along_another_axis_are_merged_where_they_lie(monkeypatch):
    """As MaxText stacks them, that axis sharded, one layer at a time: the numbers of one device."""
    mesh = jax.make_mesh((4,), ("data",))
    rng = np.random.default_rng(0)
    shapes = {"layers": {"up": {"kernel": (16, 4, 8)}, "norm": {"scale": (16, 4)}}}
    spread = {"layers": {"up": {"kernel": P(None, "data")}, "norm": {"scale": P("data")}}}
    host = [jax.tree.map(lambda s: rng.standard_normal(s).astype("f"), shapes, is_leaf=is_shape) for _ in range(3)]
    alone = cfmerge.merge_params(host[0], host[1:], "ace")
    monkeypatch.setattr(cutting, "STACKED", 1)
    base, *experts = [laid(tree, mesh, spread) for tree in host]
    found = cfmerge.merge_params(base, experts, "ace")
    assert_laid_as(found, base)
    for one, other in zip(jax.tree.leaves(alone), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4)


def test_the_compiled_merge_holds_no_whole_model():
    """By the compiler's own account, beside arguments and results: of 64 matrices a few, and shares of the others."""
    mesh = jax.make_mesh((8,), ("data",))
    leaf = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    tree = {f"{n}": {"kernel": leaf} for n in range(64)}
    with jax.set_mesh(mesh):
        for method in ("ace", "dare_ties"):
            merge = jax.jit(lambda base, experts, method=method: cfmerge.merge_params(base, experts, method))
            account = merge.lower(tree, [tree] * 2).compile().memory_analysis()
            assert account.temp_size_in_bytes < 0.9 * 64 * 64 * 64 * 4


# --- structures ---------------------------------------------------------------------------------------------------


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.LayerNorm()(nn.Dense(8)(nn.relu(nn.Dense(16)(x))))


def by_last_axis(tree: Tree, mesh: Mesh) -> Tree:
    """The tree, floats over all devices by their last axis."""

    def put(leaf: Any) -> Any:
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        return jax.device_put(leaf, NamedSharding(mesh, P(*[None] * (leaf.ndim - 1), "data") if floating else P()))

    return jax.tree.map(put, tree)


def changed(tree: Tree, seed: int) -> Tree:
    rng = np.random.default_rng(seed)

    def one(leaf: Any) -> Any:
        return leaf + 0.1 * rng.standard_normal(leaf.shape).astype("f") if leaf.dtype == jnp.float32 else leaf

    return jax.tree.map(one, tree)


def test_linen_and_nnx():
    class Nnx(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.first, self.second = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 8, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

    mesh = jax.make_mesh((8,), ("data",))
    for base in (Linen().init(jax.random.key(0), jnp.ones((1, 8))), nnx.split(Nnx(nnx.Rngs(0)))[1]):
        experts = [changed(base, seed) for seed in (1, 2)]
        expected = cfmerge.merge_params(base, experts, "actmat")
        there, *others = (by_last_axis(tree, mesh) for tree in (base, *experts))
        with jax.set_mesh(mesh):
            found = cfmerge.merge_params(there, others, "actmat")
            jitted = jax.jit(lambda base, experts: cfmerge.merge_params(base, experts, "actmat"))(there, others)
        for tree in (found, jitted):
            assert jax.tree.structure(tree) == jax.tree.structure(base)
            floats = [
                [leaf for leaf in jax.tree.leaves(each) if jnp.issubdtype(leaf.dtype, jnp.floating)]
                for each in (tree, expected, base, there)
            ]
            assert_same(floats[0], floats[1], floats[2], 5e-4)  # two experts: ill-conditioned
            assert_laid_as(floats[0], floats[3])


def test_statistics_of_sharded_trees(alone):
    """They are spread over the devices, and what is solved from them lies as the base does."""
    mesh = mesh_of("explicit")
    host = trees()
    base, *experts = (laid(tree, mesh) for tree in host)
    with jax.set_mesh(mesh):
        first = cfmerge.accumulate(base, {"0": experts[0], "1": experts[1]}, "ace", rules=RULES)
        both = first + cfmerge.accumulate(base, {"2": experts[2]}, "ace", rules=RULES)
        found = cfmerge.solve(both, base)
    gram = first.tensors["down/kernel"]["sums.gram"]
    assert gram.addressable_shards[0].data.nbytes * 8 == gram.nbytes
    assert_laid_as(found, base)
    assert_same(found, alone("ace"), base, METHODS["ace"])
    unsharded = cfmerge.accumulate(host[0], {"0": host[1], "1": host[2]}, "ace", rules=RULES)
    assert unsharded.base == first.base


# --- values are looked at where they lie ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["average", "ties"])
def test_a_sharded_tensor_that_is_not_finite_is_named(method):
    mesh = mesh_of("explicit")
    base, *experts = trees()
    experts[1]["down"]["kernel"][3, 4] = np.nan
    there = [laid(tree, mesh) for tree in (base, *experts)]
    with pytest.raises(cfmerge.CfmergeError, match=r"expert '1'.*down/kernel.*NaN"):
        merged_by(method, there[0], there[1:])


def test_sharded_integers_must_agree():
    mesh = jax.make_mesh((8,), ("data",))
    where = NamedSharding(mesh, P("data"))
    base = {"kernel": jax.device_put(np.ones((8, 8), "f"), where), "table": jax.device_put(np.arange(8), where)}
    other = base | {"table": jax.device_put(np.arange(8)[::-1].copy(), where)}
    with jax.set_mesh(mesh):
        assert cfmerge.merge_params(base, [base], "average")["table"] is base["table"]
        with pytest.raises(cfmerge.CfmergeError, match="integers 'table' differ"):
            cfmerge.merge_params(base, [other], "average")


def test_an_ill_conditioned_sharded_tensor_is_solved_in_float64_where_it_lies():
    mesh = jax.make_mesh((8,), ("data",))
    where = NamedSharding(mesh, P("data"))
    rng = np.random.default_rng(0)
    scales = np.logspace(0, -4, 16)
    base = {"kernel": np.zeros((16, 8), "f")}
    experts = [{"kernel": (scales[:, None] * rng.standard_normal((16, 8))).astype("f")} for _ in range(3)]
    method = "ace(eps_rel=1e-7)"
    there = [{"kernel": jax.device_put(tree["kernel"], where)} for tree in (base, *experts)]
    found = cfmerge.merge_params(there[0], there[1:], method)
    assert_laid_as(found, there[0])
    assert_same(found, cfmerge.merge_params(base, experts, method), base, 1e-3)
