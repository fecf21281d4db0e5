"""Calls as pytrees, forms of a number, forms of a method."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core_parts import BASE, close, fails, merged

import cfmerge
from cfmerge import methods
from cfmerge.core.call import form_of, settle, structure
from cfmerge.core.expressions import expression
from cfmerge.core.several import several
from cfmerge.methods import (
    Transform,
    make,
)


def test_numbers_are_the_leaves_of_a_call(own):
    method = own.times([0.1, 0.2]) >> methods.ace(eps_rel=0.5) >> methods.scale(3.0)
    leaves, treedef = jax.tree.flatten(method.call)
    assert leaves == [0.1, 0.2, 0.5, 0.3, 3.0]
    other = jax.tree.unflatten(treedef, [2.0, 4.0, *leaves[2:]]).part()
    assert jax.tree.leaves(other.call) == [2.0, 4.0, *leaves[2:]]
    assert structure(other) == structure(method)
    assert structure(method) != structure(methods.ace() >> methods.scale(3.0))
    assert structure(own.by_chance()) != structure(own.by_chance(scope="tensor"))
    assert structure(methods.ace()) != structure(methods.ace(eps=0.1))  # given or not: another branch


def test_a_call_is_compiled_once_for_all_numbers_and_swept_by_vmap(deltas):
    """Its part is made inside the trace: a tree is also made of things that are no numbers."""
    traces = []

    @jax.jit
    def merge(call):
        traces.append(call)
        return cfmerge.merge_tensor(BASE, deltas, call.part())

    made = [methods.task_arithmetic(scale) >> methods.scale(2.0) for scale in (0.5, 1.0)]
    for scale, method in zip((1.0, 2.0), made, strict=True):
        close(merge(method.call), scale * np.sum(deltas, axis=0))
    assert len(traces) == 1
    stacked = jax.tree.map(lambda *values: jnp.stack(values), *(method.call for method in made))
    swept = jax.vmap(lambda call: cfmerge.merge_tensor(BASE, deltas, call.part()))(stacked)
    close(swept[1], 2 * np.sum(deltas, axis=0))
    jax.tree.map(lambda _: object(), made[0].call)


def test_parts_without_a_call_are_their_own_structure():
    plain = Transform("plain", lambda delta: delta)
    assert structure(plain) == structure(plain)
    assert structure(plain) != structure(Transform("plain", lambda delta: delta))
    method = plain >> methods.scale(2.0)
    assert jax.tree.leaves(method.call) == [2.0]
    assert jax.tree.map(lambda _: 3.0, method.call).part().parameters["parts"][0] is plain


@pytest.mark.parametrize(
    "text",
    ["task_arithmetic(scale=0.7)", "times(factor=0.7) >> average", "average >> scale(factor=0.7)",
     "squares(ridge=0.7) >> scale(0.5)", "times(0.7) >> middle >> toward"],
)  # fmt: skip
def test_traced_numbers_give_the_same(own, deltas, text):
    """Under jit, vmap and grad; the derivative is that of finite differences."""
    method = make(text)

    def result(number):
        traced = jax.tree.map(lambda value: number if value == 0.7 else value, method.call).part()
        return cfmerge.merge_tensor(BASE, deltas, traced)

    expected = merged(method, deltas)
    close(jax.jit(result)(0.7), expected, 2e-6)
    close(jax.vmap(result)(jnp.asarray([0.2, 0.7]))[1], expected, 2e-6)

    def size(number):
        return jnp.sum(result(number) ** 2)

    step = 2e-3
    slope = (size(0.7 + step) - size(0.7 - step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(size)(0.7), slope, rtol=2e-2, atol=2e-3)


# --- forms of a number -------------------------------------------------------------------------------------------


def settled(part, name="model.layers.1.mlp.w", depth=None, experts=("a", "b", "c")):
    from cfmerge.planning.depth import place

    return [value for _, value in settle(part, place(name, depth, experts)).call.values()]


def test_values_are_settled_for_a_tensor(own):
    scale = methods.task_arithmetic
    assert settled(scale(0.25)) == [0.25]
    assert settled(scale({"gradient": [1.0, 3.0]}), depth=0.25) == [1.5]
    assert settled(scale({"gradient": [1.0, 3.0, 9.0]}), depth=0.75) == [6.0]
    assert settled(scale({"gradient": [1.0, 3.0]}), depth=None) == [1.0]
    assert settled(scale({"gradient": [4.0]}), depth=0.7) == [4.0]
    by_name = scale([{"match": "*mlp*", "value": {"gradient": [0.0, 1.0]}}, {"value": 7.0}])
    assert settled(by_name, depth=0.5) == [0.5]
    assert settled(by_name, "head") == [7.0]
    assert settled(own.times([1, 2, 3])) == [(1, 2, 3)]
    assert settled(own.times({"experts": {"c": 3, "a": 1, "b": 2}})) == [(1, 2, 3)]
    mixed = own.times([{"match": "*mlp*", "value": [1, {"gradient": [0.0, 4.0]}, 3]}, {"value": 5}])
    assert settled(mixed, depth=0.5) == [(1, 2.0, 3)]
    assert settled(mixed, "head") == [5]


def test_values_that_do_not_fit_the_merge(own):
    fails(["times: parameter 'factor'", "2 values for 3 experts"], settled, own.times([1, 2]))
    fails(["no expert 'd'", "a, b, c"], settled, own.times({"experts": {"a": 1, "b": 2, "c": 3, "d": 4}}))
    fails(["expert 'c' has no value"], settled, own.times({"experts": {"a": 1, "b": 2}}))
    only = methods.task_arithmetic([{"match": "*attn*", "value": 1.0}])
    fails(["'scale'", "'model.layers.1.mlp.w'", "no pattern"], settled, only)


def test_per_expert_values_in_a_merge(own, deltas):
    for factor in ([1.0, 2.0, 4.0], {"experts": {"x": 1.0, "z": 4.0, "y": 2.0}}):
        method = own.times(factor) >> methods.average()
        expected = (deltas[0] + 2 * deltas[1] + 4 * deltas[2]) / 3
        close(merged(method, deltas, names=["x", "y", "z"]), expected)


# --- forms of a method --------------------------------------------------------------------------------------------


def test_the_form_with_a_sum_keeps_the_numbers_of_a_chain():
    """Whatever they depend on: the form is asked of a method before it is settled for a tensor, or after."""
    text = "trim(density={'gradient': [0.5, 1.0]}) >> ace(eps_rel=0.5)"
    formed = form_of(make(text))
    assert expression(formed) == text
    assert jax.tree.leaves(formed.call) == jax.tree.leaves(make(text).call)
    assert structure(formed) != structure(make(text))
    start = formed.init(BASE)
    for known in (start, formed.update(start, BASE + 1.0, 1.0)):
        assert [leaf.shape for leaf in jax.tree.leaves(known)] == [leaf.shape for leaf in jax.tree.leaves(start)]
    assert structure(form_of(formed)) == structure(formed)
    again = jax.tree.map(lambda value: value, formed.call).part()
    assert structure(again) == structure(formed)


def test_forms_that_are_not_there(own):
    assert form_of(own.middle()) is None
    assert form_of(own.times(1.0) >> own.middle()) is None
    assert form_of(methods.average()).name == "average"
    assert form_of(methods.average(), rank=3) is None
    assert form_of(methods.tact(), rank=3) is None
    assert form_of(own.times(2.0) >> methods.ace(), rank=3) is None
    assert form_of(methods.ace(), rank=3).call.factory.rank == 3
    assert form_of(methods.anchored(towards=own.middle())) is None


def test_an_anchor_in_the_form_with_a_sum(deltas):
    method = methods.anchored(towards=methods.ace())
    assert structure(form_of(form_of(method))) == structure(form_of(method))
    close(merged(form_of(method), deltas), merged(method, deltas), 1e-5)


def test_several_methods_report_each_for_itself(own):
    many = several((own.squares(ridge=0.1), methods.average(), own.squares(ridge=0.2)))
    _, reports = many.solve(many.update(many.init(BASE), BASE + 1.0, 1.0))
    assert [dict(report).keys() for report in reports] == [{"trace", "ridge"}, set(), {"trace", "ridge"}]
    close([reports[0]["ridge"], reports[2]["ridge"]], [0.1, 0.2])
