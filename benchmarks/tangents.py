"""Tangent Model Composition on a small zoo: streams of parts, against ensembles, sequential fine-tuning, arithmetic.

    python benchmarks/tangents.py ROWS.jsonl --seeds 0 1 2      about ten minutes of two cores for each seed
    python benchmarks/tangents.py ROWS.jsonl --table            the tables of docs/tangents.md, from the rows

The base and the data are the demo's (`cfmerge.demo`: a residual MLP of 1M parameters, which has seen 2 % of the
training images under noise; heads drawn once and frozen). Streams:

    task       digits, animals, letters, optdigits, each under its own head
    class      two classes after two, under one head of ten: of digits, and of animals
    shards     eight shards of the training images of animals, drawn at random

Every part trains from the base alone (linearised, with the rescaled square loss; ordinary, with the same loss and with
cross-entropy), or from what the parts before have left (sequential). A row is written when its seed's stream is done,
and what is in the file already is not done again. Scales are chosen on validation images; accuracies are on test ones.
"""

import argparse
import functools
import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from measuring import table
from tangents_zoo import STEPS, Part, Split, Zoo, network, of, ordinary, parts, tangent, zoo

from cfmerge.compose.tangents import Tangents, linearised

SCALES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
STREAMS = ("task", "class: digits", "class: animals", "shards: animals")
Logits = Callable[[str, np.ndarray], np.ndarray]  # (head, images) -> outputs


# --- judging ------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="head")
def plain_outputs(head: str, params: Any, images: jax.Array) -> jax.Array:
    return network(head)(params, images)


@functools.partial(jax.jit, static_argnames="head")
def linearised_outputs(head: str, base: Any, total: Any, images: jax.Array) -> jax.Array:
    return linearised(network(head), base, total, images)


def plain(params: Any) -> Logits:
    return lambda head, images: in_chunks(lambda chunk: plain_outputs(head, params, chunk), images)


def composed(tangents: Tangents) -> Logits:
    """The outputs of `tangents.apply`: the sum first, so that one program serves any number of components."""
    total = tangents.total()
    return lambda head, images: in_chunks(lambda chunk: linearised_outputs(head, tangents.base, total, chunk), images)


def in_chunks(outputs: Callable[[np.ndarray], Any], images: np.ndarray, size: int = 500) -> np.ndarray:
    """The outputs of any number of images, by programs for `size` of them."""
    padded = np.pad(images, ((0, -len(images) % size), (0, 0), (0, 0)))
    chunks = [np.asarray(outputs(padded[first : first + size])) for first in range(0, len(padded), size)]
    return np.concatenate(chunks)[: len(images)]


def ensemble(models: Sequence[Any], how: str) -> Logits:
    """Mean of outputs, mean of probabilities, or vote; of equal votes the one with the larger mean output wins."""

    def outputs(head: str, images: np.ndarray) -> np.ndarray:
        every = np.stack([plain(params)(head, images) for params in models])
        if how == "probabilities":
            return np.asarray(jax.nn.softmax(every, axis=-1)).mean(axis=0)
        mean = every.mean(axis=0)
        votes = np.eye(every.shape[-1])[every.argmax(axis=-1)].sum(axis=0)
        return votes + 1e-4 * mean / np.abs(mean).max() if how == "vote" else mean

    return outputs


def accuracies(logits: Logits, stream: Sequence[Part], split: str = "test") -> list[float]:
    """One accuracy for each part."""
    found = []
    for part in stream:
        images, labels = of(getattr(part, split))
        found.append(float(np.mean(logits(part.head, images).argmax(axis=-1) == labels)))
    return found


def mean(logits: Logits, stream: Sequence[Part], split: str = "test") -> float:
    return statistics.mean(accuracies(logits, stream, split))


def each(models: Iterable[Logits], stream: Sequence[Part]) -> float:
    """The mean accuracy of every part's own model on it."""
    return statistics.mean(accuracies(logits, [part])[0] for logits, part in zip(models, stream, strict=True))


def best(scaled: Callable[[float], Logits], stream: Sequence[Part]) -> tuple[Logits, float]:
    """The scale that is best on validation images, and its outputs."""
    scale = max(SCALES, key=lambda scale: mean(scaled(scale), stream, "validation"))
    return scaled(scale), scale


def changed(one: Logits, other: Logits, stream: Sequence[Part]) -> float:
    """The share of test images whose predicted class is another."""
    return statistics.mean(
        float(np.mean(one(p.head, p.test.images).argmax(-1) != other(p.head, p.test.images).argmax(-1))) for p in stream
    )


def forgetting(after: Sequence[Logits], stream: Sequence[Part]) -> float:
    """Mean over all parts but the last: accuracy right after a part was learnt, less the accuracy at the end."""
    end = accuracies(after[-1], stream)
    pairs = zip(after[:-1], stream, end, strict=False)
    return statistics.mean(accuracies(logits, [part])[0] - last for logits, part, last in pairs)


# --- the study ----------------------------------------------------------------------------------------------------


def study(zoo: Zoo, stream: str) -> list[dict[str, Any]]:
    """The rows of one stream."""
    found, seed, base = parts(zoo, stream), zoo.seed, zoo.base
    seeds = [(seed, 3, index) for index in range(len(found))]
    tangents = Tangents(base)
    for part, own in zip(found, seeds, strict=True):
        tangents = tangents.add(part.name.replace(" ", "-"), tangent(base, part, own, zoo.steps))
    entropy = [ordinary(base, part, own, zoo.steps) for part, own in zip(found, seeds, strict=True)]
    squares = [ordinary(base, part, own, zoo.steps, entropy=False) for part, own in zip(found, seeds, strict=True)]
    onwards = sequence(base, found, seeds, zoo.steps)
    back = sequence(base, found[::-1], seeds[::-1], zoo.steps)

    def row(method: str, judged: Logits | float, **told: Any) -> dict[str, Any]:
        accuracy = judged if isinstance(judged, float) else mean(judged, found)
        return {"seed": seed, "stream": stream, "method": method, "accuracy": accuracy, **told}

    rows = [
        row("base", plain(base)),
        row("each component on its own part", each(map(composed, each_alone(tangents)), found)),
        row("each fine-tune on its own part", each(map(plain, entropy), found)),
        *composition_rows(row, tangents, found),
        row("ensemble, mean of outputs", ensemble(entropy, "outputs")),
        row("ensemble, mean of probabilities", ensemble(entropy, "probabilities")),
        row("ensemble, vote", ensemble(entropy, "vote")),
        row("ensemble, square loss, mean of outputs", ensemble(squares, "outputs")),
        row("sequential fine-tuning", plain(onwards[-1]), forgetting=forgetting([*map(plain, onwards)], found),
            order=changed(plain(onwards[-1]), plain(back[-1]), found), reversed=mean(plain(back[-1]), found)),
        *arithmetic_rows(row, base, entropy, tangents, found),
    ]  # fmt: skip
    return rows + (joint_rows(row, base, found, 2 * zoo.steps) if stream != "task" else [])


def sequence(base: Any, stream: Sequence[Part], seeds: Sequence[Sequence[int]], steps: int) -> list[Any]:
    """Parameters after each part, every part going on from the one before."""
    found, params = [], base
    for part, own in zip(stream, seeds, strict=True):
        params = ordinary(params, part, own, steps)
        found.append(params)
    return found


def each_alone(tangents: Tangents) -> list[Tangents]:
    return [tangents.scaled(list(map(float, one))) for one in np.eye(len(tangents.names))]


def composition_rows(row: Callable[..., dict[str, Any]], tangents: Tangents, stream: Sequence[Part]) -> list[Any]:
    """Composed by 1/T, by 1, by the best common scale; forgetting, order, unlearning."""
    count = len(stream)

    def scaled(scale: float) -> Logits:
        return composed(tangents.scaled([scale] * count))

    turned = Tangents(tangents.base)
    for name, component in reversed([*zip(tangents.names, tangents.components, strict=True)]):
        turned = turned.add(name, component)
    prefixes = [composed(tangents.scaled([1 / n] * n + [0.0] * (count - n))) for n in range(1, count + 1)]
    whole, chosen = composed(tangents.mean()), best(scaled, stream)
    forgot = {
        "forgetting": forgetting(prefixes, stream),
        "order": changed(whole, composed(turned.mean()), stream),
        **unlearning(tangents, stream),
    }
    return [
        row("TMC, mean", whole, **forgot),
        row("TMC, sum", scaled(1.0)),
        row("TMC, best scale", chosen[0], scale=chosen[1]),
    ]


def unlearning(tangents: Tangents, stream: Sequence[Part]) -> dict[str, Any]:
    """Each component removed in turn: accuracy on its part and on the others, and whether it is as never seen."""
    own, others, same = [], [], True
    for index, name in enumerate(tangents.names):
        never = Tangents(tangents.base)
        for other, component in zip(tangents.names, tangents.components, strict=True):
            never = never if other == name else never.add(other, component)
        left = composed(tangents.remove(name).mean())
        scores = accuracies(left, stream)
        own.append(scores.pop(index))
        others.append(statistics.mean(scores))
        images = stream[index].test.images
        same &= bool(np.all(left(stream[index].head, images) == composed(never.mean())(stream[index].head, images)))
    return {"removed, own part": statistics.mean(own), "removed, others": statistics.mean(others), "bitwise": same}


def arithmetic_rows(
    row: Callable[..., dict[str, Any]], base: Any, models: Sequence[Any], tangents: Tangents, stream: Sequence[Part]
) -> list[Any]:
    """`W_0 + c sum_t (W_t - W_0)`; and the same with the components in place of the deltas."""
    vector = jax.tree.map(lambda start, *own: sum(w - start for w in own), base, *models)
    folded = tangents.to_task_vector()

    def added(direction: Any) -> Callable[[float], Logits]:
        return lambda scale: plain(jax.tree.map(lambda start, delta: start + scale * delta, base, direction))

    chosen, linear = best(added(vector), stream), best(added(folded), stream)
    return [
        row("task arithmetic, mean", added(vector)(1 / len(stream))),
        row("task arithmetic, best scale", chosen[0], scale=chosen[1]),
        row("task arithmetic of the components, best scale", linear[0], scale=linear[1]),
    ]


def joint_rows(row: Callable[..., dict[str, Any]], base: Any, stream: Sequence[Part], steps: int) -> list[Any]:
    """One training on the images of all parts, twice as long: what no stream can have."""
    splits = [part.train for part in stream]
    images, labels = (np.concatenate(arrays) for arrays in zip(*map(of, splits), strict=True))
    whole = stream[0]._replace(train=Split(images, labels))
    trained = Tangents(base).add("all", tangent(base, whole, (0, 4), steps))
    return [
        row("all parts at once, linearised", composed(trained)),
        row("all parts at once, ordinary", plain(ordinary(base, whole, (0, 4), steps))),
    ]


# --- telling ------------------------------------------------------------------------------------------------------


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def tables(rows: Sequence[Mapping[str, Any]]) -> str:
    """Accuracies by method and stream, and what else is known of TMC and of sequential fine-tuning."""

    def average(key: str, method: str, stream: str) -> float | None:
        values = [r[key] for r in rows if r["method"] == method and r["stream"] == stream and key in r]
        return round(100 * statistics.mean(values), 1) if values else None

    methods = dict.fromkeys(row["method"] for row in rows)
    first = [{"method": m, **{s: average("accuracy", m, s) for s in STREAMS}} for m in methods]
    keys = ("forgetting", "order", "reversed", "removed, own part", "removed, others")
    second = [
        {"method": m, "figure": key, **{s: average(key, m, s) for s in STREAMS}}
        for m in ("TMC, mean", "sequential fine-tuning")
        for key in keys
        if average(key, m, STREAMS[0]) is not None
    ]
    same = all(row["bitwise"] for row in rows if "bitwise" in row)
    seeds = sorted({row["seed"] for row in rows})
    return f"{table(first)}\n{table(second)}\nseeds {seeds}; removed is bit for bit never seen: {same}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("rows", type=Path, help="a file of JSON lines, gone on with where it exists")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=STEPS, help="of one training")
    parser.add_argument("--streams", nargs="+", default=list(STREAMS), choices=STREAMS)
    parser.add_argument("--table", action="store_true", help="print the tables of the rows that are there")
    args = parser.parse_args()
    for seed in [] if args.table else args.seeds:
        done = {row["stream"] for row in read(args.rows) if row["seed"] == seed}
        missing = [stream for stream in args.streams if stream not in done]
        made = zoo(seed, args.steps) if missing else None
        for stream in missing:
            rows = study(made, stream)
            with args.rows.open("a") as file:
                file.write("".join(json.dumps(row) + "\n" for row in rows))
            print(seed, stream, {row["method"]: round(row["accuracy"], 3) for row in rows}, flush=True)
    print(tables(read(args.rows)))


if __name__ == "__main__":
    main()
