"""Merges from every format beside the same merge from safetensors: time and memory of whole processes, in turn.

    python benchmarks/formats.py DIR --experts 4 --formats torch msgpack --method average ace --rounds 3

DIR holds `base` and `expert_0`, ... as `make_llama.py` makes them. They are converted, tensor by tensor, into `--work`
(a temporary directory if it is not given), which needs the models' size once for each format; what is there already is
used again. All merges write safetensors. A ratio is that of the wall times of one round, the median of the rounds.
"""

import argparse
import contextlib
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from measuring import ROOT, Figures, run, table

PLAIN = "safetensors"
COLUMNS = ["method", "format", "wall, s", "to safetensors", "memory, GiB"]


def converted(models: Sequence[Path], work: Path, form: str) -> list[Path]:
    """The models in another format, made where they are not there."""
    made = []
    for model in models:
        target = work / form / model.name
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            run([sys.executable, "-m", "cfmerge", "convert", str(model), str(target), "--format", form], ROOT)
        made.append(target)
    return made


def merged(models: Sequence[Path], method: str, out: Path) -> Figures:
    base, *experts = map(str, models)
    command = [sys.executable, "-m", "cfmerge", "merge", "--base", base, "-m", method, "-o", str(out), "--overwrite"]
    command += [part for expert in experts for part in ("-e", expert)]
    return run([*command, "--format", PLAIN, "--fresh", "-q"], ROOT)


def rows(asked: argparse.Namespace, work: Path) -> Iterator[dict]:
    models = [asked.models / "base", *(asked.models / f"expert_{number}" for number in range(asked.experts))]
    sides = {PLAIN: models, **{form: converted(models, work, form) for form in asked.formats}}
    for method in asked.method:
        for side in sides.values():  # fills the caches: of programs, of digests, of files
            merged(side, method, work / "out")
        rounds = [
            {form: merged(side, method, work / "out") for form, side in sides.items()} for _ in range(asked.rounds)
        ]
        for form in sides:
            own = [one[form] for one in rounds]
            ratio = statistics.median(one[form].wall / one[PLAIN].wall for one in rounds)
            memory = max(one.memory or 0 for one in own)
            wall = statistics.median(one.wall for one in own)
            yield dict(zip(COLUMNS, [method, form, wall, ratio, memory], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, metavar="DIR")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--formats", nargs="+", default=["torch", "msgpack"])
    parser.add_argument("--method", nargs="+", default=["average", "ace"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path)
    asked = parser.parse_args()
    with contextlib.ExitStack() as stack:
        work = asked.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        print(table(list(rows(asked, work)), COLUMNS))


if __name__ == "__main__":
    main()
