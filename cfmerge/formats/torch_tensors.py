"""Tensors of torch's pickles: views of storages, read lazily, whole or a range of their flat entries."""

import math
from typing import Any, NamedTuple

import numpy as np

from cfmerge.errors import CfmergeError
from cfmerge.formats.pickles import Call, Global
from cfmerge.formats.ranges import flat_range
from cfmerge.formats.torch_archives import AGAIN, DTYPES, Archive, Storage
from cfmerge.models import Shape

MAX_AXES = 32
MAX_REPEATED, MAX_CLAIM = 1 << 10, 1 << 30  # a tensor may be so much larger than its storage, or have so many bytes
PLAIN = {"torch._utils._rebuild_tensor": 4, "torch._utils._rebuild_tensor_v2": 6, "torch._utils._rebuild_tensor_v3": 7}
WRAPPED = {"torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"}
TYPED = {"torch._tensor._rebuild_from_type", "torch._tensor._rebuild_from_type_v2"}
REFUSED = {  # what the tensor is
    "torch._utils._rebuild_qtensor": "quantised by torch; merge the model that it was made from",
    "torch._utils._rebuild_sparse_tensor": "sparse; save it dense: tensor.to_dense()",
    "torch._utils._rebuild_sparse_csr_tensor": "sparse; save it dense: tensor.to_dense()",
    "torch._utils._rebuild_nested_tensor": "nested; save its parts as tensors",
    "torch._utils._rebuild_meta_tensor_no_storage": "on the meta device, which has no numbers; save the loaded model",
    "torch._utils._rebuild_wrapper_subclass": "of a class of its own (DTensor, torchao); save plain tensors, "
    "or a distributed checkpoint",
    "torch._utils._rebuild_device_tensor_from_numpy": "of another device; move it first: tensor.cpu()",
    "torch._utils._rebuild_xla_tensor": "of another device; move it first: tensor.cpu()",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "of another device; move it first: tensor.cpu()",
}
TENSORS = PLAIN.keys() | WRAPPED | TYPED | REFUSED.keys()


class View(NamedTuple):
    """A tensor: entries of a storage, `offset` and `strides` counted in entries."""

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: Shape
    strides: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def span(self) -> tuple[int, int]:
        """The first byte in the storage, and the one behind the last."""
        if not self.size:
            return 0, 0
        last = sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        first = self.offset * self.dtype.itemsize
        return first, first + (last + 1) * self.dtype.itemsize


def is_tensor(value: Any) -> bool:
    """Whether it is a tensor of any kind, also of one that is not read."""
    return isinstance(value, Call) and str(value.func) in TENSORS


def view_of(value: Call, archive: Archive, where: str) -> View:
    """The view that a tensor's record describes.

    Args:
        where: file and tensor, for messages.

    Raises:
        CfmergeError: it is sparse, quantised or the like, or it does not lie in its storage.
    """
    func, args = str(value.func), value.args
    for _ in range(3):
        if func in WRAPPED and args and isinstance(args[0], Call):
            func, args = str(args[0].func), args[0].args
        elif func in TYPED and len(args) >= 3 and isinstance(args[0], Global) and type(args[2]) is tuple:
            func, args = str(args[0]), args[2]
    if func in REFUSED:
        raise CfmergeError(f"{where} is {REFUSED[func]}")
    if func not in PLAIN or len(args) < PLAIN[func]:
        raise CfmergeError(f"{where} is made by {func} of {len(args)} arguments, which cfmerge does not know")
    if func != "torch._utils._rebuild_tensor" and len(args) > PLAIN[func]:
        _check_bits(args[PLAIN[func]], where)
    id = getattr(args[0], "id", None)
    storage = archive.storages.get(id[2]) if type(id) is tuple and len(id) > 2 and type(id[2]) is str else None
    if storage is None:
        raise CfmergeError(f"{where} has no storage in the file; {AGAIN}")
    dtype = dtype_of(args[6], where) if func == "torch._utils._rebuild_tensor_v3" else storage.dtype
    if dtype is None:
        raise CfmergeError(f"{where} has a storage without a dtype; {AGAIN}")
    view = View(storage, dtype, args[1], numbers(args[2]), numbers(args[3]))
    _check(view, where)
    return view


def read(view: View, content: memoryview, first: int = 0, count: int | None = None) -> np.ndarray:
    """The tensor, read-only; with `count`, so many entries of the flat tensor from `first` on."""
    size = view.size
    if not 0 <= first <= first + (count or 0) <= size:
        raise IndexError(f"a tensor of {size} entries has no {count} from {first} on")
    if size == 0:
        return np.zeros(view.shape if count is None else 0, view.dtype)
    itemsize = view.dtype.itemsize
    start = view.storage.start + view.offset * itemsize
    if _is_contiguous(view):
        flat = np.frombuffer(content, view.dtype, size, start)
        return flat.reshape(view.shape) if count is None else flat[first : first + count]
    seen = np.ndarray(view.shape, view.dtype, content, start, tuple(stride * itemsize for stride in view.strides))
    return seen if count is None else flat_range(seen, first, count)


def _is_contiguous(view: View) -> bool:
    """Whether entries follow one another; the stride of an axis of length 1 says nothing."""
    step = 1
    for n, stride in zip(reversed(view.shape), reversed(view.strides), strict=True):
        if n != 1 and stride != step:
            return False
        step *= n
    return True


def numbers(value: Any) -> tuple[int, ...]:
    """Sizes or strides, a tuple or a `torch.Size`; (-1,) if they are neither."""
    if isinstance(value, Call) and str(value.func) == "torch.Size" and len(value.args) == 1:
        value = value.args[0]
    if (
        type(value) not in (tuple, list)
        or len(value) > MAX_AXES
        or not all(type(n) is int and 0 <= n < 1 << 60 for n in value)
    ):
        return (-1,)
    return tuple(value)


def dtype_of(value: Any, where: str) -> np.dtype:
    """The dtype that `torch.NAME` is."""
    if not isinstance(value, Global) or value.module != "torch" or value.name not in DTYPES:
        named = str(value) if isinstance(value, Global) else "no dtype"
        raise CfmergeError(f"{where} has dtype {named}, which cfmerge does not read; it reads {', '.join(DTYPES)}")
    return DTYPES[value.name]


def _check_bits(metadata: Any, where: str) -> None:
    if isinstance(metadata, dict) and (metadata.get("conj") or metadata.get("neg")):
        raise CfmergeError(f"{where} is conjugate or negated lazily; save tensor.resolve_conj().resolve_neg()")


def _check(view: View, where: str) -> None:
    shape, strides, offset = view.shape, view.strides, view.offset
    if len(shape) != len(strides) or -1 in shape + strides or type(offset) is not int:
        raise CfmergeError(f"{where} has a corrupt header: {len(shape)} sizes, {len(strides)} strides; {AGAIN}")
    if offset < 0 or view.span[1] > view.storage.nbytes:
        raise CfmergeError(
            f"{where} of shape {shape} with strides {strides} from entry {offset} on needs {view.span[1]} bytes of its "
            f"storage {view.storage.key}, which has {view.storage.nbytes}; the file is corrupt, {AGAIN}"
        )
    claim = view.size * view.dtype.itemsize
    if claim > max(MAX_CLAIM, MAX_REPEATED * view.storage.nbytes):
        raise CfmergeError(
            f"{where} of shape {shape} repeats the {view.storage.nbytes} bytes of its storage until they are {claim}; "
            "save what it repeats: tensor.clone() if its numbers are needed"
        )
