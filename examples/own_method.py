"""Writes a merging method of one's own: one decorated function, and the same as three functions that stream.

The spectral average is the mean of the deltas, cut to its largest singular values. What the experts have in common
adds up in a few directions, what each has by itself (its noise) spreads over all of them and is cut.

    python examples/own_method.py
"""

import tempfile
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

import cfmerge
from cfmerge.methods import Method, from_deltas, register


@from_deltas
def spectral_average(base, deltas, weights, keep: float = 0.1):
    """The mean of the deltas, cut to its largest singular values.

    Args:
        keep: share of the singular values that is kept.

    Source: examples/own_method.py.
    """
    return cut(jnp.tensordot(weights, deltas, 1) / jnp.sum(weights), keep)


def cut(mean, keep):
    u, s, vt = jnp.linalg.svd(mean, full_matrices=False)
    k = max(1, round(keep * len(s)))
    return (u[:, :k] * s[:k]) @ vt[:k]


class Sum(NamedTuple):
    """What the streaming form keeps of the experts: a sum, so its size does not grow with their number."""

    deltas: jax.Array  # (out, in)
    weight: jax.Array


@register
def streaming_spectral_average(keep: float = 0.1) -> Method:
    """The same, from a sum: experts come one at a time, and `cfmerge.accumulate` works.

    Args:
        keep: share of the singular values that is kept.

    Source: examples/own_method.py.
    """

    def init(base):
        return Sum(jnp.zeros_like(base), jnp.zeros((), base.dtype))

    def update(statistic, delta, weight=1.0):
        return Sum(statistic.deltas + weight * delta, statistic.weight + weight)

    def solve(statistic):
        return cut(statistic.deltas / statistic.weight, keep), {}  # the merged delta, and a report: nothing to tell

    return Method("streaming_spectral_average", init, update, solve)


def main():
    # A change of rank 3 that all experts share, in a matrix stored (in, out) as Flax does, and noise of each one's own.
    rng = np.random.default_rng(0)
    base = rng.standard_normal((32, 48)).astype(np.float32)
    wanted = base + (rng.standard_normal((32, 3)) @ rng.standard_normal((3, 48))).astype(np.float32)
    experts = [wanted + 2 * rng.standard_normal(base.shape).astype(np.float32) for _ in range(4)]

    def distance(merged):
        return float(np.linalg.norm(merged - wanted) / np.linalg.norm(base - wanted))

    print("distance to what the experts have in common")
    print(f"  average           {distance(np.mean(experts, axis=0)):.3f}")

    # 1. One canonical weight, (out, in).
    merged = cfmerge.merge_tensor(base.T, [expert.T for expert in experts], spectral_average()).T
    print(f"  merge_tensor      {distance(merged):.3f}")

    merged = cfmerge.merge_tensor(base.T, [expert.T for expert in experts], streaming_spectral_average()).T
    print(f"  streamed          {distance(merged):.3f}")

    # 2. A tree of parameters, jitted. Biases and norms get the mean: the method takes matrices only.
    def tree(kernel):
        return {"layer": {"kernel": jnp.asarray(kernel), "bias": jnp.zeros(48)}}

    solver = jax.jit(lambda base, experts: cfmerge.merge_params(base, experts, spectral_average()))
    merged = solver(tree(base), [tree(expert) for expert in experts])
    print(f"  merge_params      {distance(merged['layer']['kernel']):.3f}")

    # 3. Checkpoints on disk, by name. Its parameters are checked and converted by the factory's annotations.
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for name, weight in {"base": base, **{f"expert{n}": e for n, e in enumerate(experts)}}.items():
            save_file({"layer.weight": np.ascontiguousarray(weight.T)}, folder / f"{name}.safetensors")
        result = cfmerge.merge(
            folder / "base.safetensors",
            [folder / f"expert{n}.safetensors" for n in range(4)],
            method="spectral_average",
            parameters={"keep": 0.1},
            output=folder / "merged",
        )
        merged = load_file(result.output / "base.safetensors")["layer.weight"].T
    print(f"  merge, on disk    {distance(merged):.3f}")


if __name__ == "__main__":
    main()
