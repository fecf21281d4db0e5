"""How long `cfmerge convert` takes beside `cp` of the same files.

    python benchmarks/convert.py DIR [--size 1.1B] [--rounds 5] [--names llama3] [--warm]

The base of make_llama.py is written to DIR once. Then `cp -r` and a conversion into each format run in turn, round
after round; both end when the files are on the disk (`cp` is followed by `sync`). The system forgets the input's pages
before each, unless `--warm`. Medians of the ratios to `cp` of the same round are told. `--names` adds the conversion
into the other names of the family, which transposes most tensors.
"""

import argparse
import os
import shutil
import statistics
import sys
import time
from pathlib import Path

import measuring
from make_llama import SIZES, write_models

from cfmerge.formats.containers import FORMATS

COMMAND = [sys.executable, "-m", "cfmerge", "convert"]


def forget(directory: Path) -> None:
    """Lets the system forget the pages of a directory's files."""
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--size", choices=SIZES, default="1.1B")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--names")
    parser.add_argument("--warm", action="store_true")
    asked = parser.parse_args()
    model, out = write_models(asked.directory, SIZES[asked.size], 0) / "base", asked.directory / "out"
    size = sum(path.stat().st_size for path in model.iterdir())
    commands = {"cp": ["sh", "-c", f"cp -r '{model}' '{out}' && sync '{out}'/*"]}
    commands |= {name: [*COMMAND, str(model), str(out), "--format", name, "--quiet"] for name in FORMATS}
    if asked.names:
        how = ["--names", asked.names, "--format", "safetensors", "--quiet"]
        commands[f"names {asked.names}"] = [*COMMAND, str(model), str(out), *how]
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    memory: dict[str, float] = {}
    order = list(commands.items())
    for number in range(asked.rounds):
        first = number % len(order)  # none always follows the same other
        for name, command in order[first:] + order[:first]:
            shutil.rmtree(out, ignore_errors=True)
            os.sync()
            if not asked.warm:
                forget(model)
            time.sleep(0.5)
            figures = measuring.run(command)
            seconds[name].append(figures.wall)
            memory[name] = max(memory.get(name, 0.0), figures.memory or 0.0)
    shutil.rmtree(out, ignore_errors=True)
    print(f"{size / 1e9:.2f} GB, {asked.rounds} rounds, {'warm' if asked.warm else 'input not in memory'}")
    print(f"{'':16} {'median s':>9} {'GB/s':>6} {'of cp (least .. most)':>24} {'GiB':>6}")
    for name, each in seconds.items():
        ratios = sorted(mine / cp for mine, cp in zip(each, seconds["cp"], strict=True))
        told = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} .. {ratios[-1]:.2f})"
        middle = statistics.median(each)
        print(f"{name:16} {middle:9.2f} {size / 1e9 / middle:6.2f} {told:>24} {memory[name]:6.2f}")


if __name__ == "__main__":
    main()
