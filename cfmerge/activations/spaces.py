"""Permutation spaces of Flax models, linen and nnx: their functions traced.

spaces = spaces_of_linen(model, variables, batch)
cfmerge.align.check_spaces(spaces, model.apply, variables, batch)
"""

from collections.abc import Callable, Mapping
from typing import Any

from cfmerge.align import Spaces, trace_spaces


def spaces_of_linen(model: Any, variables: Any, *inputs: Any, **options: Any) -> Spaces:
    """The permutation spaces of a linen model.

    The tensors are named as in `variables`: `params/Dense_0/kernel`, `batch_stats/BatchNorm_0/mean`. If these are the
    parameters alone, `variables["params"]`, their names have no prefix: `Dense_0/kernel`.

    Args:
        model: the `flax.linen.Module`.
        variables: as for `model.apply`, or the parameters alone; `jax.ShapeDtypeStruct` will do.
        inputs: of the model, such as a batch.
        options: of `model.apply`: `method`, `rngs`, `train=False`, ...
    """
    return trace_spaces(linen_function(model, variables, **options), variables, *inputs)


def linen_function(model: Any, variables: Any, **options: Any) -> Callable[..., Any]:
    """`f(variables, *inputs)` of a linen model, for `check_spaces`; the variables may be the parameters alone."""
    alone = not (isinstance(variables, Mapping) and "params" in variables)
    return lambda tensors, *inputs: model.apply({"params": tensors} if alone else tensors, *inputs, **options)


def spaces_of_nnx(model: Any, *inputs: Any, method: str = "__call__", **options: Any) -> Spaces:
    """The permutation spaces of an nnx model, whose tensors are named as in `nnx.state(model)`.

    Args:
        model: the `nnx.Module`, in the mode in which it is to run (`model.eval()`). It is left as it is.
        inputs: of the model, such as a batch.
        method: the method that is called.
        options: its arguments by name.
    """
    from flax import nnx

    return trace_spaces(nnx_function(model, method, **options), nnx.state(model), *inputs)


def nnx_function(model: Any, method: str = "__call__", **options: Any) -> Callable[..., Any]:
    """`f(state, *inputs)` of an nnx model, for `check_spaces`."""
    from flax import nnx

    graph = nnx.graphdef(model)
    return lambda state, *inputs: getattr(nnx.merge(graph, state), method)(*inputs, **options)
