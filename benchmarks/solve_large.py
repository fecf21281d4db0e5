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
from measuring import blas_threads

import cfmerge
from cfmerge import methods
from cfmerge.formats.shards import save
from cfmerge.methods import Method

M, N, EXPERTS, RANK = 4096, 11008, 8, 16


def factors(rng: np.random.Generator, rank: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Of a delta's low-rank part: a LoRA product, or 64 directions of decaying strength."""
    columns = rank or 64
    spectrum = np.ones(columns) if rank else np.arange(1, columns + 1) ** -0.5
    left = (rng.standard_normal((M, columns)) * spectrum).astype(np.float32)
    right = rng.standard_normal((columns, N), np.float32)
    return left * np.float32(1e-3 / (left @ right).std()), right


def delta(seed: int, rank: int | None) -> np.ndarray:
    """A LoRA product; or, without a rank, decaying directions and noise of full rank."""
    rng = np.random.default_rng(seed)
    left, right = factors(rng, rank)
    return left @ right if rank else left @ right + np.float32(5e-4) * rng.standard_normal((M, N), np.float32)


def exact_low_rank(eps_rel: float = 0.07) -> np.ndarray:
    """ACE of the LoRA deltas in NumPy float64, in the joint basis of their factors (homogeneous branch).

    `D_t = U M_t V^T`; everything commutes with U and V, the prior becoming `v (1/n) v^T g` with `v = V^T 1`.
    """
    made = [factors(np.random.default_rng(seed), RANK) for seed in range(EXPERTS)]
    pairs = [(left.astype(np.float64), right.astype(np.float64)) for left, right in made]
    u_basis, _ = np.linalg.qr(np.concatenate([left for left, _ in pairs], axis=1))
    v_basis, _ = np.linalg.qr(np.concatenate([right for _, right in pairs]).T)
    cores = [(u_basis.T @ left) @ (right @ v_basis) for left, right in pairs]
    u, v = u_basis.sum(axis=0) / np.sqrt(M), v_basis.sum(axis=0)
    grams = [core.T @ (core - np.outer(u, u @ core)) for core in cores]
    eps = eps_rel * np.trace(sum(grams)) / (EXPERTS * N)
    gram, q = sum(grams), v_basis.shape[1]
    right_side = sum(core @ g for core, g in zip(cores, grams, strict=True)) + eps * sum(cores)
    system = gram + EXPERTS * eps * np.eye(q) + np.outer(v, v @ gram) / N
    merged = (u_basis - u_basis.mean(axis=0)) @ (right_side @ np.linalg.inv(system))
    return merged @ v_basis.T


def solve(method: Method, rank: int | None, double: bool) -> tuple[np.ndarray, dict[str, float], float]:
    """The merged delta, the method's report, and seconds without compilation and without making the deltas.

    In float32; with `double` the merged delta is what float64 makes of the same sums.
    """
    dtype = jnp.float32
    with jax.enable_x64(False):
        update, report = jax.jit(method.update), jax.jit(method.solve)
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
    if double:  # as a merge does with a system too ill-conditioned for a float32 solve; not timed
        with jax.enable_x64(True):
            statistic = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), statistic)
            merged = jax.jit(method.solve)(statistic)
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
    ratios, exact = [], exact_low_rank()
    for _ in range(rounds):
        narrow, told, fast = solve(methods.ace(form="low-rank", rank=RANK), RANK, False)
        wide, _, slow = solve(methods.ace(form="full"), RANK, True)
        ratios.append(slow / fast)
        print(
            f"low-rank {fast:.2f} s, full {slow:.1f} s, ratio {slow / fast:.0f}; errors against float64: "
            f"low-rank {error(narrow, exact):.1e}, full {error(wide, exact):.1e}, mutual {error(narrow, wide):.1e}; "
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
    with blas_threads(1):
        full(args.directory) if args.what == "full" else low_rank(args.rounds)


if __name__ == "__main__":
    main()
