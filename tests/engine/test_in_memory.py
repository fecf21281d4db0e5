"""Merging trees and arrays in memory: the right way round, for Flax's layouts, under jit, vmap and grad.

Expected values come from `reference` (NumPy, float64), with canonical matrices taken by hand here.
"""

import itertools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx
from flax.core import FrozenDict
from flax.traverse_util import flatten_dict

import cfmerge
from cfmerge import CfmergeError, methods

TOLERANCE = 2e-4  # of merged deltas, relative to their norm; where ACE refines, float32 is a little off
SMALL, SPREAD = (0.3, 0.31, 0.32, 0.33), (0.01, 0.9, 0.05, 0.3)  # sizes of deltas: homogeneous, heterogeneous
ACE = methods.ace()
Tree = Any


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def is_float(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def experts_of(base: Tree, sizes: tuple[float, ...] = SMALL[:3], seed: int = 0) -> list[Tree]:
    """The base with noise of each size on its floating-point leaves."""
    rng = np.random.default_rng(seed)

    def changed(leaf: Any, size: float) -> Any:
        noise = size * rng.standard_normal(leaf.shape)
        return jnp.asarray(leaf, jnp.float32) + noise.astype("f") if is_float(leaf) else leaf

    return [jax.tree.map(lambda leaf, size=size: changed(leaf, size), base) for size in sizes]


def array(*shape: int, seed: int = 1) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def ace(base: Tree, experts: list[Tree], **options: Any) -> Tree:
    """`merge_params` by ACE, compiled, and without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return jax.jit(lambda base, experts: cfmerge.merge_params(base, experts, ACE, **options))(base, experts)


def assert_merged(
    merged: Any,
    base: Any,
    experts: list[Any],
    view: Callable[[np.ndarray], list[np.ndarray]] | None,
    tolerance: float = TOLERANCE,
) -> None:
    """Against the reference; `view` gives the canonical matrices of the stored array, none: the mean of deltas."""
    merged, base, *experts = (np.asarray(each, np.float64) for each in (merged, base, *experts))
    stored = [expert - base for expert in experts]
    if view is None:
        np.testing.assert_allclose(merged, base + reference.average(stored), atol=1e-6)
        return
    for number, found in enumerate(view(merged - base)):
        wanted = reference.ace([view(delta)[number] for delta in stored])
        assert np.linalg.norm(found - wanted) <= tolerance * np.linalg.norm(wanted)


def one(function: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], list[np.ndarray]]:
    return lambda stored: [function(stored)]


def per_layer(function: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], list[np.ndarray]]:
    return lambda stored: [function(layer) for layer in stored]


def dense(kernel: np.ndarray) -> np.ndarray:  # (in, out)
    return kernel.T


def split(kernel: np.ndarray) -> np.ndarray:  # (embed, heads, head_dim)
    return kernel.reshape(kernel.shape[0], -1).T


def joined(kernel: np.ndarray) -> np.ndarray:  # (heads, head_dim, embed) and (height, width, in, out)
    return kernel.reshape(-1, kernel.shape[-1]).T


# --- linen ------------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        x = nn.Dense(6, name="up")(nn.LayerNorm(name="norm")(x))
        return nn.MultiHeadDotProductAttention(2, qkv_features=6, out_features=8, name="attention")(x), None


class Model(nn.Module):
    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        x = nn.Embed(5, 8, name="embed")(ids)
        x = nn.MultiHeadDotProductAttention(2, qkv_features=6, name="attention")(x)
        layers = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = layers(name="layers")(x, None)
        x = nn.Conv(4, (3,), name="convolution")(x)
        x = nn.BatchNorm(use_running_average=False, name="batch_norm")(x)
        x = nn.Conv(4, (2, 2), name="window")(x[:, :, None].repeat(2, axis=2))
        return nn.Dense(6, name="dense")(nn.LayerNorm(name="norm")(x))


LINEN = {
    "params/dense/kernel": one(dense),
    "params/convolution/kernel": one(joined),
    "params/window/kernel": one(joined),
    "params/attention/query/kernel": one(split),
    "params/attention/key/kernel": one(split),
    "params/attention/value/kernel": one(split),
    "params/attention/out/kernel": one(joined),
    "params/layers/up/kernel": per_layer(dense),
    "params/layers/attention/query/kernel": per_layer(split),
    "params/layers/attention/key/kernel": per_layer(split),
    "params/layers/attention/value/kernel": per_layer(split),
    "params/layers/attention/out/kernel": per_layer(joined),
}


def check_against(table: Mapping[str, Any], merged: Mapping, base: Mapping, experts: list[Mapping]) -> None:
    assert merged.keys() == base.keys()
    assert table.keys() <= base.keys()
    for name, leaf in base.items():
        if is_float(leaf):
            assert_merged(merged[name], leaf, [expert[name] for expert in experts], table.get(name))


@pytest.fixture(scope="module")
def variables() -> Tree:
    return jax.jit(Model().init)(jax.random.key(0), jnp.zeros((2, 4), int))


def test_linen(variables):
    """Every kernel of the table is solved, the right way round; the rest gets the mean of the deltas."""
    experts = experts_of(variables)
    merged = ace(variables, experts)
    assert jax.tree.structure(merged) == jax.tree.structure(variables)
    trees = [flatten_dict(tree, sep="/") for tree in (merged, variables, *experts)]
    assert {name for name in trees[1] if name.startswith("batch_stats/")}
    check_against(LINEN, trees[0], trees[1], trees[2:])


def test_linen_model_runs_with_the_merged_variables(variables):
    merged = ace(variables, experts_of(variables))
    output, _ = jax.jit(lambda v, ids: Model().apply(v, ids, mutable=["batch_stats"]))(merged, jnp.ones((2, 4), int))
    assert jnp.isfinite(output).all()


def test_running_statistics_are_averaged_by_entrywise_methods_too(variables):
    base = variables["batch_stats"]
    experts = experts_of(base)
    merged = cfmerge.merge_params(base, experts, methods.task_arithmetic(2.0))
    for name in ("mean", "var"):
        values = [tree["batch_norm"][name] for tree in (merged, base, *experts)]
        assert_merged(values[0], values[1], values[2:], None)


# --- nnx --------------------------------------------------------------------------------------------------------


class Nnx(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(5, 8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, qkv_features=6, decode=False, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(8, 6, rngs=rngs), nnx.Linear(6, 8, rngs=rngs)])
        self.convolution = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)


NNX = {
    "attention/query/kernel": one(split),
    "attention/key/kernel": one(split),
    "attention/value/kernel": one(split),
    "attention/out/kernel": one(joined),
    "blocks/0/kernel": one(dense),
    "blocks/1/kernel": one(dense),
    "convolution/kernel": one(joined),
}


def flat_state(state: nnx.State) -> dict[str, jax.Array]:
    return {"/".join(map(str, path)): variable[...] for path, variable in nnx.to_flat_state(state)}


def test_nnx():
    """The whole state, with the keys of the random streams and the running statistics."""
    graph, state = nnx.split(Nnx(nnx.Rngs(0)))
    experts = experts_of(state)
    merged = ace(state, experts)
    assert isinstance(merged, nnx.State)
    assert jax.tree.structure(merged) == jax.tree.structure(state)
    trees = [flat_state(tree) for tree in (merged, state, *experts)]
    check_against(NNX, trees[0], trees[1], trees[2:])
    keys = [name for name in trees[1] if name.endswith("/key") and not is_float(trees[1][name])]
    assert keys
    for name in keys:
        assert jnp.array_equal(jax.random.key_data(trees[0][name]), jax.random.key_data(trees[1][name]))
    assert nnx.merge(graph, merged).blocks[0](jnp.ones((2, 8))).shape == (2, 6)


def test_nnx_random_streams_may_have_moved_on():
    """An expert that was trained with dropout has drawn keys. Its stream is no weight; the base's is kept."""
    base, expert = nnx.Dropout(0.5, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    expert(jnp.ones(3))
    trees = [nnx.split(model)[1] for model in (base, expert)]
    merged, before, after = (
        flat_state(tree) for tree in (cfmerge.merge_params(trees[0], trees[1:], methods.average()), *trees)
    )
    counts = [name for name in before if name.endswith("/count")]
    assert any(int(after[name]) > int(before[name]) for name in counts)
    assert all(int(merged[name]) == int(before[name]) for name in counts)


def test_nnx_batch_norm_statistics_are_no_weights():
    _, state = nnx.split(nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
    experts = experts_of(state)
    merged = cfmerge.merge_params(state, experts, methods.task_arithmetic(1.0))
    deltas = [np.asarray(expert["var"][...] - state["var"][...]) for expert in experts]
    np.testing.assert_allclose(merged["var"][...] - state["var"][...], np.mean(deltas, axis=0), atol=1e-6)
    deltas = [np.asarray(expert["scale"][...] - state["scale"][...]) for expert in experts]
    np.testing.assert_allclose(merged["scale"][...] - state["scale"][...], np.sum(deltas, axis=0), atol=1e-6)


def test_nnx_modules_stacked_by_vmap():
    """`nnx.vmap` stacks a whole tree, with nothing above it that is not stacked."""

    @nnx.vmap(in_axes=0, out_axes=0)
    def make(key: jax.Array) -> nnx.Module:
        class Block(nnx.Module):
            def __init__(self, rngs: nnx.Rngs):
                self.norm = nnx.LayerNorm(8, rngs=rngs)
                self.attention = nnx.MultiHeadAttention(2, 8, qkv_features=6, decode=False, rngs=rngs)

        return Block(nnx.Rngs(key))

    state = nnx.state(make(jax.random.split(jax.random.key(0), 3)), nnx.Param)
    experts = experts_of(state)
    merged, base, *experts = (flat_state(tree) for tree in (ace(state, experts), state, *experts))
    table = {
        **{f"attention/{name}/kernel": per_layer(split) for name in ("query", "key", "value")},
        "attention/out/kernel": per_layer(joined),
    }
    check_against(table, merged, base, experts)


# --- layouts ----------------------------------------------------------------------------------------------------


def test_a_flax_convolution_is_the_torch_one():
    """HWIO and OIHW fold their window in another order; the result is the same convolution."""
    base, *experts = (np.asarray(array(3, 2, 4, 5, seed=seed)) for seed in range(4))
    flax = [{"convolution": {"kernel": kernel}} for kernel in (base, *experts)]
    torch = [{"convolution.weight": kernel.transpose(3, 2, 0, 1)} for kernel in (base, *experts)]
    ours, theirs = ace(flax[0], flax[1:]), ace(torch[0], torch[1:])
    np.testing.assert_allclose(
        ours["convolution"]["kernel"].transpose(3, 2, 0, 1), theirs["convolution.weight"], atol=2e-5
    )


def test_a_flax_kernel_is_the_torch_weight():
    base, *experts = (np.asarray(array(8, 6, seed=seed)) for seed in range(4))
    flax = ace({"a": {"kernel": base}}, [{"a": {"kernel": expert}} for expert in experts])
    torch = ace({"a": {"weight": base.T}}, [{"a": {"weight": expert.T}} for expert in experts])
    np.testing.assert_allclose(flax["a"]["kernel"].T, torch["a"]["weight"], atol=2e-5)


def test_a_parameter_of_unknown_role_is_averaged_with_a_warning():
    base = {"w": array(8, 6)}
    experts = experts_of(base)
    with pytest.warns(UserWarning, match="1 parameters are averaged, not solved, such as 'w'"):
        merged = cfmerge.merge_params(base, experts, ACE)
    assert_merged(merged["w"], base["w"], [expert["w"] for expert in experts], None)


def test_an_entrywise_method_does_not_warn():
    base = {"w": array(8, 6)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cfmerge.merge_params(base, experts_of(base), methods.average())


@pytest.mark.parametrize(("layout", "view"), [("io", dense), ("oi", lambda stored: stored)])
def test_a_rule_gives_the_layout(layout, view):
    base = {"mlp": {"w": array(8, 6)}}
    experts = experts_of(base)
    rule = {"match": "*/w", "layout": layout, "method": "ace"}
    merged = ace(base, experts, rules=[rule])
    assert_merged(merged["mlp"]["w"], base["mlp"]["w"], [expert["mlp"]["w"] for expert in experts], one(view))


def test_rules_choose_methods():
    base = {"a": {"kernel": array(8, 6)}, "b": {"kernel": array(8, 6)}, "c": {"kernel": array(8, 6)}}
    experts = experts_of(base)
    rules = [{"match": "a/*", "method": "keep-base"}, cfmerge.Rule(match="b/*", method="average")]
    merged = ace(base, experts, rules=rules)
    assert jnp.array_equal(merged["a"]["kernel"], base["a"]["kernel"])
    for name, view in {"b": None, "c": one(dense)}.items():
        kernels = [expert[name]["kernel"] for expert in experts]
        assert_merged(merged[name]["kernel"], base[name]["kernel"], kernels, view)


# --- structures and dtypes --------------------------------------------------------------------------------------

KERNELS = {"first": {"kernel": array(8, 6), "bias": array(6)}, "second": {"kernel": array(8, 6, seed=2)}}
STRUCTURES = {
    "dict": KERNELS,
    "FrozenDict": FrozenDict(KERNELS),
    "list": [KERNELS["first"], KERNELS["second"]],
    "tuple in dict": {"layers": (KERNELS["first"], [KERNELS["second"], {}]), "none": None},
    "nnx.State": nnx.State({"first": {"kernel": nnx.Param(array(8, 6))}, "second": {"kernel": nnx.Param(array(8, 6))}}),
}


@pytest.mark.parametrize("structure", STRUCTURES)
def test_structures(structure):
    """The same leaves in any structure give the same kernels, in that structure."""
    base = STRUCTURES[structure]
    experts = experts_of(base)
    merged = ace(base, experts)
    assert type(merged) is type(base)
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    for leaves in zip(*map(jax.tree.leaves, (merged, base, *experts)), strict=True):
        assert_merged(leaves[0], leaves[1], list(leaves[2:]), one(dense) if leaves[1].ndim == 2 else None)


def test_a_mapping_names_the_experts():
    base = KERNELS
    experts = experts_of(base)
    by_name = ace(base, dict(zip(("x", "y", "z"), experts, strict=True)))
    assert jax.tree.all(jax.tree.map(jnp.array_equal, by_name, ace(base, experts)))
    wrong = {"english": experts[0], "french": {"first": experts[1]["first"]}}
    with pytest.raises(cfmerge.CfmergeError, match="french lacks 'second/kernel'"):
        cfmerge.merge_params(base, wrong, ACE)


def test_dtypes_are_the_base_s():
    """Each leaf in its own dtype, computed in float32; experts may have another."""
    base = {
        "a": {"kernel": array(8, 6).astype(jnp.bfloat16), "bias": array(6)},
        "b": {"kernel": array(8, 6).astype(jnp.float16)},
        "steps": np.int32(7),
        "mask": np.array([True, False]),
    }
    experts = experts_of(base)
    merged = ace(base, experts)
    assert jax.tree.map(lambda leaf: leaf.dtype, merged) == jax.tree.map(lambda leaf: leaf.dtype, base)
    assert int(merged["steps"]) == 7
    for name, precision in {"a": 2**-8, "b": 2**-11}.items():
        wide = np.asarray(base[name]["kernel"], np.float64)
        deltas = [np.asarray(expert[name]["kernel"], np.float64) - wide for expert in experts]
        expected = wide + reference.ace([delta.T for delta in deltas]).T
        found = np.asarray(merged[name]["kernel"], np.float64)
        assert np.all(np.abs(found - expected) <= 1.01 * precision * np.abs(expected) + 1e-5)


def test_float64():
    with jax.enable_x64(True):
        base = jnp.asarray(np.random.default_rng(0).standard_normal((6, 8)))
        experts = [base + 0.1 * jnp.asarray(np.random.default_rng(n).standard_normal((6, 8))) for n in (1, 2, 3)]
        tree = ace({"a": {"weight": base}}, [{"a": {"weight": expert}} for expert in experts])
        assert tree["a"]["weight"].dtype == jnp.float64
        assert_merged(tree["a"]["weight"], base, experts, one(lambda stored: stored), tolerance=1e-10)


# --- merge_tensor -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "sizes"), list(itertools.product((1, 2, 3, 4), (SMALL, SPREAD))))
def test_merge_tensor(count, sizes):
    """One to four experts, in both branches of ACE."""
    base = array(6, 8)
    experts = experts_of(base, sizes[:count])
    told: dict[str, Any] = {}
    reference.ace([np.asarray(expert - base, np.float64) for expert in experts], told=told)
    assert told["heterogeneous"] == (sizes is SPREAD and count > 1)
    merged = jax.jit(lambda base, experts: cfmerge.merge_tensor(base, experts, ACE))(base, experts)
    assert_merged(merged, base, experts, one(lambda stored: stored))


def test_merge_tensor_averages_what_is_not_two_dimensional():
    base = array(6)
    experts = experts_of(base)
    assert_merged(cfmerge.merge_tensor(base, experts, ACE), base, experts, None)


def test_merge_params_is_merge_tensor_leaf_by_leaf():
    """Stacking tensors of one shape changes nothing."""
    base = {name: {"weight": array(6, 8, seed=seed)} for seed, name in enumerate("abc")}
    base["d"] = {"weight": array(4, 8), "bias": array(4)}
    experts = experts_of(base)
    merged = ace(base, experts)
    tensor = jax.jit(lambda base, experts: cfmerge.merge_tensor(base, experts, ACE))
    for name, layer in base.items():
        for part, leaf in layer.items():
            alone = tensor(leaf, [expert[name][part] for expert in experts])
            np.testing.assert_allclose(merged[name][part], alone, atol=2e-6)


def test_python_and_numpy_arrays_are_taken():
    base, *experts = (np.asarray(array(6, seed=seed)) for seed in range(3))
    merged = cfmerge.merge_params({"bias": base, "scale": 1.0}, [{"bias": e, "scale": 3.0} for e in experts], ACE)
    np.testing.assert_allclose(merged["bias"], np.mean(experts, axis=0), atol=1e-6)
    assert float(merged["scale"]) == 3.0


# --- transformations --------------------------------------------------------------------------------------------


def test_vmap_over_whole_trees():
    """Two merges at once, of trees whose leaves carry a leading axis."""
    bases = [{"a": {"kernel": array(8, 6, seed=seed), "bias": array(6)}} for seed in (1, 2)]
    families = [
        experts_of(base, sizes, seed) for seed, (base, sizes) in enumerate(zip(bases, (SMALL, SPREAD), strict=True))
    ]
    families = [family[:3] for family in families]
    stack = lambda *trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)  # noqa: E731
    both = jax.jit(jax.vmap(lambda base, experts: cfmerge.merge_params(base, experts, ACE)))
    merged = both(stack(*bases), stack(*families))
    for number, (base, family) in enumerate(zip(bases, families, strict=True)):
        kernels = [expert["a"]["kernel"] for expert in family]
        assert_merged(merged["a"]["kernel"][number], base["a"]["kernel"], kernels, one(dense))


@pytest.mark.parametrize("sizes", [SMALL[:3], (0.2, 0.9, 0.5)])
def test_gradient_with_respect_to_weights(sizes):
    base = {"a": {"kernel": array(8, 6)}, "b": {"bias": array(6)}}
    experts = experts_of(base, sizes)
    target = experts_of(base, (1.0,), seed=9)[0]

    def loss(weights: jax.Array) -> jax.Array:
        merged = cfmerge.merge_params(base, experts, ACE, weights=weights)
        return sum(jax.tree.leaves(jax.tree.map(lambda x, y: jnp.sum((x - y) ** 2), merged, target)))

    weights = jnp.asarray([1.0, 0.7, 1.3])
    evaluate = jax.jit(loss)
    steps = 0.02 * np.eye(3, dtype=np.float32)
    differences = [float(evaluate(weights + step) - evaluate(weights - step)) / 0.04 for step in steps]
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(weights), differences, rtol=0.02, atol=0.02)
    together = jax.jit(jax.vmap(loss))(jnp.stack([weights, jnp.ones(3)]))
    np.testing.assert_allclose(together, [evaluate(weights), evaluate(jnp.ones(3))], rtol=1e-5)


def test_gradient_with_respect_to_trees_is_finite():
    """Also where an expert has not changed a tensor at all."""
    base = {"a": {"kernel": array(8, 6)}}
    experts = [*experts_of(base, SMALL[:2]), base]

    def loss(base: Tree, experts: list[Tree]) -> jax.Array:
        return jnp.sum(cfmerge.merge_params(base, experts, ACE)["a"]["kernel"] ** 2)

    for gradient in jax.jit(jax.grad(loss, argnums=(0, 1)))(base, experts):
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_order_of_experts_does_not_matter():
    base = array(6, 8)
    experts = experts_of(base)
    merge = jax.jit(lambda experts: cfmerge.merge_tensor(base, experts, ACE))
    np.testing.assert_allclose(merge(experts), merge(experts[::-1]), atol=1e-5)


# --- errors -----------------------------------------------------------------------------------------------------

BASE = {"a": {"kernel": np.ones((3, 2), np.float32), "bias": np.ones(2, np.float32)}}


@pytest.mark.parametrize(
    ("expert", "message"),
    [
        ({"a": {"kernel": BASE["a"]["kernel"]}}, "expert 1 lacks 'a/bias'"),
        ({"a": {"kernel": BASE["a"]["kernel"], "bais": BASE["a"]["bias"]}}, "lacks 'a/bias'; did you mean 'a/bais'"),
        ({**BASE, "b": np.ones(1)}, "expert 1 has 'b', which the base lacks"),
        ({"a": {**BASE["a"], "kernel": np.ones((2, 3))}}, r"'a/kernel' has shape \(2, 3\), in the base \(3, 2\)"),
        ({"a": {**BASE["a"], "bias": "text"}}, "leaf 'a/bias' is not an array, but str"),
    ],
)  # fmt: skip
def test_trees_that_do_not_match(expert, message):
    with pytest.raises(cfmerge.CfmergeError, match=message):
        cfmerge.merge_params(BASE, [BASE, expert], ACE)


def test_weights_and_experts_are_counted():
    for merge, base in ((cfmerge.merge_params, BASE), (cfmerge.merge_tensor, np.ones((3, 2)))):
        with pytest.raises(cfmerge.CfmergeError, match="no experts"):
            merge(base, [], ACE)
        with pytest.raises(cfmerge.CfmergeError, match="3 weights for 2 experts"):
            merge(base, [base, base], ACE, weights=[1, 1, 1])


def test_merge_tensor_names_the_shapes():
    with pytest.raises(cfmerge.CfmergeError, match=r"expert 1 has shape \(2, 3\), the base \(3, 2\)"):
        cfmerge.merge_tensor(np.ones((3, 2)), [np.ones((3, 2)), np.ones((2, 3))], ACE)


def test_integers_must_agree_or_follow_a_rule():
    base = {"bias": np.ones(2, np.float32), "ids": np.arange(3)}
    other = {**base, "ids": np.arange(1, 4)}
    with pytest.raises(cfmerge.CfmergeError, match="expert 1: integers 'ids' differ from the base's"):
        cfmerge.merge_params(base, [base, other], methods.average())
    rules = [{"match": "ids", "method": "keep-base"}]
    merged = cfmerge.merge_params(base, [base, other], methods.average(), rules=rules)
    assert np.array_equal(merged["ids"], base["ids"])


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"match": "*kernel", "method": "skip"}, "use keep-base instead of skip"),
        ({"match": "*weight", "method": "keep-base"}, "names look like 'a/bias'"),
        ({"match": "*kernel", "layout": "oii"}, "cannot have layout 'oii'"),
        ({"match": "*bias", "method": "ace"}, "needs the layout of 'a/bias'"),
        ({"match": "*kernel", "method": "acé"}, "unknown method"),
    ],
)
def test_rules_that_cannot_be_followed(rule, message):
    with pytest.raises(cfmerge.CfmergeError, match=message):
        cfmerge.merge_params(BASE, [BASE, BASE], ACE, rules=[rule])


def test_a_misspelt_rule():
    tree = {"a": {"kernel": np.ones((2, 3), np.float32)}}
    with pytest.raises(cfmerge.CfmergeError, match="did you mean 'layout'"):
        cfmerge.merge_params(tree, [tree, tree], cfmerge.methods.ace(), rules=[{"match": "*", "layuot": "io"}])


def test_moments_and_weights_by_name_fit_under_jit_where_a_dict_of_experts_is_sorted():
    base = {"w": {"kernel": normal(0, 6, 4)}}
    experts = {name: {"w": {"kernel": normal(number, 6, 4)}} for number, name in enumerate("ba", start=1)}
    grams = {name: {"w/kernel": np.diag(np.arange(1.0, 7)) * scale} for name, scale in (("b", 1.0), ("a", 9.0))}
    weights = {"b": 1.0, "a": 3.0}

    def merged(experts, moments, weights):
        return cfmerge.merge_params(base, experts, methods.regmean(), moments=moments, weights=weights)["w"]["kernel"]

    expected = merged(experts, list(grams.values()), list(weights.values()))
    swapped = merged(experts, list(grams.values())[::-1], list(weights.values())[::-1])
    assert not np.allclose(swapped, expected, rtol=1e-2)
    for found in (merged(experts, grams, weights), jax.jit(merged)(experts, grams, weights)):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("what", ["weights", "moments"])
def test_what_is_given_by_name_names_the_experts(what):
    base, *others = ({"w": {"kernel": normal(seed, 3, 3)}} for seed in range(3))
    named: Any = {what: {"a": 1.0, "c": 1.0}}
    with pytest.raises(CfmergeError, match=f"{what} by name: the experts are a, b; found a, c"):
        cfmerge.merge_params(base, dict(zip("ab", others, strict=True)), methods.average(), **named)


def test_a_second_merge_compiles_nothing(caplog):
    base, *experts = ({"w": {"kernel": normal(seed, 13, 7)}} for seed in range(3))
    for name in ("power", "iso_c"):
        cfmerge.merge_params(base, experts, methods.make(name))
    with jax.log_compiles():
        cfmerge.merge_params(base, experts, methods.power(ridge=0.5))
        cfmerge.merge_params(base, experts, methods.iso_c(alpha=0.5))
    assert not [record for record in caplog.records if "Compiling" in record.getMessage()]


# --- values that are not finite -----------------------------------------------------------------------------------


def test_a_nan_in_memory_is_told_with_expert_and_leaf_and_no_option_that_is_not_there():
    base = {"kernel": array(4, 3)}
    experts = {"math": {"kernel": array(4, 3, seed=2)}, "code": {"kernel": array(4, 3, seed=3).at[1, 1].set(jnp.nan)}}
    with pytest.raises(CfmergeError, match="expert 'code': tensor 'kernel' holds NaN") as caught:
        cfmerge.merge_params(base, experts, methods.average())
    assert "--" not in str(caught.value)
    with pytest.raises(CfmergeError, match="base: tensor 'kernel' holds NaN"):
        cfmerge.merge_params(experts["code"], [base, experts["math"]], methods.average())


def test_values_that_are_traced_are_not_looked_at():
    base, broken = {"kernel": array(4, 3)}, {"kernel": array(4, 3).at[0, 0].set(jnp.inf)}
    merged = jax.jit(lambda a, b: cfmerge.merge_params(a, [b, b], methods.average()))(base, broken)
    assert not np.isfinite(merged["kernel"][0, 0])


def test_an_ill_conditioned_system_is_solved_in_float64_in_memory_too():
    """The experts differ from the base along one direction alone, so that nothing but the ridge holds the rest."""
    base = {"kernel": jnp.zeros((64, 8))}
    common = np.outer(normal(0, 64), normal(1, 8))
    experts = [{"kernel": jnp.asarray(common + 1e-5 * normal(seed, 64, 8), jnp.float32)} for seed in (2, 3)]
    method = methods.actmat(ridge=1e-6)
    with jax.enable_x64(True):
        exact = cfmerge.merge_params(*jax.tree.map(lambda x: x.astype(jnp.float64), (base, experts)), method)["kernel"]
    with pytest.warns(UserWarning, match="kernel: the Cholesky factorisation failed"):
        found = np.asarray(cfmerge.merge_params(base, experts, method)["kernel"])
    assert np.linalg.norm(found - np.asarray(exact)) < 1e-4 * np.linalg.norm(found)


# --- methods as text ----------------------------------------------------------------------------------------------


def test_a_method_may_be_text_a_chain_or_left_out():
    base, experts = {"kernel": array(4, 3)}, [{"kernel": array(4, 3, seed=seed)} for seed in (2, 3, 4)]
    for text, made in (
        ("ace", methods.ace()),
        ("trim(density=0.5) >> average", methods.trim(0.5) >> methods.average()),
    ):
        by_text = cfmerge.merge_params(base, experts, text)
        assert np.array_equal(by_text["kernel"], cfmerge.merge_params(base, experts, made)["kernel"])
    assert np.array_equal(
        cfmerge.merge_params(base, experts)["kernel"], cfmerge.merge_params(base, experts, "ace")["kernel"]
    )
    alone = cfmerge.merge_tensor(base["kernel"], [expert["kernel"] for expert in experts], "average")
    assert np.allclose(alone, np.mean([expert["kernel"] for expert in experts], axis=0), atol=1e-6)
    with pytest.raises(CfmergeError, match="expected a name such as 'ace'"):
        cfmerge.merge_params(base, experts, 3)
