"""How fast a device is at what cfmerge asks of it: rates, a roofline, memory, precision, and whole merges from files.

    python benchmarks/accelerator.py --quick                       # a minute
    python benchmarks/accelerator.py -o RESULTS                    # GPU, TPU or processor, whichever JAX takes
    python benchmarks/accelerator.py --size 1.1B --work DIR -o RESULTS
    python benchmarks/accelerator.py --models DIR --shapes 4096x4096 4096x11008 -o RESULTS

1. The device's peak: the best rate of a product of square matrices, for each dtype and precision (`default` is what
   XLA does when nobody asks: TF32 on a GPU, bfloat16 on a TPU; cfmerge asks for `highest`); and the rate of memory.
2. Each operation (accelerator_operations.py) by shape, dtype and precision: seconds, the rate by the least number of
   operations, its share of the peak, and of the roof (the peak, or operations per byte times the rate of memory, if
   that is less); memory as the compiled program states it; the error against float64 on the processor.
3. Merges of a LLaMA from files, each a process of its own and made twice (the second finds the compiled programs),
   beside bare reading of the same files. They come first, while this process holds no memory of the device.

A call is compiled and made once before it is timed; then calls are made in batches and awaited together, and the best
batch counts. RESULTS gets accelerator.md, accelerator.json and accelerator.png.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from accelerator_operations import OPERATIONS, VARIANTS, ace_flops
from accelerator_rates import bandwidth, measure, peaks
from make_llama import SIZES, write_models
from measuring import ROOT, blas_threads, existing, figure, machine, run, table, write_report
from recipes import recipe, shapes

SHAPES = {
    "quick": [(64, 64), (96, 64)],
    "cpu": [(1024, 1024), (2816, 1024), (1024, 2816), (4096, 4096)],
    "accelerator": [(1024, 1024), (2816, 1024), (1024, 2816), (4096, 4096), (11008, 4096), (4096, 11008), (8192, 8192)],
}
SQUARES = {"quick": [256], "cpu": [1024, 2048, 4096], "accelerator": [2048, 4096, 8192, 16384]}
COLUMNS = [
    "operation", "shape", "dtype", "precision", "ms", "GFLOP/s", "GB/s", "operations per byte", "of the peak",
    "of the roof", "memory, MiB", "error", "failed",
]  # fmt: skip


# --- whole merges -------------------------------------------------------------------------------------------------


def merge_and_tell(file: str, out: str, told: str) -> None:
    """The work of a process: the command line's merge, and what the devices say of their memory after it."""
    from cfmerge.cli import main as command

    sys.argv = ["cfmerge", "merge", file, "--quiet", "--overwrite", "-o", out]
    try:
        command()
    finally:
        Path(told).write_text(json.dumps([device.memory_stats() for device in jax.local_devices()]))


def reading(models: Sequence[Path]) -> tuple[float, float]:
    """Seconds to read the files into one buffer, and their GiB."""
    buffer, total, started = bytearray(1 << 24), 0, time.monotonic()
    for file in (file for model in models for file in sorted(model.glob("*.safetensors"))):
        with file.open("rb", buffering=0) as opened:
            while count := opened.readinto(buffer):
                total += count
    return time.monotonic() - started, total / 2**30


def merges(models: Path, methods: Sequence[str], experts: int, folder: Path) -> list[dict[str, Any]]:
    """A row for each method: a merge with an empty cache of programs and one with a full one."""
    needed = sum(
        ace_flops(*shape, experts)
        for name, shape in shapes(models / "base" / "model.safetensors").items()
        if len(shape) == 2 and ".layers." in name
    )
    rows = []
    for method in methods:
        file, told = recipe(models, method, experts, folder), folder / "told.json"
        ours = [sys.executable, __file__, "--merge", str(file), str(folder / "out"), str(told)]
        environment = {**os.environ, "XDG_CACHE_HOME": tempfile.mkdtemp(dir=folder)}
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        first, second = (run(ours, ROOT, environment) for _ in range(2))
        stats = [each for each in json.loads(told.read_text()) if each]
        seconds, size = reading([models / "base", *(models / f"expert_{number}" for number in range(experts))])
        row = {"method": method, "experts": experts, "inputs, GiB": size, "bare reading, s": seconds}
        row |= {"wall, first, s": first.wall, "wall, again, s": second.wall, "processor, again, s": second.cpu}
        row |= {"anonymous memory, GiB": second.memory, "operations": needed if method == "ace" else None}
        row["device memory, GiB"] = max((each["peak_bytes_in_use"] for each in stats), default=0) / 2**30 or None
        row["GFLOP/s"] = needed / second.wall / 1e9 if method == "ace" else None
        print(f"merge by {method}: {first.wall:.1f} s, again {second.wall:.1f} s; reading {seconds:.1f} s", flush=True)
        rows.append(row)
    shutil.rmtree(folder / "out", ignore_errors=True)
    return rows


# --- telling ------------------------------------------------------------------------------------------------------


def add_roof(row: dict[str, Any], best: Mapping[tuple[str, str], float], memory: float) -> None:
    """The share of the peak of the row's dtype and precision, and of the roof over it."""
    if "ms" not in row:
        return
    peak = best.get((row["dtype"], row["precision"]))
    if row["operations"] and peak:
        row["operations per byte"] = row["operations"] / row["bytes"]
        row["of the peak"] = row["GFLOP/s"] / peak
        row["of the roof"] = row["GFLOP/s"] / min(peak, row["operations per byte"] * memory)
    else:
        row["of the roof"] = row["GB/s"] / memory


def draw(content: Mapping[str, Any], best: Mapping[tuple[str, str], float], file: Path) -> None:
    """The roofs of all dtypes by colour, and under them a point for every operation and shape, by the marker."""
    made, (axes,) = figure(1, 8.0)
    memory, reach = content["bandwidth"]["memory"], np.logspace(-1, 4, 100)
    colours = {variant: f"C{number}" for number, variant in enumerate(VARIANTS)}
    for variant, peak in best.items():
        axes.loglog(reach, np.minimum(peak, reach * memory), color=colours[variant], label=" ".join(variant), lw=1)
    points = [row for row in content["operations"] if row.get("operations per byte")]
    for marker, name in zip("osD^v*P", dict.fromkeys(row["operation"] for row in points), strict=False):
        axes.plot([], [], marker, color="grey", label=name)
        for row in points:
            if row["operation"] == name:
                colour = colours[row["dtype"], row["precision"]]
                axes.plot(row["operations per byte"], row["GFLOP/s"], marker, color=colour, markersize=4)
    axes.set_xlabel("operations per byte, at least")
    axes.set_ylabel("GFLOP/s")
    axes.set_title(content["device"]["kind"], fontsize=9)
    made.legend(fontsize=7, loc="outside right upper")
    made.savefig(file)


def best_rates(peaks: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], float]:
    """The peak of each dtype and precision; on a processor NumPy's, if that is better."""
    best: dict[tuple[str, str], float] = {}
    of_numpy = {row["dtype"]: row["peak"] for row in peaks if row["precision"] == "NumPy"}
    for row in peaks:
        if row["precision"] != "NumPy" and row["peak"]:
            best[row["dtype"], row["precision"]] = max(row["peak"], of_numpy.get(row["dtype"], 0))
    return best


def report(content: dict[str, Any], output: Path) -> None:
    best = best_rates(content["peaks"])
    for row in content["operations"]:
        add_roof(row, best, content["bandwidth"]["memory"])
    for row in content["merges"]:
        peak = best.get(("float32", "highest"))
        row["of the peak"] = row["GFLOP/s"] / peak if row["GFLOP/s"] and peak else None
    device, rates = content["device"], content["bandwidth"]
    told = f"Device: {device['count']} x {device['kind']} ({device['platform']})."
    told += "".join(f" {name.capitalize()} {rate:.3g} GB/s." for name, rate in rates.items() if rate)
    sections = [
        told, "\n## Products of square matrices, GFLOP/s\n", table(content["peaks"]),
        "\n## Operations\n", table(content["operations"], COLUMNS),
        *([f"\n## A LLaMA ({content['size']}) from files\n", table(content["merges"])] if content["merges"] else []),
    ]  # fmt: skip
    write_report(output, "accelerator", f"cfmerge on {device['kind']}", content, sections)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes and a tiny model")
    parser.add_argument("--shapes", nargs="+", metavar="MxN")
    parser.add_argument(
        "--operations", nargs="+", metavar="NAME", help="some of them: 'Gram', 'solve', 'ACE of 4', ..."
    )
    parser.add_argument("--size", choices=list(SIZES), help="of the model that is made and merged; default: 374M")
    parser.add_argument("--models", type=Path, help="models of make_llama.py that are there, in place of --size")
    parser.add_argument("--methods", nargs="*", default=["average", "ace"], help="of the whole merges; none: no merge")
    parser.add_argument("--experts", type=int, default=4, help="of the whole merges")
    parser.add_argument("--exact", type=int, default=4096, help="the widest shape that is compared with float64")
    parser.add_argument("--work", type=Path, metavar="DIR", help="where models are made; default: a temporary folder")
    parser.add_argument("-o", "--output", type=Path, default=Path("results"))
    args = parser.parse_args()
    args.work = existing(args.work)
    content: dict[str, Any] = {"machine": machine(), "operations": []}
    with tempfile.TemporaryDirectory(prefix="accelerator-", dir=args.work) as directory:
        folder, size = Path(directory), args.size or ("tiny" if args.quick else "374M")
        content["size"], content["merges"] = args.models.name if args.models else size, []
        if args.methods:
            place = (args.work or folder) / f"llama-{size}"
            models = args.models or write_models(place, SIZES[size], args.experts)
            content["merges"] = merges(models.resolve(), args.methods, args.experts, folder)
    device, least = jax.devices()[0], 0.02 if args.quick else 0.3
    content["device"] = {"kind": device.device_kind, "platform": device.platform, "count": jax.device_count()}
    kind = "quick" if args.quick else "cpu" if device.platform == "cpu" else "accelerator"
    given = [tuple(map(int, text.split("x"))) for text in args.shapes or ()] or SHAPES[kind]
    with blas_threads(1):
        content["peaks"] = peaks(SQUARES[kind], least)
        content["bandwidth"] = bandwidth(1 << (24 if args.quick else 28), least)
        chosen = [each for each in OPERATIONS if not args.operations or each.name in args.operations]
        for operation, shape in ((operation, shape) for operation in chosen for shape in given):
            if device.platform != "cpu" or max(shape) <= operation.widest:
                content["operations"] += measure(operation, shape, least, args.exact)
                content["device"]["memory"] = device.memory_stats()
                report(content, args.output)  # what is measured stays, whatever comes next
    draw(content, best_rates(content["peaks"]), args.output / "accelerator.png")
    print(f"written: {args.output}/accelerator.md, .json, .png")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--merge"]:
        merge_and_tell(*sys.argv[2:])
    else:
        main()
