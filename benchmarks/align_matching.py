"""Measures weight matching of a transformer beside the authors' JAX code: seconds of a whole search.

    python benchmarks/align_matching.py                         # ours alone
    python benchmarks/align_matching.py --peer DIR --rounds 3   # beside `weight_matching.py` of samuela/git-re-basin

Two models of random weights (`--same SHARE` of b's is a permuted a), in memory, in float32. Both sides have the same
spaces: the residual stream, the MLPs' neurons, and the heads, with queries, keys, values and outputs stored as
(heads, 64, width), for the authors' code permutes whole axes. It starts from the identity, and ours from the weights of
known spaces (`--start identity`: from there too). Both run in this process, in turn, compiled beforehand on one layer.
DIR holds the authors' `src`.
"""

import argparse
import json
import sys
import time
import types
from pathlib import Path

import jax
import numpy as np

from cfmerge.align import identity, parse_spaces, permute, random_permutations, weight_matching


def table_of(layers: int, width: int, hidden: int, heads: int, vocabulary: int) -> dict[str, tuple[tuple, str]]:
    """`{tensor: (shape, its axes)}` of a transformer without positions."""
    each = width // heads
    table = {"embed": ((vocabulary, width), "-, h"), "norm": ((width,), "h")}
    for layer in range(layers):
        attention, neurons = f"heads{layer}", f"mlp{layer}"
        for name in "qkv":
            table[f"{layer}.{name}"] = ((heads, each, width), f"{attention}, -, in h")
        table[f"{layer}.o"] = ((width, heads, each), f"h, in {attention}, in -")
        table[f"{layer}.up"] = ((hidden, width), f"{neurons}, in h")
        table[f"{layer}.up_bias"] = ((hidden,), neurons)
        table[f"{layer}.down"] = ((width, hidden), f"h, in {neurons}")
        table[f"{layer}.norm1"] = table[f"{layer}.norm2"] = ((width,), "h")
    return table


def models_of(table: dict, spaces: object, same: float) -> tuple[dict, dict]:
    generator = np.random.default_rng(0)

    def drawn() -> dict[str, np.ndarray]:
        return {name: generator.standard_normal(shape, np.float32) * np.float32(0.02)
                for name, (shape, _) in table.items()}  # fmt: skip

    a, other = drawn(), drawn()
    copy = permute(spaces, a, random_permutations(spaces, 1))
    share, rest = np.float32(same), np.float32((1 - same**2) ** 0.5)
    return a, {name: share * copy[name] + rest * other[name] for name in table}


def peer_of(directory: Path, table: dict) -> tuple:
    """The authors' function and their description of the same spaces."""
    utils = types.ModuleType("utils")  # theirs imports what JAX has no more; this is all that they need of it
    utils.rngmix = lambda key, number: jax.random.fold_in(key, hash(number))
    sys.modules["utils"] = utils
    sys.path.insert(0, str(directory))
    import weight_matching as authors

    axes = {name: tuple(None if axis.split()[-1] == "-" else axis.split()[-1] for axis in text.split(","))
            for name, (_, text) in table.items()}  # fmt: skip
    return authors.weight_matching, authors.permutation_spec_from_axes_to_perm(axes)


def inner(a: dict, b: dict) -> float:
    return sum(float(np.vdot(a[name], b[name])) for name in a)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, help="directory of the authors' weight_matching.py")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--hidden", type=int, default=3072)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=30522)
    parser.add_argument("--same", type=float, default=0.0, help="how much of b is a permuted copy of a")
    parser.add_argument("--start", choices=["known", "identity"], default="known")
    parser.add_argument("--sweeps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("-o", type=Path, help="a file of the figures, JSON")
    options = parser.parse_args()

    def sides(layers: int, vocabulary: int) -> tuple:
        table = table_of(layers, options.width, options.hidden, options.heads, vocabulary)
        spaces = parse_spaces({name: text for name, (_, text) in table.items()},
                              {name: shape for name, (shape, _) in table.items()})  # fmt: skip
        a, b = models_of(table, spaces, options.same)

        def ours() -> tuple[float, int]:
            start = identity(spaces) if options.start == "identity" else None
            found = weight_matching(spaces, a, b, sweeps=options.sweeps, start=start, restarts=0)
            return found.objective, found.sweeps

        def theirs() -> tuple[float, int]:
            function, spec = peer_of(options.peer, table)
            on_device = [{name: jax.numpy.asarray(array) for name, array in side.items()} for side in (a, b)]
            found = function(jax.random.PRNGKey(0), spec, *on_device, max_iter=options.sweeps, silent=True)
            return inner(a, permute(spaces, b, {name: np.asarray(p) for name, p in found.items()})), -1

        parameters = sum(array.size for array in a.values())
        return parameters, {"ours": ours, **({"authors": theirs} if options.peer else {})}

    for run in sides(1, options.vocabulary)[1].values():
        run()
    parameters, runs = sides(options.layers, options.vocabulary)
    print(f"{parameters / 1e6:.0f}M parameters")
    rows: list[dict] = []
    for number in range(options.rounds):
        for name, run in runs.items():
            begun, worked = time.perf_counter(), time.process_time()
            objective, sweeps = run()
            rows.append({"round": number, "side": name, "seconds": time.perf_counter() - begun,
                         "processor": time.process_time() - worked,
                         "objective": objective, "sweeps": sweeps})  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
    if options.o:
        options.o.write_text(json.dumps({"parameters": parameters, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
