"""Merging LLaMA 374M in bfloat16, on disk: wall time, processor time and peak anonymous memory of whole processes.

    python benchmarks/make_llama.py DIR
    python benchmarks/llama.py DIR [--experts 4] [--rounds 3] [--mergekit PATH/TO/mergekit-yaml] [--only NAME ...]

Commands run in turn, round after round, so that what else the machine does hits all alike; ratios are taken round
by round and their median is quoted. Memory is the peak of the process's RssAnon, sampled every 10 ms. mergekit
needs an environment of its own (`pip install mergekit==0.1.4`).
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path


def run(command: Sequence[str]) -> tuple[float, float, float]:
    """`(wall seconds, processor seconds, peak anonymous GiB)`."""
    before, started, peak = os.times(), time.monotonic(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while process.poll() is None:
        try:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            peak = max([peak, *(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))])
        except OSError:
            pass
        time.sleep(0.01)
    if process.returncode:
        sys.exit(f"{' '.join(command)}\n{process.stderr.read().decode()[-2000:] if process.stderr else ''}")
    after = os.times()
    cpu = after.children_user - before.children_user + after.children_system - before.children_system
    return time.monotonic() - started, cpu, peak / 2**20


def commands(directory: Path, experts: int, mergekit: str | None) -> dict[str, tuple[list[str], Path]]:
    base, out = directory / "base", directory / "out"
    paths = [directory / f"expert_{number}" for number in range(experts)]
    cfmerge = [sys.executable, "-m", "cfmerge", "merge", "--base", str(base), "--quiet", "-o"]
    given = [word for path in paths for word in ("-e", str(path))]
    result = {
        "cfmerge ace": ([*cfmerge, str(out), *given], out),
        "numpy ace": (
            [sys.executable, str(Path(__file__).parent / "numpy_ace.py"), str(base), *map(str, paths), "-o", str(out)],
            out,
        ),
        "cfmerge task_arithmetic": ([*cfmerge, str(out), *given, "-m", "task_arithmetic"], out),
    }
    if mergekit:
        config = directory / "mergekit.yaml"
        models = "".join(f"  - {{model: {path}, parameters: {{weight: 0.3}}}}\n" for path in paths)
        config.write_text(f"merge_method: task_arithmetic\nbase_model: {base}\ndtype: bfloat16\nmodels:\n{models}")
        result["mergekit task_arithmetic"] = ([mergekit, str(config), str(out)], out)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mergekit")
    parser.add_argument("--only", nargs="*")
    args = parser.parse_args()
    table = commands(args.directory, args.experts, args.mergekit)
    table = {name: row for name, row in table.items() if not args.only or name in args.only}
    figures: dict[str, list[tuple[float, float, float]]] = {name: [] for name in table}
    for round_number in range(args.rounds):
        for name, (command, out) in table.items():
            shutil.rmtree(out, ignore_errors=True)
            print(f"load {os.getloadavg()[0]:.1f}  ", end="", flush=True)
            figures[name].append(run(command))
            wall, cpu, peak = figures[name][-1]
            print(f"round {round_number + 1}  {name:26} wall {wall:6.1f} s  cpu {cpu:6.1f} s  anon {peak:.2f} GiB")
    print(f"\n{args.experts} experts, medians of {args.rounds} rounds")
    for name, rows in figures.items():
        wall, cpu, peak = (statistics.median(column) for column in zip(*rows, strict=True))
        print(f"{name:26} wall {wall:6.1f} s  cpu {cpu:6.1f} s  anon {peak:.2f} GiB")
    for ours, theirs in (
        ("cfmerge ace", "numpy ace"),
        ("cfmerge ace", "mergekit task_arithmetic"),
        ("cfmerge task_arithmetic", "mergekit task_arithmetic"),
    ):
        if ours in figures and theirs in figures:
            ratios = [a[0] / b[0] for a, b in zip(figures[ours], figures[theirs], strict=True)]
            print(f"wall, {ours} / {theirs}: {statistics.median(ratios):.2f} ({min(ratios):.2f} .. {max(ratios):.2f})")


if __name__ == "__main__":
    main()
