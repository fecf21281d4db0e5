"""The two sides that methods.py compares, on one tensor: cfmerge here, a peer in a worker (see methods_peers.py)."""

import json
import os
import subprocess
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import cfmerge
from cfmerge import methods

# --- the tensors --------------------------------------------------------------------------------------------------


def grid(values: np.ndarray) -> np.ndarray:
    """Multiples of 2^-26, so that base + delta and expert - base are exact below 1/4, in float32 as in float64."""
    return (np.round(values * 2.0**26) / 2.0**26).astype(np.float32)


def make(directory: Path, shape: tuple[int, int], seed: int, moments: str, experts: int) -> None:
    """A base, and deltas of a falling spectrum that they share in part, over small noise of full rank."""
    (m, n), k = shape, max(4, min(64, min(shape) // 4))
    rng = np.random.default_rng(seed)
    fall = np.arange(1, k + 1, dtype=np.float32) ** -0.7

    def low_rank() -> np.ndarray:
        product = (rng.standard_normal((m, k), np.float32) * fall) @ rng.standard_normal((k, n), np.float32)
        return product / product.std()

    directory.mkdir(parents=True, exist_ok=True)
    if not (directory / "base.npy").exists():
        np.save(directory / "base.npy", grid(np.clip(0.02 * rng.standard_normal((m, n), np.float32), -0.2, 0.2)))
        shared = low_rank()
        for number in range(experts):
            noise = rng.standard_normal((m, n), np.float32)
            np.save(directory / f"delta_{number}.npy", grid(1e-3 * (0.5 * shared + low_rank() + 0.3 * noise)))
    rng = np.random.default_rng(seed + 1)
    for number in range(experts):
        path = directory / f"{moments}_{number}.npy"
        if moments == "gram" and not path.exists():
            rows = rng.standard_normal((2 * n, n), np.float32) * np.exp(rng.standard_normal(n, np.float32))
            np.save(path, rows.T @ rows / np.float32(2 * n))
        elif moments == "fisher" and not path.exists():
            np.save(path, 1e-3 * rng.standard_normal((m, n), np.float32) ** 2)


class Arrays(NamedTuple):
    """Of one tensor."""

    base: np.ndarray
    deltas: list[np.ndarray]
    moments: list[np.ndarray] | None

    @classmethod
    def load(cls, directory: Path, moments: str, dtype: Any, experts: int) -> "Arrays":
        def read(name: str) -> np.ndarray:
            return np.load(directory / f"{name}.npy").astype(dtype)

        numbers = range(experts)
        measured = [read(f"{moments}_{number}") for number in numbers] if moments else None
        return cls(read("base"), [read(f"delta_{number}") for number in numbers], measured)


# --- the two sides ------------------------------------------------------------------------------------------------


class Ours:
    """`merge_tensor` with a method, compiled; only calls are timed."""

    def __init__(self, text: str, arrays: Arrays) -> None:
        method = methods.make(text)
        self.base = arrays.base
        self.inputs = jax.tree.map(
            jnp.asarray, (arrays.base, [arrays.base + delta for delta in arrays.deltas], arrays.moments)
        )
        started = time.perf_counter()
        merge = jax.jit(lambda base, experts, moments: cfmerge.merge_tensor(base, experts, method, moments=moments))
        self.merge = merge.lower(*self.inputs).compile()
        self.compilation = time.perf_counter() - started

    def __call__(self) -> tuple[float, np.ndarray]:
        started = time.perf_counter()
        merged = jax.block_until_ready(self.merge(*self.inputs))
        seconds = time.perf_counter() - started
        return seconds, np.asarray(merged, np.float64) - self.base


class PeerError(Exception):
    """What the peer raised."""


class Theirs:
    """A worker process, see methods_peers.py."""

    def __init__(self, python: str, peer: str, clones: str, limit: float, threads: int | None) -> None:
        script = Path(__file__).with_name("methods_peers.py")
        environment = {key: value for key, value in os.environ.items() if not key.endswith("_NUM_THREADS")}
        environment |= {"CUDA_VISIBLE_DEVICES": ""} | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
        self.limit, self.late = limit, False
        self.process = subprocess.Popen(
            [python, str(script), peer, clones],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
        )  # fmt: skip

    def ask(self, **request: Any) -> dict[str, Any]:
        """The worker's answer; the time limit itself if it takes longer, which ends the worker."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        timer = threading.Timer(self.limit, self._stop)
        timer.start()
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if self.late:
            return {"seconds": self.limit}
        if not line:
            raise PeerError(f"the worker ended with {self.process.wait()}; out of memory?")
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer

    def __call__(self, steps: int, save: Path | None = None) -> float:
        return self.ask(do="run", steps=steps, save=str(save) if save else None)["seconds"]

    def _stop(self) -> None:
        self.late = True
        self.process.kill()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()  # closes the pipes too, and minds none that is broken
