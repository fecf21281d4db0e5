"""How much an absolute `eps` shrinks, layer by layer, in the models at hand; and what the relative ridge does.

    python benchmarks/ridge.py BASE EXPERT [EXPERT ...] [--heads drop]

For every matrix that ACE solves, the shrinkage is the ridge over the mean eigenvalue of the experts' mean covariance,
`eps T n / trace(sum_t C_t)`. Near 0 the smallest, noisy directions are amplified; far above 1 the result is the mean of
the (centred) deltas. The second table says how far the merged delta is from that mean, `||X - mean|| / ||mean||`.
"""

import argparse

import jax.numpy as jnp
import numpy as np

import cfmerge
from cfmerge import methods
from cfmerge.models import to_canonical

SETTINGS = {"eps=1e-5 (CLIP)": 1e-5, "eps=2e-4 (RoBERTa)": 2e-4, "eps=1e-2 (code)": 1e-2, "eps=4e-2 (GPT-2)": 4e-2}


def quantiles(values: list[float]) -> str:
    low, middle, high = np.quantile(values, [0, 0.5, 1])
    return f"{low:9.1e} {middle:9.1e} {high:9.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("experts", nargs="+")
    parser.add_argument("--heads")
    parser.add_argument("--largest", type=int, default=2048, help="leave out matrices with more inputs than this")
    args = parser.parse_args()
    recipe = cfmerge.Recipe(base=args.base, experts=args.experts, heads=args.heads)
    plan = cfmerge.make_plan(recipe)
    made = {name: methods.ace(eps=eps) for name, eps in SETTINGS.items()} | {"eps_rel=0.07 (default)": methods.ace()}
    shrinkage: dict[str, list[float]] = {name: [] for name in made}
    distance: dict[str, list[float]] = {name: [] for name in made}
    for job in plan.jobs:
        if job.assignment.label != "ace" or job.parameter.canonical[2] > args.largest:
            continue
        base, *experts = (
            np.asarray(to_canonical(np.asarray(checkpoint.read(name), np.float32), job.parameter.layout)[0])
            for checkpoint, name in zip((plan.base, *plan.experts), (job.name, *job.sources), strict=True)
        )
        deltas = [expert - base for expert in experts]
        rows = [delta - delta.mean(axis=0) for delta in deltas]
        eigenvalue = sum(float(np.sum(row**2)) for row in rows) / (len(rows) * base.shape[1])
        mean = sum(rows) / len(rows)
        for name, method in made.items():
            statistic = method.init(jnp.asarray(base))
            for delta in deltas:
                statistic = method.update(statistic, jnp.asarray(delta))
            merged = np.asarray(method.solve(statistic)[0])
            shrinkage[name].append(SETTINGS[name] / eigenvalue if name in SETTINGS else 0.07)
            distance[name].append(float(np.linalg.norm(merged - mean) / np.linalg.norm(mean)))
    print(f"{args.base}: {len(args.experts)} experts, {len(distance['eps_rel=0.07 (default)'])} matrices")
    print(f"{'':24} shrinkage: least, median, most   distance to the mean: the same")
    for name in made:
        print(f"{name:24} {quantiles(shrinkage[name])}   {quantiles(distance[name])}")


if __name__ == "__main__":
    main()
