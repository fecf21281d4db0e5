"""How accelerator.py times: products of square matrices, memory, and operations, on the device that JAX takes."""

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from accelerator_operations import VARIANTS, Arrays, Operation, product
from measuring import blas_threads

BATCHES = 3


def seconds_of(call: Callable[..., Any], arrays: Arrays, least: float) -> float:
    """Seconds for a call, in the best of some batches (of two, if a call takes a second); a batch takes `least`."""

    def batch(count: int) -> float:
        started = time.perf_counter()
        for _ in range(count):
            result = call(*arrays)
        jax.block_until_ready(result)
        return (time.perf_counter() - started) / count

    batch(1)
    once = batch(1)
    count = max(1, math.ceil(least / once))
    return min(once, *(batch(count) for _ in range(BATCHES if once < 1 else 1)))


def on_device(arrays: Arrays, dtype: str) -> list[jax.Array]:
    return jax.block_until_ready([jnp.asarray(array, dtype) for array in arrays])


def peaks(squares: Sequence[int], least: float) -> list[dict[str, Any]]:
    """The rate of products of square matrices for each dtype and precision, in GFLOP/s."""
    rows = []
    for dtype, precision in VARIANTS:
        row: dict[str, Any] = {"dtype": dtype, "precision": precision}
        for n in squares:
            with jax.enable_x64(dtype == "float64"), failing(row):
                x, y = on_device(np.random.default_rng(0).standard_normal((2, n, n), np.float32), dtype)
                call = jax.jit(partial(product, precision=precision)).lower(x, y).compile()
                row[f"{n}"] = 2 * n**3 / seconds_of(call, [x, y], least) / 1e9
        rows.append(row | {"peak": max((row[f"{n}"] for n in squares if f"{n}" in row), default=None)})
    if jax.default_backend() == "cpu":
        rows += [of_blas(dtype, squares) for dtype in (np.float32, np.float64)]
    return rows


def of_blas(dtype: type, squares: Sequence[int]) -> dict[str, Any]:
    """The same by NumPy's BLAS on all cores: a processor's peak is the better of the two."""
    row: dict[str, Any] = {"dtype": np.dtype(dtype).name, "precision": "NumPy"}
    with blas_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1):
        for n in squares:
            x = np.random.default_rng(0).standard_normal((n, n)).astype(dtype)
            row[f"{n}"] = 2 * n**3 / seconds_of(np.matmul, [x, x], 0.1) / 1e9
    return row | {"peak": max(row[f"{n}"] for n in squares)}


def bandwidth(size: int, least: float) -> dict[str, float | None]:
    """GB/s of the device's memory, read and written; and to the device from the host, if it has memory of its own."""
    host = np.zeros(size // 4, np.float32)
    (array,) = on_device([host], "float32")
    found: dict[str, float | None] = {"memory": 2 * size / seconds_of(jax.jit(lambda x: x + 1), [array], least) / 1e9}
    accelerator = jax.default_backend() != "cpu"
    found["from the host"] = size / seconds_of(jax.device_put, [host], least) / 1e9 if accelerator else None
    return found


# --- operations ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def failing(row: dict[str, Any]) -> Iterator[None]:
    """What a device cannot do, or has no memory for, is told in the row."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        row["failed"] = str(error).splitlines()[0][:200]


def error_of(result: jax.Array, function: Callable[..., Any], arrays: Sequence[jax.Array]) -> float:
    """The relative error against the same function of the same arrays in float64, on the processor."""
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        exact = np.asarray(jax.jit(function)(*(jnp.asarray(np.asarray(array), jnp.float64) for array in arrays)))
    return float(np.linalg.norm(np.asarray(result, np.float64) - exact) / np.linalg.norm(exact))


def measure(operation: Operation, shape: tuple[int, int], least: float, exact: int) -> list[dict[str, Any]]:
    """A row for each dtype and precision of one operation on one shape."""
    m, n = shape
    arrays, rows = operation.inputs(m, n, np.random.default_rng(m + n)), []
    for dtype, precision in operation.variants:
        row: dict[str, Any] = {"operation": operation.name, "shape": f"{m} x {n}", "dtype": dtype}
        row["precision"] = precision
        function, exactly = operation.function, operation.function
        if operation.variants == VARIANTS:
            function, exactly = (partial(function, precision=name) for name in (precision, "highest"))
        with failing(row), jax.enable_x64(dtype == "float64"):
            given = on_device(arrays, dtype)
            call = jax.jit(function).lower(*given).compile()
            seconds = seconds_of(call, given, least)
            row["ms"] = 1e3 * seconds
            flops, moved = operation.flops, operation.numbers(m, n) * given[0].dtype.itemsize
            row["operations"], row["bytes"] = flops(m, n) if flops else None, moved
            row["GFLOP/s"] = flops(m, n) / seconds / 1e9 if flops else None
            row["GB/s"] = moved / seconds / 1e9
            row["memory, MiB"] = memory_of(call)
            if max(shape) <= exact and dtype != "float64":
                row["error"] = error_of(call(*given), exactly, given)
        print("  ".join(f"{key} {value}" for key, value in row.items() if value is not None), flush=True)
        rows.append(row)
    return rows


def memory_of(call: Any) -> float | None:
    """MiB of arguments, results and what lies between, as the compiled program states it."""
    told = call.memory_analysis()
    if told is None:
        return None
    return (told.argument_size_in_bytes + told.output_size_in_bytes + told.temp_size_in_bytes) / 2**20
