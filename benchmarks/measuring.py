"""What the benchmarks share: a process and its memory measured, the machine told, tables and pictures written."""

import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
EVERY = 0.01  # seconds between two looks at the memory
Cell = str | float | int | None


class ProcessError(SystemExit):
    """A process has failed; it ends the benchmark where nobody catches it."""


class Figures(NamedTuple):
    """Wall seconds; seconds of the processor in user mode, and in both modes; peak anonymous memory in GiB.

    Of processes that ran together, times of the processor are sums, and so is the memory (at one moment). The memory
    is None where there is no /proc.
    """

    wall: float
    user: float
    cpu: float
    memory: float | None


def run(command: Sequence[str], path: Path | None = None, environment: Mapping[str, str] | None = None) -> Figures:
    """The figures of one process; Python finds its modules in `path`, if given."""
    return run_together([command], path, environment)


def run_together(
    commands: Sequence[Sequence[str]], path: Path | None = None, environment: Mapping[str, str] | None = None
) -> Figures:
    """The figures of processes that run at once. Where one fails, all are ended, and what it wrote is told."""
    variables = {**(os.environ if environment is None else environment), **({"PYTHONPATH": str(path)} if path else {})}
    before, started, peak = os.times(), time.monotonic(), 0
    with tempfile.TemporaryDirectory() as folder:
        errors = [Path(folder) / str(number) for number in range(len(commands))]  # files: nobody reads pipes meanwhile
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for command, file in zip(commands, errors, strict=True):
                with file.open("wb") as opened:
                    processes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=opened, env=variables))
            while None in (ended := [process.poll() for process in processes]) and not any(ended):
                peak = max(peak, sum(anonymous(process.pid) for process in processes))
                time.sleep(EVERY)
            wall = time.monotonic() - started
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                process.wait()
        for command, code, file in zip(commands, ended, errors, strict=True):
            if code:
                how = f"ended with {code}" if code > 0 else f"was ended by signal {-code}"
                raise ProcessError(f"{' '.join(command)}\n{how}\n{file.read_text(errors='replace')[-2000:]}")
    after = os.times()
    user = after.children_user - before.children_user
    system = after.children_system - before.children_system
    return Figures(wall, user, user + system, peak / 2**20 if Path("/proc/self/status").exists() else None)


def anonymous(pid: int) -> int:
    """The anonymous memory of a process at this moment, in KiB; 0 where it is not told."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def machine() -> dict[str, Any]:
    """The class of the machine, its load before the benchmark, and the versions that matter."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    wide = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "processor": " ".join([platform.machine(), *wide]),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": f"{gib:.0f} GiB",
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        **{name: installed(name) for name in ("cfmerge", "jax", "numpy")},
    }


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@contextlib.contextmanager
def blas_threads(count: int) -> Iterator[None]:
    """NumPy's BLAS and SciPy's LAPACK, which JAX takes on a processor, have so many threads: one, as in a merge."""
    import scipy.linalg  # noqa: F401 (a bound holds for what is loaded)
    from threadpoolctl import threadpool_limits

    with threadpool_limits(count, user_api="blas"):
        yield


def existing(folder: Path | None) -> Path | None:
    """The folder's whole path, made if need be: temporary folders in it are then named in full too."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    return folder and folder.resolve()


# --- telling ------------------------------------------------------------------------------------------------------


def show(value: Cell) -> str:
    """A cell: three digits of a number, nothing for None."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "" if value is None else str(value)


def table(rows: Sequence[Mapping[str, Cell]], columns: Sequence[str] | None = None) -> str:
    """The rows in Markdown: numbers to the right; the columns are all keys of the rows where none are given."""
    names = list(columns or dict.fromkeys(name for row in sorted(rows, key=len, reverse=True) for name in row))
    numbers = [all(isinstance(row.get(name), int | float | None) for row in rows) for name in names]
    lines = [names, ["--:" if number else "---" for number in numbers]]
    lines += [[show(row.get(name)) for name in names] for row in rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def write_report(folder: Path, name: str, title: str, told: Mapping[str, Any], sections: Sequence[str]) -> None:
    """`name.json` with all that was told, and `name.md` with the command, the machine and the sections."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"command": [Path(sys.argv[0]).name, *sys.argv[1:]], **told}
    (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    words = ", ".join(f"{key} {value}" for key, value in told["machine"].items() if value is not None)
    head = f"# {title}\n\n    python benchmarks/{' '.join(content['command'])}\n\n{words}.\n"
    (folder / f"{name}.md").write_text("\n".join([head, *sections]))


def figure(panels: int, width: float = 5.0, rows: int = 1) -> tuple[Any, list[Any]]:
    """A figure with so many panels side by side, in so many rows, which needs no display; `savefig` writes it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width * panels, 4.2 * rows), dpi=120, layout="constrained")
    FigureCanvasAgg(made)
    return made, [made.add_subplot(rows, panels, number + 1) for number in range(rows * panels)]
