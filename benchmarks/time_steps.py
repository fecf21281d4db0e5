"""A step of merging over time: its time and memory as tasks come, in whole processes.

    python benchmarks/make_llama.py DIR --experts 16
    python benchmarks/time_steps.py DIR [--steps 8] [--rules "ema(weight=0.5)" ...] [--memory SIZE]

The models of DIR are linked into a store one after another, and `cfmerge time deploy` is measured after each: the
running model follows, and the model to serve is written. Rules without a running model show how a step grows.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

from measuring import ROOT, Figures, machine, run, table

TIES = "technique=ties(density=0.2)"
RULES = ("ema(weight=0.5)", "all", "all(technique=magmax)", f"ema({TIES})", f"all({TIES})")


def deployed(store: Path, output: Path, memory: str | None) -> Figures:
    """The figures of `cfmerge time deploy`."""
    bound = ["--memory", memory] if memory else []
    return run([sys.executable, "-m", "cfmerge", "time", "deploy", str(store), "-o", str(output), "-q", *bound], ROOT)


def steps(rule: str, experts: list[Path], base: Path, folder: Path, memory: str | None) -> list[dict]:
    """A row for each step of a rule."""
    sys.path.insert(0, str(ROOT))
    from cfmerge import temporal

    time, rows = temporal.Time(folder / "store", base, init="base", deploy=rule), []
    for number, expert in enumerate(experts, 1):
        time.store(expert, expert.name, link=True)
        figures = deployed(time.path, folder / "served", memory)
        rows.append({"rule": rule, "step": number, "reads": len(time.plan()[1].reads), **figures._asdict()})
        print(f"{rule}: step {number}: {figures.wall:.1f} s, {figures.memory or 0:.2f} GiB", flush=True)
        shutil.rmtree(folder / "served")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rules", nargs="*", default=RULES)
    parser.add_argument("--memory", metavar="SIZE", help="cfmerge's bound of the working set")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="rows as JSON lines")
    args = parser.parse_args()
    models = args.directory.resolve()
    experts = sorted(models.glob("expert_*"), key=lambda path: int(path.name.split("_")[1]))[: args.steps]
    rows = []
    for rule in args.rules:
        with tempfile.TemporaryDirectory(dir=models) as temporary:
            rows += steps(rule, experts, models / "base", Path(temporary), args.memory)
    if args.output:
        args.output.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(machine())
    print(told(rows))


def told(rows: list[dict]) -> str:
    """Seconds of the processor and GiB by step, a line for each rule."""
    shown = []
    for rule in dict.fromkeys(row["rule"] for row in rows):
        own = [row for row in rows if row["rule"] == rule]
        cells = {f"step {row['step']}": f"{row['cpu']:.0f} s, {row['memory'] or 0:.2f} GiB" for row in own}
        shown.append({"rule": rule, **cells})
    return table(shown)


if __name__ == "__main__":
    main()
