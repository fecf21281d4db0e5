"""Exact order statistics: of one array, and of a whole model in passes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cfmerge
from cfmerge import methods
from cfmerge.engine import cutting
from cfmerge.linalg import selection
from cfmerge.methods import _thresholds

SPECIAL = [0.0, -0.0, 1e-45, -1e-45, 1e-38, 3.4e38, -3.4e38, 1.0, -1.0]


def values(dtype="float32", size=500, seed=0):
    """Many magnitudes, many ties, and what is special among floats."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(size) * 10.0 ** rng.integers(-30, 30, size)
    x[::3] = np.round(rng.standard_normal(len(x[::3])), 1)
    return np.concatenate([x, SPECIAL]).astype(dtype)


def largest(x, count):
    """Which are the `count` of largest magnitude, ties by lower index: by sorting."""
    mask = np.zeros(x.size, bool)
    mask[np.argsort(-np.abs(x).ravel(), kind="stable")[:count]] = True
    return mask.reshape(x.shape)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_keys_are_in_the_order_of_the_floats(dtype):
    with jax.enable_x64(dtype == "float64"):
        x = values(dtype)
        order = np.argsort(np.asarray(selection.value_keys(jnp.asarray(x))), kind="stable")
        assert np.all(np.diff(x[order]) >= 0)
        order = np.argsort(np.asarray(selection.magnitude_keys(jnp.asarray(x))), kind="stable")
        assert np.all(np.diff(np.abs(x)[order]) >= 0)
        back = selection.value_of(selection.value_keys(jnp.asarray(x)))
        assert np.asarray(back).astype(dtype).tobytes() == x.tobytes()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_largest_is_exactly_so_many(dtype):
    with jax.enable_x64(dtype == "float64"):
        x = values(dtype)
        find = jax.jit(lambda x, count: selection.largest(selection.magnitude_keys(x), count))
        for count in (0, 1, 2, 17, 100, 200, len(x) - 1, len(x)):
            np.testing.assert_array_equal(find(x, count), largest(x, count))
        many = jax.vmap(find)(jnp.stack([x, x]), jnp.array([17, 200]))
        np.testing.assert_array_equal(many, [largest(x, 17), largest(x, 200)])


@pytest.mark.parametrize("level", [0, 3])
def test_largest_is_exactly_so_many_of_computed_numbers(level):
    """However XLA compiles it: without optimisation and under `vmap` it computes them twice, with other roundings."""

    def of_variance(x):
        mean = sum(x) / len(x)
        return selection.largest(selection.magnitude_keys(sum((each - mean) ** 2 for each in x)), 54)

    x = jnp.asarray(np.random.default_rng(0).standard_normal((40, 3, 13, 7)), jnp.float32)
    find = jax.jit(jax.vmap(of_variance), compiler_options={"xla_backend_optimization_level": level})
    assert set(np.asarray(find(x)).sum((1, 2))) == {54}


def test_middle_ranks():
    x = jnp.array([[3.0, -1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    ranks = selection.middle_ranks(selection.magnitude_keys(x))
    np.testing.assert_array_equal(ranks, [[3, 1.5, 1.5, 0], [1.5, 1.5, 1.5, 1.5]])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_middle_ranks_are_the_same_on_the_host(dtype):
    rng = np.random.default_rng(0)
    x = np.round(np.abs(rng.standard_normal((5, 40))), 1).astype(dtype)
    x[1] = np.abs(rng.standard_normal(40))  # no two are equal
    x[2] = 0.0
    with jax.enable_x64(dtype == "float64"):
        expected = selection.middle_ranks(selection.magnitude_keys(jnp.asarray(x)))
    np.testing.assert_array_equal(selection.middle_ranks(x), expected)


@pytest.mark.parametrize(
    ("share", "size", "rounding", "count"),
    [(0.07, 100, "ceil", 7), (0.2, 101, "ceil", 21), (0.3, 17, "floor", 5), (0.2, 126, "round", 25),
     (1.0, 7, "ceil", 7), (0.0, 7, "ceil", 0), (0.2, 10**6, "ceil", 200_000), (0.7, 10**6, "floor", 700_000)],
)  # fmt: skip
def test_shares_of_a_whole(share, size, rounding, count):
    assert _thresholds.share_of(share, size, rounding) == count
    assert int(jax.jit(lambda share: _thresholds.share_of(share, size, rounding))(share)) == count


# --- the whole model ----------------------------------------------------------------------------------------------


def model(seed=0, decimals=None):
    """A tree whose tensors have deltas of very different size; rounded ones tie."""
    rng = np.random.default_rng(seed)
    tree = {
        "b": rng.standard_normal((6, 5)),
        "a": 10 * rng.standard_normal(7),
        "c": 0.1 * rng.standard_normal((3, 4, 2)),
    }
    return {k: (np.round(v, decimals) if decimals is not None else v).astype(np.float32) for k, v in tree.items()}


def flat(tree):
    return np.concatenate([tree[name].ravel() for name in sorted(tree)])


@pytest.mark.parametrize("decimals", [None, 0])
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_trimming_a_model_is_trimming_its_flat_vector(decimals, precision):
    """With ties across tensors too: those of lower place are kept."""
    with jax.enable_x64(precision == "float64"):
        base = {name: np.zeros(array.shape, precision) for name, array in model().items()}
        experts = [{n: a.astype(precision) for n, a in model(seed, decimals).items()} for seed in (1, 2)]
        density = [0.3, 0.55]
        got = cfmerge.merge_params(
            base, experts, methods.trim(density, "model") >> methods.task_arithmetic(1.0), weights=[1.0, 100.0]
        )
        expected = 0
        for expert, d, weight in zip(experts, density, [1, 100], strict=True):
            x = flat(expert)
            expected = expected + weight * np.where(largest(x, int(np.ceil(d * x.size))), x, 0)
        np.testing.assert_allclose(flat({k: np.asarray(v) for k, v in got.items()}), expected, rtol=1e-6)


def test_a_model_on_disk_in_pieces(make_model, tmp_path, monkeypatch, load):
    """Streamed in pieces of 64 entries, with ties over all of them: the same as the flat vector."""
    rng = np.random.default_rng(0)
    shapes = {"model.layers.0.mlp.up_proj.weight": (20, 16), "model.layers.0.norm.weight": (16,), "w.weight": (9, 40)}
    trees = [{n: np.round(2 * rng.standard_normal(s)).astype(np.float32) for n, s in shapes.items()} for _ in range(2)]
    base = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    paths = [make_model(tmp_path / str(n), tree, None) for n, tree in enumerate([base, *trees])]
    monkeypatch.setattr(cutting, "ENTRIES", 64)
    cfmerge.merge(paths[0], paths[1:], "trim(density=0.3, scope='model') >> task_arithmetic(scale=1)",
                  output=tmp_path / "out")  # fmt: skip
    got = load(tmp_path / "out")
    rows = [flat(tree) for tree in trees]
    expected = [np.where(largest(x, int(np.ceil(0.3 * x.size))), x, 0) for x in rows]
    np.testing.assert_array_equal(flat(got), expected[0] + expected[1])


def test_all_zero_deltas():
    base = model()
    merged = cfmerge.merge_params(base, [base, base], methods.ties())
    for name, array in merged.items():
        np.testing.assert_array_equal(array, base[name])


def test_the_smallest_of_a_model_is_a_rank_too():
    """Ranks at both ends of two tensors: the largest magnitude, and the smallest, which is not 0."""

    def ends_of_the_model():
        """All entries are the sum of the largest and the smallest magnitude."""

        def look(entries, own):
            return (yield methods.Order(selection.magnitude_keys, [(1, entries)] * len(own), ties=False))

        def informed(found):
            def both(delta, context):
                keys = jnp.asarray(found.model.keys)[context.number].astype(selection.key_dtype())
                return jnp.full_like(delta, jnp.sum(selection.magnitude_of(keys)))

            return methods.Transform("ends_of_the_model", both)

        return methods.Transform("ends_of_the_model", lambda delta: delta, survey=methods.Survey(look, informed))

    base = {"a": np.zeros((3, 2), np.float32), "b": np.zeros(4, np.float32)}
    expert = {"a": np.array([[3, -9], [2, 4], [5, 6]], np.float32), "b": np.array([-7, 8, 2.5, 3.5], np.float32)}
    merged = cfmerge.merge_params(base, [expert], ends_of_the_model() >> methods.average())
    assert set(np.asarray(merged["b"]).tolist()) == {11.0}
