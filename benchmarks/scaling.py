"""How a merge grows: with experts, with parameters, over devices and over processes. Whole processes from files.

    python benchmarks/scaling.py --quick                                          # a minute
    python benchmarks/scaling.py --over experts sizes --work DIR -o RESULTS       # DIR keeps the models: 24 GB
    python benchmarks/scaling.py --over experts devices processes --models DIR --methods average ties ace -o RESULTS

Models are those of make_llama.py, made in DIR where they are not there yet; `--models` names some that are there, in
which nothing is written. For every method one thing grows and the rest stays as it is: 374M parameters, four experts,
one process, the devices that cfmerge takes by itself.

Processes are started together on this machine, and share its cores; they find each other by `--coordinator`. Devices of
a processor are virtual ones, which share its cores too. Memory is the largest sum of the anonymous memory of all
processes. A first merge that is not counted fills the cache of compiled programs (`--cold`: none does). RESULTS gets
scaling.md, scaling.json and scaling.png; an exponent is that of the power of the axis which fits best: 1 where the time
is linear, less where a constant part outweighs the rest, 0 where memory is flat.
"""

import argparse
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from make_llama import SIZES, Size, write_models
from make_llama import shapes as shapes_of
from measuring import ROOT, Figures, ProcessError, existing, figure, machine, run_together, table, write_report
from recipes import recipe, shapes

AXES: dict[str, Sequence[Any]] = {
    "experts": (2, 4, 8, 16),
    "sizes": ("15M", "374M", "1.1B"),
    "devices": (1, 2, 4, 8),
    "processes": (1, 2, 4),
}
QUICK: dict[str, Sequence[Any]] = {
    "experts": (2, 3), "sizes": ("tiny", "small"), "devices": (1, 2), "processes": (1, 2),
}  # fmt: skip
SMALL = SIZES | {"small": Size(2, 64, 512)}
COLUMNS = ["method", "over", "value", "parameters, M", "experts", "wall, s", "processor, s", "memory, GiB", "left out"]


class Run(NamedTuple):
    """What one point of a curve merges, and with how much."""

    size: str
    experts: int
    devices: int | None = None
    processes: int = 1

    def at(self, axis: str, value: Any) -> "Run":
        return self._replace(**{"size" if axis == "sizes" else axis: value})


def parameters(shapes: Mapping[str, tuple[int, ...]]) -> float:
    """How many, in millions."""
    return sum(float(np.prod(shape)) for shape in shapes.values()) / 1e6


class Models:
    """Folders with a base and experts, made when they are asked for."""

    def __init__(self, given: Path | None, folder: Path) -> None:
        self.given, self.folder = given, folder

    def of(self, asked: Run) -> Path:
        if self.given is None:
            return write_models(self.folder / f"llama-{asked.size}", SMALL[asked.size], asked.experts)
        if not (self.given / f"expert_{asked.experts - 1}").exists():
            raise LookupError(f"{self.given} has fewer than {asked.experts} experts")
        return self.given

    def parameters(self, size: str) -> float:
        if self.given is None:
            return parameters(shapes_of(SMALL[size]))
        return parameters(shapes(self.given / "base" / "model.safetensors"))


# --- measuring ----------------------------------------------------------------------------------------------------


def knows(option: str) -> bool:
    """Whether this cfmerge's `merge` has the option."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    command = [sys.executable, "-m", "cfmerge", "merge", "--help"]
    return option in subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


def commands(asked: Run, file: Path, out: Path, cold: bool) -> list[list[str]]:
    """One for each process."""
    command = [sys.executable, "-m", "cfmerge", "merge", str(file), "--quiet", "-o", str(out)]
    command += ["--devices", str(asked.devices)] if asked.devices else []
    command += ["--no-compile-cache"] if cold else []
    if asked.processes == 1:
        return [command]
    together = ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", str(asked.processes)]
    return [[*command, *together, "--process", str(number)] for number in range(asked.processes)]


def merge(asked: Run, method: str, models: Path, folder: Path, cold: bool) -> Figures:
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    return run_together(commands(asked, recipe(models, method, asked.experts, folder), out, cold), ROOT)


def measure(
    method: str, axis: str, value: Any, start: Run, models: Models, folder: Path, args: argparse.Namespace
) -> dict[str, Any]:
    """A point: medians of its rounds, or why it was left out."""
    asked = start.at(axis, value)
    row: dict[str, Any] = {"method": method, "over": axis, "value": value, "experts": asked.experts}
    row |= {"parameters, M": models.parameters(asked.size), "rounds": []}
    try:
        if axis == "processes" and value > 1 and not knows("--processes"):
            raise LookupError("this cfmerge has no --processes")
        place = models.of(asked)
        if not args.cold:
            merge(asked, method, place, folder, args.cold)
        for _ in range(args.rounds):
            load = os.getloadavg()[0]
            row["rounds"].append({"load": load, **merge(asked, method, place, folder, args.cold)._asdict()})
    except (LookupError, ProcessError) as error:
        row["left out"] = str(error).strip().splitlines()[-1]
        print(f"{method} over {axis}: {value} left out: {error}", flush=True)
        return row
    for name, what in (("wall, s", "wall"), ("processor, s", "cpu"), ("memory, GiB", "memory")):
        values = [one[what] for one in row["rounds"] if one[what] is not None]
        row[name] = statistics.median(values) if values else None
    print(f"{method} over {axis}: {value}  {row['wall, s']:.1f} s  {row['memory, GiB']} GiB", flush=True)
    return row


# --- telling ------------------------------------------------------------------------------------------------------


def places(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Where the points of a curve lie along their axis: parameters in place of the names of sizes."""
    return [row["parameters, M"] if row["over"] == "sizes" else float(row["value"]) for row in rows]


def exponents(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For every curve of two points or more, the powers that fit its times and its memory."""
    found = []
    for method, axis in dict.fromkeys((row["method"], row["over"]) for row in rows):
        curve = [row for row in rows if (row["method"], row["over"]) == (method, axis) and "wall, s" in row]
        if len(curve) > 1:
            line = {"method": method, "over": axis, "points": len(curve)}
            for name in ("wall, s", "processor, s", "memory, GiB"):
                values = [row[name] for row in curve]
                fit = np.polyfit(np.log(places(curve)), np.log(values), 1) if all(values) else [None]
                line[f"exponent of {name.partition(',')[0]}"] = None if fit[0] is None else round(float(fit[0]), 2)
            found.append(line)
    return found


def draw(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Wall time above, memory below; a panel for each axis, a line for each method."""
    axes_names = list(dict.fromkeys(row["over"] for row in rows))
    made, panels = figure(2 * len(axes_names), 3.4)
    pairs = [(axis, what) for axis in axes_names for what in ("wall, s", "memory, GiB")]
    for panel, (axis, what) in zip(panels, pairs, strict=True):
        for method in dict.fromkeys(row["method"] for row in rows):
            curve = [row for row in rows if row["method"] == method and row["over"] == axis and row.get(what)]
            panel.plot(places(curve), [row[what] for row in curve], ".-", label=method)
        if axis == "sizes":  # over two orders of magnitude
            panel.set_xscale("log")
            panel.set_yscale("log")
        else:
            panel.set_ylim(bottom=0)
        panel.set_xlabel("parameters, M" if axis == "sizes" else axis)
        panel.set_title(what, fontsize=9)
    panels[0].legend(fontsize=7)
    made.savefig(file)


def report(content: dict[str, Any], output: Path) -> None:
    rows, content["exponents"] = content["rows"], exponents(content["rows"])
    title = f"How a merge grows: {content['start']['size']}, {content['start']['experts']} experts"
    write_report(output, "scaling", title, content, [table(rows, COLUMNS), table(content["exponents"])])
    draw(rows, output / "scaling.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--over", nargs="+", choices=list(AXES), default=list(AXES))
    parser.add_argument("--methods", nargs="+", help="methods or expressions; default: average ties ace")
    parser.add_argument("--values", nargs="+", help="of one axis, in place of its own")
    parser.add_argument("--size", choices=list(SMALL), help="what is merged where sizes do not grow; default: 374M")
    parser.add_argument("--experts", type=int, help="where experts do not grow; default: 4")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--cold", action="store_true", help="without the cache of compiled programs")
    parser.add_argument("--quick", action="store_true", help="tiny models, one method")
    parser.add_argument("--models", type=Path, metavar="DIR", help="models that are there; sizes do not grow then")
    parser.add_argument("--work", type=Path, metavar="DIR", help="where models are made and kept; default: temporary")
    parser.add_argument("-o", "--output", type=Path, default=Path("results"))
    args = parser.parse_args()
    args.work = existing(args.work)
    if args.values and len(args.over) > 1:
        parser.error("--values are of one axis: name it with --over")
    methods = args.methods or (["average"] if args.quick else ["average", "ties", "ace"])
    size = args.models.name if args.models else args.size or ("tiny" if args.quick else "374M")
    start = Run(size, args.experts or (2 if args.quick else 4))
    rows: list[dict[str, Any]] = []
    content: dict[str, Any] = {"machine": machine(), "start": start._asdict(), "rows": rows}
    with tempfile.TemporaryDirectory(prefix="scaling-", dir=args.work) as directory:
        folder = Path(directory)
        models = Models(args.models and args.models.resolve(), args.work or folder)
        for axis in args.over:
            if axis == "sizes" and args.models:
                print("sizes left out: --models has one size", flush=True)
                continue
            values = args.values or (QUICK if args.quick else AXES)[axis]
            values = [value if axis == "sizes" else int(value) for value in values]
            for method in methods:
                for value in values:
                    rows.append(measure(method, axis, value, start, models, folder, args))
                    report(content, args.output)  # what is measured stays, whatever comes next
    print(f"written: {args.output}/scaling.md, .json, .png")


if __name__ == "__main__":
    main()
