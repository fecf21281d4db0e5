"""Where in the base's weights fine-tuning happens: SMILE's study of subspaces (arXiv 2408.10174) on our zoos.

    python benchmarks/subspaces.py -o docs/results --zoos vision text-full --seeds 0 1 2
    python benchmarks/subspaces.py -o RESULTS --quick                 a toy zoo, seconds, no data
    python benchmarks/subspaces.py -o docs/results --table            page and picture of the rows that are there

A linear layer of the base is `W_0 = U S V^T`, `(m, n)`, with all `m` columns of `U` and all `n` of `V`. With `r` its
rank and `k` the least number of singular values whose sum is at least half of all of them (of the nuclear norm),

    I     the first k columns       II    columns k to r       III   columns behind r, orthogonal to all of W_0

on both sides, and the delta `D` of an expert is projected as in the article's code, with the same columns of both:

    I        U_I U_I^T D V_I V_I^T                       II + III    U_J U_J^T D V_J V_J^T,  J = II and III together
    II       U_II U_II^T D V_II V_II^T                   but I       D less its projection on I
    none     0: only what is no linear layer's weight    all         D: the expert

A square `W_0` of full rank has no III; a wide one has III in its inputs alone and a tall one in its outputs, so that
`II + III` is of other columns on that side only. The mixed terms `U_I D V_J` and `U_J D V_I` are in `but I`, and in
neither I nor II + III. Biases, norms and all else are the expert's in every row, as in the article's code: `none` tells
what these do alone. Accuracy is each expert's on its own task. Energy is `||projection||^2 / ||D||^2`, the mean over
experts and layers; `by chance` is that of a delta without direction, `k^2 / (m n)` for I.

The overlap of two experts is that of the leading g right singular vectors of their deltas, `||V_i^T V_j||^2 / g`: 1 for
the same span, `g / n` by chance. These are what SMILE's routers look at. `held` is the energy of a delta's leading
triplets, which SMILE's experts keep.
"""

import argparse
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float
from subspaces_told import PROPER, draw, tables
from zoo_models import ZOOS, Opened, keep, kept, opened, write_tables

from cfmerge_accuracy.cache import keep_compiled

PROJECTIONS = ("none", *PROPER, "all")


class Columns(NamedTuple):
    """The singular vectors of a base's weight, those of I in front, and where II and III begin."""

    u: Float[np.ndarray, "m m"]
    v: Float[np.ndarray, "n n"]
    k: int
    r: int

    @property
    def zones(self) -> dict[str, slice]:
        return {"I": slice(0, self.k), "II": slice(self.k, self.r), "II + III": slice(self.k, None)}


def columns(weight: Float[np.ndarray, "m n"]) -> Columns:
    """The singular vectors of a weight, in float64."""
    u, s, vt = np.linalg.svd(weight.astype(np.float64), full_matrices=True)
    half = int(np.sum(np.cumsum(s) < 0.5 * s.sum())) + 1
    rank = int(np.sum(s > s[0] * max(weight.shape) * np.finfo(np.float32).eps))
    return Columns(u, vt.T, min(half, rank), rank)


def projected(own: Columns, delta: Float[np.ndarray, "m n"], how: str) -> Float[np.ndarray, "m n"]:
    """The projection of a delta: one of `PROJECTIONS`."""
    if how in ("none", "all"):
        return delta if how == "all" else np.zeros_like(delta)
    if how == "but I":
        return delta - projected(own, delta, "I")
    u, v = own.u[:, own.zones[how]], own.v[:, own.zones[how]]
    return u @ (u.T @ delta @ v) @ v.T


def chance(own: Columns, how: str) -> float:
    """The energy share of a projection of a delta without direction."""
    if how in ("none", "all"):
        return float(how == "all")
    if how == "but I":
        return 1 - chance(own, "I")
    m, n = len(own.u), len(own.v)
    return len(range(m)[own.zones[how]]) * len(range(n)[own.zones[how]]) / (m * n)


def overlap(one: Float[np.ndarray, "n r"], other: Float[np.ndarray, "n r"]) -> Float[np.ndarray, " r"]:
    """Of the leading 1, 2, ... columns of both: the mean squared cosine of the angles between their spans."""
    squares = np.cumsum(np.cumsum((one.T @ other) ** 2, axis=0), axis=1)
    return np.diagonal(squares) / np.arange(1, len(squares) + 1)


# --- the study ----------------------------------------------------------------------------------------------------


def matrices(params: Any) -> dict[str, Float[np.ndarray, "m n"]]:
    """The weights of the linear layers, `(out, in)`."""
    leaves = flatten_dict(params, sep="/")
    return {n: np.asarray(a).T for n, a in leaves.items() if n.endswith("/kernel") and np.ndim(a) == 2}


def study(zoo: Opened) -> dict[str, Any]:
    """The row of a zoo."""
    base = matrices(zoo.zoo.base)
    own = {name: columns(weight) for name, weight in base.items()}
    deltas = {
        task: {name: weight - base[name].astype(np.float64) for name, weight in matrices(zoo.zoo.experts[task]).items()}
        for task in zoo.zoo.tasks
    }
    accuracies = {how: {task: judged(zoo, own, deltas[task], task, how) for task in deltas} for how in PROJECTIONS}
    accuracies["base"] = {task: zoo.accuracy(zoo.zoo.base, task) for task in deltas}
    return {
        "accuracies": accuracies,
        "layers": {name: of_layer(own[name], [each[name] for each in deltas.values()]) for name in base},
    }


def judged(
    zoo: Opened, own: Mapping[str, Columns], deltas: Mapping[str, Float[np.ndarray, "m n"]], task: str, how: str
) -> float:
    """The accuracy of an expert whose deltas are projected, on its own task."""
    leaves = flatten_dict(zoo.zoo.experts[task], sep="/")
    start = flatten_dict(zoo.zoo.base, sep="/")
    for name, delta in deltas.items():
        leaves[name] = (start[name] + projected(own[name], delta, how).T).astype(np.float32)
    return zoo.accuracy(unflatten_dict(leaves, sep="/"), task)


def of_layer(own: Columns, deltas: Sequence[Float[np.ndarray, "m n"]]) -> dict[str, Any]:
    """Sizes; energies by projection and by rank, means over experts; overlaps of inputs by gate, means over pairs."""
    energy = {
        how: float(np.mean([np.sum(projected(own, d, how) ** 2) / np.sum(d**2) for d in deltas])) for how in PROPER
    }
    triplets = [np.linalg.svd(delta, full_matrices=False) for delta in deltas]
    overlaps = np.mean([overlap(*pair) for pair in itertools.combinations([vt.T for *_, vt in triplets], 2)], axis=0)
    held = np.mean([np.cumsum(s**2) / np.sum(s**2) for _, s, _ in triplets], axis=0)
    gates = [2**power for power in range(12) if 2**power <= len(overlaps)]
    return {
        "shape": [len(own.u), len(own.v)], "k": own.k, "rank": own.r, "energy": energy,
        "chance": {how: chance(own, how) for how in energy},
        "overlap": {str(gate): float(overlaps[gate - 1]) for gate in gates},
        "held": {str(rank): float(held[rank - 1]) for rank in gates},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--zoos", nargs="+", default=["vision"], choices=ZOOS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--quick", action="store_true", help="a toy zoo, seconds")
    parser.add_argument("--table", action="store_true", help="no new rows")
    args = parser.parse_args()
    keep_compiled()
    file = args.output / "subspaces.jsonl"
    for name, seed in itertools.product([] if args.table else ["bars"] if args.quick else args.zoos, args.seeds):
        if not any((row["zoo"], row["seed"]) == (name, seed) for row in kept(file)):
            row = study(opened(name, seed))
            keep(file, {"zoo": name, "seed": seed, **row})
            print(
                name, seed, {how: round(float(np.mean([*own.values()])), 3) for how, own in row["accuracies"].items()}
            )
    rows = kept(file)
    write_tables(args.output / "subspaces.md", "Where in the base's weights fine-tuning happens", tables(rows))
    draw(args.output / "subspaces.png", rows)


if __name__ == "__main__":
    main()
