"""SMILE's equations: the paper's own code, the identities, and NumPy beside them."""

import doctest

import golden_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from smile_parts import golden_layer, layer_of, numpy_added

from cfmerge import CfmergeError
from cfmerge.compose import smile

SMILE = golden_cases.names("fb_smile_")


@pytest.fixture
def deltas():
    """Three deltas of shape (6, 8)."""
    return np.random.default_rng(0).standard_normal((3, 6, 8)).astype(np.float32)


@pytest.fixture
def x():
    """Tokens of shape (2, 5, 8)."""
    return jnp.asarray(np.random.default_rng(1).standard_normal((2, 5, 8)), jnp.float32)


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("name", SMILE)
def test_the_papers_own_code_gives_the_same(name, precision):
    case = golden_cases.CASES[name]
    expected, params = golden_cases.load(case), case["params"]
    with jax.enable_x64(precision == "float64"):
        x, base, bias, layer = golden_layer(case, precision)
        out = x @ base.T + (0 if bias is None else bias) + smile.added(x, layer, params["top_k"])
        scores = jnp.linalg.norm(jnp.einsum("tn,ign->tig", x, layer.router), axis=-1)
        weights = smile.routing(x, layer.router, params["top_k"])
        found = {"expected_output": out, "expected_router_scores": scores}
        for i, up in enumerate(layer.up):
            found[f"expected_expert_matrix_{i}"] = up if layer.down is None else up @ layer.down[i]
            found[f"expected_expert_singular_values_{i}"] = jnp.linalg.norm(up, axis=0)
    for key in case["expected"]:
        if key == "expected_topk_index":
            chosen = np.argsort(-np.asarray(weights), axis=1, kind="stable")[:, : params["top_k"]]
            np.testing.assert_array_equal(chosen, expected[key])
        else:
            error = np.max(np.abs(np.asarray(found[key], np.float64) - expected[key]))
            assert error <= case["tolerance"][key][precision], (key, error)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_any_leading_axes_are_tokens(deltas, x, top_k):
    biases = np.random.default_rng(2).standard_normal((3, 6)).astype(np.float32)
    layer = layer_of(deltas, 4, 2, list(biases))
    expected = numpy_added(x, deltas, 4, 2, top_k, biases)
    np.testing.assert_allclose(jax.jit(smile.added, static_argnums=2)(x, layer, top_k), expected, atol=1e-5)
    each = jax.vmap(jax.vmap(lambda token: smile.added(token, layer, top_k)))(x)
    np.testing.assert_allclose(each, expected, atol=1e-5)


def test_the_whole_rank_is_the_dense_expert_and_a_rank_above_it_is_cut(deltas, x):
    dense = smile.added(x, layer_of(deltas, -1, 2))
    for rank in (6, 100):
        layer = layer_of(deltas, rank, 2)
        assert layer.up.shape == (3, 6, 6)
        np.testing.assert_allclose(smile.added(x, layer), dense, atol=1e-5)
    assert np.max(np.abs(smile.added(x, layer_of(deltas, 2, 2)) - dense)) > 0.1


def test_experts_are_made_under_vmap_and_differentiated(deltas):
    """With the whole rank an expert's product is the delta, so its derivative is that of the delta."""
    stacked = jax.vmap(lambda delta: smile.expert(delta, 3, 2))(jnp.asarray(deltas))
    layer = layer_of(deltas, 3, 2)
    np.testing.assert_allclose(stacked[0] @ stacked[1], layer.up @ layer.down, atol=1e-5)
    along = jnp.asarray(deltas[1])

    def inner(delta):
        up, down, _ = smile.expert(delta, 6, 2)
        return jnp.sum(up @ down * along)

    np.testing.assert_allclose(jax.jit(jax.grad(inner))(jnp.asarray(deltas[0])), along, atol=1e-4)


def test_signs_and_rotations_of_the_triplets_cancel(deltas, x):
    layer = layer_of(deltas, 3, 3)
    turn = np.linalg.qr(np.random.default_rng(3).standard_normal((3, 3)))[0].astype(np.float32)
    turned = smile.Layer(layer.up @ turn, turn.T @ layer.down, turn.T @ layer.router)
    np.testing.assert_allclose(smile.added(x, turned, 2), smile.added(x, layer, 2), atol=1e-5)


def test_the_order_of_the_experts_permutes_the_weights_alone(deltas, x):
    layer, order = layer_of(deltas, 3, 2), jnp.array([2, 0, 1])
    other = jax.tree.map(lambda part: part[order], layer)
    np.testing.assert_allclose(
        smile.routing(x, other.router, 2), smile.routing(x, layer.router, 2)[..., order], atol=1e-6
    )
    for top_k in (1, 2):
        np.testing.assert_allclose(smile.added(x, other, top_k), smile.added(x, layer, top_k), atol=1e-5)


def test_one_expert_has_the_weight_one(deltas, x):
    layer = layer_of(deltas[:1], 6, 2)
    assert np.all(np.asarray(smile.routing(x, layer.router)) == 1)
    np.testing.assert_allclose(smile.added(x, layer), x @ deltas[0].T, atol=1e-5)


def test_weights_sum_to_one_over_the_chosen(deltas, x):
    for top_k in (1, 2, 3):
        weights = np.asarray(smile.routing(100 * x, layer_of(deltas, 2, 2).router, top_k))
        np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
        assert np.all((weights > 0).sum(-1) <= top_k)


def test_of_equal_norms_the_first_expert_is_taken(deltas, x):
    same = layer_of([deltas[0]] * 3, 2, 2)
    assert np.all(np.asarray(smile.routing(x, same.router))[..., 0] == 1)
    np.testing.assert_allclose(np.asarray(smile.routing(x, same.router, 2)), np.broadcast_to([0.5, 0.5, 0], (2, 5, 3)))
    assert np.all(np.asarray(smile.routing(jnp.zeros(8), layer_of(deltas, 2, 2).router)) == [1, 0, 0])


def test_gradients_are_finite_and_those_of_the_formula(deltas, x):
    layer = layer_of(deltas, 3, 2)
    total = jax.grad(lambda x: smile.added(x, layer, 2).sum())
    assert np.all(np.isfinite(total(jnp.zeros_like(x))))
    found, token, step = total(x), np.array(x), 1e-3
    token[0, 0, 0] += step
    above, below = numpy_added(token, deltas, 3, 2, 2).sum(), numpy_added(x, deltas, 3, 2, 2).sum()
    assert found[0, 0, 0] == pytest.approx((above - below) / step, rel=0.02, abs=0.02)


@pytest.mark.parametrize(("rank", "gate"), [(2, 1), (3, 3), (5, 4), (None, 2)])
def test_factors_give_what_their_product_gives(rank, gate):
    rng = np.random.default_rng(4)
    left, right = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((7, 3), (3, 9)))
    up, down, router = smile.expert_of_factors(left, right, rank, gate)
    of_up, of_down, of_router = smile.expert(left @ right, rank, gate)
    product = of_up if of_down is None else of_up @ of_down
    np.testing.assert_allclose(up @ down, product, atol=1e-5)
    np.testing.assert_allclose(router.T @ router, of_router.T @ of_router, atol=1e-5)
    assert router.shape == of_router.shape
    assert up.shape == (7, 3 if rank is None else rank)


def test_factors_are_never_multiplied_out():
    left, right = jnp.ones((40, 3)), jnp.ones((3, 50))
    program = jax.make_jaxpr(lambda left, right: smile.expert_of_factors(left, right, 8, 4))(left, right)
    sizes = [v.aval.size for equation in program.jaxpr.eqns for v in equation.outvars]
    assert max(sizes) <= 50 * 8 < 40 * 50


def test_factors_wider_than_the_matrix_are_taken_too():
    rng = np.random.default_rng(5)
    left, right = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((4, 6), (6, 5)))
    up, down, _ = smile.expert_of_factors(left, right, 4, 2)
    np.testing.assert_allclose(up @ down, left @ right, atol=1e-5)


def test_a_zero_delta_adds_nothing_and_is_not_chosen(deltas, x):
    up, down, router = smile.expert(jnp.zeros((6, 8)), 3, 2)
    assert not np.any(up)
    assert not np.any(router)
    assert down.shape == (3, 8)
    layer = layer_of([np.zeros((6, 8), np.float32), *deltas[1:]], 3, 2)
    assert not np.any(np.asarray(smile.routing(x, layer.router))[..., 0])


def test_directions_beyond_a_deltas_rank_do_not_route(x):
    """They would be any basis of its null space: the gate would see what the decomposition happens to give."""
    rank_one = jnp.outer(jnp.arange(1.0, 7), jnp.arange(1.0, 9))
    router = np.asarray(smile.expert(rank_one, 4, 4)[2])
    np.testing.assert_allclose(np.linalg.norm(router, axis=1), [1, 0, 0, 0], atol=1e-6)


def test_a_rank_by_energy_is_the_least_that_holds_the_share():
    values = jnp.array([3.0, 2.0, 1.0, 0.0])
    assert [int(smile.rank_for(values, share)) for share in (0.5, 9 / 14 - 1e-3, 9 / 14 + 1e-3, 0.95, 1.0)] == [
        1, 1, 2, 3, 3,
    ]  # fmt: skip
    assert int(smile.rank_for(jnp.zeros(3), 0.9)) == 0
    assert int(smile.rank_for(1e-30 * values, 0.9)) == 2
    with pytest.raises(CfmergeError, match="energy must be above 0 and at most 1"):
        smile.rank_for(values, 0.0)


VIT = [*[(768, 768)] * 4, (3072, 768), (768, 3072)] * 12  # the linear layers of ViT-B/32's vision tower
REST = 87_456_000 - sum(m * n + m for m, n in VIT)


@pytest.mark.parametrize(("rank", "total", "times"), [(32, 141_203_712, 1.61), (128, 268_605_000, 3.07)])
def test_the_parameters_are_those_of_the_paper(rank, total, times):
    found = REST + sum(smile.parameters(m, n, 8, rank, 16).total for m, n in VIT)
    assert found == pytest.approx(total, rel=0 if rank == 32 else 1e-3)
    assert round(found / 87_456_000, 2) == times


def test_parameters_are_the_sizes_of_the_arrays(deltas):
    for rank in (3, -1):
        layer = layer_of(deltas, rank, 2, [np.zeros(6, np.float32)] * 3)
        cost = smile.parameters(6, 8, 3, rank, 2)
        assert cost.base == 6 * 8 + 6
        assert cost.experts + cost.router == sum(part.size for part in jax.tree.leaves(layer))
    assert smile.parameters(6, 8, 3, 3, 2, bias=False).total == 48 + 3 * (3 * 14 + 2 * 8)


def test_flops_are_two_a_parameter_of_the_experts_computed():
    assert smile.flops(6, 8, 3, 3, 2) == (2 * 54, 2 * 3 * (3 * 14 + 6), 2 * 3 * 2 * 8)
    assert smile.flops(6, 8, 3, 3, 2, computed=1).experts == 2 * (3 * 14 + 6)


def test_a_gate_as_wide_as_the_input_is_refused():
    with pytest.raises(CfmergeError, match=r"gate=8 is not below the input width 8 of 'h/kernel'.*at most 7"):
        smile.check_gate(8, 8, "h/kernel")
    with pytest.raises(CfmergeError, match="gate=9 is not below the input width 8"):
        smile.expert(jnp.ones((6, 8)), 2, 9)
    with pytest.raises(CfmergeError, match="gate must be at least 1, not 0"):
        smile.expert_of_factors(jnp.ones((6, 1)), jnp.ones((1, 8)), 2, 0)


def test_top_k_is_from_one_to_the_number_of_experts(deltas, x):
    for top_k in (0, 4):
        with pytest.raises(CfmergeError, match=f"from 1 to the number of experts, 3, not {top_k}"):
            smile.added(x, layer_of(deltas, 2, 2), top_k)
    assert smile.blend_warning(1) is None
    assert "top_k=2" in smile.blend_warning(2)


def test_the_examples_in_its_docstrings_run():
    assert doctest.testmod(smile, extraglobs={"jnp": jnp}) == (0, 2)
