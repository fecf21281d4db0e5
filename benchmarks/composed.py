"""Composed results beside fusion_bench's: time and memory of whole processes.

    python benchmarks/make_llama.py DIR --experts 8 --layers 8 --hidden 256 --vocabulary 16000
    python benchmarks/composed.py DIR --peer PYTHON [--systems emr tall smile tsv_c] [--experts 8] [--rounds 3]

Both read the same files. Ours writes the result; fusion_bench's functions (`composed_peers.py`, run by PYTHON, an
environment with `pip install fusion-bench`) keep theirs in memory, and theirs is the time with the imports and without.
Without `--peer` ours is measured alone: DIR may hold any model of make_llama.py.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measuring import ROOT, Figures, run

OURS = {
    "emr": "emr(scope='tensor_mean')",
    "tall": "tall(threshold=0.4)",
    "smile": "smile(rank=32, gate=16)",
    "tsv_c": "tsv_c",
}


def ours(models: Path, system: str, experts: int, memory: str | None, folder: Path) -> Figures:
    """The figures of `cfmerge compose`."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    given = [part for n in range(experts) for part in ("-e", str(models / f"expert_{n}"))]
    bound = ["--memory", memory] if memory else []
    command = ["-m", "cfmerge", "compose", OURS[system], "--base", str(models / "base"), *given, *bound, "--quiet"]
    return run([sys.executable, *command, "-o", str(folder / "out")], ROOT)


def theirs(python: str, models: Path, system: str, experts: int) -> tuple[float, float]:
    """Wall seconds of fusion_bench's program, and of its reading and its work alone."""
    paths = [str(models / "base"), *(str(models / f"expert_{n}") for n in range(experts))]
    program = str(Path(__file__).with_name("composed_peers.py"))
    started = time.monotonic()
    done = subprocess.run([python, program, system, *paths], capture_output=True, text=True, check=True)
    work, read = map(float, done.stderr.split()[-2:])
    return time.monotonic() - started, work + read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--peer", metavar="PYTHON")
    parser.add_argument("--systems", nargs="+", default=["emr", "tall", "smile"], choices=OURS)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", metavar="SIZE")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="rows as JSON lines")
    args = parser.parse_args()
    models = args.directory.resolve()
    with tempfile.TemporaryDirectory(dir=models) as folder:
        for system in args.systems:
            rows: list[dict[str, float]] = []
            for _ in range(args.rounds):
                figures = ours(models, system, args.experts, args.memory, Path(folder))
                row = {"ours": figures.wall, "memory": figures.memory or 0.0}
                if args.peer and system != "tsv_c":
                    row["theirs"], row["work"] = theirs(args.peer, models, system, args.experts)
                rows.append(row)
                if args.output:
                    with args.output.open("a") as file:
                        file.write(json.dumps({"system": system, "experts": args.experts, **row}) + "\n")
            told = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
            text = f"{system:6} ours {told['ours']:7.2f} s, {told['memory']:.2f} GiB"
            if "theirs" in told:
                whole = statistics.median(row["ours"] / row["theirs"] for row in rows)
                work = statistics.median(row["ours"] / row["work"] for row in rows)
                text += f"   theirs {told['theirs']:7.2f} s, {told['work']:.2f} s without imports"
                text += f"   ours/theirs {whole:.3f}, {work:.3f}"
            print(text, flush=True)


if __name__ == "__main__":
    main()
