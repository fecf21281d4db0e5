"""Merging models in memory as files are merged: modules and state dicts of torch, dicts of NumPy and JAX arrays."""

import threading
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cfmerge.errors import CfmergeError
from cfmerge.formats.arrays import ArraysSource, like, named_arrays
from cfmerge.formats.base import Header
from cfmerge.methods import Method
from cfmerge.planning.resolved import Resolved
from cfmerge.products.plan import as_recipe, planned
from cfmerge.products.trees import names_of
from cfmerge.recipe import Expert, Rule

MEMORY = "memory"  # stands in messages where a path does


def merge_state_dicts(
    base: Any,
    experts: Sequence[Any] | Mapping[str, Any],
    method: str | Method = "ace",
    *,
    weights: Sequence[Any] | Mapping[str, Any] | None = None,
    parameters: Mapping[str, Any] | None = None,
    rules: Sequence[Rule | Mapping[str, Any]] = (),
    config: Mapping[str, Any] | None = None,
    heads: str | None = None,
    partial: bool = False,
    dtype: Any = None,
    seed: int = 0,
    allow: Sequence[str] = (),
    dequantize: bool = False,
) -> dict[str, Any]:
    """The merged state dict of models in memory: what `merge` makes of the same models in files, bit for bit.

        >>> base = {"layer.weight": np.zeros((4, 3), np.float32), "layer.bias": np.zeros(4, np.float32)}
        >>> experts = [{name: array + step for name, array in base.items()} for step in (1, 3)]
        >>> merged = cfmerge.merge_state_dicts(base, experts, "average", weights=[3, 1])
        >>> merged["layer.bias"]
        array([1.5, 1.5, 1.5, 1.5], dtype=float32)

    A model is a module of torch (anything with a method `state_dict`), its state dict, or a dict of NumPy or JAX
    arrays by name. Models of other kinds may meet. Nothing of them is changed, and they are read where they lie, one
    tensor at a time. Notes on the merge become warnings.

    Args:
        base: the model that the experts were fine-tuned from.
        experts: a list, or a mapping by the experts' names.
        method, parameters, rules, heads, seed, allow, dequantize: as in a recipe; `heads` is not `export`.
        weights: one for each expert: numbers, or what a recipe takes; a mapping by the experts' names too.
        config: the base's config.json; None: a module's own `config`, if it has one.
        partial: the experts are parts of the base, or hold it as a part.
        dtype: of the floats in the result: `"bfloat16"`, `torch.bfloat16`; None: the base's.

    Returns:
        `{name: array}` in the base's order, each array of the base's kind and where the base's lies. Names of one
        array in the base are names of one array here, unless an expert has two in its place. Values of the base that
        are no arrays are taken over.

    Raises:
        CfmergeError: with every problem that names, shapes and dtypes show, one a line; or of a tensor's values.
    """
    named = isinstance(experts, Mapping)
    given = list(experts.values()) if isinstance(experts, Mapping) else list(experts)
    names = names_of(list(map(str, experts)) if named else None, len(given))
    sources = {MEMORY: _source(base, "base", MEMORY, config)}
    for name, expert in zip(names, given, strict=True):
        sources[f"{MEMORY}:{name}"] = _source(expert, f"expert {name!r}", f"{MEMORY}:{name}")
    if heads == "export":
        raise CfmergeError("heads: 'export' writes files; in memory the choices are 'keep-base' and 'drop'")
    specs = [
        Expert(path=f"{MEMORY}:{name}", name=name, weight=weight, partial=partial)
        for name, weight in zip(names, _in_order(weights, names), strict=True)
    ]
    floats = None if dtype is None else _name(dtype)
    options = {"rules": rules, "heads": heads, "dtype": floats, "seed": seed, "allow": list(allow)}
    options["dequantize"] = dequantize
    plan = planned({"": as_recipe(MEMORY, specs, method, parameters, options)}, opened=sources)
    origin = sources[MEMORY]
    sink = Filled(plan.output, _joined(plan, origin))
    result = plan.run(sink)
    for note in (*result.warnings, *result.notes, *_taken_over(origin, [sources[spec.path] for spec in specs])):
        warnings.warn(note, stacklevel=2)
    return sink.finished(origin)


def _source(model: Any, who: str, label: str, config: Mapping[str, Any] | None = None) -> ArraysSource:
    own = getattr(model, "config", None) if callable(getattr(model, "state_dict", None)) else None
    if config is None:
        told = getattr(own, "to_dict", None)
        config = told() if callable(told) else {}
    return ArraysSource(named_arrays(model, who), who, label, dict(config))


def _in_order(weights: Any, names: Sequence[str]) -> list[Any]:
    """A weight for each expert, in their order."""
    if weights is None:
        return [1.0] * len(names)
    if isinstance(weights, Mapping):
        if set(weights) != set(names):
            raise CfmergeError(f"weights by name: the experts are {', '.join(names)}; found {', '.join(weights)}")
        weights = [weights[name] for name in names]
    if len(weights) != len(names):
        raise CfmergeError(f"{len(weights)} weights for {len(names)} experts")
    return [weight if isinstance(weight, Mapping | list | tuple) else float(weight) for weight in weights]


def _name(dtype: Any) -> str:
    """The name of a dtype of NumPy, JAX or torch, or of its name."""
    told = str(dtype)
    return told.removeprefix("torch.") if isinstance(dtype, str) or told.startswith("torch.") else np.dtype(dtype).name


def _joined(plan: Resolved, base: ArraysSource) -> dict[str, str]:
    """`{alias: name}` of the names that are one array in the base, and are merged as one."""
    merged = {name: job.name for job in plan.jobs for name in job.writes}
    return {alias: name for alias, name in base.same().items() if merged.get(alias) == merged.get(name, "")}


def _taken_over(base: ArraysSource, experts: Sequence[ArraysSource]) -> list[str]:
    """A note on the values that are no arrays."""
    others = {name: None for model in (base, *experts) for name in model.others}
    return [f"{', '.join(others)}: no arrays, and not merged; the result has the base's"] if others else []


class Filled:
    """A sink that fills new arrays.

    Args:
        headers: the tensors'.
        joined: `{alias: name}` of names that are one array.
    """

    def __init__(self, headers: Mapping[str, Header], joined: Mapping[str, str]) -> None:
        self._headers, self._joined = headers, joined
        self._arrays: dict[str, np.ndarray] = {}
        self._lock = threading.Lock()

    def write(self, name: str, values: Any, first: int = 0) -> None:
        if name in self._joined:
            return
        with self._lock:
            if name not in self._arrays:
                self._arrays[name] = np.empty(*self._headers[name])
        values = np.asarray(values).reshape(-1)
        self._arrays[name].reshape(-1)[first : first + values.size] = values

    def finished(self, base: ArraysSource) -> dict[str, Any]:
        """The arrays in the base's kinds and order; hands them over."""
        result: dict[str, Any] = {}
        for name in base.values:
            if name in self._headers and name not in self._joined:
                array = self._arrays.pop(name, None)  # nothing is written of a tensor without entries
                result[name] = like(np.empty(*self._headers[name]) if array is None else array, base.values[name])
        return {
            name: base.others[name] if name in base.others else result[self._joined.get(name, name)]
            for name in base.order if name in base.others or name in self._headers
        }  # fmt: skip
