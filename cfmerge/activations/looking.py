"""Running a Flax model on a batch, and looking on: what layers of some kinds are given, and what they make of it.

A look stands between a layer and the model: it gets a call of the layer, and returns the outputs, which may be others
than the layer's, and what is kept of them. Linen hands every call to it (`intercept_methods`, kept by
`sow`), in nnx the layers' `__call__` is replaced while the model runs. Both work inside `nn.scan` and `nnx.scan`.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple


class Call(NamedTuple):
    """A call of a layer: `run()` makes it, `run(option=value)` with an option changed. Scans of nnx know no names."""

    layer: Any
    name: str | None
    inputs: Any
    options: Mapping[str, Any]
    run: Callable[..., Any]


Look = Callable[[Call], tuple[Any, Any]]  # the outputs, and what is kept: a pytree of arrays, or None
Join = Callable[[Any, Any], Any]  # what was kept of one layer in several calls
Forward = Callable[..., dict[str, Any]]  # (variables or state, batch, ...) -> {layer's name: what was kept}

LINEAR = ("Dense", "DenseGeneral", "Conv", "Linear", "LinearGeneral")
NORMS = ("BatchNorm",)
FIELD = "cfmerge_inputs"  # of a layer, while the model runs
COLLECTION = "intermediates"  # of linen: models that scan over layers often carry it along
PATCHING = threading.Lock()


def in_linen(
    model: Any, kinds: tuple[str, ...], look: Callable[..., Look], join: Join, options: Mapping[str, Any]
) -> Forward:
    """`f(variables, batch, *more)`: what `look(*more)` keeps of the layers of a linen model. To be jitted."""
    from flax import linen, traverse_util

    mutable = options.get("mutable") or ()
    mutable = mutable if mutable is True else [COLLECTION, *([mutable] if isinstance(mutable, str) else mutable)]

    def forward(variables: Any, batch: Any, *more: Any) -> dict[str, Any]:
        own = look(*more)

        def intercept(following: Any, args: Any, kwargs: Any, context: Any) -> Any:
            layer = context.module
            known = isinstance(layer, _kinds(linen, kinds)) and context.method_name == "__call__"
            if not (known and layer.is_mutable_collection(COLLECTION)):
                return following(*args, **kwargs)
            outputs, kept = own(_call(layer, "/".join(layer.path), following, args, kwargs))
            if kept is not None:
                layer.sow(COLLECTION, FIELD, kept, reduce_fn=_joined(join), init_fn=lambda: None)
            return outputs

        args, kwargs = _arguments(batch)
        with linen.intercept_methods(intercept):
            _, changed = model.apply(variables, *args, **kwargs, **{**options, "mutable": mutable})
        flat = traverse_util.flatten_dict(changed.get(COLLECTION, {}))
        return {"/".join(path[:-1]): kept for path, kept in flat.items() if path[-1] == FIELD}

    return forward


def in_nnx(
    graph: Any, kinds: tuple[str, ...], look: Callable[..., Look], join: Join, method: str, options: Mapping[str, Any]
) -> Forward:
    """`f(state, batch, *more)`: what `look(*more)` keeps of the layers of an nnx model. To be jitted."""
    from flax import nnx

    def forward(state: Any, batch: Any, *more: Any) -> dict[str, Any]:
        model = nnx.merge(graph, state)
        names = {id(node): "/".join(map(str, path)) for path, node in nnx.iter_graph(model)}
        args, kwargs = _arguments(batch)
        with _replaced(_kinds(nnx, kinds), names, look(*more), join):
            getattr(model, method)(*args, **kwargs, **options)
        return {
            "/".join(map(str, path[:-1])): _value(variable)
            for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Intermediate))
            if path[-1] == FIELD
        }

    return forward


@contextlib.contextmanager
def _replaced(kinds: tuple[Any, ...], names: Mapping[int, str], look: Look, join: Join) -> Iterator[None]:
    """While it is open, layers of nnx run under a look, which keeps things in a variable of theirs."""
    from flax import nnx

    def looking(call: Any) -> Any:
        @functools.wraps(call)
        def looked(layer: Any, *args: Any, **kwargs: Any) -> Any:
            bound = functools.partial(call, layer)
            outputs, kept = look(_call(layer, names.get(id(layer)), bound, args, kwargs))
            if kept is not None:
                known = getattr(layer, FIELD, None)
                kept = _joined(join)(None if known is None else _value(known), kept)
                setattr(layer, FIELD, nnx.Intermediate(kept))
            return outputs

        return looked

    with PATCHING:
        calls = [kind.__call__ for kind in kinds]
        try:
            for kind, call in zip(kinds, calls, strict=True):
                kind.__call__ = looking(call)
            yield
        finally:
            for kind, call in zip(kinds, calls, strict=True):
                kind.__call__ = call


def _kinds(library: Any, names: tuple[str, ...]) -> tuple[Any, ...]:
    return tuple(getattr(library, name) for name in names if hasattr(library, name))


def _call(layer: Any, name: str | None, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    def run(**options: Any) -> Any:  # an option by place, `use_running_average` of BatchNorm alone, gives way
        return call(*(args[:1] if options else args), **{**kwargs, **options})

    given = args[0] if args else kwargs["inputs"] if "inputs" in kwargs else kwargs["x"]
    return Call(layer, name, given, kwargs, run)


def _joined(join: Join) -> Join:
    return lambda known, kept: kept if known is None else join(known, kept)


def _value(variable: Any) -> Any:
    return variable.get_value() if hasattr(variable, "get_value") else variable.value  # older flax


def _arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call, by place and by name."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch), {}) if isinstance(batch, tuple | list) else ((batch,), {})


def kernel_of(layer: str) -> str:
    """The name of a layer's kernel."""
    return f"{layer}/kernel" if layer else "kernel"
