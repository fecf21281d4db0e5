"""Sparsifiers, sign consensus, masks, layer scales: what they are, and what papers and peers get wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from elementwise_parts import deltas_of, merge

import cfmerge
from cfmerge import methods
from cfmerge.core.call import of_expert
from cfmerge.core.random import key_of
from cfmerge.errors import CfmergeError
from cfmerge.methods import Context

# --- what the methods are, in NumPy -------------------------------------------------------------------------------


def trimmed(delta, density):
    count = int(np.ceil(density * delta.size))
    kept = np.argsort(-np.abs(delta).ravel(), kind="stable")[:count]
    return np.where(np.isin(np.arange(delta.size), kept).reshape(delta.shape), delta, 0)


def voted(items, weights):
    """The mean of those that have the sign of the sum."""
    sign = np.sign(items.sum(0))
    agree = (np.sign(items) == sign) & (items != 0)
    weight = np.where(agree, weights[:, None, None], 0).sum(0)
    return np.where(agree, items, 0).sum(0) / np.where(weight == 0, 1, weight)


def test_ties_in_numpy():
    deltas, weights = deltas_of().astype(np.float64), np.array([1.0, 2.0, 0.5])
    expected = voted(np.stack([w * trimmed(d, 0.3) for w, d in zip(weights, deltas, strict=True)]), weights)
    for scope in ("model", "tensor"):
        got = merge(methods.ties(0.3, scope=scope), deltas.astype(np.float32), weights=list(weights))
        np.testing.assert_allclose(got, expected, atol=1e-6)


def test_ties_of_the_authors_over_a_model():
    """Norms, majority and threshold of the whole model, though it comes tensor by tensor; -1 + 1 cancels."""
    rng = np.random.default_rng(0)
    values = rng.integers(-3, 4, (3, 60)).astype(np.float32) * [[1.0], [1.0], [2.0]]
    shapes = {"a": (4, 5), "b": (20,), "c": (20,)}

    def tree(row):
        parts = np.split(row.astype(np.float32), 3)
        return {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}

    for options in ({}, {"elect": "norm_mass"}):
        method = methods.ties(0.4, variant="official", **options)
        whole = merge(method, values.astype(np.float32))
        base = tree(np.zeros(60))
        got = cfmerge.merge_params(base, [tree(row) for row in values], method)
        np.testing.assert_allclose(np.concatenate([np.ravel(got[n]) for n in shapes]), whole, atol=1e-5)
    kept = np.where(np.abs(values) >= -np.sort(-np.abs(values), axis=1)[:, 24:25], values, 0)
    sign = np.sign(kept.sum(0))
    sign = np.where(sign == 0, 1 if sign.sum() > 0 else -1, sign)
    agree = np.sign(kept) == sign
    expected = np.where(agree, kept, 0).sum(0) / np.maximum(agree.sum(0), 1)
    np.testing.assert_allclose(merge(methods.ties(0.4, variant="official"), values.astype(np.float32)), expected,
                               atol=1e-5)  # fmt: skip


def test_cancelled_votes():
    deltas = np.array([[[2.0, 3.0]], [[-2.0, 1.0]]], np.float32)
    for zero, expected in {"drop": 0.0, "positive": 2.0}.items():
        assert merge(methods.disjoint_mean(zero=zero), deltas)[0, 0] == expected
    assert merge(methods.disjoint_mean(zero="majority"), deltas)[0, 0] == 2.0
    assert merge(methods.disjoint_mean(zero="majority"), -deltas)[0, 0] == -2.0


@pytest.mark.parametrize(
    "method",
    [methods.trim(1.0), methods.drop(0.0), methods.scale(1.0), methods.outliers(1.0, 0.0), methods.trim(1.0, "model")],
)
def test_nothing_dropped_is_the_identity(method):
    deltas = deltas_of(experts=1)
    np.testing.assert_array_equal(merge(method >> methods.task_arithmetic(1.0), deltas), deltas[0])


def test_one_expert_and_identical_ones():
    delta = deltas_of(experts=1)[0]
    for method in (methods.ties(1.0), methods.disjoint_mean(), methods.magmax(1.0), methods.sce(), methods.ram(),
                   methods.consensus(agree=2, scale=1.0), methods.random_expert()):  # fmt: skip
        np.testing.assert_allclose(merge(method, [delta]), delta, rtol=1e-6)
    for method in (methods.disjoint_mean(), methods.magmax(1.0), methods.sce(0.3), methods.random_expert()):
        np.testing.assert_allclose(merge(method, [delta] * 3), delta, rtol=1e-6)
    np.testing.assert_allclose(merge(methods.ties(0.3), [delta] * 3), trimmed(delta, 0.3), rtol=1e-6)


def test_l2_and_linf_norms_are_restored():
    delta = deltas_of(experts=1)[0]
    sizes = {"l1": lambda x: np.abs(x).sum(), "l2": np.linalg.norm, "linf": lambda x: np.abs(x).max()}
    for norm, size in sizes.items():
        for part in (methods.trim(0.3, rescale=norm), methods.outliers(0.6, 0.1, norm), methods.drop(0.5, norm),
                     methods.drop_by_rank(0.5, 0.1, norm)):  # fmt: skip
            got = np.asarray(part(jnp.asarray(delta), Context(key_of(0, "w", "a"))))
            np.testing.assert_allclose(size(got), size(delta), rtol=1e-5)
            assert np.sum(got != 0) < delta.size


def test_pcb_over_a_model():
    """Quantiles of the whole model, though it comes tensor by tensor."""
    rows = deltas_of(shape=(90,))
    base = {"a": np.zeros((5, 8), np.float32), "b": np.zeros(50, np.float32)}
    trees = [{"a": row[:40].reshape(5, 8), "b": row[40:]} for row in rows]
    method = methods.pcb(0.2, 0.05, 1.0, "ranks")
    got = cfmerge.merge_params(base, trees, method)
    np.testing.assert_allclose(np.concatenate([np.ravel(got["a"]), got["b"]]), merge(method, rows), atol=1e-5)


def test_lines_of_the_data_free_rule():
    """alpha = ||N|| / (||X|| T) over the model: of task arithmetic with scale s, 1 / (s T)."""
    rng = np.random.default_rng(0)
    base = {"embed": np.zeros(5, np.float32), "out": np.zeros((2, 3), np.float32)}
    experts = [{k: rng.standard_normal(v.shape).astype(np.float32) for k, v in base.items()} for _ in range(4)]
    got = cfmerge.merge_params(base, experts, methods.task_arithmetic(0.3) >> methods.lines())
    mean = cfmerge.merge_params(base, experts, methods.average())
    for name in base:
        np.testing.assert_allclose(got[name], mean[name], rtol=1e-5)
    deltas = deltas_of()
    x = merge(methods.magmax(1.0), deltas)
    expected = np.linalg.norm(deltas.sum(0)) / np.linalg.norm(x) / 3 * x
    np.testing.assert_allclose(merge(methods.magmax(1.0) >> methods.lines(), deltas), expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["larv", "svc"])
def test_what_looks_at_the_merged_delta_stands_behind_a_method(name):
    with pytest.raises(cfmerge.CfmergeError, match=f"{name} looks at the merged delta: it must stand behind a method"):
        methods.make(f"{name} >> average")


def test_larv_scales_the_tiers():
    rng = np.random.default_rng(0)
    names_, base, experts = [f"layers.{n}.w.weight" for n in range(6)], {}, [{}, {}]
    for number, name in enumerate(names_):
        base[name] = rng.standard_normal((8, 8)).astype(np.float32)
        size = 4.0 ** -np.arange(8) if number >= 4 else 0.5 ** np.arange(8) if number >= 2 else np.ones(8)
        delta = (rng.standard_normal((8, 8)) * size).astype(np.float32)  # the later, the lower the effective rank
        for expert in experts:
            expert[name] = base[name] + delta
    plain = cfmerge.merge_params(base, experts, methods.average())
    got = cfmerge.merge_params(base, experts, methods.average() >> methods.larv(0.5, 2.0))
    factors = [np.linalg.norm(got[n] - base[n]) / np.linalg.norm(plain[n] - base[n]) for n in names_]
    np.testing.assert_allclose(factors, [0.5, 0.5, 1, 1, 2, 2], rtol=1e-4)


# --- what peers get wrong -----------------------------------------------------------------------------------------


def test_breadcrumbs_without_outliers_is_trim():
    """mergekit keeps nothing where gamma leaves less than one entry: of every small tensor."""
    delta = jnp.asarray(deltas_of(experts=1)[0])
    for gamma in (0.0, 0.01):
        got = methods.outliers(0.5, gamma)(delta)
        np.testing.assert_array_equal(got, methods.trim(0.5)(delta))


def test_a_density_that_leaves_less_than_one_entry():
    """mergekit stops at a bare assertion."""
    deltas = deltas_of(shape=(2, 2))
    assert np.all(merge(methods.ties(0.2, variant="mergekit"), deltas) == 0)
    assert np.count_nonzero(merge(methods.ties(0.2), deltas[:1])) == 1


@pytest.mark.parametrize(("density", "kept"), [(0.0, 0), (0.001, 1), (0.2, 1), (0.5, 2), (0.74, 2), (1.0, 4)])
def test_some_entries_are_kept_and_one_at_least(density, kept):
    """As mergekit 0.1.5 counts, whether the density is known or traced; and the look for pieces asks for as many."""
    delta = jnp.asarray(deltas_of(shape=(2, 2), experts=1)[0])
    assert np.count_nonzero(methods.trim(density, count="some")(delta)) == kept
    assert np.count_nonzero(jax.jit(lambda share: methods.trim(share, count="some")(delta))(density)) == kept
    (asked,) = next(methods.trim(density, count="some").pieces().survey.look(4, [density])).ranks
    assert np.array_equal(asked, [kept])


def test_weights_that_cancel():
    deltas = deltas_of(experts=2)
    for method in (methods.ties(), methods.ties(variant="mergekit"), methods.disjoint_mean()):
        assert np.isfinite(merge(method, deltas, weights=[1.0, -1.0])).all()
        assert np.isfinite(merge(method, np.abs(deltas), weights=[1e-3, -1e-3])).all()


def test_sce_weights_ordinary_deltas_by_energy():
    """rms 1e-4 and 4e-4: weights 1/17 and 16/17, where mergekit's are equal."""
    sign = np.sign(deltas_of(experts=1)[0])
    got = merge(methods.sce(), [1e-4 * sign, 4e-4 * sign])
    np.testing.assert_allclose(got, (1e-4 / 17 + 4e-4 * 16 / 17) * sign, rtol=1e-5)


# --- randomness ---------------------------------------------------------------------------------------------------

RANDOM = {
    "dare_linear": {}, "dare_ties": {}, "della": {}, "della_linear": {}, "random_expert": {},
}  # fmt: skip


@pytest.mark.parametrize("name", RANDOM)
def test_the_order_of_the_experts_changes_no_draw(name):
    """Two experts, so that sums commute exactly."""
    deltas = deltas_of(experts=2)
    method = methods.make(name)
    merged = merge(method, deltas, names=["a", "b"], seed=3)
    assert merged.tobytes() == merge(method, deltas[::-1], names=["b", "a"], seed=3).tobytes()
    assert merged.tobytes() != merge(method, deltas, names=["a", "b"], seed=4).tobytes()


def test_random_expert_is_uniform():
    deltas = np.stack([np.full((100, 100), value, np.float32) for value in (1.0, 2.0, 3.0)])
    merged = merge(methods.random_expert(), deltas)
    shares = [np.mean(merged == value) for value in (1, 2, 3)]
    np.testing.assert_allclose(shares, 1 / 3, atol=5 * np.sqrt(2 / 9 / 1e4))


# --- derivatives, bad parameters ----------------------------------------------------------------------------------

SMOOTH = [
    methods.ties(0.5, scope="tensor"), methods.disjoint_mean(elect="norm_mass"), methods.breadcrumbs(0.7, 0.1),
    methods.dare_ties(0.5), methods.della(rescale="l2"), methods.sce(0.6), methods.ram_plus(0.5), methods.magmax(),
    methods.consensus(), methods.trim_energy() >> methods.average(), methods.trim_deviation() >> methods.average(),
]  # fmt: skip


@pytest.mark.parametrize("method", SMOOTH, ids=lambda method: method.name)
def test_jit_vmap_and_grad(method):
    deltas = jnp.asarray(deltas_of(shape=(4, 5)))
    part = of_expert(method, 0)

    def merged(deltas):
        statistic = part.init(deltas[0])
        for t, delta in enumerate(deltas):
            statistic = part.see(statistic, delta, 1.0, Context(key_of(0, "w", str(t)), t))
        return part.solve(statistic)[0]

    both = jax.jit(jax.vmap(merged))(jnp.stack([deltas, 2 * deltas]))
    np.testing.assert_allclose(both[0], merged(deltas), atol=1e-5)
    gradient = jax.jit(jax.grad(lambda deltas: jnp.sum(merged(deltas) ** 2)))(deltas)
    assert np.isfinite(gradient).all()
    assert np.any(gradient)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: methods.trim(1.5), r"trim: density must lie in \[0, 1\], got 1.5"),
        (lambda: methods.drop(-0.1), r"drop: p must lie in \[0, 1\]"),
        (lambda: methods.drop_by_rank(0.1, 0.2), "density - epsilon must be positive"),
        (lambda: methods.outliers(0.5, 2.0), r"outliers: gamma must lie in \[0, 1\]"),
        (lambda: methods.pcb(0.0), "pcb: ratio must lie"),
        (lambda: methods.ram(-1.0), "ram: threshold must not be negative"),
        (lambda: methods.sce(2.0), "sce: density must lie"),
        (lambda: methods.drop()(jnp.ones(3)), "needs a key"),
    ],
)
def test_bad_parameters(make, message):
    with pytest.raises(CfmergeError, match=message):
        make()


def test_lines_without_alpha_takes_the_norms_of_the_whole_model():
    rng = np.random.default_rng(0)
    base = {f"layers.{n}.w": np.zeros((4, 3), np.float32) for n in range(3)}
    experts = [{k: (n + 1) * rng.standard_normal((4, 3)).astype(np.float32) for n, k in enumerate(base)} for _ in "abc"]
    plain = cfmerge.merge_params(base, experts, methods.magmax(1.0))
    scaled = cfmerge.merge_params(base, experts, methods.magmax(1.0) >> methods.lines(alpha=None, beta=0.0))

    def flat(tree):
        return np.concatenate([np.ravel(tree[name]) for name in base])

    alpha = np.linalg.norm(sum(map(flat, experts))) / np.linalg.norm(flat(plain)) / 3
    np.testing.assert_allclose(flat(scaled), alpha * flat(plain), rtol=1e-5)
