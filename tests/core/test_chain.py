"""Chains of transforms and a method, and contexts."""

import numpy as np
import pytest
from core_parts import BASE, close, fails, merged

from cfmerge import methods
from cfmerge.core.call import structure
from cfmerge.core.expressions import expression
from cfmerge.core.part import with_context
from cfmerge.methods import Context, Method, Needs, Seen, Transform, chain


def test_chain_is_its_parts_one_after_the_other(own, deltas):
    """In front on each delta, behind on the merged one; called part by part, it is the same."""
    method = own.times(2.0) >> own.deeper() >> methods.average() >> methods.scale(0.5) >> own.times(3.0)
    close(merged(method, deltas), 3 * np.mean(deltas, axis=0))
    statistic = method.init(BASE)
    for delta in deltas:
        statistic = method.update(statistic, delta, 1.0)
    close(method.solve(statistic)[0], 3 * np.mean(deltas, axis=0))


def test_chain_takes_over_what_its_method_says(own):
    method = own.by_chance() >> methods.average() >> own.times(1.0)
    assert method.additive
    assert method.needs.normalises
    assert method.needs.random
    assert method.needs.scope == "entry"
    assert method.name == "by_chance >> average >> times"
    assert (own.times(1.0) >> methods.ace()).needs.scope == "matrix"
    assert (own.by_chance(scope="tensor") >> methods.average()).needs.scope == "tensor"
    assert not (own.times(1.0) >> own.middle()).additive
    assert (own.times(1.0) >> methods.expo()).needs.experts == (1, 1)
    assert method.statistic is None  # transformed deltas are not another method's statistic


def test_chains_nest(own, deltas):
    a, b, method, c, d = own.times(2.0), own.times(3.0), methods.average(), own.times(5.0), own.times(7.0)
    ways = [a >> b >> method >> c >> d, (a >> b) >> (method >> (c >> d)), chain(a, chain(b, chain(method, c)), d)]
    assert len({structure(way) for way in ways}) == 1
    assert {expression(way) for way in ways} == {
        "times(factor=2.0) >> times(factor=3.0) >> average >> times(factor=5.0) >> times(factor=7.0)"
    }
    results = [merged(way, deltas) for way in ways]
    assert all(np.array_equal(result, results[0]) for result in results)


def test_a_chain_of_transforms_is_a_transform(own, deltas):
    both = own.times(2.0) >> own.times(3.0)
    assert isinstance(both, Transform)
    close(both(deltas[0]), 6 * deltas[0])
    assert isinstance(both >> methods.average(), Method)


def test_what_cannot_be_chained(own):
    fails(["two methods", "average and ace"], lambda: methods.average() >> methods.ace())
    fails(["toward", "behind a method"], lambda: own.toward() >> methods.average())
    fails(["by_chance", "in front of the method"], lambda: methods.average() >> own.by_chance())
    with pytest.raises(TypeError):
        methods.average() >> 3


def test_a_transform_that_looks_back(own, deltas):
    """It gets the deltas as they came in, whatever stands in front of the method."""
    method = own.times(2.0) >> methods.average() >> own.toward(0.25)
    assert not method.additive
    close(merged(method, deltas), 0.75 * 2 * np.mean(deltas, axis=0) + 0.25 * deltas[0])


def test_what_a_transform_sees_when_it_looks_back(deltas):
    seen = []

    def look() -> Transform:
        """Notes what it is given."""
        return Transform("look", lambda merged, given: seen.append(given) or merged, needs=Needs("entry", seen=True))

    method = methods.average() >> look()
    statistic = method.init(deltas[0])
    for number in (1, 2):
        statistic = method.update(statistic, deltas[number], float(number))
    method.solve(statistic)
    assert isinstance(seen[0], Seen)
    assert np.array_equal(seen[0].base, deltas[0])
    assert np.array_equal(seen[0].deltas, np.stack(deltas[1:]))
    assert seen[0].weights.tolist() == [1, 2]


def test_context_comes_to_those_who_take_it(own):
    context = Context(number=3)
    assert with_context(lambda delta: delta, (1,), context) == 1
    assert with_context(lambda delta, context: context.number, (1,), context) == 3
    assert with_context(lambda *all_of_them: all_of_them[-1].number if len(all_of_them) > 1 else 0, (1,), context) == 0
