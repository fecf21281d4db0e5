"""The arithmetic of a function, counted in its trace: no number is computed, no array is made."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Var

LOOPS = 8  # rounds of a loop that ends when it has converged
DEAR = 8  # operations that a root, a quotient or a logarithm counts as
ROOTS = {"div", "sqrt", "rsqrt", "exp", "log", "log1p", "expm1", "pow", "sin", "cos", "tanh", "erf_inv", "rem", "cbrt"}
FREE = {
    "reshape", "broadcast_in_dim", "squeeze", "expand_dims", "iota", "copy", "stop_gradient", "optimization_barrier",
    "bitcast_convert_type", "convert_element_type", "random_wrap", "random_unwrap", "empty", "pvary", "create_token",
}  # fmt: skip


class Tally(NamedTuple):
    """The operations of a function by kind.

    Attributes:
        products: floating-point operations of matrix products.
        solves: those of Cholesky factorisations and triangular solves.
        eigen, svd, qr: sums of `n^3`, or of `m n min(m, n)`, over the matrices that are decomposed.
        entries: operations on entries, one by one.
        sorted: entries that are sorted.
        moved: bytes that are read and written where entries are sorted or laid otherwise, and at both ends; loops over
            entries are fused, and products and decompositions have rates that hold theirs.
        equations: the length of the trace.
        memory: bytes of all arrays that are there at once, at most.
    """

    products: float = 0.0
    solves: float = 0.0
    eigen: float = 0.0
    svd: float = 0.0
    qr: float = 0.0
    entries: float = 0.0
    sorted: float = 0.0
    moved: float = 0.0
    equations: float = 0
    memory: float = 0.0

    def __add__(self, other: "Tally") -> "Tally":  # type: ignore[override]
        """One after the other."""
        both = Tally(*(a + b for a, b in zip(self, other, strict=True)))
        return both._replace(memory=max(self.memory, other.memory))

    def times(self, count: float) -> "Tally":
        """The same so many times, in one loop."""
        many = Tally(*(count * own for own in self))
        return many._replace(memory=self.memory, equations=self.equations)

    @property
    def flops(self) -> float:
        """Floating-point operations, about; those of decompositions by the usual counts."""
        return self.products + self.solves + 9 * self.eigen + 14 * self.svd + 4 * self.qr + self.entries


def tally(function: Callable[..., Any], *arguments: Any) -> Tally:
    """The tally of a function of arrays, or of their shapes and dtypes."""
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    found, ends = _of(jaxpr), [atom for atom in (*jaxpr.invars, *jaxpr.outvars) if isinstance(atom, Var)]
    return found._replace(moved=found.moved + sum(map(_bytes, ends)))


def _of(jaxpr: Jaxpr) -> Tally:
    total, live = Tally(), _Live(jaxpr)
    for number, equation in enumerate(jaxpr.eqns):
        inner = _of_equation(equation)
        total += inner._replace(memory=live.after(number, inner.memory))
    return total._replace(memory=max(total.memory, live.now))


class _Live:
    """The arrays that are in memory while a trace runs: those that only fused loops hand on are not."""

    def __init__(self, jaxpr: Jaxpr) -> None:
        self.last: dict[Var, int] = {}
        self.whole: set[Var] = {atom for atom in (*jaxpr.invars, *jaxpr.outvars) if isinstance(atom, Var)}
        for number, equation in enumerate(jaxpr.eqns):
            inputs = [atom for atom in equation.invars if isinstance(atom, Var)]
            self.last.update(dict.fromkeys(inputs, number))
            if not _fuses(equation):
                self.whole.update([*inputs, *equation.outvars])
        self.last.update({atom: len(jaxpr.eqns) for atom in jaxpr.outvars if isinstance(atom, Var)})
        self.ending: dict[int, list[Var]] = {}
        for atom, number in self.last.items():
            if atom in jaxpr.invars:  # the caller holds them
                continue
            self.ending.setdefault(number, []).append(atom)
        self.outputs = [equation.outvars for equation in jaxpr.eqns]
        self.inputs = [[a for a in e.invars if isinstance(a, Var)] for e in jaxpr.eqns]
        self.now = float(sum(_bytes(atom) for atom in jaxpr.invars))

    def after(self, number: int, inner: float) -> float:
        """The most that there is while an equation runs; `inner`: of its own trace, inputs and outputs included."""
        outputs = sum(_bytes(atom) for atom in self.outputs[number] if atom in self.whole)
        inputs = sum(_bytes(atom) for atom in set(self.inputs[number]) if atom in self.whole)
        most = self.now + max(outputs, inner - inputs)
        ended = [atom for atom in self.ending.get(number, ()) if atom in self.whole]
        unused = [atom for atom in self.outputs[number] if atom in self.whole and atom not in self.last]
        self.now += outputs - sum(map(_bytes, ended)) - sum(map(_bytes, unused))
        return most


def _of_equation(equation: Any) -> Tally:
    name, inputs, outputs = equation.primitive.name, equation.invars, equation.outvars
    inner = list(_inner(equation))
    if name == "cond":
        return _branch(equation, inner)._replace(equations=1 + sum(one.equations for one in inner))
    if name == "while":
        return sum(inner, Tally()).times(LOOPS)
    if name == "scan":
        return inner[0].times(equation.params["length"])
    if inner:
        return sum(inner[1:], inner[0])
    if name == "dot_general":
        contracted = math.prod(inputs[0].aval.shape[axis] for axis in equation.params["dimension_numbers"][0][0])
        return Tally(products=2.0 * contracted * _size(outputs[0]), equations=1)
    return _leaf(name, equation)


def _leaf(name: str, equation: Any) -> Tally:
    """The tally of an equation without a trace of its own."""
    inputs, outputs = equation.invars, equation.outvars
    moved = sum(_bytes(atom) for atom in (*inputs, *outputs))
    one = Tally(equations=1)
    shape = inputs[0].aval.shape if inputs else ()
    if name in DECOMPOSED and len(shape) >= 2:
        size = math.prod(shape) * min(shape[-2:])
        own = _solves(name, inputs, size)
        kind, count = own if own else (name if name in {"eigh", "svd"} else "qr", float(size))
        return one._replace(**{"eigen" if kind == "eigh" else kind: count})
    if name in {"sort", "top_k"}:
        return one._replace(sorted=float(sum(map(_size, inputs))), moved=moved)
    if name in FREE:
        return one
    weight = DEAR if name in ROOTS else 1
    size = max([0, *map(_size, outputs), *(map(_size, inputs) if name.startswith(("reduce", "arg", "cum")) else ())])
    return one._replace(entries=float(weight * size), moved=0 if _fuses(equation) else moved)


DECOMPOSED = {"eigh", "svd", "qr", "geqrf", "householder_product", "cholesky", "triangular_solve", "lu", "schur", "eig"}


def _solves(name: str, inputs: Any, size: int) -> tuple[str, float] | None:
    if name == "cholesky":
        return "solves", size / 3
    if name == "lu":
        return "solves", 2 * size / 3
    if name == "triangular_solve":
        return "solves", float(_size(inputs[1]) * inputs[0].aval.shape[-1])
    return None


def _fuses(equation: Any) -> bool:
    """Whether XLA makes it a part of a loop over entries."""
    name = equation.primitive.name
    apart = name in {"dot_general", "sort", "top_k", "gather", "scatter", "transpose", "concatenate", *DECOMPOSED}
    return not apart and not any(True for _ in _traces(equation))


def _traces(equation: Any) -> Iterator[Jaxpr]:
    """The traces inside an equation that run; a system that is solved has others, for derivatives."""
    if equation.primitive.name == "custom_linear_solve":
        yield equation.params["jaxprs"].solve.jaxpr
        return
    for value in equation.params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, ClosedJaxpr):
                yield one.jaxpr
            elif isinstance(one, Jaxpr):
                yield one


def _inner(equation: Any) -> Iterator[Tally]:
    return map(_of, _traces(equation))


def _branch(equation: Any, inner: list[Tally]) -> Tally:
    """The branch for a processor; else the cheapest: the dear one is the way out, where a matrix is singular, say."""
    platforms = equation.params.get("branches_platforms")
    if platforms is not None:
        own = [number for number, names in enumerate(platforms) if names is None or "cpu" in names]
        return inner[own[0]]
    return min(inner, key=lambda one: one.flops)


def _size(atom: Any) -> int:
    return math.prod(getattr(atom.aval, "shape", ()))


def _bytes(atom: Any) -> int:
    dtype = getattr(atom.aval, "dtype", None)
    return _size(atom) * getattr(dtype, "itemsize", 0)
