"""A model's equations walked through: its jaxpr, with what it calls and its loops."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal

from cfmerge.align import indexing, rules
from cfmerge.align.atoms import Atom, fix
from cfmerge.align.values import Along, Facts, Value, fix_all, fixed, meet, shape

RULES = {**rules.RULES, **indexing.RULES}

CALLS = {  # primitives that call a function: its place among their parameters
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "composite": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
}


def walk(facts: Facts, closed: Any, operands: Sequence[Value]) -> list[Value]:
    """The outputs of a function, given as a jaxpr, of these operands."""
    jaxpr = closed.jaxpr if isinstance(closed, ClosedJaxpr) else closed
    consts = closed.consts if isinstance(closed, ClosedJaxpr) else ()
    known: dict[Any, Value] = {}

    def value_of(variable: Any) -> Value:
        return constant(variable.val) if isinstance(variable, Literal) else known[variable]

    def keep(variables: Sequence[Any], values: Sequence[Value]) -> None:
        for variable, value in zip(variables, values, strict=True):
            known[variable] = value
            facts.note(value)

    keep(jaxpr.constvars, [constant(const) for const in consts])
    keep(jaxpr.invars, operands)
    for equation in jaxpr.eqns:
        keep(equation.outvars, step(facts, equation, [value_of(variable) for variable in equation.invars]))
    return [value_of(variable) for variable in jaxpr.outvars]


def step(facts: Facts, equation: Any, operands: Sequence[Value]) -> list[Value]:
    """The results of one equation."""
    name = equation.primitive.name
    if name in CALLS and CALLS[name] in equation.params:
        return walk(facts, equation.params[CALLS[name]], operands)
    if name in LOOPS:
        return LOOPS[name](facts, equation, operands)
    return RULES.get(name, fix_all)(facts, equation, operands)


def constant(array: Any) -> Value:
    """An array that the model has in its code: the axes along which it changes keep their order."""
    sizes = np.shape(array)
    if not any(n > 1 for n in sizes) or 0 in sizes:
        return Value((Along(),) * len(sizes))
    plain = jnp.issubdtype(array.dtype, np.number) or array.dtype == bool
    entries = np.asarray(array) if plain else None
    same = [entries is not None and bool((entries == entries.take([0], axis)).all()) for axis in range(len(sizes))]
    axes = (Along() if s else fixed(n, "a constant of the model") for n, s in zip(sizes, same, strict=True))
    return Value(tuple(axes))


def data(value: Value) -> Value:
    """The same array, seen as one that depends on the inputs."""
    return Value(tuple(Along(axis.atom) for axis in value.axes), True)


def carried(value: Value, variable: Any) -> Value:
    """An array that a loop changes: nothing is constant along its axes, and no tensor is its origin."""
    sizes = shape(variable)
    return Value(
        tuple(Along(a.atom or (Atom(n) if n > 1 else None)) for a, n in zip(value.axes, sizes, strict=True)), True
    )


def again(start: Sequence[Value], end: Sequence[Value]) -> None:
    """What a loop hands to its next round lies as what it was handed."""
    for one, other in zip(start, end, strict=True):
        for left, right in zip(one.axes, other.axes, strict=True):
            meet([left, right])


def scan(facts: Facts, equation: Any, operands: Sequence[Value]) -> list[Value]:
    """A loop over first axes, which keep their order."""
    p = equation.params
    consts, ends = p["num_consts"], p["num_consts"] + p["num_carry"]
    carry = [carried(value, v) for value, v in zip(operands[consts:ends], equation.invars[consts:ends], strict=True)]
    rows = []
    for value in operands[ends:]:
        if value.axes[0].atom is not None:
            fix(value.axes[0].atom, "a loop over it")
        rows.append(Value(value.axes[1:], value.data))
    results = walk(facts, p["jaxpr"], [*operands[:consts], *carry, *rows])
    again(carry, results[: len(carry)])
    stacked = [
        Value((fixed(p["length"], "a loop over it"), *value.axes), value.data) for value in results[len(carry) :]
    ]
    return [*carry, *stacked]


def while_(facts: Facts, equation: Any, operands: Sequence[Value]) -> list[Value]:
    p = equation.params
    tests, start = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]
    carry = [carried(value, v) for value, v in zip(operands[start:], equation.invars[start:], strict=True)]
    walk(facts, p["cond_jaxpr"], [*operands[:tests], *carry])
    again(carry, walk(facts, p["body_jaxpr"], [*operands[tests:start], *carry]))
    return carry


def cond(facts: Facts, equation: Any, operands: Sequence[Value]) -> list[Value]:
    branches = [walk(facts, branch, operands[1:]) for branch in equation.params["branches"]]
    return [
        data(Value(tuple(meet(axes) for axes in zip(*(value.axes for value in values), strict=True))))
        for values in zip(*branches, strict=True)
    ]


LOOPS = {"scan": scan, "while": while_, "cond": cond}
