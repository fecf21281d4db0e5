"""Models in memory: modules and state dicts of torch, dicts of NumPy's and of JAX's arrays, trees.

Arrays are read as NumPy's: without a copy where they lie in the host's memory, otherwise one at a time. Torch is never
imported: where nobody else has imported it, nothing is a tensor of torch.
"""

import math
import sys
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from cfmerge.errors import CfmergeError
from cfmerge.formats.base import Folder, TensorInfo
from cfmerge.formats.pytree import flatten
from cfmerge.models.deltas import Delta, Dense
from cfmerge.models.ties import likely_ties

PARAMS = "merge_params is for trees"
WIDTHS = {1: "uint8", 2: "int16", 4: "int32", 8: "int64"}  # by bytes: integers that NumPy shares with torch


def torch_of(value: Any) -> Any:
    """The module `torch` if the value is one of its tensors, else None."""
    torch = sys.modules.get("torch")
    return torch if torch is not None and isinstance(value, getattr(torch, "Tensor", ())) else None


def is_array(value: Any) -> bool:
    """Whether a value is an array or a tensor of numbers."""
    if isinstance(value, jax.Array):
        return not jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
    return isinstance(value, np.ndarray | np.generic) or torch_of(value) is not None


def named_arrays(model: Any, who: str, trees: bool = False) -> dict[str, Any]:
    """A model's values by name, in its order.

    Args:
        model: has a method `state_dict`, as modules of torch do; or is a mapping by name.
        who: the model, in messages.
        trees: take nested values too, their names joined by `/`.

    Raises:
        CfmergeError: it is something else.
    """
    if callable(getattr(model, "state_dict", None)):
        return dict(model.state_dict(keep_vars=True))
    flat = isinstance(model, Mapping) and not any(isinstance(value, Mapping | list | tuple) for value in model.values())
    if flat and all(isinstance(name, str) for name in model):
        return dict(model)
    if trees:
        return flatten(model)[0]
    inner = next((name for name, value in model.items() if isinstance(value, Mapping)), None) if _maps(model) else None
    if inner in {"state_dict", "model_state_dict", "model"}:
        raise CfmergeError(f"{who}: is a checkpoint, whose tensors lie in its {inner!r}; give that")
    if inner is not None:
        raise CfmergeError(f"{who}: {inner!r} is a dict, not an array; {PARAMS}")
    raise CfmergeError(
        f"{who}: expected a module or a dict of arrays by name, found {type(model).__name__}; cfmerge.merge is for "
        f"models in files, {PARAMS}"
    )


def _maps(model: Any) -> bool:
    return isinstance(model, Mapping)


class ArraysSource:
    """A model in memory as a `Source`; its arrays are never changed.

    Args:
        values: by name. Values that are no arrays (a module's `_extra_state`) are no tensors: see `others`.
        who: the model in messages; `label` in place of a path.
        config: the model's config.json, or {}.

    Attributes:
        values: the arrays, by name.
        others: the values that are no arrays, by name.
        order: all names, in the model's order.
    """

    def __init__(self, values: Mapping[str, Any], who: str, label: str, config: Mapping[str, Any]) -> None:
        self.path = Path(label)
        self.values = {name: value for name, value in values.items() if is_array(value)}
        self.others = {name: value for name, value in values.items() if name not in self.values}
        self.order = tuple(values)
        if not self.values:
            raise CfmergeError(f"{who}: holds no arrays")
        headers = {name: _header(value, f"{who}: {name!r}") for name, value in self.values.items()}
        self.tensors: Mapping[str, TensorInfo] = {n: TensorInfo(*header, self.path) for n, header in headers.items()}
        self.config = config
        self.files: tuple[Path, ...] = ()
        self.side_files: Mapping[str, Path] = {}
        self.metadata: Mapping[str, str] = {}
        self.folders = (Folder(),)
        self.notes: tuple[str, ...] = ()
        self.left_out: tuple[str, ...] = ()
        self.ties: Mapping[str, str] = {**likely_ties(self.tensors, config, {}), **self.same()}
        self._last: tuple[str, np.ndarray] = "", np.empty(0)

    def same(self) -> dict[str, str]:
        """`{alias: name}` of the names whose arrays are one in memory, the first being the name."""
        first: dict[Hashable, str] = {}
        found = {name: first.setdefault(_place(value), name) for name, value in self.values.items()}
        return {alias: name for alias, name in found.items() if alias != name}

    def prepare(self) -> None:
        pass

    def grain(self, name: str) -> int:
        return 1

    def read(self, name: str, first: int = 0, count: int | None = None) -> np.ndarray:
        """See `Source`. Rows alone are copied, where a piece of an array is not one run of memory."""
        value, shape = self.values[name], self.tensors[name].shape
        if isinstance(value, jax.Array):
            value = self._fetched(name, value, count is not None)
        if count is not None and shape:
            row = max(math.prod(shape[1:]), 1)
            begin, end = first // row, -(-(first + count) // row)
            value, first = value[begin:end], first - begin * row
        array = on_host(value)
        if count is not None:
            array = array.reshape(-1)[first : first + count]
        array.flags.writeable = False
        return array

    def rank(self, name: str) -> int | None:
        return None

    def delta(self, name: str, first: int = 0, count: int | None = None) -> Delta:
        return Dense(self.read(name, first, count))

    def _fetched(self, name: str, value: jax.Array, again: bool) -> np.ndarray:
        """A JAX array in the host's memory; kept, where it is a copy and other pieces of it are read next."""
        if _is_here(value):
            return np.asarray(value)
        kept, array = self._last
        if kept != name:
            array = on_host(value)
        self._last = (name, array) if again else ("", np.empty(0))
        return array


def on_host(value: Any) -> np.ndarray:
    """An array or a tensor as one of NumPy's, with its bits: a view of its memory if that is the host's, else a copy.

    The view is a new object, whose flags may be set.
    """
    torch = torch_of(value)
    if torch is None:
        there = isinstance(value, jax.Array) and not _is_here(value)
        return _gathered(value) if there else np.asarray(value).view()
    tensor = value.detach().cpu().resolve_conj().resolve_neg()
    width = WIDTHS.get(tensor.element_size())
    if width is None:  # complex numbers of 16 bytes
        return tensor.numpy().view()
    return tensor.view(getattr(torch, width)).numpy().view(_dtype_of(value))


def _gathered(value: jax.Array) -> np.ndarray:
    """A copy of a JAX array on other devices, or on several. `np.asarray` would leave one in the array itself."""
    if len(value.devices()) == 1:
        return np.asarray(jax.device_put(value, jax.local_devices(backend="cpu")[0])).view()
    whole = np.empty(value.shape, value.dtype)
    for shard in value.addressable_shards:
        if shard.replica_id == 0:
            whole[shard.index] = on_host(shard.data)
    return whole


def like(array: np.ndarray, example: Any) -> Any:
    """A new array in the kind of another and where that lies: of torch on its device, of JAX in its sharding.

    In the host's memory torch's tensor is the array's own memory, as NumPy's is.
    """
    torch = torch_of(example)
    if torch is not None:
        width = WIDTHS.get(array.itemsize)
        whole = torch.from_numpy(array if width is None else array.view(width))
        return whole.view(getattr(torch, array.dtype.name)).to(example.device)
    return jax.device_put(array, example.sharding) if isinstance(example, jax.Array) else array


def _is_here(value: jax.Array) -> bool:
    """Whether a JAX array is one run of the host's memory."""
    return value.is_fully_addressable and {d.platform for d in value.devices()} == {"cpu"} and len(value.devices()) == 1


def _place(value: Any) -> Hashable:
    """The memory of an array: equal for names of one array, and for views that are the same."""
    if torch_of(value) is not None:
        if value.numel() and value.device.type != "meta":
            return value.device, value.data_ptr(), tuple(value.shape), tuple(value.stride()), value.dtype
    elif isinstance(value, np.ndarray) and value.size:
        return value.__array_interface__["data"][0], value.shape, value.strides, value.dtype.str
    return id(value)


def _dtype_of(value: Any) -> np.dtype | None:
    """The dtype of a tensor of torch as NumPy has it; None: it has none."""
    name = str(value.dtype).removeprefix("torch.")
    try:
        return np.dtype(getattr(ml_dtypes, name, name))
    except TypeError:
        return None


def _header(value: Any, what: str) -> tuple[tuple[int, ...], np.dtype]:
    """The shape and the dtype of an array.

    Raises:
        CfmergeError: it is of a kind that is not read.
    """
    wrong: str | None = None
    torch = torch_of(value)
    if torch is not None:
        wrong = next((told for is_so, told in WRONG if is_so(value, torch)), None)
        dtype = _dtype_of(value)
        wrong = wrong or (f"is of dtype {value.dtype}, which is not read" if dtype is None else None)
    elif isinstance(value, jax.core.Tracer):
        raise CfmergeError(f"{what} is traced by JAX, and its values are looked at; under jit use merge_params")
    else:
        dtype = np.dtype(value.dtype)
        if isinstance(value, jax.Array) and not value.is_fully_addressable:
            wrong = "lies on devices of other processes too; gather it, or use merge_params"
        elif dtype.kind in "OSUMm":
            wrong = f"is of dtype {dtype}, not numbers"
        elif not dtype.isnative:
            wrong = "has the bytes of its numbers in the other order; convert it: a.astype(a.dtype.newbyteorder('='))"
    if wrong or dtype is None:
        raise CfmergeError(f"{what} {wrong}")
    return tuple(value.shape), dtype


WRONG: tuple[tuple[Callable[[Any, Any], bool], str], ...] = (  # tensors of torch that are no plain arrays of numbers
    (lambda t, torch: t.device.type == "meta", "lies on the meta device, without numbers; load the weights first"),
    (lambda t, torch: t.is_quantized, "is quantised; merge the model that it was made from, or t.dequantize()"),
    (lambda t, torch: hasattr(t, "full_tensor"), "is a DTensor; gather it: t.full_tensor()"),
    (lambda t, torch: t.layout != torch.strided, "is sparse; make it dense: t.to_dense()"),
    (
        lambda t, torch: type(t).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__,
        "is of a class of its own (packed or quantised numbers, say); give plain tensors",
    ),
)
