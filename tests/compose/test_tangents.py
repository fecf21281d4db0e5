"""Tangent components compose by one jvp, and add, scale, subtract and are forgotten as vectors are."""

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from golden_cases import CASES, load, states
from tangent_parts import X, base, component, head_alone, network, three

import cfmerge
from cfmerge.compose import tangent_files, tangent_training
from cfmerge.compose import tangents as tangents_module
from cfmerge.compose.tangents import Tangents, linearised

apply = jax.jit(lambda tangents, x: tangents.apply(network, x))


def by_formula(tangents, x):
    """`f + J sum_t c_t V_t` in NumPy and float64, the derivative of the tanh network by hand."""
    w = {name: np.asarray(a, np.float64) for name, a in _leaves(tangents.base).items()}
    v = {name: np.zeros_like(a) for name, a in w.items()}
    for c, one in zip(tangents.coefficients, tangents.components, strict=True):
        for name, array in one.items():
            v[name] += c * np.asarray(array, np.float64)
    x = np.asarray(x, np.float64)
    hidden = np.tanh(x @ w["hidden/kernel"] + w["hidden/bias"])
    moved = (1 - hidden**2) * (x @ v["hidden/kernel"] + v["hidden/bias"])
    return hidden @ w["head/kernel"] + moved @ w["head/kernel"] + hidden @ v["head/kernel"]


def _leaves(tree):
    return {
        "hidden/kernel": tree["hidden"]["kernel"],
        "hidden/bias": tree["hidden"]["bias"],
        "head/kernel": tree["head"]["kernel"],
    }


def same_bits(one, other):
    return np.array_equal(np.asarray(one).view(np.uint32), np.asarray(other).view(np.uint32))


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_golden_composition_with_unequal_and_negative_coefficients(precision):
    case, arrays = CASES["tmc_compose"], load(CASES["tmc_compose"])
    with jax.enable_x64(precision == "float64"):
        cast = {key: value.astype(precision) for key, value in arrays.items()}
        tangents = Tangents(states(cast, "base"))
        for number, coefficient in enumerate(case["params"]["lambda"]):
            tangents = tangents.add(f"t{number}", states(cast, f"tangent_{number}"), coefficient)
        net = jax.jit(lambda p, x: jnp.tanh(x @ p["W1"].T + p["b1"]) @ p["W2"].T)
        asked = {"expected": None, "expected_base_output": np.zeros(3)}
        asked |= {f"expected_component_output_{t}": np.eye(3)[t] for t in range(3)}
        for key, coefficients in asked.items():
            found = tangents.apply(net, cast["x"], coefficients=coefficients)
            assert np.max(np.abs(np.asarray(found, np.float64) - arrays[key])) <= case["tolerance"][key][precision]


def test_composition_is_the_formula_in_numpy_with_frozen_leaves_and_components_of_some_leaves():
    tangents = three()
    np.testing.assert_allclose(apply(tangents, X), by_formula(tangents, X), rtol=1e-5, atol=1e-5)


def test_one_jvp_whatever_the_number_of_components_and_none_through_frozen_layers():
    def products(*components):
        tangents = Tangents(base())
        for number, one in enumerate(components):
            tangents = tangents.add(f"t{number}", one)
        return str(jax.make_jaxpr(lambda x: tangents.apply(network, x))(X)).count("dot_general")

    plain = str(jax.make_jaxpr(lambda x: network(base(), x))(X)).count("dot_general")
    assert products(component(1)) == products(*map(component, range(8))) <= 2 * plain + 1
    assert products(head_alone(1)) == products(*map(head_alone, range(8))) == plain + 1


def test_coefficients_of_1_over_t_give_the_mean_of_the_components_outputs():
    tangents = three()
    every = [apply(tangents.scaled(row.tolist()), X) for row in np.eye(3)]
    np.testing.assert_allclose(apply(tangents.mean(), X), np.mean(every, axis=0), rtol=1e-5, atol=1e-6)


def test_the_order_of_components_changes_rounding_alone():
    a, b, c = (three().components[index] for index in range(3))
    other = Tangents(base()).add("c", c, 2.0).add("b", b, -0.25).add("a", a, 0.5)
    np.testing.assert_allclose(apply(three(), X), apply(other, X), rtol=1e-5, atol=1e-6)


def test_the_composition_is_linear_in_the_coefficients():
    tangents, start = three(), network(base(), X)
    moved = apply(tangents.scaled([3 * c for c in tangents.coefficients]), X) - start
    np.testing.assert_allclose(moved, 3 * (apply(tangents, X) - start), rtol=1e-5, atol=1e-5)


def test_no_component_is_the_base_and_one_is_its_own_linearised_model():
    assert same_bits(jax.jit(lambda x: Tangents(base()).apply(network, x))(X), jax.jit(network)(base(), X))
    assert Tangents(base()).mean().coefficients == ()
    one = Tangents(base()).add("a", component(1))
    assert same_bits(one.apply(network, X), linearised(network, base(), component(1), X))


def test_a_subtracted_component_takes_back_what_it_added():
    tangents = Tangents(base()).add("a", component(1)).add("again", component(1), -1.0)
    np.testing.assert_allclose(apply(tangents, X), network(base(), X), rtol=1e-5, atol=1e-6)
    only = three().scaled({"b": -1.0})
    assert only.coefficients == (0.5, -1.0, 2.0)


def test_a_removed_component_leaves_bit_for_bit_the_model_that_never_saw_it():
    a, b, c = component(1), component(2), head_alone(3)
    never = Tangents(base()).add("b", b, 0.3).add("c", c, -1.7)
    left = Tangents(base()).add("a", a, 9.0).add("b", b, 0.3).add("c", c, -1.7).remove("a")
    assert jax.tree.structure(left) == jax.tree.structure(never)
    assert same_bits(apply(left, X), apply(never, X))
    again = Tangents(base()).add("b", b, 0.3).add("a", a).remove("a").add("c", c, -1.7).add("a", a).remove("a")
    assert same_bits(apply(again, X), apply(never, X))
    assert all(same_bits(again.total()[name], array) for name, array in never.total().items())


def test_a_leaf_that_only_a_removed_component_had_is_frozen_again():
    tangents = Tangents(base()).add("head", head_alone(1)).add("all", component(2)).remove("all")
    assert list(tangents.total()) == ["head/kernel"]


def test_an_added_component_leaves_the_object_it_was_added_to_as_it_is():
    one = Tangents(base()).add("a", component(1))
    two = one.add("b", component(2))
    assert (one.names, two.names) == (("a",), ("a", "b"))
    with pytest.raises(AttributeError):
        one.names = ("b",)


def test_jit_takes_the_object_and_coefficients_of_a_request():
    tangents, asked = three(), jnp.array([1.0, 0.5, -2.0])
    compiled = jax.jit(lambda t, x, c: t.apply(network, x, coefficients=c))
    want = by_formula(tangents.scaled([1.0, 0.5, -2.0]), X)
    np.testing.assert_allclose(compiled(tangents, X, asked), want, rtol=1e-5, atol=1e-5)
    named = tangents.apply(network, X, coefficients={"c": -2.0, "a": 1.0})
    want = by_formula(tangents.scaled([1.0, -0.25, -2.0]), X)
    np.testing.assert_allclose(named, want, rtol=1e-5, atol=1e-5)


def test_vmap_over_requests_is_each_request_by_itself_and_so_are_coefficients_for_every_example():
    tangents = three()
    asked = jnp.asarray(np.random.default_rng(0).standard_normal((4, 3)), jnp.float32)
    want = np.stack([by_formula(tangents.scaled(c.tolist()), x) for c, x in zip(asked, X, strict=True)])
    mapped = jax.vmap(lambda x, c: tangents.apply(network, x, coefficients=c))(X, asked)
    np.testing.assert_allclose(mapped, want, rtol=1e-5, atol=1e-5)
    each = jax.jit(lambda x, c: tangents.apply_each(network, x, coefficients=c))(X, asked)
    np.testing.assert_allclose(each, want, rtol=1e-5, atol=1e-5)


def test_the_gradient_by_a_coefficient_is_that_components_change_of_the_output():
    tangents = three()
    by_coefficient = jax.jacfwd(lambda c: tangents.apply(network, X, coefficients=c))(jnp.array([0.5, -0.25, 2.0]))
    for index, one in enumerate(tangents.components):
        change = linearised(network, base(), one, X) - network(base(), X)
        np.testing.assert_allclose(by_coefficient[..., index], change, rtol=1e-4, atol=1e-6)


def test_reverse_gradients_by_coefficients_and_by_inputs_are_finite_differences():
    tangents = three()

    def score(c, x):
        return jnp.sum(tangents.apply(network, x, coefficients=c) ** 2)

    with jax.enable_x64():
        c, x = jnp.array([0.5, -0.25, 2.0]), jnp.asarray(X, jnp.float64)
        by_c, by_x = jax.grad(score, argnums=(0, 1))(c, x)
        step = 1e-4
        at_c = (score(c + jnp.array([step, 0, 0]), x) - score(c - jnp.array([step, 0, 0]), x)) / (2 * step)
        way = jnp.zeros_like(x).at[1, 2].set(step)
        at_x = (score(c, x + way) - score(c, x - way)) / (2 * step)
    np.testing.assert_allclose([by_c[0], by_x[1, 2]], [at_c, at_x], rtol=2e-3)


def test_outputs_may_be_any_tree_and_integers_among_them_stay():
    def told(params, x):
        return {"logits": network(params, x), "steps": params["steps"]}

    tangents = three()
    found = tangents.apply(told, X)
    np.testing.assert_allclose(found["logits"], by_formula(tangents, X), rtol=1e-5, atol=1e-5)
    assert found["steps"] == 7


def test_integer_leaves_have_no_tangent():
    whole = jax.tree.map(jnp.zeros_like, base())
    own = Tangents(base()).add("a", {**whole, "head": head_alone(1)["head"]})
    assert "steps" not in own.total()
    floats = jax.grad(lambda p: jnp.sum(network(p, X)), allow_int=True)(base())
    assert floats["steps"].dtype == jax.dtypes.float0
    assert set(Tangents(base()).add("a", floats).total()) == set(component(1))
    with pytest.raises(cfmerge.CfmergeError, match="'steps' is int32 in the base"):
        Tangents(base()).add("a", {"steps": jnp.int32(1)})


def test_a_base_in_bfloat16_keeps_its_dtype_and_sums_are_made_in_float32():
    low = jax.tree.map(lambda a: a.astype(jnp.bfloat16) if a.dtype == jnp.float32 else a, base())
    tangents = Tangents(low)
    for number in range(64):
        tangents = tangents.add(f"t{number}", {"hidden/bias": jnp.full(5, 1 / 64 + 2**-9, jnp.bfloat16)})
    np.testing.assert_allclose(tangents.total()["hidden/bias"], np.full(5, 1.125), rtol=1e-6)
    assert tangents.apply(network, X.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    assert tangents.to_task_vector()["hidden"]["bias"].dtype == jnp.bfloat16


def test_a_module_of_nnx_is_a_base_by_its_state_and_gelu_has_its_tangent_at_zero():
    """The authors' code divides by the input there."""
    layer = nnx.Linear(3, 2, use_bias=False, rngs=nnx.Rngs(0))
    graph, state = nnx.split(layer)
    tangents = Tangents(state).add("a", jax.tree.map(jnp.ones_like, state))

    def gelu(state, x):
        return jax.nn.gelu(nnx.merge(graph, state)(x) - nnx.merge(graph, jax.lax.stop_gradient(state))(x))

    found = tangents.apply(gelu, X)
    np.testing.assert_allclose(found, 0.5 * jnp.broadcast_to(X.sum(axis=1, keepdims=True), (4, 2)), rtol=1e-5)
    assert isinstance(tangents.to_task_vector(), nnx.State)


def test_the_task_vector_is_the_sum_as_a_tree_and_differs_at_second_order():
    def apart(scale):
        tangents = three().scaled([scale, scale, scale])
        moved = jax.tree.map(jnp.add, tangents.base, tangents.to_task_vector())
        assert moved["steps"] == 7
        return float(jnp.max(jnp.abs(network(moved, X) - tangents.apply(network, X))))

    assert apart(1.0) / apart(0.5) == pytest.approx(4, rel=0.3)  # quadratic


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda t: t.add("a", component(1)), ["'a'", "there already", "remove it first"]),
        (lambda t: t.add("d/e", component(1)), ["'d/e'", "letters, digits"]),
        (lambda t: t.add("d", {"head/kernle": jnp.ones((5, 2))}), ["'d'", "head/kernle", "did you mean 'head/kernel'"]),
        (lambda t: t.add("d", {"head/kernel": jnp.ones((2, 5))}), ["'head/kernel'", "(2, 5)", "(5, 2)"]),
        (lambda t: t.add("d", {"head/kernel": jnp.ones((5, 2), jnp.complex64)}), ["complex64", "float32"]),
        (lambda t: t.add("d", {}), ["'d'", "no leaf that moves"]),
        (lambda t: t.remove("birds"), ["no component 'birds'", "a, b, c"]),
        (lambda t: t.scaled([1.0]), ["expected 3", "a, b, c", "(1,)"]),
        (lambda t: t.scaled({"d": 1.0}), ["no component 'd'"]),
        (lambda t: t.apply_each(network, X, coefficients=jnp.ones(3)), ["(examples, 3)", "(3,)"]),
        (lambda t: t.apply_each(network, X, coefficients=jnp.ones((9, 3))), ["9 examples", "(4, 2)"]),
    ],
)  # fmt: skip
def test_an_error_tells_what_was_expected_and_what_was_found(call, words):
    with pytest.raises(cfmerge.CfmergeError) as caught:
        call(three())
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("module", [tangents_module, tangent_files, tangent_training])
def test_the_examples_in_docstrings_run(module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    known = {"jax": jax, "jnp": jnp, "optax": optax, "compose": cfmerge.compose}
    done = doctest.testmod(module, extraglobs=known, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert done.attempted >= 3
    assert not done.failed


def test_the_representation_is_short():
    assert repr(three()) == "<Tangents: 3 components, 3 of 4 leaves: a 0.5, b -0.25, c 2.0>"
