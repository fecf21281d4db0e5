"""Statistics of experts: accumulated, saved, added, forgotten, solved.

For additive methods the statistic of a tensor is a few sums over the experts. A directory of them can be shipped
instead of the experts: it is all that the method, and every other that keeps the same statistic, needs of them.
"""

import dataclasses
import hashlib
import json
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np

from cfmerge.core.call import call_of, form_of, identity
from cfmerge.core.expressions import expression
from cfmerge.errors import CfmergeError
from cfmerge.formats import DirectorySink, Folder, Source, Totals, open_checkpoint
from cfmerge.methods import Method
from cfmerge.recipe import Recipe, Rule

KEY = "cfmerge.statistics"  # in the files' metadata
SAMPLE = 1024  # entries of each tensor of the base that its fingerprint is made of

Leaves = Mapping[str, Any]  # {leaf of the statistic: array (matrices, ...)}


@dataclasses.dataclass(frozen=True)
class Statistics:
    """The statistics of experts: the sums that an additive method keeps of them, for every tensor.

        >>> statistics = cfmerge.accumulate("base", ["math"], "average", output="one")
        >>> both = statistics + cfmerge.accumulate("base", ["code"], "average", output="two")
        >>> both.save("both")
        >>> cfmerge.Statistics.load("both").experts
        {'math': 1.0, 'code': 1.0}
        >>> list((both - cfmerge.Statistics.load("two")).experts)
        ['math']

    `a + b` holds the experts of both, `a - b` forgets those of b. Both are computed tensor by tensor when they are
    needed, and `load` reads arrays from the files when they are needed.

    Attributes:
        method: the method that they were accumulated for, as text.
        experts: `{name: weight}`.
        kinds: `{tensor: name of its statistic}`; a method can solve it if it keeps a statistic of that name.
        base: a fingerprint of the base, which must be the same wherever statistics meet.
        options: rules and heads of the recipe.
        tensors: `{tensor: {leaf: array (matrices, ...)}}`.

    Raises:
        CfmergeError: from `+` and `-`: another base, another method, an expert that is there twice or not at all.
    """

    method: str
    experts: Mapping[str, Any]
    kinds: Mapping[str, str]
    base: str
    options: Mapping[str, Any]
    tensors: Mapping[str, Leaves]

    def __add__(self, other: "Statistics") -> "Statistics":
        both = [name for name in self.experts if name in other.experts]
        if both:
            raise CfmergeError(f"statistics: expert {both[0]!r} is in both, and would count twice")
        return self._with(other, {**self.experts, **other.experts}, operator.add)

    def __sub__(self, other: "Statistics") -> "Statistics":
        unknown = [name for name in other.experts if name not in self.experts]
        if unknown:
            raise CfmergeError(f"statistics: expert {unknown[0]!r} cannot be forgotten: it was never added")
        for name, weight in other.experts.items():
            if weight != self.experts[name]:
                raise CfmergeError(
                    f"statistics: expert {name!r} was added with weight {self.experts[name]}, not {weight}"
                )
        kept = {name: weight for name, weight in self.experts.items() if name not in other.experts}
        return self._with(other, kept, operator.sub)

    def _with(self, other: "Statistics", experts: Mapping[str, Any], combine: Callable[..., Any]) -> "Statistics":
        if self.base != other.base:
            raise CfmergeError("statistics: they were accumulated over different bases")
        if dict(self.kinds) != dict(other.kinds):
            name = next(n for n in {**self.kinds, **other.kinds} if self.kinds.get(n) != other.kinds.get(n))
            raise CfmergeError(
                f"statistics: they differ in what is kept of tensor {name!r}: {self.kinds.get(name, 'nothing')} and "
                f"{other.kinds.get(name, 'nothing')}"
            )

        def combined(name: str) -> Leaves:
            mine, theirs = self.tensors[name], other.tensors[name]
            return {leaf: combine(mine[leaf], theirs[leaf]) for leaf in mine}

        return dataclasses.replace(self, experts=experts, tensors=_Lazily(self.kinds, combined))

    def check(self, method: Method, name: str) -> None:
        """Raises `CfmergeError` unless the method can solve the statistic of the tensor."""
        if name not in self.kinds:
            raise CfmergeError(
                f"statistics: nothing was kept of tensor {name!r}; leave it at the base by a rule with method keep-base"
            )
        wanted = statistic_name(method)
        if wanted != self.kinds[name]:
            raise CfmergeError(
                f"statistics: {method.name} needs the statistic {wanted} of tensor {name!r}, but {self.kinds[name]} "
                f"was kept; accumulate for {method.name}"
            )

    def recipe(self, asked: Recipe) -> Recipe:
        """The recipe with the rules and the choice about heads that were accumulated with, where it has none."""
        rules = asked.rules or msgspec.convert(self.options["rules"], list[Rule])
        return msgspec.structs.replace(asked, rules=rules, heads=asked.heads or self.options["heads"])

    def save(self, directory: str | Path, *, overwrite: bool = False, inputs: Sequence[Path] = ()) -> None:
        """Writes them as a directory of safetensors, which appears when it is complete.

        Raises:
            CfmergeError: the directory exists.
        """
        with statistics_sink(directory, self.metadata(), overwrite, inputs) as sink:
            headers = {
                f"{name}:{leaf}": (tuple(array.shape), np.dtype(array.dtype))
                for name in self.kinds
                for leaf, array in self.tensors[name].items()
            }
            sink.declare(headers)
            for name in self.kinds:
                for leaf, array in self.tensors[name].items():
                    sink.write(f"{name}:{leaf}", np.asarray(array))
            sink.finish(Totals())
            sink.commit()

    def metadata(self) -> dict[str, str]:
        told = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "tensors"}
        return {KEY: json.dumps(told, default=dict)}

    @staticmethod
    def load(directory: str | Path) -> "Statistics":
        """The statistics that `save` wrote; arrays are read when they are needed.

        Raises:
            CfmergeError: it is something else.
        """
        file = open_checkpoint(directory)
        if KEY not in file.metadata:
            raise CfmergeError(f"{directory}: holds no statistics of cfmerge")
        told = json.loads(file.metadata[KEY])
        leaves: dict[str, list[str]] = {name: [] for name in told["kinds"]}
        for stored in file.tensors:
            name, _, leaf = stored.rpartition(":")
            leaves[name].append(leaf)

        def read(name: str) -> Leaves:
            return {leaf: file.read(f"{name}:{leaf}") for leaf in leaves[name]}

        return Statistics(**told, tensors=_Lazily(told["kinds"], read))


class _Lazily(Mapping[str, Leaves]):
    """A mapping that computes its values when they are asked for."""

    def __init__(self, names: Mapping[str, Any], make: Callable[[str], Leaves]) -> None:
        self._names, self._make = names, make

    def __getitem__(self, name: str) -> Leaves:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def statistics_sink(
    directory: str | Path, metadata: Mapping[str, str], overwrite: bool, inputs: Sequence[Path]
) -> DirectorySink:
    """The sink of statistics: a directory of safetensors whose metadata describes them."""
    folders = [Folder(metadata=metadata)]
    return DirectorySink(Path(directory), folders, metadata={}, overwrite=overwrite, inputs=inputs)


def statistic_name(method: Method) -> str:
    """The name of a method's statistic: methods of one name can solve it."""
    if method.statistic is not None:
        return repr(method.statistic)
    return expression(method) if method.call else repr(identity(call_of(method)))


def full_form(method: Method) -> Method:
    """The method in the form whose statistic is sums of a fixed size, where it has several.

    Raises:
        CfmergeError: it keeps all experts' deltas.
    """
    formed = form_of(method)
    if formed is None:
        raise CfmergeError(f"{method.name} keeps every expert's delta: it has no statistics to accumulate")
    return formed


def leaf_names(statistic: Any) -> list[str]:
    """Names of the arrays in a statistic, in the order of its leaves."""
    paths, _ = jax.tree_util.tree_flatten_with_path(statistic)
    return [jax.tree_util.keystr(path, simple=True, separator=".") or "value" for path, _ in paths]


def pattern(method: Method, shape: tuple[int, ...], dtype: str) -> Any:
    """The statistic of a tensor of that shape, as shapes and dtypes."""
    return jax.eval_shape(method.init, jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)))


def named_leaves(statistics: Any, span: slice) -> dict[str, Any]:
    """A share of a stack's statistics by name: `{leaf: (matrices, ...)}`."""
    leaves = jax.tree.leaves(statistics)
    return {name: leaf[span] for name, leaf in zip(leaf_names(statistics), leaves, strict=True)}


def stacked(shares: Sequence[Leaves], method: Method, shape: tuple[int, ...], compute: str) -> Any:
    """The statistics of a stack, from the leaves of its parts one behind the other."""
    like = pattern(method, shape, "float32")
    leaves = [
        jnp.array(jnp.concatenate([jnp.asarray(own[name], compute) for own in shares]))  # steps use up what they get
        for name in leaf_names(like)
    ]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def fingerprint(tensors: Mapping[str, Any] | Source, names: Sequence[str]) -> str:
    """The fingerprint of a base: a hash of the first entries of the tensors that are merged."""
    digest = hashlib.sha256()
    for name in sorted(names):
        array = tensors[name] if isinstance(tensors, Mapping) else tensors.read(name)
        digest.update(name.encode() + b"\0")
        rows = -(-SAMPLE // max(1, math.prod(array.shape[1:])))  # the whole would be gathered where it is sharded
        first = array[:rows] if array.ndim else array
        digest.update(np.asarray(first.reshape(-1)[:SAMPLE], np.float32).tobytes())
    return digest.hexdigest()
