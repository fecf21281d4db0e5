"""The call that made a part, such as `trim(density=0.2)`: a pytree whose leaves are its numbers.

All else (the factory, its options, which numbers are None) is the structure of the tree. So `jax.jit` of a function
that takes a call compiles once for all numbers, and `jax.vmap` over the leaves is a sweep:

    calls = jax.tree.map(lambda *values: jnp.stack(values), *(method.call for method in methods))
    jax.vmap(lambda call: call.part().solve(statistic))(calls)

The part is made when it is asked for, inside the trace.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, TypeVar

import jax

from cfmerge.core.numbers import Place, at, is_number, plain_number
from cfmerge.core.part import Method, Part

P = TypeVar("P", bound=Part)


class Options(dict[str, Any]):
    """Arguments that are no numbers: compared by value, and never changed."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(repr(sorted(self.items())))


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["numbers", "parts"], meta_fields=["factory", "options"]
)
@dataclasses.dataclass(frozen=True)
class Call:
    """A factory and its arguments.

    Attributes:
        factory: the function that is called; of a part that no registered factory made, the part.
        numbers: `{parameter: value}` of those annotated `Number` or `PerExpert`, and `depth`.
        parts: `{parameter: call}`, or tuples of calls, of those that are parts themselves.
        options: all others.
    """

    factory: Any
    numbers: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    parts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    options: Options = dataclasses.field(default_factory=Options)

    @staticmethod
    def of(factory: Callable[..., Part], arguments: Mapping[str, Any], numbers: frozenset[str]) -> "Call":
        """The call of a factory, given the names of the parameters that are numbers."""
        parts = {key: value for key, value in arguments.items() if key not in numbers and _holds_parts(value)}
        rest = {key: value for key, value in arguments.items() if key not in numbers and key not in parts}
        calls = jax.tree.map(call_of, parts, is_leaf=lambda value: isinstance(value, Part))
        return Call(factory, {key: arguments[key] for key in arguments if key in numbers}, calls, Options(rest))

    def part(self) -> Any:
        """The part that the call makes."""
        return self.factory if isinstance(self.factory, Part) else self.factory(**self.arguments)

    @property
    def arguments(self) -> dict[str, Any]:
        """All arguments, in the factory's order."""
        given = {**self.numbers, **self._each(lambda call: call.part()), **self.options}
        return {key: given[key] for key in inspect.signature(self.factory).parameters if key in given} if given else {}

    def mapped(self, change: Callable[["Call", str, Any], Any]) -> "Call":
        """The call, every number `value` of parameter `key` replaced by `change(call, key, value)`."""
        numbers = {key: change(self, key, value) for key, value in self.numbers.items()}
        return dataclasses.replace(self, numbers=numbers, parts=self._each(lambda call: call.mapped(change)))

    def values(self) -> Iterator[tuple[str, Any]]:
        """`(parameter, value)` of every number, those of inner calls too."""
        yield from self.numbers.items()
        for call in jax.tree.leaves(self.parts, is_leaf=_is_call):
            yield from call.values()

    def _each(self, function: Callable[["Call"], Any]) -> dict[str, Any]:
        return jax.tree.map(function, dict(self.parts), is_leaf=_is_call)


def _is_call(value: Any) -> bool:
    return isinstance(value, Call)


def _holds_parts(value: Any) -> bool:
    items = value if isinstance(value, tuple) else (value,)
    return len(items) > 0 and all(isinstance(item, Part) for item in items)


def call_of(part: Part) -> Call:
    """The call that made the part; a part that no registered factory made is its own structure, without numbers."""
    return part.call or Call(part)


def structure(part: Part) -> Hashable:
    """All of the part but its numbers: parts of equal structure differ in these alone."""
    return jax.tree.structure(call_of(part))


def identity(tree: Any) -> Hashable:
    """Equal for trees of equal structure and numbers, whatever array holds these; traced ones while they live."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, tuple(id(leaf) if isinstance(leaf, jax.core.Tracer) else plain_number(leaf) for leaf in leaves)


def settle(part: P, place: Place) -> P:
    """The part with the numbers of one tensor: plain ones, and tuples of one for each expert.

    Raises:
        CfmergeError: another number of values than there are experts, or a value for an unknown one.
    """

    def settled(call: Call, key: str, value: Any) -> Any:
        if key == "depth":
            return place.depth or 0.0
        return at(value, place, f"{call.factory.__name__}: parameter {key!r}")

    if part.call is None or all(key != "depth" and _is_plain(value) for key, value in part.call.values()):
        return part
    return part.call.mapped(settled).part()


def _is_plain(value: Any) -> bool:
    return value is None or is_number(value)


def of_expert(part: P, number: int) -> P:
    """The part with the numbers of one expert."""
    if part.call is None or not any(isinstance(value, tuple | list) for _, value in part.call.values()):
        return part
    return part.call.mapped(lambda call, key, value: value[number] if isinstance(value, tuple | list) else value).part()


# --- forms of a method --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Formed:
    """A factory of methods in another form."""

    factory: Callable[..., Any]
    rank: int | None

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return self.factory

    @property
    def __name__(self) -> str:
        return self.factory.__name__

    def __call__(self, **arguments: Any) -> Any:
        return self.factory(**arguments).form(self.rank)


def form_of(method: Method, rank: int | None = None) -> Method | None:
    """The method with a statistic that is a sum of fixed size; with `rank`, the method for deltas of that rank.

    None: the method has no such form.
    """
    if method.form is None:
        return method if rank is None and method.additive else None
    return method.form(rank)


def in_pieces(part: P) -> P | None:
    """The part of scope "entry" that looks within each tensor first; None: there is no such form. See `Part.pieces`.

    Its call makes it again with other numbers.
    """
    made: Any = part.pieces() if part.pieces is not None else None
    call = Call.of(in_pieces, {"part": part}, frozenset())  # type: ignore[arg-type]
    return made and dataclasses.replace(made, name=part.name, call=call, pieces=None)
