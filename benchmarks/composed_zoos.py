"""Accuracy against size of composed results on the zoos of `accuracy/`: SMILE, EMR, TALL masks, TSV-Compress.

    python benchmarks/composed_zoos.py -o docs/results --zoos vision text-full --seeds 0 1 2
    python benchmarks/composed_zoos.py -o RESULTS --quick             a toy zoo, seconds, no data
    python benchmarks/composed_zoos.py -o docs/results --table        tables and pictures of the rows that are there

Size is that of base and result over that of the base, in bytes; heads, which belong to the tasks, count nowhere, and
the frozen embeddings of the text zoo do not either. The head of a task is known to all. What else knows the task:

    merge     a method at its published defaults: nothing
    smile     SMILE: nothing; each token chooses in each layer
    told      EMR, TALL, TSV-Compress; and SMILE's experts without its routers: the task's delta in all layers

Ranks and gates are those of the article at the zoo's width: for ViT-B/32, 768 wide, it has gate 16 and ranks 4 to 128.
A row is written into `composed.jsonl` when it is done, and what is there is not done again. `sent to its expert` is the
share of tokens, over all layers, that a router sends to the expert of their task; `taken by one` the largest share of
the tokens of all tasks that one expert of a layer takes. Accuracies are on test examples; the thresholds of
`tall, chosen` are those that are best on validation examples, one for each task.
"""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from composed_told import MOST, SENT, System, complete, draw, lines, tables
from flax.traverse_util import flatten_dict, unflatten_dict
from zoo_models import ZOOS, Opened, by_zoo, keep, kept, opened, write_tables

import cfmerge
from cfmerge import compose
from cfmerge.compose import smile_layers
from cfmerge_accuracy.cache import keep_compiled

REFERENCES = ("base", "experts", "multitask")
MERGES = ("average", "task_arithmetic", "ties", "ace", "tsv_m", "iso_c")
THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.6)
RATIOS = (0.02, 0.05, 0.0625, 0.125, 0.25, 0.5)
CHOSEN = "tall, chosen"


class Scale(NamedTuple):
    """The ranks and gates for a zoo's width; `at` is the article's gate 16, rank 32 at that width."""

    ranks: tuple[int | None, ...]
    gates: tuple[int, ...]
    at: tuple[int, int]


SCALES = {
    "vision": Scale((2, 5, 8, 16, 32, None), (1, 3, 8, 32), (3, 5)),
    "text-full": Scale((4, 16, 64, None), (8, 64), (8, 16)),
    "bars": Scale((2, None), (4,), (4, 2)),
}


def systems(scale: Scale) -> list[System]:
    """All rows of a zoo."""
    gate, rank = scale.at
    grid = [(g, k, "") for g in scale.gates for k in scale.ranks]
    more = [(gate, rank, f", top_k={n}") for n in (2, 3)] + [(gate, rank, ", router='expert'")]
    more += [(gate, k, ", others='mean'") for k in (rank, scale.ranks[-1])]
    names = [smile(*one) for one in (*grid, *more)]
    return [
        *(System("reference", text) for text in REFERENCES),
        *(System("merge", text) for text in MERGES),
        *(System("told", f"emr(rescale={r!r}, scope={s!r})") for r in ("l1", "l2") for s in ("model", "tensor_mean")),
        System("told", "emr(rescale='none')"),
        *(System("told", f"tall(threshold={threshold})") for threshold in THRESHOLDS),
        System("told", CHOSEN),
        *(System("told", f"tsv_c(ratio={ratio})") for ratio in RATIOS),
        *(System("told", smile(gate, rank)) for rank in scale.ranks),
        *(System("smile", name) for name in dict.fromkeys(names)),
    ]


def of_zoo(name: str) -> list[System]:
    """All rows of a zoo; of the toy zoo a few of each kind."""
    found = systems(SCALES[name])
    if name != "bars":
        return found
    few = (*REFERENCES, "average", "emr(rescale='l1', scope='model')", "tall", "tsv_c(ratio=0.5)", "smile(rank=")
    return [system for system in found if system.text.startswith(few) and system.text.count(",") < 2]


def smile(gate: int, rank: int | None, more: str = "") -> str:
    """The system's text."""
    return f"smile(rank={rank}, gate={gate}{more})"


# --- judging ------------------------------------------------------------------------------------------------------


def study(zoo: Opened, system: System, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The row of one system."""
    base, experts = zoo.zoo.base, {task: zoo.zoo.experts[task] for task in zoo.zoo.tasks}
    if system.kind == "reference":
        own: dict[str, Callable[[str], Any]] = {
            "base": lambda task: base, "experts": experts.__getitem__, "multitask": lambda task: zoo.zoo.multitask,
        }  # fmt: skip
        return judged(zoo, float(len(experts)) if system.text == "experts" else 1.0, own[system.text])
    if system.kind == "merge":
        merged = cfmerge.merge_params(base, experts, system.text, seed=zoo.zoo.seed)
        return judged(zoo, 1.0, lambda task: merged)
    chosen = {"threshold": thresholds(rows, tuple(experts))} if system.text == CHOSEN else None
    made = compose.build(base, experts, "tall" if chosen else system.text, parameters=chosen)
    size = 1 + made.nbytes / made.about.base_bytes
    if system.kind == "smile":
        return routed(zoo, size, made)
    validation = system.text.startswith("tall(")
    return judged(zoo, size, lambda task: made.materialise(task, base), validation) | (chosen or {})


def judged(zoo: Opened, size: float, model: Callable[[str], Any], validation: bool = False) -> dict[str, Any]:
    """Size and accuracies of what has a tree of parameters for each task."""
    found: dict[str, Any] = {"size": size, "accuracies": {}}
    for split in ("test", "validation")[: 1 + validation]:
        own = {task: zoo.accuracy(model(task), task, split) for task in zoo.zoo.tasks}
        found["accuracies" if split == "test" else split] = own
    return found


def routed(zoo: Opened, size: float, made: compose.Artifact) -> dict[str, Any]:
    """Size and accuracies of SMILE; by layer the share of tokens that reach their task's expert, and the largest share
    that one expert has of the tokens of all tasks."""
    top_k = int(made.about.parameters["top_k"])
    layers = smile_layers.layers_of(made.parts)
    params = with_means(zoo.zoo.base, made.parts)
    accuracies, weights = {}, []
    for task in zoo.zoo.tasks:
        accuracies[task], found = zoo.routed(params, layers, task, top_k)
        weights.append(found)
    own = {name: float(np.mean([found[name][n] for n, found in enumerate(weights)])) for name in layers}
    most = {name: float(np.mean([found[name] for found in weights], axis=0).max()) for name in layers}
    return {"size": size, "accuracies": accuracies, SENT: own, MOST: most}


def with_means(base: Any, parts: Mapping[str, Mapping[str, Any]]) -> Any:
    """The base; with `others=mean` what is no linear layer's is the experts' mean."""
    leaves = flatten_dict(base, sep="/")
    return unflatten_dict(
        {name: leaf + parts[name]["mean"] if "mean" in parts.get(name, {}) else leaf for name, leaf in leaves.items()},
        sep="/",
    )


def thresholds(rows: Iterable[Mapping[str, Any]], tasks: Sequence[str]) -> list[float]:
    """Each task's best threshold on validation examples: of equals the one nearest to 0.4."""
    found = {t: row["validation"] for t in THRESHOLDS for row in rows if row["system"] == f"tall(threshold={t})"}
    order = sorted(found, key=lambda threshold: abs(threshold - 0.4))
    return [max(order, key=lambda threshold: found[threshold][task]) for task in tasks]


def run(name: str, seed: int, file: Path, only: Sequence[str] = ("",)) -> None:
    """Makes the rows of a zoo and seed that are not there yet, of systems that begin with one of these words."""

    def of_this() -> dict[System, dict[str, Any]]:
        return {System(r["kind"], r["system"]): r for r in kept(file) if (r["zoo"], r["seed"]) == (name, seed)}

    asked = [system for system in of_zoo(name) if system.text.startswith(tuple(only))]
    missing = [system for system in asked if system not in of_this()]
    zoo = opened(name, seed) if missing else None
    for number, system in enumerate(missing):
        row = study(zoo, system, [*of_this().values()])
        keep(file, {"zoo": name, "seed": seed, "kind": system.kind, "system": system.text, **row})
        mean = np.mean([*row["accuracies"].values()])
        print(f"{name} {seed} {system.kind} {system.text}: {mean:.3f} at {row['size']:.2f}", flush=True)
        if number % 20 == 19:
            jax.clear_caches()


# --- telling ------------------------------------------------------------------------------------------------------


def write(folder: Path, file: Path) -> None:
    """The page and the pictures of the rows that are there."""
    place = {(name, *system): place for name in SCALES for place, system in enumerate(of_zoo(name))}
    rows = sorted(kept(file), key=lambda row: (row["seed"], place[row["zoo"], row["kind"], row["system"]]))
    rows.sort(key=lambda row: ZOOS.index(row["zoo"]))
    write_tables(folder / "composed.md", "Composed results on the zoos: accuracy against size", tables(rows))
    for name, of in by_zoo(rows):
        draw(folder / f"composed-{name.partition('-')[0]}.png", name, lines(complete(of)), SCALES[name].gates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--zoos", nargs="+", default=["vision"], choices=ZOOS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="systems that begin so")
    parser.add_argument("--quick", action="store_true", help="a toy zoo, seconds")
    parser.add_argument("--table", action="store_true", help="no new rows")
    args = parser.parse_args()
    keep_compiled()
    file = args.output / "composed.jsonl"
    for name in [] if args.table else ["bars"] if args.quick else args.zoos:
        for seed in args.seeds:
            run(name, seed, file, args.only)
    write(args.output, file)


if __name__ == "__main__":
    main()
