"""Methods that are one function of all deltas: the simplest method of one's own is one decorated function.

    @from_deltas(scope="entry")
    def middle(base, deltas, weights, scale: Number = 1.0):
        \"\"\"The median of the deltas, times a number.\"\"\"
        return scale * jnp.median(deltas, axis=0)

registers `middle(scale=1.0)`. It gets the base, deltas `(T, ...)` and weights `(T,)` of one tensor, and returns the
merged delta, or that and `{name: scalar}`.
"""

import functools
import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from cfmerge.core.joint import Joint
from cfmerge.core.part import NO_CONTEXT, Context, Method, Needs, Note, Report, Seen
from cfmerge.core.registry import register
from cfmerge.errors import CfmergeError

MATRICES = Needs()


def of_deltas(
    function: Callable[..., Any],
    needs: Needs = MATRICES,
    *,
    name: str = "",
    notes: Mapping[str, Note] | None = None,
    located: bool = False,
    joint: Callable[[Joint], Callable[..., Any]] | bool = False,
) -> Method:
    """The method whose merged delta is `function(base, deltas, weights)`.

    Args:
        function: it may return `(merged, report)` too.
        needs, notes: see `Method`.
        located: the function takes a last argument, the number of the first entry in its tensor.
        joint: `joint(basis)` is the function of cores in a joint basis; True: the same; see `Part.joint`.
    """

    def in_basis(basis: Joint) -> Method:
        return of_deltas(joint(basis), needs, name=name or function.__name__, notes=notes)  # type: ignore[operator]

    def init(base: Array) -> Seen:
        return Seen(base, (), ())  # type: ignore[arg-type]

    def update(statistic: Seen, delta: Array, weight: float | Array = 1.0, context: Context = NO_CONTEXT) -> Seen:
        weights = (*statistic.weights, jnp.asarray(weight, delta.dtype))
        contexts = (Context(start=context.start),) if located else ()
        return Seen(statistic.base, (*statistic.deltas, delta), weights, contexts)  # type: ignore[arg-type]

    def solve(statistic: Seen) -> tuple[Array, Report]:
        start = (statistic.contexts[0].start,) if located else ()
        found = function(statistic.base, jnp.stack(statistic.deltas), jnp.stack(statistic.weights), *start)  # type: ignore[arg-type]
        return found if isinstance(found, tuple) else (found, {})

    return Method(
        name or function.__name__,
        init,
        update,
        solve,
        needs=needs,
        additive=False,
        statistic="all deltas",
        notes=notes or {},
        joint=in_basis if callable(joint) else joint,
    )


def from_deltas(
    function: Callable[..., Any] | None = None,
    /,
    *,
    notes: Mapping[str, Note] | None = None,
    joint: bool = False,
    **needs: Any,
) -> Any:
    """The factory of the method whose merged delta is `function(base, deltas, weights, **parameters)`: a decorator.

        >>> @methods.from_deltas(scope="entry")
        ... def middle(base, deltas, weights, scale: methods.Number = 1.0):
        ...     '''The median of the deltas, times a number.'''
        ...     return scale * jnp.median(deltas, axis=0)
        >>> base = jnp.zeros((4, 3))
        >>> float(cfmerge.merge_tensor(base, [base + 1, base + 2, base + 9], "middle(scale=0.5)")[0, 0])
        1.0

    The function gets the base, deltas `(T, ...)` and weights `(T,)` of one tensor; it returns the merged delta, or that
    and a report `{name: scalar}`. The method is registered.

    Args:
        notes: see `Method`.
        joint: it commutes with orthonormal bases of outputs and inputs, see `Part.joint`.
        **needs: fields of `Needs`, such as `scope="entry"`.

    Returns:
        The factory: its parameters are those of the function behind the third.

    Raises:
        CfmergeError: the function has fewer than three parameters, or its name is registered already.
    """
    if function is None:
        return functools.partial(from_deltas, notes=notes, joint=joint, **needs)
    signature = inspect.signature(function)
    if len(signature.parameters) < 3:
        raise CfmergeError(f"{function.__name__}: a function of all deltas takes (base, deltas, weights, ...)")
    parameters = list(signature.parameters.values())[3:]

    def factory(*args: Any, **kwargs: Any) -> Method:
        given = factory.__signature__.bind(*args, **kwargs).arguments  # type: ignore[attr-defined]
        own = functools.partial(function, **given)
        return of_deltas(own, Needs(**needs), name=function.__name__, notes=notes, joint=joint)

    functools.update_wrapper(factory, function, ("__module__", "__name__", "__qualname__", "__doc__"), updated=())
    del factory.__wrapped__  # type: ignore[attr-defined]
    factory.__signature__ = signature.replace(parameters=parameters, return_annotation=Method)  # type: ignore[attr-defined]
    hints = typing.get_type_hints(function, include_extras=True)
    factory.__annotations__ = {p.name: hints[p.name] for p in parameters if p.name in hints} | {"return": Method}
    return register(factory)
