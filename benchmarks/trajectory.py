"""The mean of checkpoints along a run beside the plain way, all of them in memory: time and memory of whole processes.

    python benchmarks/make_llama.py DIR --experts 16
    python benchmarks/trajectory.py DIR [--steps 10] [--rounds 3] [--plain torch numpy] [--decay linear]

Links to the models of DIR stand for a run's steps. `cfmerge merge --run` and the plain ways (`trajectory_plain.py`)
read the same files in turn; ratios are taken round by round. The first round is left out: it fills the page cache and
cfmerge's caches of compiled programs and of hashes. `fresh` hashes all files again, as a first merge of them does.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from measuring import ROOT, Figures, machine, run, table


def linked(models: Path, count: int, folder: Path) -> list[Path]:
    """The steps of a run, which are links to the models."""
    found = [models / "base", *sorted(models.glob("expert_*"), key=lambda path: int(path.name.split("_")[1]))]
    if len(found) < count:
        raise SystemExit(f"{models}: {len(found)} models, {count} steps are asked for; make_llama.py --experts {count}")
    steps = [folder / "run" / f"checkpoint-{100 * (number + 1)}" for number in range(count)]
    for step, model in zip(steps, found, strict=False):
        step.parent.mkdir(exist_ok=True)
        step.symlink_to(model, target_is_directory=True)
    return steps


def ours(folder: Path, decay: str, memory: str | None, fresh: bool = False) -> Figures:
    """The figures of `cfmerge merge --run`."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    bound = [*(["--memory", memory] if memory else []), *(["--fresh"] if fresh else [])]
    command = ["-m", "cfmerge", "merge", "--run", str(folder / "run"), "--decay", decay, *bound, "--quiet"]
    return run([sys.executable, *command, "-o", str(folder / "out")], ROOT)


def plain(library: str, steps: list[Path], folder: Path) -> Figures:
    """The figures of the plain way."""
    output = folder / "plain.safetensors"
    output.unlink(missing_ok=True)
    program = str(Path(__file__).with_name("trajectory_plain.py"))
    return run([sys.executable, program, library, str(output), *map(str, steps)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plain", nargs="*", default=["torch", "numpy"], choices=["torch", "numpy"])
    parser.add_argument("--decay", default="linear")
    parser.add_argument("--memory", metavar="SIZE", help="cfmerge's bound of the working set")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="rows as JSON lines")
    args = parser.parse_args()
    models, rows = args.directory.resolve(), []
    with tempfile.TemporaryDirectory(dir=models) as temporary:
        folder = Path(temporary)
        steps = linked(models, args.steps, folder)
        for number in range(args.rounds + 1):
            figures = {"ours": ours(folder, args.decay, args.memory)}
            figures["fresh"] = ours(folder, args.decay, args.memory, fresh=True)
            figures |= {library: plain(library, steps, folder) for library in args.plain}
            row = {"round": number, "steps": args.steps}
            row |= {f"{who}_{key}": value for who, one in figures.items() for key, value in one._asdict().items()}
            if args.output:
                with args.output.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            print(
                " ".join(f"{who} {one.wall:.2f} s {one.memory or 0:.2f} GiB" for who, one in figures.items()),
                flush=True,
            )
            rows += [row] if number else []
    print(machine())
    print(summary(rows, ["ours", "fresh", *args.plain]))


def summary(rows: list[dict], who: list[str]) -> str:
    """Medians, and ours over each other, round by round."""

    def median(values) -> float:
        return statistics.median(values)

    def row_of(one: str) -> dict[str, str | float]:
        return {
            "way": one,
            "seconds": median(row[f"{one}_wall"] for row in rows),
            "processor's seconds": median(row[f"{one}_cpu"] for row in rows),
            "GiB": median(row[f"{one}_memory"] or 0.0 for row in rows),
            "ours over it: time": median(row["ours_wall"] / row[f"{one}_wall"] for row in rows),
            "processor's": median(row["ours_cpu"] / row[f"{one}_cpu"] for row in rows),
        }

    return table([row_of(one) for one in who])


if __name__ == "__main__":
    main()
