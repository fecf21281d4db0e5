"""Every method by this checkout and by another cfmerge: wall time and peak anonymous memory of whole processes.

    python benchmarks/make_llama.py DIR --experts 3 --layers 4 --hidden 256 --vocabulary 2000
    python benchmarks/against.py DIR --method all --against PYTHON [--pythonpath CHECKOUT] [--experts 3] [--rounds 3]

PYTHON is the interpreter that runs the other cfmerge; without one, this checkout is measured alone. Both run in turn,
round after round and method by method, so that what else the machine does hits both alike.
"""

import argparse
import shutil
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from measuring import ROOT, Figures, run
from recipes import chosen_methods, recipe


def compare(directory: Path, chosen: Sequence[str], args: argparse.Namespace) -> None:
    """Each method by both sides in turn; a line for each, and at the end the ratios of all."""
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
        walls = {side: [row.wall for row in rows] for side, rows in figures.items()}
        told = "  ".join(
            f"{side} {min(wall):6.2f} {statistics.median(wall):6.2f} "
            f"({max(row.memory or 0 for row in figures[side]):.2f} GiB)"
            for side, wall in walls.items()
        )
        if args.against:
            of_least = min(walls["ours"]) / min(walls["theirs"])
            of_median = statistics.median(walls["ours"]) / statistics.median(walls["theirs"])
            ratios[method] = (of_least, of_median)
            told += f"  ours/theirs: least {of_least:.2f}, median {of_median:.2f}"
        print(f"{method:40} {told}", flush=True)
    for number, what in enumerate(("least", "median") if ratios else ()):
        values = sorted((pair[number], method) for method, pair in ratios.items())
        middle = statistics.median(value for value, _ in values)
        ends = " .. ".join(f"{value:.2f} ({method})" for value, method in (values[0], values[-1]))
        print(f"ours/theirs, {what}: {middle:.2f} in the middle, {ends}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--method", nargs="+", default=["all"], help="methods or expressions, or `all`")
    parser.add_argument("--against", metavar="PYTHON", help="the interpreter of another environment with cfmerge")
    parser.add_argument("--pythonpath", type=Path, metavar="DIR", help="where it finds its cfmerge, if not installed")
    parser.add_argument("--warm", type=int, default=0, help="rounds that are not counted, to fill a compilation cache")
    args = parser.parse_args()
    compare(args.directory.resolve(), chosen_methods(args.method), args)


if __name__ == "__main__":
    main()
