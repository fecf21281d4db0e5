"""Methods and transforms.

statistic      = init(base)                          nothing seen yet
statistic      = update(statistic, delta, weight)    one expert seen
merged, report = solve(statistic)                    the merged delta, and a report on it

The result is base + merged.

transform: delta -> delta                            in front of a method, or behind it on the merged delta
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Hashable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from jaxtyping import Array

if TYPE_CHECKING:
    from cfmerge.core.call import Call
    from cfmerge.core.joint import Joint
    from cfmerge.core.survey import Survey

Statistic = Any  # a pytree of arrays, private to each method
Report = Mapping[str, Any]  # {name: scalar}; a sweep has a tuple of them, one for each of its methods
Scope = Literal["entry", "tensor", "matrix"]
SCOPES: tuple[Scope, ...] = ("entry", "tensor", "matrix")  # from the narrowest to the widest
Note = tuple[Callable[[float], bool], str]  # (condition, message): it is said where condition(value) holds
FILLED_IN = ("depth", "experts")  # parameters that planning fills in: a tensor's depth, the number of experts


class Context(NamedTuple):
    """All that comes with an expert's delta besides its weight. `update` and `apply` may take it as last argument.

    Attributes:
        key: a JAX key of this seed, tensor and expert, for parts whose needs say `random`.
        number: the expert's place in the recipe, from 0.
        moment: the measurement of this expert for this tensor, for methods whose needs name `moments`.
        start: index of the delta's first entry, where a large tensor is merged in pieces (0 otherwise).
        stored, view: the shape in which the tensor lies in its file, and the function that turns it into the delta's,
            where they differ: a number that is drawn belongs to an entry of the file.
        rank: the rank of each entry's magnitude in its row over that of the largest, from 0 to 1, for parts whose needs
            say `ranks`.
        factors: `(left, right)` with `delta = left @ right`, where all experts come as factors.
    """

    key: Array | None = None
    number: int | Array = 0
    moment: Array | None = None
    start: int | Array = 0
    stored: tuple[int, ...] | None = None
    view: Callable[[Array], Array] | None = None
    rank: Array | None = None
    factors: tuple[Array, Array] | None = None


NO_CONTEXT = Context()


class Seen(NamedTuple):
    """All experts of one tensor at once: the base, deltas `(T, ...)`, weights `(T,)`, and their contexts."""

    base: Array
    deltas: Array
    weights: Array
    contexts: tuple[Context, ...] = ()


@dataclasses.dataclass(frozen=True)
class Needs:
    """All that a part asks for besides deltas and weights.

        >>> needs = methods.Needs("entry", experts=(2, None), weights="positive")
        >>> needs.but(random=True).random, methods.Needs().scope
        (True, 'matrix')

    Attributes:
        scope: the cuts that its mathematics permits. "entry": every entry is taken by itself, so a large tensor may
            come in pieces; "tensor": whole tensors of any shape, as `(out, in)` where they have such a view;
            "matrix": canonical matrices only, the remaining tensors get the mean of the deltas.
        experts: the least and the largest number of experts (None: any).
        weights: which weights have a meaning: "any", "positive", or "none" (the method ignores them).
        normalises: it divides by the sum of the weights, which must not be 0.
        moments: the measurement that every expert must bring, in the context: "input_gram" or "fisher".
        ordered: the result depends on the order of the experts.
        random: a key in the context.
        ranks: the ranks of the delta's entries in their rows, in the context: for the first part of a chain.
        behind: a transform that must stand behind a method, as its survey measures the merged delta.
        seen: one that is called as `apply(merged, Seen)`; it too must stand there.
        factors: "required": the factors of every delta, so that all experts must be adapters; "used": the method takes
            them into account where all have them. Both come in the context, in the joint basis.
    """

    scope: Scope = "matrix"
    experts: tuple[int, int | None] = (1, None)
    weights: Literal["any", "positive", "none"] = "any"
    normalises: bool = False
    moments: Literal["", "input_gram", "fisher"] = ""
    ordered: bool = False
    random: bool = False
    ranks: bool = False
    behind: bool = False
    seen: bool = False
    factors: Literal["", "used", "required"] = ""

    def but(self, **changes: Any) -> "Needs":
        """The needs, some of them changed."""
        return dataclasses.replace(self, **changes)


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """A method or a transform: the fields that both have.

    Attributes:
        name: its name in recipes.
        needs: see `Needs`.
        survey: the look at the whole model before the merge, if it needs one.
        call: the registered call that made it, from which it can be made again with other numbers.
        pieces: `pieces()` is the same part of scope "entry" after a look within each tensor, so that a large tensor can
            be merged in pieces; None where there is no such form. Ask by `in_pieces`.
        joint: `joint(basis)` is the same part for cores `U^T D V` in a joint basis of the deltas (`core/joint.py`),
            with the constants of the dense shape; True: it has none, and takes cores as it takes deltas; False: it does
            not commute with bases. Ask by `in_joint`.
    """

    name: str
    _: dataclasses.KW_ONLY
    needs: Needs = Needs()
    survey: "Survey | None" = None
    call: "Call | None" = None
    pieces: "Callable[[], Part] | None" = None
    joint: "Callable[[Joint], Part] | bool" = False

    @property
    def parameters(self) -> Mapping[str, Any]:
        """The arguments of the call that made it."""
        shown = self.call.arguments if self.call else {}
        return {key: value for key, value in shown.items() if key not in FILLED_IN}

    def __rshift__(self, other: "Part") -> Any:
        from cfmerge.core.chain import chain

        return chain(self, other) if isinstance(other, Part) else NotImplemented


@dataclasses.dataclass(frozen=True, eq=False)
class Transform(Part):
    """A delta -> delta rule, `apply(delta)` or `apply(delta, context)`; see `Needs.seen` for a third.

        >>> clip = methods.Transform("clip", lambda delta: jnp.clip(delta, -1, 1))
        >>> base = jnp.zeros((4, 3))
        >>> float(cfmerge.merge_tensor(base, [base + 1, base + 3], clip >> methods.average())[0, 0])
        1.0

    The delta is canonical, `(out, in)`, for scope "matrix"; the result has its shape and dtype.
    """

    apply: Callable[..., Array]
    _: dataclasses.KW_ONLY
    needs: Needs = Needs("entry")

    def __call__(self, delta: Array, context: Context = NO_CONTEXT) -> Array:
        """The transformed delta."""
        return with_context(self.apply, (delta,), context)


@dataclasses.dataclass(frozen=True, eq=False)
class Method(Part):
    """A rule that turns the experts' deltas of one tensor into the merged delta: three pure functions.

        >>> mean = methods.Method(
        ...     "mean",
        ...     init=lambda base: (jnp.zeros_like(base), 0.0),
        ...     update=lambda kept, delta, weight=1.0: (kept[0] + weight * delta, kept[1] + weight),
        ...     solve=lambda kept: (kept[0] / kept[1], {}),
        ...     needs=methods.Needs("entry"),
        ... )
        >>> base = jnp.zeros((4, 3))
        >>> float(cfmerge.merge_tensor(base, [base + 1, base + 3], mean, weights=[3.0, 1.0])[0, 0])
        1.5

    `base` and `delta` are canonical, `(out, in)`, for scope "matrix"; see `Needs.scope`. All three functions can be
    jitted, vmapped and, where the mathematics is, differentiated.

    Attributes:
        init, update, solve: `solve(statistic)` returns the merged delta and a report `{name: scalar}`.
        additive: the statistic is a sum over experts; without it all deltas of a tensor come at once.
        statistic: a name of the statistic; methods that give the same one share it (None: no other method has it).
        by_rows: its cost is products with rows of the deltas and solves for them, so that devices can share out the
            rows of one large matrix.
        form: `form(None)` is the same method with a statistic that is a sum of fixed size, `form(r)` the same for
            deltas of rank at most `r`, which reports `factor_error`, the relative error of taking them so; None where
            there is no such form. Ask by `form_of`. A method without `form` has one form only.
        notes: `{report name: (condition, message)}`: the message for the user where `condition(value)` holds.
        chooses: it stands for other methods, one of which takes its place for each tensor after a look at the deltas
            (`cfmerge/products/choosing.py`). Its functions are those of the method that most tensors get.
    """

    init: Callable[[Array], Statistic]
    update: Callable[..., Statistic]
    solve: Callable[[Statistic], tuple[Any, Any]]
    _: dataclasses.KW_ONLY
    additive: bool = True
    statistic: Hashable = None
    by_rows: bool = False
    form: Callable[[int | None], "Method | None"] | None = None
    notes: Mapping[str, Note] = dataclasses.field(default_factory=dict)
    chooses: bool = False

    def see(
        self, statistic: Statistic, delta: Array, weight: float | Array = 1.0, context: Context = NO_CONTEXT
    ) -> Statistic:
        """`update`, given the context if it takes one."""
        return with_context(self.update, (statistic, delta, weight), context)


@dataclasses.dataclass(frozen=True, eq=False)
class Composer(Method):
    """A method whose `solve` returns, in place of the merged delta, the named arrays of a result for each tensor.

    `{part: array}`, written as they are. Of scope "entry" the last axes of every part are the tensor's: a large tensor
    comes in pieces. In a joint basis of adapters the parts are those of the cores.

    Attributes:
        out_of: `out_of(parts, u, v)` are the parts of the deltas `U M_t V^T`, from those of the cores `M_t`.
        sums: its report's values are sums over entries, which are added up over the pieces of a tensor.
    """

    _: dataclasses.KW_ONLY
    sums: bool = False
    out_of: Callable[..., Mapping[str, Array]] | None = None


def with_context(function: Callable[..., Any], arguments: tuple[Any, ...], context: Context) -> Any:
    """The function's result, called with the context as a last argument if it takes one."""
    return function(*arguments, context) if _takes(function, len(arguments) + 1) else function(*arguments)


@functools.lru_cache(maxsize=4096)
def _takes(function: Callable[..., Any], count: int) -> bool:
    """Whether the function has at least `count` positional parameters."""
    kinds = [p.kind for p in inspect.signature(function).parameters.values()]
    positional = {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD}
    return sum(kind in positional for kind in kinds) >= count
