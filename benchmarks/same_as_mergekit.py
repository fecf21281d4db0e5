"""No time: whether merges of mergekit's YAML are those of mergekit, on a LLaMA of two layers in float32.

    python benchmarks/same_as_mergekit.py DIR [--mergekit PYTHON] [--only ties slerp] -o RESULTS

Every deterministic method, and slices, gradients, filters and stacks, by mergekit 0.1.5 in its own environment and by
cfmerge from the same file. Two errors of the worst tensor: the largest difference over the largest change of the tensor
by the merge, and over the rounding of its largest entry in float32. PYTHON is that of an environment with mergekit;
without it one is made in DIR. Names of tensors and the number of layers in config.json must agree too.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from make_llama import Size, config, shapes
from safetensors.numpy import load_file, save_file

import cfmerge
from cfmerge import mergekit
from peers import environment

SIZE = Size(2, 64, 256)
ROUNDING = 16  # of these roundings an error is one of arithmetic in float32
THEIRS = """
import json, sys, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
for name, out in json.load(open(sys.argv[1])).items():
    try:
        content = MergeConfiguration.model_validate(yaml.safe_load(open(name)))
        run_merge(content, out, MergeOptions(copy_tokenizer=False, quiet=True, write_model_card=False))
    except Exception as error:
        print(f"{name}: {type(error).__name__}: {error}", flush=True)
"""


def models(parameters: dict[str, Any] | None = None, names: str = "abc") -> list[dict[str, Any]]:
    """Models of a configuration, with the same parameters."""
    return [{"model": name, **({"parameters": parameters} if parameters else {})} for name in names]


def case(method: str, parameters: dict[str, Any] | None = None, **keys: Any) -> dict[str, Any]:
    """A configuration; every model has its own weight unless `models` says otherwise."""
    given = [
        {"model": name, "parameters": {"weight": weight}} for name, weight in zip("abc", (0.5, 0.3, 0.4), strict=True)
    ]
    content = {"merge_method": method, "base_model": "base", "models": given, "dtype": "float32", **keys}
    content = {key: value for key, value in content.items() if value is not None}
    return content | ({"parameters": parameters} if parameters else {})


def slices(*ranges: tuple[str, int, int], **keys: Any) -> dict[str, Any]:
    """A slice with a source for each range."""
    return {"sources": [{"model": m, "layer_range": [first, end]} for m, first, end in ranges], **keys}


DENSE = [{"model": n, "parameters": {"weight": w, "density": d}} for n, w, d in (("a", 0.5, 0.4), ("b", 0.3, 0.7))]
NULLED = [{"filter": "down_proj", "value": 0.0}, {"filter": "o_proj", "value": [0.5, 0.25]}, {"value": 1.0}]
WEIGHTS = [{"model": "a", "parameters": {"weight": [{"filter": "mlp", "value": [0.1, 0.9]}, {"value": 0.5}]}},
           {"model": "b", "parameters": {"weight": [1.0, 0.0, 0.5]}}]  # fmt: skip

CASES: dict[str, dict[str, Any]] = {
    "linear": case("linear", base_model=None),
    "linear, not normalised": case("linear", {"normalize": False}, base_model=None),
    "linear, base as a model": case("linear", {"weight": 0.2}),
    "linear, gradients and filters": case("linear", base_model=None, models=WEIGHTS),
    "slerp": case("slerp", {"t": 0.3}, models=models(names="a")),
    "slerp, t by gradient and filter": case(
        "slerp", {"t": [{"filter": "attn", "value": [0, 0.5, 1]}, {"filter": "mlp", "value": 0.2}, {"value": 0.5}]},
        models=models(names="a"),
    ),
    "nuslerp": case("nuslerp", models=models({"weight": 0.5}, "ab")),
    "nuslerp, rows": case("nuslerp", {"nuslerp_flatten": False}, models=models({"weight": 0.5}, "ab")),
    "nuslerp, columns": case(
        "nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True}, models=models({"weight": 0.5}, "ab")
    ),
    "nuslerp, no base": case("nuslerp", base_model=None, models=models({"weight": 0.5}, "ab")),
    "multislerp": case("multislerp"),
    "multislerp, no base": case("multislerp", base_model=None),
    "karcher": case("karcher", base_model=None, models=models()),
    "karcher, base as a model": case("karcher", {"max_iter": 20}, models=models()),
    "task_arithmetic": case("task_arithmetic", {"lambda": 0.7}),
    "task_arithmetic, normalised": case("task_arithmetic", {"normalize": True}),
    "ties": case("ties", {"density": 0.3}),
    "ties, by model, a sum, rescaled": case("ties", {"normalize": False, "rescale": True}, models=DENSE),
    "ties, very thin": case("ties", {"density": 0.002}),
    "breadcrumbs": case("breadcrumbs", {"density": 0.8, "gamma": 0.05}),
    "breadcrumbs_ties": case("breadcrumbs_ties", {"density": 0.8, "gamma": 0.05, "lambda": 0.9}),
    "dare_linear, density 1": case("dare_linear"),
    "dare_ties, density 1": case("dare_ties"),
    "della, density 1": case("della"),
    "della_linear, density 1": case("della_linear"),
    "model_stock": case("model_stock", models=models()),
    "model_stock, by filter": case("model_stock", {"filter_wise": True}, models=models()),
    "sce": case("sce", models=models()),
    "sce, selected": case("sce", {"select_topk": 0.4}, models=models()),
    "ram": case("ram", {"epsilon": 0.002}, models=models()),
    "ramplus_tl": case("ramplus_tl", {"epsilon": 0.002, "r": 0.3}, models=models()),
    "nearswap": case("nearswap", {"t": 0.001}, models=models(names="a")),
    "arcee_fusion": case("arcee_fusion", models=models(names="a"), dtype="float64", out_dtype="float32"),
    "passthrough": case("passthrough", base_model=None, models=models(names="a")),
    "passthrough, scaled": case("passthrough", {"scale": NULLED}, base_model=None, models=models(names="a")),
    "stack": case("passthrough", base_model=None, models=None, slices=[
        slices(("a", 0, 2)), slices(("b", 0, 1)), slices(("a", 1, 2), parameters={"scale": NULLED}),
        slices(("c", 0, 2)),
    ]),
    "stack, slerp": case("slerp", {"t": [0.0, 1.0]}, models=None, slices=[
        slices(("base", 0, 2), ("a", 0, 2)), slices(("base", 0, 1), ("b", 1, 2), parameters={"t": 0.25}),
    ]),
    "stack, ties": case("ties", {"weight": 0.5, "density": 0.5}, models=None, slices=[
        slices(("base", 0, 1), ("a", 0, 1), ("b", 0, 1)),
        slices(("base", 0, 2), ("c", 0, 2), parameters={"weight": [0, 1]}),
    ]),
    "slices of one range": case("linear", {"weight": [0.25, 0.75]}, base_model=None, models=None, slices=[
        slices(("a", 0, 2), ("b", 0, 2), parameters={"normalize": False}),
    ]),
}  # fmt: skip


def write_models(folder: Path) -> None:
    """A base and three models of it, whose deltas are large enough for mergekit's absolute thresholds."""
    for number, name in enumerate(("base", "a", "b", "c")):
        place = folder / name
        place.mkdir(parents=True, exist_ok=True)
        (place / "config.json").write_text(json.dumps(config(SIZE) | {"dtype": "float32"}))
        tensors = {}
        for n, (tensor, shape) in enumerate(shapes(SIZE).items()):
            value = np.random.default_rng([0, n]).standard_normal(shape) * 0.05 + (len(shape) == 1)
            for shared in (9, number) if number else ():  # a part of the change is common to all
                value += np.random.default_rng([shared, n]).standard_normal(shape) * 0.007
            tensors[tensor] = value.astype(np.float32)
        save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})


def here(content: Any, folder: Path) -> Any:
    """A configuration with the models' paths in place of their names."""
    if isinstance(content, dict):
        named = {"model", "base_model"}
        return {key: str(folder / one) if key in named else here(one, folder) for key, one in content.items()}
    return [here(one, folder) for one in content] if isinstance(content, list) else content


def compared(ours: Path, theirs: Path, folder: Path) -> dict[str, Any]:
    """The errors of the worst tensor; or what is not the same."""
    a, b = load_file(ours / "model.safetensors"), load_file(next(iter(theirs.glob("*.safetensors"))))
    layers = [json.loads((out / "config.json").read_text())["num_hidden_layers"] for out in (ours, theirs)]
    if a.keys() != b.keys() or layers[0] != layers[1]:
        return {"failed": f"other tensors: {sorted(a.keys() ^ b.keys())[:4]}, layers {layers}"}
    base = load_file(folder / "base" / "model.safetensors")
    of_change, of_rounding = {}, {}
    for name, value in a.items():
        error, largest = float(np.abs(value - b[name]).max()), float(np.abs(b[name]).max())
        change = float(np.abs(b[name] - base[name]).max()) if name in base else largest
        of_change[name] = error / (change or 1)
        of_rounding[name] = error / (2**-24 * largest or 1)
    worst = max(of_rounding, key=of_rounding.__getitem__)
    equal = sum(np.array_equal(a[name], b[name]) for name in a)
    errors = {"of change": max(of_change.values()), "of rounding": of_rounding[worst]}
    return {**errors, "where": worst, "equal": equal, "tensors": len(a)}


def run(folder: Path, python: Path, only: list[str]) -> list[dict[str, Any]]:
    write_models(folder)
    files = {}
    for number, (label, content) in enumerate(CASES.items()):
        if not only or content["merge_method"] in only:
            files[label] = folder / f"{number:02d}.yml"
            files[label].write_text(yaml.safe_dump(here(content, folder)))
    todo = folder / "todo.json"
    todo.write_text(json.dumps({str(file): str(file.with_suffix(".theirs")) for file in files.values()}))
    done = subprocess.run([python, "-c", THEIRS, todo], capture_output=True, text=True)
    told = dict(line.split(": ", 1) for line in done.stdout.splitlines() if line.startswith(str(folder)))
    rows = []
    for label, file in files.items():
        row: dict[str, Any] = {"case": label, "method": CASES[label]["merge_method"]}
        try:
            (stage,) = mergekit.load(file)
            out = file.with_suffix(".ours")
            cfmerge.merge_recipe(stage.recipe, out, overwrite=True)
            theirs = file.with_suffix(".theirs")
            failed = {"failed": f"mergekit: {told.get(str(file), done.stderr[-300:])}"}
            row |= compared(out, theirs, folder) if theirs.is_dir() and str(file) not in told else failed
        except cfmerge.CfmergeError as error:
            row["failed"] = f"cfmerge: {error}"
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| merge | error, of the change | in roundings | equal bit by bit |", "|---|--:|--:|---|"]
    for row in rows:
        found = f"{row['of change']:.1e} | {row['of rounding']:.1f} | {row['equal']} of {row['tensors']} tensors" \
            if "equal" in row else f"{row['failed']} | | "  # fmt: skip
        lines.append(f"| {row['case']} | {found} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--mergekit", type=Path, metavar="PYTHON", help="of an environment that has mergekit")
    parser.add_argument("--only", nargs="+", default=[], metavar="METHOD")
    parser.add_argument("--torch", default="torch", help="what pip installs for torch")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    python = args.mergekit or environment(args.directory / "environments", "mergekit", args.torch)
    rows = run(args.directory.resolve(), python, args.only)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "same_as_mergekit.json").write_text(json.dumps(rows, indent=1) + "\n")
    (args.output / "same_as_mergekit.md").write_text(table(rows))
    print(table(rows))
    sys.exit(any(row.get("of rounding", ROUNDING + 1) > ROUNDING for row in rows))
