"""Whether every method gives what it gave before: this checkout against another environment or commit.

    git worktree add BEFORE 36bd03a
    python benchmarks/same_results.py --against PYTHON --pythonpath BEFORE

All registered methods and some chains merge (a) a small pytree in float64, and methods and transforms (chained with
`average`) merge (b) a tiny model on disk, computed in float64 and written in float32; some of them with a convolution,
stacked layers and embeddings too. Once with this checkout, once with the other cfmerge, each in a process of its own.
For every method the largest difference of a tensor is told, relative to the norm of its merged delta; more than 1e-6
anywhere fails. A method that is new here is told, one that is gone fails.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import numpy as np

BOUND = 1e-6
ROOT = Path(__file__).resolve().parents[1]

# What a method needs besides three experts and weights.
EXPERTS = {"arcee_fusion": 1, "expo": 1, "nearswap": 1, "nuslerp": 2, "slerp": 2}
MOMENTS = {"fisher": "fisher", "lot": "gram", "regmean": "gram"}
UNWEIGHTED = {
    "arcee_fusion", "expo", "metagpt", "model_stock", "nearswap", "opcm", "ram", "ram_plus", "random_expert", "sce",
    "slerp",
}  # fmt: skip
BEHIND = {"half_flatten", "larv", "lines", "subspace_boosting", "svc"}  # transforms that stand behind a method
ARGUMENTS = {
    "drop": "p=0.5",
    "trim": "density=0.5",
    "low_rank": "rank=2",
    "nearswap": "t=0.05",
    "wudi_adam": "steps=40",
}
CHAINS = (
    "trim(density=0.2) >> disjoint_mean >> scale(0.5)",
    "trim(density=0.5) >> ace",
    "low_rank(rank=2) >> ace(form='full')",
    "ace >> lines",
    "task_arithmetic(scale=0.4) >> lines >> scale(0.9)",
    "anchored(towards=ace)",
    "anchored(towards=iso_c, ridge=None)",
    "ace(eps=0.0001, form='full')",
    "ace(gate='log_variance', tau=0.05)",
    "ace(zero_delta='keep')",
    "actmat(ridge=0.01)",
    "power(exponent=1.0, normalise='none')",
    "regmean(a=0.5, ridge=0.1)",
    "fisher(normalise=True)",
    "iso_cts >> svc",
    "outliers >> drop(p=0.3) >> task_arithmetic(scale=0.5)",
)
LISTED = (  # numbers that differ by expert, depth and name
    "drop(p=[0.2, 0.5, 0.8]) >> average",
    "trim(density=[0.9, 0.5, 0.2]) >> disjoint_mean",
    "task_arithmetic(scale={'gradient': [0.1, 1.0]})",
    "ace(eps_rel={'gradient': [0.01, 0.5]})",
    "scale(factor=[{'match': '*layers*1*', 'value': 0.5}, {'value': 1.0}]) >> average",
)

ON_DISK = ("trim(density=0.2) >> disjoint_mean >> scale(0.5)", "anchored(towards=ace)", *LISTED[2:])  # beside methods
WHOLE = {  # methods that merge the whole models; the others merge the tensors in THIN alone, to save compilations
    "ace", "actmat", "average", "dare_ties", "fisher", "iso_c", "regmean", "ties", *ON_DISK,
}  # fmt: skip
THIN = ("layers/0/dense", "layers/1/dense/kernel", "mlp", "layers.1.input_layernorm")

# --- the models: layer 1's experts differ in size, so that ACE's gate falls to either side -----------------------

TREE = {
    "embed/embedding": (10, 8), "layers/0/dense/kernel": (8, 12), "layers/1/dense/kernel": (8, 12),
    "layers/0/dense/bias": (12,), "layers/1/dense/bias": (12,), "blocks/scanned/kernel": (2, 8, 12),
}  # fmt: skip
DISK = {
    "model.embed_tokens.weight": (12, 8),
    "model.vision.filters.weight": (6, 3, 2, 2),
    "model.scanned.weight": (2, 12, 8),
    **{
        f"model.layers.{layer}.{name}": shape
        for layer in range(2)
        for name, shape in {
            "mlp.up_proj.weight": (12, 8), "mlp.down_proj.weight": (8, 12), "input_layernorm.weight": (8,),
        }.items()
    },
    "model.norm.weight": (8,),
    "lm_head.weight": (12, 8),
}  # fmt: skip
RULES = [
    {"match": "blocks/scanned/kernel", "layout": "bio"},
    {"match": "model.scanned.weight", "layout": "boi"},
]


def tensors(shapes: dict[str, tuple[int, ...]], number: int) -> dict[str, np.ndarray]:
    """The base for 0, experts for 1, 2, ...: a decaying spectrum of each one's own, and noise."""
    common, own = np.random.default_rng(0), np.random.default_rng(number)
    made = {}
    for name, shape in shapes.items():
        base = common.standard_normal(shape)
        change = own.standard_normal(shape)
        if len(shape) > 1:
            rows, columns = np.prod(shape[:-1], dtype=int), shape[-1]
            low = own.standard_normal((rows, 3)) * [3.0, 2.0, 1.0] @ own.standard_normal((3, columns))
            change = change + low.reshape(shape)
        size = [0.1, 0.3, 0.02][number - 1] if "1" in name else 0.1
        made[name] = base + (size * change if number else 0)
    return made


def moments(shapes: dict[str, tuple[int, ...]], number: int, kind: str) -> dict[str, np.ndarray]:
    """The diagonal Fishers, or the input Grams of all that has a layout."""
    rng = np.random.default_rng(100 + number)
    if kind == "fisher":
        return {name: rng.random(shape) + 0.01 for name, shape in shapes.items()}
    found = {}
    for name, shape in shapes.items():
        if len(shape) > 1:
            inputs = shape[-2] if name.endswith("kernel") else int(np.prod(shape[1:])) if len(shape) == 4 else shape[-1]
            samples = rng.standard_normal((*shape[: len(shape) == 3], 5 * inputs, inputs))
            found[name] = np.swapaxes(samples, -1, -2) @ samples / (5 * inputs)
    return found


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *folders, last = name.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[last] = value
    return tree


def flattened(tree: Any, prefix: str = "") -> dict[str, np.ndarray]:
    if not isinstance(tree, dict):
        return {prefix: np.asarray(tree)}
    return {k: v for key, item in tree.items() for k, v in flattened(item, f"{prefix}/{key}".lstrip("/")).items()}


# --- one side: runs with whatever cfmerge its interpreter finds, by calls that both sides have ---------------------


def texts(registered: Any) -> list[str]:
    """An expression for every registered method and transform, then the chains."""
    found = []
    for name in registered:
        text = f"{name}({ARGUMENTS[name]})" if name in ARGUMENTS else name
        if registered[name].kind == "transform":
            text = f"average >> {text}" if name in BEHIND else f"{text} >> average"
        found.append(text)
    return [*found, *CHAINS, *LISTED]


def first_known(text: str, table: Any, default: Any) -> Any:
    """The table's entry of the first of its names that the expression is made of."""
    words = text.replace("(", " ").replace("=", " ").replace(",", " ").replace(")", " ").split()
    return next((table[word] for word in words if word in table), default)


def cases(registered: Any) -> list[tuple[str, str]]:
    """`(place, expression)`: methods in memory and on disk, transforms and most chains in either."""
    found = []
    for text in texts(registered):
        chained = ">>" in text and text not in CHAINS + LISTED
        if not chained:
            found.append(("memory", text))
        if text not in CHAINS + LISTED or text in ON_DISK:
            found.append(("disk", text))
    return found


def chosen(flat: dict[str, Any], text: str) -> dict[str, Any]:
    """The tensors that this case merges."""
    whole = text in WHOLE
    return {name: value for name, value in flat.items() if whole or any(part in name for part in THIN)}


def work(directory: Path, only: list[str] | None) -> None:
    """Writes `{case}: {tensor: merged}` of both models, and how long each case took."""
    import jax
    from safetensors.numpy import load_file, save_file

    import cfmerge

    warnings.simplefilter("ignore")
    root = Path(tempfile.mkdtemp(dir=directory))
    for size, text in (("whole", "ace"), ("thin", "")):
        for number in range(4):
            measured = {kind: moments(DISK, number, kind) for kind in ("fisher", "gram")}
            for what, flat in {"model": tensors(DISK, number), **measured}.items():
                cast = {name: value.astype(np.float32) for name, value in chosen(flat, text).items()}
                save_file(cast, root / f"{size}-{what}{number}.safetensors")

    def in_memory(text: str, count: int, kind: str | None) -> dict[str, np.ndarray]:
        with jax.enable_x64(True):
            base, *experts = (nested(chosen(tensors(TREE, number), text)) for number in range(count + 1))
            given = [chosen(moments(TREE, number, kind), text) for number in range(1, count + 1)] if kind else None
            method = cfmerge.methods.make(text)
            rules = RULES[:1] if text in WHOLE else []
            return flattened(cfmerge.merge_params(base, experts, method, rules=rules, moments=given, seed=3))

    def on_disk(text: str, count: int, kind: str | None) -> dict[str, np.ndarray]:
        size, rules = ("whole", RULES[1:]) if text in WHOLE else ("thin", [])
        weights = [1.0, 0.5, 2.0] if first_known(text, dict.fromkeys(UNWEIGHTED, False), True) else [1.0] * 3

        def path(what: str, number: int) -> str:
            return str(root / f"{size}-{what}{number}.safetensors")

        experts = [
            cfmerge.Expert(
                path=path("model", number),
                name=f"expert{number}",
                weight=weight,
                moments=path(kind, number) if kind else "",
            )
            for number, weight in zip(range(1, count + 1), weights, strict=False)
        ]
        fixed = {"dtype": "float32", "precision": "float64", "allow": ["one-expert"], "seed": 3}
        output = root / "merged"
        result = cfmerge.merge(path("model", 0), experts, text, output=output, overwrite=True, rules=rules, **fixed)
        files = [result.output] if result.output.is_file() else sorted(result.output.glob("*.safetensors"))
        return {name: value for file in files for name, value in load_file(file).items()}

    arrays, told = {}, {}
    for place, text in cases(cfmerge.methods.registry()):
        if only and not any(word in text for word in only):
            continue
        count, kind = first_known(text, EXPERTS, 3), first_known(text, MOMENTS, None)
        case, started = f"{place}: {text}", time.monotonic()
        try:
            merged = (in_memory if place == "memory" else on_disk)(text, count, kind)
            told[case] = {"tensors": list(merged), "seconds": time.monotonic() - started}
            arrays |= {f"{case}: {name}": value for name, value in merged.items()}
        except Exception as error:
            told[case] = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
        jax.clear_caches()  # thousands of small compilations would fill the memory
    about = {"cfmerge": str(Path(cfmerge.__file__).parent), "jax": jax.__version__, "cases": told}
    np.savez(directory / "arrays.npz", **arrays)
    (directory / "told.json").write_text(json.dumps(about))


# --- both sides ----------------------------------------------------------------------------------------------------


def side(
    python: str, path: Path | None, directory: Path, args: argparse.Namespace
) -> tuple[dict[str, Any], Any, float]:
    """What a side told, its arrays, and its seconds."""
    directory.mkdir()
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
    environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(directory.parent / "compiled"))
    environment |= {
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    if not args.optimised:
        environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    environment.pop("PYTHONPATH", None)
    if path:
        environment["PYTHONPATH"] = str(path)
    command = [python, __file__, "--work", str(directory), *(["--only", *args.only] if args.only else [])]
    started = time.monotonic()
    subprocess.run(command, env=environment, check=True)
    seconds = time.monotonic() - started
    return json.loads((directory / "told.json").read_text()), np.load(directory / "arrays.npz"), seconds


def difference(case: str, names: list[str], ours: Any, theirs: Any) -> float:
    """The largest over the tensors, relative to the merged delta (to a thousandth of an expert's, if that is more)."""
    shapes = TREE if case.startswith("memory") else DISK
    base, expert, worst = tensors(shapes, 0), tensors(shapes, 1), 0.0
    for name in names:
        a, b = (np.asarray(arrays[f"{case}: {name}"], np.float64) for arrays in (ours, theirs))
        if a.shape != b.shape:
            return float("inf")
        apart = float(np.linalg.norm(a - b))
        delta = max(np.linalg.norm(b - base[name]), 1e-3 * np.linalg.norm(expert[name] - base[name]))
        worst = max(worst, apart / delta if np.isfinite(apart) else float("inf"))
    return worst


def verdict(case: str, ours: tuple[Any, Any], theirs: tuple[Any, Any]) -> tuple[float, str]:
    """The difference, or infinity and why there is none."""
    own, other = (told["cases"].get(case) for told, _ in (ours, theirs))
    if own is None:
        return float("inf"), "is gone here"
    if other is None:
        return 0.0, "is new here"
    for who, one in (("here", own), ("there", other)):
        if "error" in one:
            return float("inf"), f"fails {who}: {one['error'].splitlines()[0]}"
    if set(own["tensors"]) != set(other["tensors"]):
        return float("inf"), f"other tensors: {sorted(set(own['tensors']) ^ set(other['tensors']))}"
    return difference(case, own["tensors"], ours[1], theirs[1]), ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--against", metavar="PYTHON", help="the interpreter of the other environment")
    parser.add_argument("--pythonpath", type=Path, metavar="DIR", help="where it finds its cfmerge, if not installed")
    parser.add_argument("--only", nargs="*", metavar="WORD", help="only expressions that contain one of these")
    parser.add_argument("--optimised", action="store_true", help="compile as users do (several times slower)")
    parser.add_argument("--verbose", action="store_true", help="every case, and the traces of those that fail")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return work(args.work, args.only)
    if not args.against:
        parser.error("--against PYTHON: what to compare with")
    with tempfile.TemporaryDirectory(prefix="same-results-") as folder:
        ours, our_arrays, our_seconds = side(sys.executable, ROOT, Path(folder) / "ours", args)
        theirs, their_arrays, their_seconds = side(args.against, args.pythonpath, Path(folder) / "theirs", args)
        cases = list(dict.fromkeys([*ours["cases"], *theirs["cases"]]))
        found = {case: verdict(case, (ours, our_arrays), (theirs, their_arrays)) for case in cases}
    for who, told, seconds in (("here", ours, our_seconds), ("there", theirs, their_seconds)):
        print(f"{who:5}  {told['cfmerge']}, jax {told['jax']}, {seconds:.0f} s")
    for case, (apart, why) in sorted(found.items(), key=lambda item: -item[1][0]):
        if args.verbose or apart > BOUND / 1000 or why:
            print(f"{apart:8.1e}  {case}  {why}")
        if args.verbose:
            for told in (ours, theirs):
                print(told["cases"].get(case, {}).get("trace", ""), end="")
    wrong = [case for case, (apart, _) in found.items() if not apart <= BOUND]
    compared = [case for case, (_, why) in found.items() if not why]
    largest = max((found[case][0] for case in compared), default=float("inf"))
    print(f"{len(compared)} cases compared, the largest difference {largest:.1e} of the delta; {len(wrong)} wrong")
    sys.exit(bool(wrong) or not compared)


if __name__ == "__main__":
    main()
