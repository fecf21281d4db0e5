"""Adapters merged by their factors, beside the same experts merged and unloaded: time, memory, and the ratio.

    python benchmarks/adapters.py DIR [--size 1.1B] [--layers N] [--experts 8] [--rank 16] [--method ace] [--rounds 1]

DIR gets a LLaMA-architecture base (`make_llama.py`), PEFT adapters of all its linear layers, and full experts, which
are base plus adapter in bfloat16. Both merges are whole processes that write a model, and run in turn; the ratio is
taken round by round. The embedding and the head, which no adapter changes, are read and written by both.
"""

import argparse
import json
import shutil
import statistics
import sys
from pathlib import Path

import measuring
import numpy as np
from make_llama import BF16, SIZES, Size, base_tensor, config, shapes, write_models

from cfmerge.formats.shards import ShardWriter, save

ALPHA = 2  # times the rank


def changed(size: Size) -> dict[str, tuple[int, ...]]:
    """The tensors that adapters change."""
    return {name: shape for name, shape in shapes(size).items() if name.endswith("_proj.weight")}


def factors(expert: int, number: int, shape: tuple[int, ...], rank: int) -> tuple[np.ndarray, np.ndarray]:
    """B and A of a layer, whose delta is about 1 % of the base's norm."""
    rng = np.random.default_rng([2, expert, number])
    b, a = rng.standard_normal((shape[0], rank), np.float32), rng.standard_normal((rank, shape[1]), np.float32)
    return b * np.float32(2e-4 / ALPHA / rank**0.5), a


def write_adapter(directory: Path, size: Size, expert: int, rank: int) -> None:
    directory.mkdir(parents=True)
    modules = sorted({name.split(".")[-2] for name in changed(size)})
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": ALPHA * rank, "bias": "none",
        "target_modules": modules, "base_model_name_or_path": "base", "fan_in_fan_out": False,
    }  # fmt: skip
    (directory / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    tensors = {}
    for number, (name, shape) in enumerate(changed(size).items()):
        b, a = factors(expert, number, shape, rank)
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        tensors |= {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
    save(directory, tensors, {"format": "pt"}, "adapter_model")


def write_full(directory: Path, size: Size, expert: int, rank: int) -> None:
    """The expert that merging and unloading the adapter gives."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config(size), indent=2) + "\n")
    own = {name: number for number, name in enumerate(changed(size))}
    writer = ShardWriter(directory, {n: (s, BF16) for n, s in shapes(size).items()}, 1 << 40, {"format": "pt"})
    for number, (name, shape) in enumerate(shapes(size).items()):
        value = base_tensor(np.random.default_rng([0, number]), shape).astype(BF16)
        if name in own:
            b, a = factors(expert, own[name], shape, rank)
            value = (value.astype(np.float32) + np.float32(ALPHA) * (b @ a)).astype(BF16)
        writer.write(name, value)
    writer.close()


def write_all(directory: Path, size: Size, experts: int, rank: int) -> None:
    """Base, adapters and full experts; what is there already stays as it is."""
    write_models(directory, size, 0)
    for expert in range(experts):
        for kind, write in (("adapter", write_adapter), ("full", write_full)):
            place = directory / f"{kind}_{rank}_{expert}"
            if not place.exists():
                partial = place.with_name(f"{place.name}.partial")
                shutil.rmtree(partial, ignore_errors=True)
                write(partial, size, expert, rank)
                partial.rename(place)


def merge(directory: Path, kind: str, rank: int, experts: int, method: str) -> measuring.Figures:
    output = directory / f"merged_{kind}"
    shutil.rmtree(output, ignore_errors=True)
    models = [str(directory / f"{kind}_{rank}_{expert}") for expert in range(experts)]
    command = [sys.executable, "-m", "cfmerge", "merge", "--base", str(directory / "base"), "-m", method]
    command += [word for model in models for word in ("-e", model)]
    command += ["-o", str(output), "--fresh", "-q"]
    figures = measuring.run(command, measuring.ROOT)
    shutil.rmtree(output)
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--size", choices=SIZES, default="1.1B")
    parser.add_argument("--layers", type=int, help="fewer or more than that size has")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--method", default="ace")
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    size = SIZES[args.size]._replace(**({"layers": args.layers} if args.layers else {}))
    write_all(args.directory, size, args.experts, args.rank)
    rows, ratios = [], []
    for number in range(args.rounds):
        found = {
            kind: merge(args.directory, kind, args.rank, args.experts, args.method) for kind in ("full", "adapter")
        }
        rows += [{"round": number, "experts": kind, **own._asdict()} for kind, own in found.items()]
        ratios.append(found["adapter"].wall / found["full"].wall)
    print(measuring.table(rows))
    print(f"adapters / full, wall: {statistics.median(ratios):.3f} (aim: at most {1 / 20})")
