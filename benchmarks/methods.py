"""Every least-squares and spectral method beside fusion_bench's and the authors' own code of the same method.

    python benchmarks/methods.py --quick
    python benchmarks/methods.py --shapes gpt2 --rounds 3 --json gpt2.json
    python benchmarks/methods.py --shapes large --experts 2 --rounds 1 --time-limit 600 --json large.json

The peers run in an environment of their own, `--python` (or PEERS_PYTHON), with `pip install torch fusion-bench`; the
authors' repositories are folders in `--clones` (or PEERS_CLONES): actmat, CART, DC-Merge, iso-merging, MLLMerging,
OrthoMerge, STAR, task_singular_vectors. Both sides have the same arrays in memory; calls are made in turn, matrix by
matrix, and ratios are taken round by round, over all matrices of the set. cfmerge's compilation is told apart. BLAS
threads are one on cfmerge's side, as in a merge (XLA has its own threads); torch keeps its default.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from measuring import blas_threads
from methods_cases import CASES, STEPS, WITHOUT, Case
from methods_sides import Arrays, Ours, PeerError, Theirs, make

from cfmerge import CfmergeError, methods

SMALL = 10_000_000  # entries, below which a first call of each is not counted
SHAPES = {  # canonical, (out, in)
    "gpt2": {"c_attn": (2304, 768), "c_proj": (768, 768), "c_fc": (3072, 768), "mlp.c_proj": (768, 3072)},
    "one": {"mlp.c_proj": (768, 3072)},
    "large": {"gate": (4096, 11008)},
    "quick": {"tall": (98, 49), "square": (64, 64), "wide": (49, 98)},
}


# --- measuring ----------------------------------------------------------------------------------------------------


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs)))


def loss(x: np.ndarray, deltas: Sequence[np.ndarray]) -> float:
    """WUDI's."""
    return sum(float(np.linalg.norm((x - d) @ d.T.astype(np.float64)) ** 2 / np.linalg.norm(d) ** 2) for d in deltas)


class Options(NamedTuple):
    """What the command line gave."""

    python: str
    clones: str
    rounds: int
    limit: float
    threads: int | None
    steps: int
    experts: int
    whole: bool  # all steps are taken, none scaled; and float64 is compared too


def timed(ours: dict[int, Ours], theirs: Theirs, counts: Sequence[int], turn: int, out: Path) -> dict[str, Any]:
    """One call of each (of two counts of steps where they are scaled), the first of them in turn."""
    found: dict[str, Any] = {}

    def of_ours() -> None:
        found["ours"], found["merged"] = scaled(lambda steps: ours[steps](), list(ours))

    def of_theirs() -> None:
        found["theirs"], _ = scaled(lambda steps: (theirs(steps, out), None), counts)

    for side in (of_ours, of_theirs) if turn % 2 == 0 else (of_theirs, of_ours):
        side()
    return found


def scaled(call: Callable[[int], tuple[float, Any]], counts: Sequence[int]) -> tuple[float, Any]:
    """The seconds of `STEPS` steps, by the cost of one of them if there are two counts, and the last call's result."""
    seconds, result = call(counts[0])
    if len(counts) == 1:
        return seconds, result
    few, many = counts
    longer, result = call(many)
    return seconds + (STEPS - few) * max(longer - seconds, 0) / (many - few), result


def measure(case: Case, shapes: dict[str, tuple[int, int]], directory: Path, options: Options) -> dict[str, Any]:
    """Seconds and differences of one case, over all tensors of the set; what went wrong, if something did."""
    row: dict[str, Any] = {"method": case.ours, "peer": case.peer, "aim": case.aim, "tensors": {}}
    counts = [1, 1 + options.steps] if case.iterates and not options.whole else [STEPS]
    theirs = Theirs(options.python, case.peer, options.clones, options.limit, options.threads)
    try:
        for seed, (name, shape) in enumerate(shapes.items()):
            tensor = row["tensors"][name] = {"shape": shape, "compilation": 0.0, "ours": [], "theirs": []}
            make(directory / name, shape, 10 * seed, case.moments, options.experts)
            arrays = Arrays.load(directory / name, case.moments, np.float32, options.experts)
            texts = {case.ours.format(steps=count): count for count in counts}
            ours = {count: Ours(text, arrays) for text, count in texts.items()}
            tensor["compilation"] = ours[max(ours)].compilation
            given = {"do": "load", "directory": str(directory / name)}
            given |= {"experts": options.experts, "moments": case.moments}
            theirs.ask(**given, double=False)
            out = directory / name / "theirs.npy"
            if np.prod(shape) < SMALL:
                theirs(counts[0])
                ours[min(ours)]()
            for turn in range(options.rounds):
                found = timed(ours, theirs, counts, turn, out)
                tensor["ours"].append(found["ours"])
                tensor["theirs"].append(found["theirs"])
            if theirs.late:
                break  # it runs no more
            merged, other = found["merged"], np.load(out).astype(np.float64)
            tensor["same"] = case.same(shape, options.experts)
            if case.tolerance is None:
                tensor["loss"] = loss(merged, arrays.deltas) / loss(other, arrays.deltas)
            else:
                tensor["difference"] = difference(merged, other)
                if options.whole and case.double:
                    tensor["double"] = in_double(case, directory / name, theirs, given, out)
    except PeerError as error:
        row["failed"] = str(error)
    finally:
        row["late"] = theirs.late
        theirs.close()
    return row


def in_double(case: Case, directory: Path, theirs: Theirs, given: dict[str, Any], out: Path) -> float:
    """The difference of both in float64."""
    with jax.enable_x64(True):
        ours = Ours(case.ours.format(steps=STEPS), Arrays.load(directory, case.moments, np.float64, given["experts"]))
        theirs.ask(**given | {"double": True})
        theirs(STEPS, out)
        return difference(ours()[1], np.load(out).astype(np.float64))


# --- telling ------------------------------------------------------------------------------------------------------

HEAD = "| method | beside | cfmerge s | theirs s | cfmerge / theirs | aim | difference | float64 | compilation s | |"


def summed(row: dict[str, Any], side: str) -> list[float]:
    """Seconds round by round, over all tensors."""
    return [sum(times) for times in zip(*(tensor[side] for tensor in row["tensors"].values()), strict=True)]


def line(case: Case, row: dict[str, Any], options: Options) -> str:
    """A row of the table."""
    tensors = row["tensors"].values()
    method, compilation = case.ours.format(steps=STEPS), sum(tensor["compilation"] for tensor in tensors)
    if "failed" in row:
        return f"| `{method}` | {case.peer} | | | | | | | {compilation:.1f} | {row['failed']} |"
    ours, theirs = summed(row, "ours"), summed(row, "theirs")
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    row["ratio"], notes = statistics.median(ratios), []
    row["met"] = row["ratio"] <= 1 / case.aim
    differences = [tensor["difference"] for tensor in tensors if "difference" in tensor and tensor["same"]]
    doubles = [tensor["double"] for tensor in tensors if "double" in tensor and tensor["same"]]
    told, double = "", ""
    if differences:
        told = f"{max(differences):.0e}" + ("" if max(differences) <= (case.tolerance or 0) else " (!)")
    if doubles:
        double = f"{max(doubles):.0e}" + ("" if max(doubles) <= (case.double or 0) else " (!)")
    if case.tolerance is None:
        spread = [tensor["loss"] for tensor in tensors if "loss" in tensor]
        notes += [f"loss / theirs {min(spread):.3g} to {max(spread):.3g}"] if spread else []
    if case.iterates and not options.whole:
        both = " on both sides" if "{steps}" in case.ours else ""
        notes.append(f"theirs is scaled to {STEPS} steps from 1 and {1 + options.steps}{both}")
        if case.tolerance is None:
            notes.append(f"loss after {1 + options.steps} of their steps")
    if row["late"]:
        *_, last = row["tensors"]
        notes.append(f"theirs was stopped after {options.limit:.0f} s, on {last}, and nothing was run after that")
    if not all(tensor.get("same", True) for tensor in tensors):
        notes.append(f"compared {case.where}")
    return (
        f"| `{method}` | {case.peer} | {statistics.median(ours):.3g} | {statistics.median(theirs):.3g} "
        f"| **{'< ' if row['late'] else ''}{row['ratio']:.3g}** ({min(ratios):.3g} .. {max(ratios):.3g}) "
        f"| {'met' if row['met'] else 'missed'} (1/{case.aim}) | {told} | {double} | {compilation:.1f} "
        f"| {'; '.join(notes)} |"
    )


def chosen(names: Sequence[str] | None) -> list[Case]:
    """The cases that are asked for, and whose method exists."""
    found = []
    for case in CASES:
        if names and not any(name in case.ours or name == case.peer for name in names):
            continue
        try:
            methods.make(case.ours.format(steps=STEPS))
            found.append(case)
        except CfmergeError as error:
            print(f"left out: {case.ours}: {error}", file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shapes", choices=list(SHAPES), default="gpt2")
    parser.add_argument("--quick", action="store_true", help="small shapes, one round, all steps, float64 besides")
    parser.add_argument("--methods", nargs="*", help="parts of a method's text, or whole names of peers")
    parser.add_argument("--experts", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="of Adam that are measured, beyond the first")
    parser.add_argument("--time-limit", type=float, default=900, help="seconds for one call of a peer")
    parser.add_argument("--threads", type=int, help="of the peers; none: torch's default")
    parser.add_argument("--python", default=os.environ.get("PEERS_PYTHON", "python"))
    parser.add_argument("--clones", default=os.environ.get("PEERS_CLONES", "."))
    parser.add_argument("--directory", type=Path, help="for the tensors; none: a temporary one")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    shapes, rounds = SHAPES["quick" if args.quick else args.shapes], 1 if args.quick else args.rounds
    options = Options(
        args.python, args.clones, rounds, args.time_limit, args.threads, args.steps, args.experts, args.quick
    )
    rows = []
    with tempfile.TemporaryDirectory() as temporary, blas_threads(1):
        directory = (args.directory or Path(temporary)) / ("quick" if args.quick else args.shapes)
        print(f"{args.experts} experts, {', '.join(f'{name} {m} x {n}' for name, (m, n) in shapes.items())}\n")
        print(HEAD, "|---" * 10 + "|", sep="\n", flush=True)
        for case in chosen(args.methods):
            rows.append(measure(case, shapes, directory, options))
            print(line(case, rows[-1], options), flush=True)
            if args.json:
                args.json.write_text(json.dumps(rows, indent=1))
    print(f"\nNo public code was found to run beside {', '.join(WITHOUT)}.")


if __name__ == "__main__":
    main()
