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
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from threadpoolctl import threadpool_limits

import cfmerge
from cfmerge import CfmergeError, methods

STEPS = 300  # of Adam, as published
SMALL = 10_000_000  # entries, below which a first call of each is not counted
SHAPES = {  # canonical, (out, in)
    "gpt2": {"c_attn": (2304, 768), "c_proj": (768, 768), "c_fc": (3072, 768), "mlp.c_proj": (768, 3072)},
    "one": {"mlp.c_proj": (768, 3072)},
    "large": {"gate": (4096, 11008)},
    "quick": {"tall": (98, 49), "square": (64, 64), "wide": (49, 98)},
}


class Case(NamedTuple):
    """A method of ours and the function that is the same method.

    Attributes:
        ours, peer: an expression for `methods.make`, with `{steps}` where the peer's are given too; a name of
            methods_peers.py.
        aim: how many times faster we mean to be: 5 where theirs is a Python loop or full SVDs, else 1.
        tolerance: of the largest difference in float32, relative to the largest entry of theirs; None: another
            solution of the same loss, so that the losses are compared.
        double: the same in float64, where theirs can compute in it.
        iterates: theirs takes steps: a few are measured, and scaled up to `STEPS`.
        moments: what is measured of each expert: "gram", "fisher" or nothing.
        same: for which shapes, and of how many experts, theirs is the same method, and `where`, in words.
    """

    ours: str
    peer: str
    aim: int = 1
    tolerance: float | None = 1e-3
    double: float | None = 1e-8
    iterates: bool = False
    moments: str = ""
    same: Callable[[tuple[int, int], int], bool] = lambda shape, experts: True
    where: str = ""


CASES = (
    Case("wudi", "fusion_bench_wudi", aim=50, tolerance=None, iterates=True),
    Case("wudi_adam(steps={steps})", "fusion_bench_wudi", aim=5, double=1e-6, iterates=True),
    Case("swudi", "authors_swudi", double=None),
    Case("aswudi", "authors_aswudi", double=None),
    Case("optmerge", "authors_optmerge", aim=5, tolerance=None),
    Case("actmat", "authors_actmat", aim=5, tolerance=5e-2),
    Case("tact", "authors_tact", aim=5, tolerance=5e-2),
    Case("regmean(a=0.9)", "fusion_bench_regmean", double=1e-6, moments="gram"),  # theirs: 1 - 0.9 in float32
    Case("fisher(floor=1e-6, below='add')", "fusion_bench_fisher", moments="fisher"),
    Case("tsv_m", "fusion_bench_tsv_m", aim=5),
    Case("tsv_m", "authors_tsv_m", aim=5),
    Case("iso_c", "fusion_bench_iso_c", aim=5),
    Case("iso_c", "authors_iso_c", aim=5),
    Case("iso_cts", "fusion_bench_iso_cts", aim=5),
    Case("iso_cts", "authors_iso_cts", aim=5),
    Case(
        "dc_merge",
        "authors_dc_merge",
        aim=5,
        # else they keep 0.1 % of a core that they have padded with zeros
        same=lambda shape, experts: min(shape) % experts == 0,
        where="where min(out, in) is a multiple of the experts",
    ),
    Case("cart", "authors_cart", aim=5),
    Case("opcm", "fusion_bench_opcm", aim=5, tolerance=5e-2),  # sees single vectors: ill-conditioned
    Case("star >> average", "authors_star", aim=5),
    Case("task_arithmetic(scale=0.4) >> svc(alpha=1.0)", "fusion_bench_svc", aim=5),
    Case(
        "orthomerge(residual=task_arithmetic(scale=0.2))",
        "authors_orthomerge",
        aim=5,
        double=None,
        same=lambda shape, experts: shape[0] >= shape[1],  # else the base has no say in some of the inputs' rotation
        where="where out >= in",
    ),
)
WITHOUT = ("ace", "anchored", "power", "cauchy_poe", "two_sided", "subspace_boosting")  # no public code to run beside


# --- the tensors --------------------------------------------------------------------------------------------------


def grid(values: np.ndarray) -> np.ndarray:
    """Multiples of 2^-26, so that base + delta and expert - base are exact below 1/4, in float32 as in float64."""
    return (np.round(values * 2.0**26) / 2.0**26).astype(np.float32)


def make(directory: Path, shape: tuple[int, int], seed: int, moments: str, experts: int) -> None:
    """A base, and deltas of a falling spectrum that they share in part, over small noise of full rank."""
    (m, n), k = shape, max(4, min(64, min(shape) // 4))
    rng = np.random.default_rng(seed)
    fall = np.arange(1, k + 1, dtype=np.float32) ** -0.7

    def low_rank() -> np.ndarray:
        product = (rng.standard_normal((m, k), np.float32) * fall) @ rng.standard_normal((k, n), np.float32)
        return product / product.std()

    directory.mkdir(parents=True, exist_ok=True)
    if not (directory / "base.npy").exists():
        np.save(directory / "base.npy", grid(np.clip(0.02 * rng.standard_normal((m, n), np.float32), -0.2, 0.2)))
        shared = low_rank()
        for number in range(experts):
            noise = rng.standard_normal((m, n), np.float32)
            np.save(directory / f"delta_{number}.npy", grid(1e-3 * (0.5 * shared + low_rank() + 0.3 * noise)))
    rng = np.random.default_rng(seed + 1)
    for number in range(experts):
        path = directory / f"{moments}_{number}.npy"
        if moments == "gram" and not path.exists():
            rows = rng.standard_normal((2 * n, n), np.float32) * np.exp(rng.standard_normal(n, np.float32))
            np.save(path, rows.T @ rows / np.float32(2 * n))
        elif moments == "fisher" and not path.exists():
            np.save(path, 1e-3 * rng.standard_normal((m, n), np.float32) ** 2)


class Arrays(NamedTuple):
    """Of one tensor."""

    base: np.ndarray
    deltas: list[np.ndarray]
    moments: list[np.ndarray] | None

    @classmethod
    def load(cls, directory: Path, moments: str, dtype: Any, experts: int) -> "Arrays":
        def read(name: str) -> np.ndarray:
            return np.load(directory / f"{name}.npy").astype(dtype)

        numbers = range(experts)
        measured = [read(f"{moments}_{number}") for number in numbers] if moments else None
        return cls(read("base"), [read(f"delta_{number}") for number in numbers], measured)


# --- the two sides ------------------------------------------------------------------------------------------------


class Ours:
    """`merge_tensor` with a method, compiled; only calls are timed."""

    def __init__(self, text: str, arrays: Arrays) -> None:
        method = methods.make(text)
        self.base = arrays.base
        self.inputs = jax.tree.map(
            jnp.asarray, (arrays.base, [arrays.base + delta for delta in arrays.deltas], arrays.moments)
        )
        started = time.perf_counter()
        merge = jax.jit(lambda base, experts, moments: cfmerge.merge_tensor(base, experts, method, moments=moments))
        self.merge = merge.lower(*self.inputs).compile()
        self.compilation = time.perf_counter() - started

    def __call__(self) -> tuple[float, np.ndarray]:
        started = time.perf_counter()
        merged = jax.block_until_ready(self.merge(*self.inputs))
        seconds = time.perf_counter() - started
        return seconds, np.asarray(merged, np.float64) - self.base


class PeerError(Exception):
    """What the peer raised."""


class Theirs:
    """A worker process, see methods_peers.py."""

    def __init__(self, python: str, peer: str, clones: str, limit: float, threads: int | None) -> None:
        script = Path(__file__).with_name("methods_peers.py")
        environment = {key: value for key, value in os.environ.items() if not key.endswith("_NUM_THREADS")}
        environment |= {"CUDA_VISIBLE_DEVICES": ""} | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
        self.limit, self.late = limit, False
        self.process = subprocess.Popen(
            [python, str(script), peer, clones],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
        )  # fmt: skip

    def ask(self, **request: Any) -> dict[str, Any]:
        """The worker's answer; after the time limit, that limit, then and ever after."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        timer = threading.Timer(self.limit, self._stop)
        timer.start()
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if self.late:
            return {"seconds": self.limit}
        if not line:
            raise PeerError(f"the worker ended with {self.process.wait()}; out of memory?")
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer

    def __call__(self, steps: int, save: Path | None = None) -> float:
        return self.ask(do="run", steps=steps, save=str(save) if save else None)["seconds"]

    def _stop(self) -> None:
        self.late = True
        self.process.kill()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


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
                continue
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
        notes.append(f"theirs was stopped after {options.limit:.0f} s")
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
    with tempfile.TemporaryDirectory() as temporary, threadpool_limits(1, user_api="blas"):
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
