"""Adapters merged in their joint basis: the numbers of the dense merge, no dense delta, the memory of their rank."""

import dataclasses

import jax
import numpy as np
import pytest
from adapter_parts import ADAPTERS, RANKS, SHAPES, Adapter, merged, tensors, works

from cfmerge import methods
from cfmerge.engine import joint, run
from cfmerge.engine.cutting import units_of
from cfmerge.engine.inputs import Inputs, settings_of
from cfmerge.errors import CfmergeError, NonFiniteError
from cfmerge.models import classify
from cfmerge.planning import prediction
from cfmerge.planning.assign import assign
from cfmerge.planning.jobs import with_ranks
from cfmerge.products.leaves import Kept


@pytest.mark.parametrize("method", ["ace", "metagpt", pytest.param("tsv_m", marks=pytest.mark.long)])
def test_adapters_are_merged_as_dense_deltas_are(method):
    weights = None if method == "metagpt" else [1.0, 0.5, 2.0]
    dense, factored = works(method, ADAPTERS, weights=weights)
    joint_jobs = [job.name for job in factored.jobs if job.joint is not None]
    assert joint_jobs == list(SHAPES)[:5]
    (expected,), told = merged(dense)
    (found,), own = merged(factored)
    for name, tensor in expected.items():
        np.testing.assert_allclose(found[name], tensor, rtol=0, atol=1e-9, err_msg=name)
    assert own.reports.get(0, {}).keys() == told.reports.get(0, {}).keys()


@pytest.mark.parametrize("more", [[], pytest.param(["knots(method=average)"], marks=pytest.mark.long)])
def test_a_sweep_is_merged_so_too(more):
    grid = ["task_arithmetic(scale=0.1)", "task_arithmetic(scale=0.5)", *more]
    dense, factored = works(grid, ADAPTERS)
    assert any(job.joint is not None for job in factored.jobs)
    for expected, found in zip(merged(dense, len(grid))[0], merged(factored, len(grid))[0], strict=True):
        for name, tensor in expected.items():
            np.testing.assert_allclose(found[name], tensor, rtol=0, atol=1e-9, err_msg=name)


def test_a_random_rule_draws_by_tensor_and_expert():
    _, factored = works("core_space(method=dare_linear(p=0.5))", ADAPTERS[:1] * 2)
    ((one,), _), ((again,), _) = merged(factored), merged(factored)
    (mean,), _ = merged(works("task_arithmetic", ADAPTERS[:1] * 2)[1])
    names = ["layers.0.up.weight", "layers.1.up.weight"]
    for name in names:
        np.testing.assert_array_equal(one[name], again[name])
        assert np.abs(one[name] - mean[name]).max() > 0.1
    deltas = [one[name] - np.asarray(factored.base.tensors.read(name)) for name in names]
    assert np.abs(deltas[0] - deltas[1]).max() > 0.1  # the same adapter


def linear(adapters):
    """The work of the first tensor by a rule that takes the factors of adapters."""
    _, factored = works("peft_cat", adapters)
    assignment = dataclasses.replace(factored.jobs[0].assignment, method=methods.peft_linear())
    job = dataclasses.replace(factored.jobs[0], assignment=assignment, ranks=())
    return dataclasses.replace(factored, jobs=tuple(with_ranks([job], factored.experts)))


def test_a_rule_of_factors_gets_them():
    (found,), account = merged(linear([ADAPTERS[0], ADAPTERS[2]]))
    name = "layers.0.up.weight"
    factors = [adapter.delta(name) for adapter in (ADAPTERS[0], ADAPTERS[2])]
    expected = sum(one.left for one in factors) @ sum(one.right for one in factors)
    np.testing.assert_allclose(found[name] - tensors(0)[name], expected, rtol=0, atol=1e-9)
    assert any("off the weighted sum of the deltas" in note for note in account.told())


def test_a_rule_of_factors_is_refused_where_an_expert_has_none():
    full = Adapter(5, dict.fromkeys(SHAPES, None))
    with pytest.raises(
        CfmergeError, match=r"'layers.0.up.weight' takes the factors .* which expert 'e1' does not have"
    ):
        linear([ADAPTERS[0], full])


@pytest.mark.parametrize("method", ["ties", "trim >> average"])
def test_a_method_that_does_not_commute_sees_the_products(method):
    dense, factored = works(method, ADAPTERS)
    assert all(job.joint is None for job in factored.jobs)
    (expected,), (found,) = merged(dense)[0], merged(factored)[0]
    for name, tensor in expected.items():
        np.testing.assert_allclose(found[name], tensor, rtol=0, atol=1e-9, err_msg=name)


def test_adapters_beside_full_models_are_merged_as_products():
    full = Adapter(5, dict.fromkeys(SHAPES, None))
    dense, factored = works("ace", [ADAPTERS[0], full])
    assert all(job.joint is None for job in factored.jobs)
    (expected,), (found,) = merged(dense)[0], merged(factored)[0]
    for name, tensor in expected.items():
        np.testing.assert_allclose(found[name], tensor, rtol=0, atol=1e-9, err_msg=name)


def test_adapters_of_too_many_directions_are_merged_as_products():
    wide = [Adapter(n, {**RANKS, "layers.0.up.weight": 7}) for n in (1, 2)]
    _, factored = works("ace", wide)
    by_name = {job.name: job for job in factored.jobs}
    assert by_name["layers.0.up.weight"].joint is None  # 14 of 24
    assert by_name["layers.1.up.weight"].joint == (3, 3)


def test_tensors_of_one_shape_and_rank_are_one_unit():
    _, factored = works("ace", ADAPTERS[:1] * 2)
    units = [unit.names for unit in units_of(factored, factored.merged) if unit.job.joint]
    assert units == [
        ("layers.0.up.weight", "layers.1.up.weight"), ("layers.2.up.weight",), ("layers.0.down.kernel",),
        ("conv.weight",),
    ]  # fmt: skip


def test_no_array_of_the_dense_shape_exists_before_the_base_is_added():
    m, n, ranks = 40, 24, (3, 4)
    base = jax.ShapeDtypeStruct((2, m, n), "bfloat16")
    experts = [tuple(jax.ShapeDtypeStruct((2, *s), "bfloat16") for s in ((m, r), (r, n))) for r in ranks]
    inputs = [Inputs(np.ones(2)) for _ in ranks]
    # the product, the base in float32, the sum, its cast, and the look at it
    expected = ["add", "convert_element_type", "convert_element_type", "dot_general", "is_finite"]
    for text in ("ace", "wudi", "tsv_m", "iso_c", "average", "dc_merge", "knots"):
        settings = [settings_of([methods.make(text)] * 2)] * 2

        def step(base, experts, settings=settings):
            return joint.merge("oi", "float32", False, settings, base, experts, inputs, "bfloat16")

        with jax.enable_x64(True):
            program = jax.make_jaxpr(step)(base, experts)
        large = [equation.primitive.name for equation in equations(program.jaxpr) if dense(equation, m, n)]
        assert sorted(large) == expected, text


def equations(jaxpr):
    """Those of all inner programs, without the calls of these."""
    for equation in jaxpr.eqns:
        inner = [i for i in jax.tree.leaves(list(equation.params.values()), is_leaf=is_program) if is_program(i)]
        for one in inner:
            yield from equations(one)
        if not inner and equation.primitive.name not in {"optimization_barrier", "squeeze", "dynamic_slice"}:
            yield equation


def is_program(value):
    return hasattr(value, "eqns")


def dense(equation, m, n):
    return any(getattr(out.aval, "size", 0) >= m * n for out in equation.outvars)


def test_nan_in_a_factor_is_told_with_its_expert_and_tensor():
    broken = dataclasses.replace(ADAPTERS[1], broken="layers.1.up.weight")
    _, factored = works("ace", [ADAPTERS[0], broken])
    with pytest.raises(NonFiniteError, match=r"expert 'e1': tensor 'layers.1.up.weight' holds NaN") as error:
        merged(factored)
    assert (error.value.source, error.value.tensor) == ("e1", "layers.1.up.weight")


def test_factors_of_another_rank_than_the_header_says_are_an_error():
    _, factored = works("ace", ADAPTERS)
    ADAPTERS[0].ranks, before = {**RANKS, "conv.weight": 4}, ADAPTERS[0].ranks
    try:
        with pytest.raises(CfmergeError, match=r"'e0': the factors of 'conv.weight' have rank 4, expected 3"):
            merged(factored)
    finally:
        ADAPTERS[0].ranks = before


class Factored(Kept):
    """A sink that takes factors."""

    def __init__(self):
        super().__init__()
        self.factors = {}

    def write_factors(self, name, left, right):
        self.factors[name] = (np.asarray(left), np.asarray(right))


def test_a_sink_may_take_the_merged_deltas_as_factors():
    untouched = {**RANKS, "layers.0.down.kernel": 0}
    _, factored = works("ace", [Adapter(1, untouched), Adapter(2, untouched)], "float32")
    (whole,), _ = merged(factored)
    sink = Factored()
    run.merge(factored, [sink])
    changed = [job.name for job in factored.jobs if any(job.joint or ())]
    assert list(sink.factors) == changed
    np.testing.assert_array_equal(whole["layers.0.down.kernel"], factored.base.tensors.read("layers.0.down.kernel"))
    for name, (left, right) in sink.factors.items():
        base = np.asarray(factored.base.tensors.read(name))
        assert left.shape[1] <= 9
        np.testing.assert_allclose((left @ right).reshape(base.shape) + base, whole[name], rtol=0, atol=1e-5)
    assert set(sink.arrays(whole)) == set(SHAPES) - set(sink.factors)


def test_the_working_set_of_adapters_is_that_of_their_rank():
    _, factored = works("ace", ADAPTERS, "bfloat16")
    parameters = classify({"w.weight": ((4096, 4096), "bfloat16")})
    job = dataclasses.replace(
        factored.jobs[0], assignment=next(iter(assign(parameters, methods.ace()).values())), ranks=(16,) * 3
    )
    assert job.joint == (16, 16, 16)
    assert job.working_bytes < 0.25 * dataclasses.replace(job, ranks=()).working_bytes


def test_a_prediction_counts_the_cores():
    _, factored = works("ace", ADAPTERS, "bfloat16")
    parameters = classify({"w.weight": ((4096, 4096), "bfloat16")})
    job = dataclasses.replace(
        factored.jobs[0], name="w.weight", assignment=next(iter(assign(parameters, methods.ace()).values()))
    )
    flops = {}
    for ranks in ((), (16,) * 3):
        own = dataclasses.replace(factored, jobs=(dataclasses.replace(job, ranks=ranks),))
        (group,) = prediction.groups(own, lambda job: 1 << 20, 1 << 18)
        flops[ranks] = group.needs.merge.flops
        assert (group.entries, group.units) == (4096 * 4096, 1)
    assert 2 * 4096**2 * 48 < flops[(16,) * 3] < 0.02 * flops[()]
