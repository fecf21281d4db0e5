"""Methods as text, and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core_parts import BASE, fails

import cfmerge
from cfmerge import methods
from cfmerge.core.call import identity
from cfmerge.core.expressions import expression
from cfmerge.methods import (
    make,
)

TEXTS = [
    "average", "task_arithmetic(scale=0.4)", "trim(density=0.3) >> disjoint_mean", "trim(density=0.3) >> average",
    "times(factor=2.0) >> ace(eps_rel=0.01) >> scale(factor=0.5)", "times(factor=[0.1, 0.2, 0.3]) >> average",
    "times(factor={'experts': {'a': 0.1, 'b': 2.0}}) >> average", "task_arithmetic(scale={'gradient': [0.0, 1.0]})",
    "task_arithmetic(scale=[{'match': '*mlp*', 'value': 1.0}, {'value': -0.5}])",
    "by_chance(p=0.25, scope='tensor') >> average",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_text_and_back(own, text):
    made = make(text)
    assert expression(made) == text
    assert identity(make(expression(made)).call) == identity(made.call)


def test_ways_to_write_the_same(own):
    texts = ["times( 2.0 )>>average", "times(factor=2.0) >> average()", "(times(factor=2.0)) >> (average)"]
    names = {expression(make(text)) for text in texts}
    assert names == {"times(factor=2.0) >> average"}
    assert make("task_arithmetic", {"scale": "4e-1"}).call == make("task_arithmetic(scale=4e-1)").call
    assert make("task_arithmetic", {"scale": 0.3}).call != make("task_arithmetic", {"scale": 0.4}).call
    assert expression(make("task_arithmetic(scale=0.3)")) == "task_arithmetic"  # the default


def test_text_is_not_evaluated(own):
    fails(["cannot be read"], make, "task_arithmetic(scale=__import__('os').getpid())")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("averag", ["unknown method 'averag'", "did you mean 'average'"]),
        ("trim(densit=0.2) >> average", ["trim", "no parameter 'densit'", "'density'"]),
        ("times >> average", ["'times' needs a value for 'factor'", "the number"]),
        ("times(1, 2) >> average", ["times has 1 parameters, found 2"]),
        ("task_arithmetic(scale='big')", ["'scale'", "expected a number", "'big'"]),
        ("task_arithmetic(scale=True)", ["'scale'", "expected a number", "True"]),
        ("task_arithmetic(normalise='maybe')", ["'normalise'", "bool", "'maybe'"]),
        ("by_chance(scope='all') >> average", ["'scope'", "'all'"]),
        ("trim(density=1.5) >> average", ["trim: density", "[0, 1]", "1.5"]),
        ("trim(density=0.2", ["cannot be read"]),
        ("", ["cannot be read"]),
        ("trim + average", ["cannot be read", "trim + average"]),
        ("trim(density=0.2)", ["is a transform", ">> average"]),
        ("times(factor=[]) >> average", ["'factor'", "[]"]),
        ("task_arithmetic(scale=[0.1, 0.2])", ["'scale'", "cannot differ from expert to expert"]),
        ("task_arithmetic(scale={'experts': {'a': 1}})", ["'scale'", "cannot differ from expert to expert"]),
        ("task_arithmetic(scale={'gradient': 3})", ["'scale'", "gradient"]),
        ("task_arithmetic(scale={'gradient': []})", ["'scale'", "gradient"]),
        ("times(factor={'experts': [1, 2]}) >> average", ["'factor'", "experts"]),
        ("task_arithmetic(scale=[{'match': '*'}])", ["'scale'", "values by name"]),
        ("task_arithmetic(scale={'gradient': [0, 'x']})", ["'scale'", "expected a number"]),
    ],
)
def test_text_that_is_wrong(own, text, words):
    fails(words, make, text)


def test_values_that_are_wrong_from_python(own):
    fails(["'scale'", "gradient"], methods.task_arithmetic, {"gradient": [0.1, "x"]})
    fails(["'factor'"], own.times, {"experts": {"a": 1.0, "b": "x"}})
    fails(["'factor'"], own.times, [0.1, [0.2]])
    fails(["'scale'"], methods.task_arithmetic, jnp.ones(3))
    fails(["times"], own.times)
    fails(["times"], own.times, 1.0, wrong=2)
    fails(["write the parameters into the expression"], make, "times(1.0) >> average", {"factor": 2})


def test_arrays_that_print_alike_are_different_numbers():
    """`make` keeps what it made, but neither traced values nor one number for another."""
    near = np.float32(0.1), np.nextafter(np.float32(0.1), np.float32(1))
    made = [make("task_arithmetic", {"scale": jnp.asarray(value)}) for value in near]
    assert [float(method.parameters["scale"]) for method in made] == [float(value) for value in near]

    for shift in (1.0, 2.0):  # the second trace must not find the first one's value
        merge = jax.jit(lambda s, shift=shift: shift * merged_sum(make("task_arithmetic", {"scale": s})))
        assert merge(0.5) == shift * 6
    chained = jax.jit(lambda s: merged_sum(methods.scale(s) >> methods.average()))
    assert chained(0.5) == 6


def merged_sum(method):
    return jnp.sum(cfmerge.merge_tensor(BASE, [jnp.ones((4, 3))], method))
