"""Merging LLaMA 374M in bfloat16, on disk: wall time, processor time and peak anonymous memory of whole processes.

    python benchmarks/make_llama.py DIR
    python benchmarks/llama.py DIR [--experts 4] [--rounds 3] [--mergekit PATH/TO/mergekit-yaml] [--only NAME ...]
    python benchmarks/llama.py DIR --method all --against PYTHON [--pythonpath CHECKOUT]

The second form runs every method (or those that are named) by this checkout and by another environment's cfmerge.
Commands run in turn, round after round, so that what else the machine does hits all alike; ratios are taken round
by round and their median is quoted. Memory is the peak of the process's RssAnon, sampled every 10 ms. mergekit
needs an environment of its own (`pip install mergekit==0.1.4`).
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file
from same_results import EXPERTS, MOMENTS, first_known

ROOT = Path(__file__).resolve().parents[1]
Figures = tuple[float, float, float]


def run(command: Sequence[str], path: Path | None = None) -> Figures:
    """`(wall seconds, processor seconds, peak anonymous GiB)`; Python finds its modules in `path`, if given."""
    environment = {**os.environ, "PYTHONPATH": str(path)} if path else None
    before, started, peak = os.times(), time.monotonic(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)
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


def moments(directory: Path, expert: int, kind: str) -> Path:
    """A file of diagonal Fishers or input Grams for an expert, made when it is first asked for."""
    file = directory / f"{kind}_{expert}.safetensors"
    if not file.exists():
        rng, measured = np.random.default_rng(expert), {}
        for name, shape in _shapes(directory / "base" / "model.safetensors").items():
            if kind == "fisher":
                measured[name] = rng.random(shape, np.float32) + np.float32(0.01)
            elif len(shape) == 2 and ".layers." in name:
                samples = rng.standard_normal((2 * shape[1], shape[1]), np.float32)
                measured[name] = samples.T @ samples / len(samples)
        save_file(measured, file)
    return file


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(file, "numpy") as opened:
        return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118


def recipe(directory: Path, method: str, experts: int) -> Path:
    """The recipe file of a merge by the method, with what it needs."""
    count, kind = first_known(method, EXPERTS, experts), first_known(method, MOMENTS, "")
    given = [
        {
            "path": str(directory / f"expert_{number}"),
            **({"moments": str(moments(directory, number, kind))} if kind else {}),
        }
        for number in range(count)
    ]
    content = {"base": str(directory / "base"), "experts": given, "method": method, "allow": ["one-expert"]}
    file = directory / "recipe.yaml"
    file.write_text(json.dumps(content))  # JSON is YAML
    return file


def compare(directory: Path, chosen: list[str], args: argparse.Namespace) -> None:
    """Each method by this checkout and by the other cfmerge, in turn; without another, by this one alone."""
    sides = {"ours": (sys.executable, ROOT)}
    if args.against:
        sides["theirs"] = (args.against, args.pythonpath)
    out, ratios = directory / "out", {}
    print(f"{args.experts} experts, {args.rounds} rounds; wall seconds, least and median")
    for method in chosen:
        file = recipe(directory, method, args.experts)
        figures: dict[str, list[Figures]] = {side: [] for side in sides}
        for round_number in range(args.rounds + args.warm):
            for side, (python, path) in sides.items():
                shutil.rmtree(out, ignore_errors=True)
                measured = run([python, "-m", "cfmerge", "merge", str(file), "--quiet", "-o", str(out)], path)
                if round_number >= args.warm:
                    figures[side].append(measured)
        walls = {side: [wall for wall, _, _ in rows] for side, rows in figures.items()}
        told = "  ".join(
            f"{side} {min(wall):6.2f} {statistics.median(wall):6.2f} ({max(row[2] for row in figures[side]):.2f} GiB)"
            for side, wall in walls.items()
        )
        if args.against:
            of_least = min(walls["ours"]) / min(walls["theirs"])
            of_median = statistics.median(walls["ours"]) / statistics.median(walls["theirs"])
            ratios[method] = (of_least, of_median)
            told += f"  ours/theirs: least {of_least:.2f}, median {of_median:.2f}"
        print(f"{method:40} {told}", flush=True)
    if ratios:
        for number, what in enumerate(("least", "median")):
            values = sorted((pair[number], method) for method, pair in ratios.items())
            middle = statistics.median(value for value, _ in values)
            print(f"ours/theirs, {what}: {middle:.2f} in the middle, {values[0][0]:.2f} ({values[0][1]}) .. "
                  f"{values[-1][0]:.2f} ({values[-1][1]})")  # fmt: skip


def chosen_methods(words: Sequence[str]) -> list[str]:
    """The methods that are named; all that are registered here for `all`."""
    if list(words) != ["all"]:
        return list(words)
    import cfmerge

    return [name for name, entry in cfmerge.methods.registry().items() if entry.kind == "method"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mergekit")
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--method", nargs="+", help="methods or expressions, or `all`")
    parser.add_argument("--against", metavar="PYTHON", help="the interpreter of another environment with cfmerge")
    parser.add_argument("--pythonpath", type=Path, metavar="DIR", help="where it finds its cfmerge, if not installed")
    parser.add_argument("--warm", type=int, default=0, help="rounds that are not counted, to fill a compilation cache")
    args = parser.parse_args()
    if args.method or args.against:
        compare(args.directory.resolve(), chosen_methods(args.method or ["all"]), args)
    else:
        beside_others(args)


def beside_others(args: argparse.Namespace) -> None:
    """cfmerge beside NumPy and mergekit."""
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
