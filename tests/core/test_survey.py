"""Looks at the whole model, driven by hand."""

import numpy as np
from core_parts import close

from cfmerge import methods
from cfmerge.core.part import with_context
from cfmerge.methods import Context


def drive(part, experts, models):
    """The findings of a look at models `[(tensor, ...), ...]`, of each expert's deltas, and the number of passes."""
    look, totals, passes = part.survey.look(sum(t.size for t in models[0]), [part.survey.own] * experts), None, 0
    while True:
        try:
            wanted = look.send(totals)
        except StopIteration as done:
            return done.value, passes
        passes += 1
        each = wanted.each(experts)
        totals = np.stack([
            sum(np.asarray(with_context(each[t], (delta,), Context(number=t))) for delta in model)
            for t, model in enumerate(models)
        ])  # fmt: skip


def test_each_part_of_a_chain_sees_what_those_before_it_let_through(own, deltas):
    """Two looks, one after the other: the second finds unit norms, whatever the first one saw."""
    models = [(delta, 2 * delta) for delta in deltas]
    chained = own.unit(2.0) >> own.times(3.0) >> own.unit(5.0) >> methods.average()
    found, passes = drive(chained, 3, models)
    assert passes == 2
    norms = np.sqrt([5 * np.sum(np.square(delta)) for delta in deltas])
    close(found.model[0], 2 / norms, 1e-5)
    close(found.model[2], np.full(3, 5 / 6), 1e-5)


def test_a_part_without_a_look_has_none(own):
    assert (own.times(2.0) >> methods.average()).survey is None
    assert (own.times(2.0) >> methods.metagpt()).survey is not None


def test_measures_of_experts_alike_are_one_function(own):
    """So that they are compiled once."""
    alike = own.times(2.0) >> own.unit() >> methods.average()
    wanted = next(alike.survey.look(12, [alike.survey.own] * 3))
    assert len(set(wanted.each(3))) == 1
