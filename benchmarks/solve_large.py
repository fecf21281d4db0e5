"""One weight of 4096 x 11008 (a LLaMA-7B gate projection the hard way round) with 8 experts, by ACE.

    python benchmarks/solve_large.py full --directory DIR   the default precision against float64
    python benchmarks/solve_large.py low-rank               LoRA deltas of rank 16: low-rank form against the full one

`full` needs about 12 GB and, on two cores, ten minutes, most of it for the float64 reference.
"""

import argparse
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from threadpoolctl import threadpool_limits

import cfmerge
from cfmerge import methods
from cfmerge.checkpoints.safetensors import save
from cfmerge.methods import Method

M, N, EXPERTS, RANK = 4096, 11008, 8, 16


def delta(seed: int, rank: int | None) -> np.ndarray:
    """Full rank with a decaying spectrum and noise; or a LoRA product."""
    rng = np.random.default_rng(seed)
    columns = rank or 64
    spectrum = np.ones(columns) if rank else np.arange(1, columns + 1) ** -0.5
    left = (rng.standard_normal((M, columns)) * spectrum).astype(np.float32)
    low = left @ rng.standard_normal((columns, N), np.float32)
    low *= np.float32(1e-3 / low.std())
    return low if rank else low + np.float32(5e-4) * rng.standard_normal((M, N), np.float32)


def solve(method: Method, rank: int | None, dtype: str) -> tuple[np.ndarray, dict[str, float], float]:
    """The merged delta, the method's report, and seconds without compilation and without making the deltas."""
    with jax.enable_x64(dtype == "float64"):
        update, report = jax.jit(method.update), jax.jit(method.solve_with_report)
        statistic, seconds = jax.jit(method.init)(jnp.zeros((M, N), dtype)), 0.0
        for seed in range(EXPERTS):
            value = jnp.asarray(delta(seed, rank), dtype)
            compiled = update.lower(statistic, value, 1.0).compile()
            started = time.monotonic()
            statistic = jax.block_until_ready(compiled(statistic, value, 1.0))
            seconds += time.monotonic() - started
        compiled = report.lower(statistic).compile()
        started = time.monotonic()
        merged, told = jax.block_until_ready(compiled(statistic))
        seconds += time.monotonic() - started
        return np.asarray(merged, np.float64), {key: float(value) for key, value in told.items()}, seconds


def error(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def merge_on_disk(directory: Path, precision: str) -> tuple[np.ndarray, cfmerge.MergeResult]:
    """The same deltas as checkpoints in float32 (the base is zero), merged as a user merges them."""
    models = [directory / "base", *(directory / f"expert_{t}" for t in range(EXPERTS))]
    for number, model in enumerate(models):
        if not model.exists():
            model.mkdir(parents=True)
            tensor = delta(number - 1, None) if number else np.zeros((M, N), np.float32)
            save(model, {"gate.weight": tensor}, {"format": "pt"}, "model")
    out = directory / precision
    result = cfmerge.merge(models[0], models[1:], output=out, precision=precision, memory="16GB", overwrite=True)
    return cfmerge.open_checkpoint(out).read("gate.weight").astype(np.float64), result


def full(directory: Path) -> None:
    for precision in ("auto", "float64"):
        _, result = merge_on_disk(directory, precision)
        print(f"{precision}: {result.seconds:.0f} s, {result.reports['gate.weight']}, {result.notes}", flush=True)
    exact = cfmerge.open_checkpoint(directory / "float64").read("gate.weight").astype(np.float64)
    merged = cfmerge.open_checkpoint(directory / "auto").read("gate.weight")
    print(f"relative error of auto against float64: {error(merged, exact):.1e}")


def low_rank(rounds: int) -> None:
    ratios = []
    for _ in range(rounds):
        narrow, told, fast = solve(methods.ace(form="low-rank", rank=RANK), RANK, "float32")
        wide, _, slow = solve(methods.ace(form="full"), RANK, "float32")
        ratios.append(slow / fast)
        print(
            f"low-rank {fast:.2f} s, full {slow:.1f} s, ratio {slow / fast:.0f}; difference {error(narrow, wide):.1e}, "
            f"ridge ratio {told['ridge_ratio']:.1e}, factor error {told['factor_error']:.1e}",
            flush=True,
        )
    print(f"full / low-rank: {statistics.median(ratios):.0f} times")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=["full", "low-rank"])
    parser.add_argument("--directory", type=Path, help="of `full`: 2 GB of checkpoints, made where they are not")
    parser.add_argument("--rounds", type=int, default=3, help="of `low-rank`")
    args = parser.parse_args()
    with threadpool_limits(1, user_api="blas"):  # as a merge does
        full(args.directory) if args.what == "full" else low_rank(args.rounds)


if __name__ == "__main__":
    main()
