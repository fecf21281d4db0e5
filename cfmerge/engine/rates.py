"""The rates of this machine, each measured in a moment: processor, device, memory, files, compilation, start."""

import contextlib
import hashlib
import mmap
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cfmerge import linalg
from cfmerge.engine.loop import WORKERS
from cfmerge.engine.placement import Placement
from cfmerge.methods import make
from cfmerge.planning.arithmetic import merging
from cfmerge.planning.prediction import MEMORY, Rates
from cfmerge.planning.tally import tally

MIXES = 16
LONG = 0.2  # seconds of a measurement, at least
BYTES = 1 << 26  # of the file that is written and read
CHILD = """
import jax, scipy.linalg, cfmerge.products.merge
jax.jit(lambda x: x @ x)(jax.numpy.ones((512, 512))).block_until_ready()
print(*[line.split()[1] for line in open("/proc/self/status") if line.startswith("RssAnon")])
"""


def measured(placement: Placement, folder: Path | None) -> Rates:
    """The rates of this machine and of a placement's device, measured now.

    Args:
        folder: where a file is written and read, on the disk of the models; None: the system's for such files.
    """
    with _compiling_anew(), jax.default_device(device_of(placement)):
        start, memory = _start()
        trace, compiling, code = _programs()
        return Rates(
            cores=cores(), on_host=placement.on_host, start=start, memory=memory, call=_call(), trace=trace,
            compile=compiling, code=code, **_files(folder), **_arithmetic(placement), select=_select(),
        )  # fmt: skip


def cores() -> int:
    """The processor's cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_of(placement: Placement) -> jax.Device:
    return placement.devices[0] if placement.devices else jax.local_devices()[0]


@contextlib.contextmanager
def _compiling_anew() -> Iterator[None]:
    """Programs come from no cache, and none is kept."""
    before = getattr(jax.config, "jax_enable_compilation_cache")  # noqa: B009
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


def _spent(function: Callable[[], Any], clock: Callable[[], float] = time.process_time, threads: int = 1) -> float:
    """The seconds of one call; processor seconds, which depend less on what else the machine does.

    Calls are repeated for a while, since some systems count a processor's seconds in coarse steps, and in as many
    threads as the loop has: two cores may be one that pretends.
    """
    jax.block_until_ready(function())
    started = clock()

    def repeated(_: int) -> int:
        calls = 0
        while calls < 2 or clock() - started < LONG * threads:
            jax.block_until_ready(function())
            calls += 1
        return calls

    with ThreadPoolExecutor(threads) as pool:
        calls = sum(pool.map(repeated, range(threads)))
    return max((clock() - started) / calls, 1e-9)


def _start() -> tuple[float, float]:
    """Processor seconds and bytes of a process that imports what a merge does, and merges nothing."""
    environment, before = {**os.environ, "PYTHONSAFEPATH": "1"}, os.times()
    done = subprocess.run(
        [sys.executable, "-c", CHILD], capture_output=True, text=True, check=True, env=environment, timeout=60
    )
    after, told = os.times(), done.stdout.split()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    return max(spent, 0.1), 1024.0 * int(told[0]) if told else MEMORY


def _programs() -> tuple[float, float, float]:
    """For each equation of programs that methods make: seconds to trace it, seconds to compile it, bytes of it."""
    tracing, compiling, equations, before = 0.0, 0.0, 0.0, _anonymous()
    for method in (make("actmat"), make("dare_ties")):
        function, arguments = merging(method, (48, 64), 2)
        equations += tally(function, *arguments).equations
        times = [time.process_time()]
        lowered = jax.jit(function).lower(*arguments)
        times.append(time.process_time())
        lowered.compile()
        times.append(time.process_time())
        tracing, compiling = tracing + times[1] - times[0], compiling + times[2] - times[1]
    return tracing / equations, compiling / equations, max(_anonymous() - before, 1e7) / equations


def _anonymous() -> float:
    """Bytes of this process that are no file's; 0 where the system does not tell."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
    return 0.0


def _call() -> float:
    add = jax.jit(lambda *arrays: sum(arrays))
    arrays = [np.ones(64, np.float32) for _ in range(8)]
    return _spent(lambda: [np.asarray(add(*arrays)) for _ in range(20)]) / 20


def _arithmetic(placement: Placement) -> dict[str, float]:
    """The rates of the device. A processor's are those of a core, times the cores that the loop keeps busy."""
    several = min(cores(), WORKERS) if placement.on_host else 1  # decompositions at once, each on a core of its own
    all_cores = cores() if placement.on_host else 1

    def seconds(function: Callable[..., Any], *arrays: Any) -> float:
        compiled = jax.jit(function)
        clock = time.process_time if placement.on_host else time.perf_counter
        return _spent(lambda: compiled(*arrays), clock, several)

    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32))

    square, small, tall = normal(1536, 1536), normal(512, 512), normal(512, 256)
    large, flat, keys = rng.standard_normal((1024, 1024), np.float32), normal(1 << 23), normal(1 << 18)
    gram = jnp.asarray(large @ large.T / len(large) + np.eye(len(large), dtype=np.float32))
    n, once, mixed = float(len(large)), seconds(lambda x: x + 1, flat), seconds(_mixed, flat)
    move = all_cores * 8.0 * flat.size / once
    return {
        "product": all_cores * 2.0 * len(square) ** 3 / seconds(linalg.matmul, square, square),
        "solve": several * (n**3 / 3 + 2 * n**3) / seconds(linalg.solve_right, gram, gram),
        "eigen": several * float(len(small)) ** 3 / seconds(linalg.symmetric_eigen, small),
        "svd": several * 512 * 256.0**2 / seconds(linalg.thin_svd, tall),
        "qr": several * 512 * 256.0**2 / seconds(linalg.orthonormal, tall),
        "sort": several * keys.size / seconds(jnp.sort, keys),
        "move": move,
        "entry": all_cores * 4.0 * MIXES * flat.size / max(mixed - once, mixed / 10),
    }


def _mixed(x: jax.Array) -> jax.Array:
    """`4 * MIXES` operations on every entry, in one loop."""
    for number in range(MIXES):
        x = jnp.where(x > number, jnp.abs(x - 1.5), x * 1.25)
    return x


def _select() -> float:
    """Keys a second that the host selects among: see `orders.py`."""
    keys = np.random.default_rng(0).integers(0, 1 << 31, 1 << 22, np.uint32)
    low, width, high = np.uint32(1 << 30), np.uint32(1 << 24), np.uint32((1 << 30) + (1 << 24))

    def selected() -> Any:
        return np.unique(keys[keys - low <= width], return_counts=True), np.count_nonzero(keys > high)

    return keys.size / _spent(selected, threads=min(cores(), WORKERS))


def _files(folder: Path | None) -> dict[str, float]:
    """Bytes a second: to and from the page cache, to and from the disk; and of SHA-256."""
    block = np.random.default_rng(0).integers(0, 255, BYTES, np.uint8)
    with tempfile.TemporaryDirectory(dir=folder) as own:
        path = Path(own) / "block"

        def write() -> None:
            with path.open("wb") as file:
                file.write(block.data)

        def sync() -> None:
            write()
            with path.open("rb+") as file:
                os.fsync(file.fileno())

        def read() -> Any:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                return np.frombuffer(mapped, np.uint8).copy()

        def digest() -> None:
            hashed = hashlib.sha256()
            with path.open("rb") as file:
                while part := file.read(1 << 22):
                    hashed.update(part)

        def from_disk() -> Any:
            with path.open("rb", 0) as file:
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                return file.readinto(block.data)

        busy, of_a_core = min(cores(), WORKERS), {"write": write, "read": read, "hash": digest}
        of_the_disk = {"sync": sync, "disk": from_disk}
        rates = {name: BYTES / _spent(do, threads=busy) for name, do in of_a_core.items()}
        return rates | {name: BYTES / _spent(do, time.perf_counter) for name, do in of_the_disk.items()}
