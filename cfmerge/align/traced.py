"""Permutation spaces of a model, derived from the model itself: its function is traced, and each axis followed.

Two axes that meet, in a sum entry by entry or in a product as inputs and outputs, permute together. Axes of the inputs
and outputs keep their order, and so does every axis whose order the model uses: positions, windows of a convolution,
the halves that a rotary embedding turns. What is left are the spaces. An axis that is reshaped is split: the outputs
of a projection into heads and what lies within a head.
"""

from collections.abc import Callable
from typing import Any

import jax

from cfmerge.align.atoms import Atom, fix, leaves
from cfmerge.align.derived import Axes, spaces_of
from cfmerge.align.tracing import walk
from cfmerge.align.values import Along, Facts, Value, fixed
from cfmerge.formats.pytree import named_leaves
from cfmerge.models.spaces import Spaces


def trace_spaces(f: Callable[..., Any], params: Any, *inputs: Any) -> Spaces:
    """The permutation spaces of the model `f(params, *inputs)`.

        >>> def model(params, x):
        ...     return jax.nn.relu(x @ params["up"] + params["bias"]) @ params["down"]
        >>> params = {"up": jnp.ones((3, 8)), "bias": jnp.ones(8), "down": jnp.ones((8, 2))}
        >>> cfmerge.align.trace_spaces(model, params, jnp.ones((1, 3))).table()
        {'bias': 'up', 'down': 'in up, -', 'up': 'in 3, up'}

    Nothing is computed: arrays may be `jax.ShapeDtypeStruct`. A permutation in the spaces leaves the outputs as they
    are, whatever the values of the tensors; `check_spaces` tries it. Where the model does what cannot be followed, the
    axes are fixed: `why_fixed` says which and by what.

    Args:
        f: a pure function, such as `model.apply` of linen.
        params: a tree or a flat mapping of arrays, which names the tensors.
        inputs: of the model, such as a batch; their axes keep their order.

    Raises:
        CfmergeError: two tensors have one name.
    """
    return spaces_of(*_traced(f, params, inputs))


def why_fixed(f: Callable[..., Any], params: Any, *inputs: Any) -> dict[str, dict[int, str]]:
    """Why axes keep their order, wholly or in part: `{tensor: {axis: reason}}`, as `trace_spaces` finds them.

        >>> model = lambda params, x: jnp.cumsum(x @ params["w"], axis=-1) @ params["v"]
        >>> params = {"w": jnp.ones((3, 8)), "v": jnp.ones((8, 2))}
        >>> cfmerge.align.why_fixed(model, params, jnp.ones((1, 3)))["w"]
        {0: 'an input of the model', 1: '`cumsum` along it'}

    Args:
        f, params, inputs: as for `trace_spaces`.
    """
    axes, facts = _traced(f, params, inputs)
    spaces_of(axes, facts)
    reasons = {
        name: {i: reason for i, atom in enumerate(own) if (reason := _reason(atom))} for name, own in axes.items()
    }
    return {name: own for name, own in reasons.items() if own}


def _reason(atom: Atom) -> str:
    return "; ".join(dict.fromkeys(leaf.fixed for leaf in leaves(atom) if leaf.fixed))


def _traced(f: Callable[..., Any], params: Any, inputs: tuple[Any, ...]) -> tuple[Axes, Facts]:
    """The atoms of each tensor's axes after the trace, and what else was found."""
    facts, (named, _) = Facts(), named_leaves(params)
    closed = jax.make_jaxpr(f)(params, *inputs)
    axes = {
        name: tuple(Atom(n, "" if n > 1 else "a single element") for n in aval.shape)
        for name, aval in zip(named, closed.in_avals[: len(named)], strict=True)
    }
    tensors = [
        Value(tuple(Along(a if a.size > 1 else None, frozenset([(name, i)])) for i, a in enumerate(own)))
        for name, own in axes.items()
    ]
    rest = [
        Value(tuple(fixed(n, "an input of the model") for n in aval.shape), True)
        for aval in closed.in_avals[len(named) :]
    ]
    for value in walk(facts, closed, [*tensors, *rest]):
        for axis in value.axes:
            if axis.atom is not None:
                fix(axis.atom, "an output of the model")
    return axes, facts
