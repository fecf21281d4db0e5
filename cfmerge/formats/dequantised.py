"""Models whose weights are floats of 8 bits with scales, seen as the bfloat16 models that they stand for.

    weight[i, j] = quantised[i, j] * scale[i // rows, j // columns]

One scale stands for a block of rows and columns (128 x 128, say), for a row, or for all.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from cfmerge.errors import CfmergeError
from cfmerge.formats.base import Source, TensorInfo
from cfmerge.formats.quantised import problem, quantised, told_scheme
from cfmerge.formats.wrapped import Wrapped
from cfmerge.models import Shape, is_float

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SCALE = ("_scale_inv", "_scale")  # behind the weight's name
OF_ACTIVATIONS = re.compile(r"[._](input|activation|act|output|k|v|q|kv|prob)_scale(_inv|_ub|s)?$")
KEYS = ("quantization_config", "compression_config")


class Dequantised(Wrapped):
    """The model with its weights in bfloat16, without scales.

    Raises:
        CfmergeError: its scheme is another one, or a scale does not fit its weight.
    """

    def __init__(self, who: str, inner: Source):
        super().__init__(inner)
        found = quantised(inner)
        if found is None:
            raise ValueError(f"{who} is not quantised")
        eight = [name for name, info in inner.tensors.items() if _is_eight(info)]
        scales = {name: scale for name in eight if (scale := _scale_of(name, inner.tensors))}
        self.changed = {name: scales.get(name) for name in eight if name not in scales.values()}
        unscaled = [name for name, scale in self.changed.items() if scale is None]
        if found.tensor not in self.changed or (scales and unscaled) or _others(inner, set(self.changed)):
            raise CfmergeError(problem(who, inner, found))
        self._told = _told_blocks(inner.config)
        for name, scale in scales.items():
            if self._fitted(name, scale) is None:
                raise CfmergeError(
                    f"{who} ({inner.path}): {scale!r} has shape {inner.tensors[scale].shape}, which gives no blocks of "
                    f"{'x'.join(map(str, self._told))} of {name!r}, {inner.tensors[name].shape}; fetch the model "
                    "again, or take the one that it was made from"
                )
        gone = {*scales.values(), *(name for name in inner.tensors if OF_ACTIVATIONS.search(name))}
        self.tensors = {
            name: TensorInfo(info.shape, BFLOAT16, info.file) if name in self.changed else info
            for name, info in inner.tensors.items() if name not in gone
        }  # fmt: skip
        self.ties = {alias: name for alias, name in inner.ties.items() if name in self.tensors}
        self.config = {key: value for key, value in inner.config.items() if key not in KEYS}
        self.side_files = {name: file for name, file in inner.side_files.items() if name != "hf_quant_config.json"}
        scheme = told_scheme(inner) or found.scheme
        self.notes += (f"{len(self.changed)} weights are dequantised ({scheme}): they count as bfloat16",)

    def read(self, name: str, first: int = 0, count: int | None = None) -> np.ndarray:
        """The tensor, each number times its scale, rounded to bfloat16."""
        if name not in self.changed:
            return self.inner.read(name, first, count)
        values, scale = self.inner.read(name, first, count).astype(np.float32), self.changed[name]
        if scale is not None:
            shape = self.tensors[name].shape
            fitted, blocks = self._fitted(name, scale) or (shape, shape)
            factors = self.inner.read(scale).astype(np.float32).reshape(fitted)
            if count is None:
                values *= _repeated(factors, blocks, shape)
            else:
                axes = np.unravel_index(np.arange(first, first + count), shape)
                values *= factors[tuple(axis // block for axis, block in zip(axes, blocks, strict=True))]
        return values.astype(BFLOAT16)

    def _fitted(self, name: str, scale: str) -> tuple[Shape, Shape] | None:
        return _blocks(self.inner.tensors[scale].shape, self.inner.tensors[name].shape, self._told)


def _told_blocks(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Rows and columns of a block, as the config says, else as it is usual."""
    given = config.get("quantization_config")
    told = given.get("weight_block_size") if isinstance(given, Mapping) else None
    return tuple(map(int, told)) if isinstance(told, Sequence) and len(told) == 2 else (128, 128)


def dequantised(who: str, source: Source) -> Source:
    """The source, dequantised if it is quantised."""
    return source if quantised(source) is None else Dequantised(who, source)


def _is_eight(info: TensorInfo) -> bool:
    return is_float(info.dtype.name) and info.dtype.itemsize < 2


def _others(source: Source, weights: set[str]) -> bool:
    """Whether the model has packed integers too, or was rotated or made smaller before it was quantised."""
    integers = {"int8", "uint8", "int32", "uint32", "int16", "uint16"}
    return any(info.dtype.name in integers and info.size > 1 for name, info in source.tensors.items()) or any(
        name.endswith(("_scale_2", "_zero_point")) for name in source.tensors if name not in weights
    )


def _scale_of(name: str, tensors: Mapping[str, TensorInfo]) -> str | None:
    return next((name + end for end in SCALE if name + end in tensors), None)


def _blocks(scale: Sequence[int], shape: Shape, told: Sequence[int]) -> tuple[Shape, Shape] | None:
    """The scales' shape with the weight's axes, and how many entries of each axis share one; None: they do not fit."""
    if math.prod(scale) == 1:
        return (1,) * len(shape), shape
    if len(scale) == 1 != len(shape):
        scale = (*scale, *(1,) * (len(shape) - 1))  # one for each row
    if len(scale) != len(shape):
        return None
    usual = (*(1,) * (len(shape) - len(told)), *told)
    blocks = tuple(n if s == 1 else 1 if s == n else block for s, n, block in zip(scale, shape, usual, strict=True))
    fits = all(-(-n // block) == s for s, n, block in zip(scale, shape, blocks, strict=True))
    return (tuple(scale), blocks) if fits else None


def _repeated(factors: np.ndarray, blocks: Shape, shape: Shape) -> np.ndarray:
    """Each factor for all entries of its block."""
    for axis, (block, n) in enumerate(zip(blocks, shape, strict=True)):
        if factors.shape[axis] > 1:
            factors = np.repeat(factors, block, axis)[(slice(None),) * axis + (slice(n),)]
    return factors
