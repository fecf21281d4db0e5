"""The greedy matching of ZipIt! beside its authors' code: the time of one call on the same similarities.

    python benchmarks/align_zipit.py --peer DIR [--features 1000] [--models 2] [--rounds 3]

DIR holds the authors' `matching_functions.py` (github.com/gstoica27/ZipIt); it needs torch. What else it imports, and
the greedy matching does not use, need not be installed. Both run in turn on correlations of random features of few
dimensions, in float32, and ours also decides as theirs does, which is checked.
"""

import argparse
import importlib
import statistics
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cfmerge.align import match

UNUSED = {"networkx": (), "sklearn": (), "sklearn.cluster": ("AgglomerativeClustering", "KMeans")}


def authors_code(directory: Path) -> Any:
    """Their module; an empty one stands for each that it imports and that is not installed."""
    for name, members in UNUSED.items():
        try:
            importlib.import_module(name)
        except ImportError:
            sys.modules[name] = types.ModuleType(name)
            vars(sys.modules[name]).update(dict.fromkeys(members))
    sys.path.insert(0, str(directory))
    return importlib.import_module("matching_functions")


def correlation(features: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    rank = max(features // 8, 2)
    values = generator.normal(size=(2 * features, rank)) @ generator.normal(size=(rank, features))
    values += 0.1 * generator.normal(size=values.shape)
    return np.corrcoef(values.T).astype(np.float32)


def seconds(call: Callable[..., Any], *given: Any, **options: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call(*given, **options)
    return time.perf_counter() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--peer", type=Path, required=True)
    parser.add_argument("--features", type=int, nargs="+", default=[1000], help="of all models together")
    parser.add_argument("--models", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    theirs = authors_code(args.peer)
    import torch

    for features in args.features:
        rows = []
        for seed in range(args.rounds):
            given = correlation(features, seed)
            metric = {"cossim": torch.tensor(given)}
            ours, _ = seconds(match, given, args.models)
            peer, (_, unmerge) = seconds(theirs.match_tensors_zipit, metric, r=1 - 1 / args.models)
            compat, groups = seconds(match, given, args.models, compat="official")
            same = np.array_equal(groups.unmerge, unmerge.numpy())
            rows.append((ours, compat, peer))
            print(f"{features} features: {ours:.3f} s, as official {compat:.3f} s, authors' {peer:.3f} s, same {same}")
        ratio = statistics.median(peer / ours for ours, _, peer in rows)
        print(f"{features} features: ours takes 1/{ratio:.0f} of the authors' time")


if __name__ == "__main__":
    main()
