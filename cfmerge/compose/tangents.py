"""Tangent Model Composition (Liu and Soatto, arXiv 2307.08114): components add in the tangent space of one base.

    f_lin(x; V)  =  f(x; W_0) + J(x) V                      J(x) = df(x; W_0) / dW: linear in V
    composed     =  f(x; W_0) + J(x) sum_t c_t V_t          coefficients c_t: any numbers, of a request, of an example

`V_t` is a component: a tree like `W_0`, or of some of its leaves; the leaves that no component has are frozen. The sum
comes first and one `jax.jvp` follows, so an answer costs two to three forward passes whatever the number of components:
layers before the first leaf that moves cost one, a frozen layer behind it two, one that moves three (`W x`, `W dx`,
`V x`). `c_t = 1/T` is exactly the mean of the T components' outputs, an ensemble; a component is forgotten by leaving
it out of the sum. The network at `W_0 + sum_t c_t V_t`, ordinary task arithmetic, differs at second order.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cfmerge.compose.tangent_checks import fitted
from cfmerge.errors import CfmergeError, nearest
from cfmerge.formats.pytree import flatten, unflatten

Tangent = Mapping[str, Any]  # {leaf: array}, the name of a leaf being its path in the base, joined by "/"
Function = Callable[..., Any]  # (parameters, *inputs) -> outputs, any tree of arrays
Coefficients = Mapping[str, Any] | Sequence[Any] | jax.Array | np.ndarray
NAME = re.compile(r"\w[\w.-]*")


def linearised(function: Function, base: Any, tangent: Tangent, *inputs: Any) -> Any:
    """`f(x; W_0) + J(x) V` by one `jax.jvp`, for leaves `V` by name; only these are differentiated.

    >>> base = {"w": jnp.array([1.0, 2.0])}
    >>> compose.linearised(lambda p, x: (p["w"] @ x) ** 2, base, {"w": jnp.array([0.1, 0.0])}, jnp.ones(2))
    Array(9.6, dtype=float32)
    """
    network, leaves = _restricted(function, base, tangent, inputs)
    outputs, change = jax.jvp(network, (leaves,), (_like(leaves, tangent),))
    return jax.tree.map(_moved, outputs, change)


def total(components: Sequence[Tangent], coefficients: Sequence[Any]) -> dict[str, Any]:
    """`sum_t c_t V_t` leaf by leaf, in the order of the components and in float32 at least."""
    leaves = dict.fromkeys(leaf for component in components for leaf in component)
    pairs = list(zip(coefficients, components, strict=True))
    return {
        leaf: functools.reduce(jnp.add, [_scaled(c, component[leaf]) for c, component in pairs if leaf in component])
        for leaf in leaves
    }


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["base", "components", "coefficients"], meta_fields=["names"]
)
@dataclasses.dataclass(frozen=True, repr=False)
class Tangents:
    """Components over one base, each with a name and a coefficient, in the order in which they were added.

        >>> base = {"w": jnp.array([1.0, 2.0]), "b": jnp.zeros(())}
        >>> network = lambda p, x: jnp.tanh(p["w"] @ x + p["b"])
        >>> both = compose.Tangents(base).add("birds", {"w": jnp.ones(2)}).add("fish", {"b": jnp.array(0.5)})
        >>> x = jnp.array([0.5, 0.25])
        >>> mean = both.apply(network, x, coefficients=[0.5, 0.5])
        >>> both.remove("fish")
        <Tangents: 1 component, 1 of 2 leaves: birds 1.0>

    It is immutable and a pytree: it passes through `jit`, and `grad` with respect to its coefficients. Nothing is
    summed in advance: what `remove` leaves is bit for bit what never saw the component.

    Attributes:
        base: `W_0`, a tree of arrays.
        names: of the components, in their order.
        components: their leaves by name.
        coefficients: one for each, used where a call names no others.
    """

    base: Any
    names: tuple[str, ...] = ()
    components: tuple[Tangent, ...] = ()
    coefficients: tuple[Any, ...] = ()

    def add(self, name: str, tangent: Any, coefficient: Any = 1.0) -> "Tangents":
        """These components and one more, the last.

        Args:
            name: letters, digits, `_`, `.` and `-`: it names a file too.
            tangent: `V_t`, a tree like the base or of some of its leaves, or `{"path/of/leaf": array}`. Integer leaves
                have no tangent: they are left out, float0, or zero.

        Raises:
            CfmergeError: the name is taken, or a leaf does not fit the base.
        """
        if not NAME.fullmatch(name):
            raise CfmergeError(f"component {name!r}: name it by letters, digits, '_', '.' and '-'")
        if name in self.names:
            raise CfmergeError(f"component {name!r}: is there already; remove it first, or choose another name")
        fitting = fitted(f"component {name!r}", self.base, tangent)
        return self._with((*self.names, name), (*self.components, fitting), (*self.coefficients, coefficient))

    def remove(self, name: str) -> "Tangents":
        """The other components, as if this one had never been there: unlearning.

        Raises:
            CfmergeError: there is no such component.
        """
        self._check_names([name])
        kept = [index for index, own in enumerate(self.names) if own != name]
        parts = (self.names, self.components, self.coefficients)
        return self._with(*(tuple(part[index] for index in kept) for part in parts))

    def scaled(self, coefficients: Coefficients) -> "Tangents":
        """The same components with other coefficients; a negative one subtracts.

        Args:
            coefficients: one for each component in order; or `{name: coefficient}`, the others keeping theirs.
        """
        return dataclasses.replace(self, coefficients=self._chosen(coefficients))

    def mean(self) -> "Tangents":
        """The same components with coefficients 1/T: the ensemble of the T components' outputs."""
        return self.scaled([1 / len(self.names) for _ in self.names])

    def apply(self, function: Function, *inputs: Any, coefficients: Coefficients | None = None) -> Any:
        """`f(x; W_0) + J(x) sum_t c_t V_t`: two to three forward passes, and a sum over the components.

        Args:
            function: `f(parameters, *inputs)`, a tree of arrays; parameters are a tree like the base.
            coefficients: of this request, as `scaled` takes them; None: the components' own.
        """
        return linearised(function, self.base, self.total(coefficients), *inputs)

    def apply_each(self, function: Function, *inputs: Any, coefficients: Any) -> Any:
        """The same with coefficients of its own for every example: `(examples, components)`.

        It costs `1 + T` to `1 + 2 T` forward passes, not 2 to 3: `J(x) V_t` of every component, weighted afterwards.
        `vmap` over `apply` instead sums the components for every example: 2 to 3 passes and `T / n` more, where a
        weight meets `n` tokens of an example, but it holds a model for every example of the batch.

        Args:
            function: its outputs have the examples as first axis, and an output depends on its own example alone.
        """
        coefficients = jnp.asarray(coefficients)
        if coefficients.ndim != 2 or coefficients.shape[1] != len(self.names):
            raise CfmergeError(
                f"coefficients: expected shape (examples, {len(self.names)}), one column for each of "
                f"{', '.join(self.names)}; found {coefficients.shape}"
            )
        trained = {leaf for component in self.components for leaf in component}
        network, leaves = _restricted(function, self.base, trained, inputs)
        outputs, push = jax.linearize(network, leaves)
        changes = [push(_like(leaves, component)) for component in self.components]
        return functools.reduce(
            lambda moved, pair: jax.tree.map(functools.partial(_moved, by=pair[0]), moved, pair[1]),
            zip(coefficients.T, changes, strict=True),
            outputs,
        )

    def total(self, coefficients: Coefficients | None = None) -> dict[str, Any]:
        """`sum_t c_t V_t` by name of leaf, of the leaves that some component has."""
        return total(self.components, self._chosen(coefficients))

    def to_task_vector(self, coefficients: Coefficients | None = None) -> Any:
        """`sum_t c_t V_t` as a tree like the base, zero in frozen leaves: for ordinary task arithmetic.

        The network at `W_0 + vector` is *not* the composed one: `f(x; W_0 + V) = f(x; W_0) + J(x) V + O(|V|^2)`. The
        components were trained for the first two terms, and no parameters have exactly these.
        """
        leaves, treedef = flatten(self.base)
        found = self.total(coefficients)
        return unflatten(
            treedef,
            {n: found[n].astype(leaf.dtype) if n in found else jnp.zeros_like(leaf) for n, leaf in leaves.items()},
        )

    def _with(self, names: Any, components: Any, coefficients: Any) -> "Tangents":
        return dataclasses.replace(self, names=names, components=components, coefficients=coefficients)

    def _check_names(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self.names:
                raise CfmergeError(f"there is no component {name!r}{nearest(name, self.names)}")

    def _chosen(self, coefficients: Coefficients | None) -> tuple[Any, ...]:
        """One coefficient for each component."""
        if coefficients is None:
            return self.coefficients
        if isinstance(coefficients, Mapping):
            self._check_names(list(coefficients))
            own = zip(self.names, self.coefficients, strict=True)
            return tuple(coefficients.get(name, coefficient) for name, coefficient in own)
        found = np.shape(coefficients)
        if found != (len(self.names),):
            raise CfmergeError(
                f"coefficients: expected {len(self.names)}, for {', '.join(self.names)}; found shape {found}"
            )
        return tuple(coefficients[index] for index in range(len(self.names)))

    def __repr__(self) -> str:
        leaves = {leaf for component in self.components for leaf in component}
        told = ", ".join(f"{name} {c}" for name, c in zip(self.names, self.coefficients, strict=True))
        count = f"{len(self.names)} component{'' if len(self.names) == 1 else 's'}"
        return f"<Tangents: {count}, {len(leaves)} of {len(jax.tree.leaves(self.base))} leaves: {told}>"


def _restricted(function: Function, base: Any, names: Any, inputs: Sequence[Any]) -> tuple[Function, dict[str, Any]]:
    """The network as a function of some leaves of the base, and these leaves; the others are constants to it."""
    leaves, treedef = flatten(base)

    def network(own: Mapping[str, Any]) -> Any:
        return function(unflatten(treedef, {**leaves, **own}), *inputs)

    return network, {name: jnp.asarray(leaf) for name, leaf in leaves.items() if name in names}


def _like(leaves: Mapping[str, Any], tangent: Tangent) -> dict[str, Any]:
    """A tangent for all of these leaves, in their dtypes; zero where it has none."""
    return {
        name: jnp.asarray(tangent[name]).astype(leaf.dtype) if name in tangent else jnp.zeros_like(leaf)
        for name, leaf in leaves.items()
    }


def _scaled(coefficient: Any, array: Any) -> Any:
    """`c V` in float32 at least."""
    array = jnp.asarray(array)
    wide = array.astype(jnp.promote_types(array.dtype, jnp.float32))
    return jnp.asarray(coefficient).astype(wide.dtype) * wide


def _moved(output: Any, change: Any, by: Any = None) -> Any:
    """An output and its change, of every example times its own coefficient `by`; outputs of integers do not change."""
    if change.dtype == jax.dtypes.float0:
        return output
    if by is None:
        return output + change
    if output.ndim == 0 or len(output) != len(by):
        raise CfmergeError(
            f"coefficients: of {len(by)} examples, but an output of the network has shape {np.shape(output)}: its "
            "first axis must be the examples"
        )
    return output + by.astype(output.dtype).reshape(-1, *[1] * (output.ndim - 1)) * change
