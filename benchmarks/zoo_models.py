"""The zoos of `accuracy/`, opened for `composed_zoos.py` and `subspaces.py`: networks, inputs and heads.

A `cfmerge_accuracy.zoo.Zoo` judges trees of parameters. Here are what it judges them with, so that layers can be
replaced; and what the two scripts write.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen
from jaxtyping import Array, Float

from cfmerge.compose import smile, smile_flax
from cfmerge.compose.smile import Layer
from cfmerge.demo.data import Split, Task
from cfmerge_accuracy import text
from cfmerge_accuracy.images import suite as images
from cfmerge_accuracy.text.setting import embedded
from cfmerge_accuracy.vision import suite as vit
from cfmerge_accuracy.zoo import Zoo

ZOOS = ("vision", "text-full", "bars")
START, END = "<!-- tables -->", "<!-- end of tables -->"


@dataclasses.dataclass(frozen=True)
class Opened:
    """A zoo and what it judges models with.

    Attributes:
        zoo: base, experts, labels.
        network: a linen module; of the inputs it makes features.
        inputs: `(task, split) -> (rows, inputs)`: all examples as one batch, and their numbers in the split.
        scores: `(features, task) -> (N, classes)`, under the task's head.
    """

    zoo: Zoo
    network: linen.Module
    inputs: Callable[[str, str], tuple[np.ndarray, tuple[Any, ...]]]
    scores: Callable[[np.ndarray, str], np.ndarray]

    def accuracy(self, params: Any, task: str, split: Any = "test") -> float:
        """The accuracy of one tree of parameters on one task."""
        return self.routed(params, {}, task, 1, split)[0]

    def routed(
        self, params: Any, layers: Mapping[str, Layer], task: str, top_k: int, split: Any = "test"
    ) -> tuple[float, dict[str, np.ndarray]]:
        """The accuracy of the network with experts in its layers, and by layer the mean weights of the experts."""
        rows, inputs = self.inputs(task, split)
        features, weights = outputs(self.network, top_k, params, layers, *inputs)
        right = self.scores(np.asarray(features), task).argmax(axis=-1) == self.zoo.labels(task, split)[rows]
        return float(np.mean(right)), {name: np.asarray(each) for name, each in weights.items()}


@functools.partial(jax.jit, static_argnames=("network", "top_k"))
def outputs(
    network: linen.Module, top_k: int, params: Any, layers: Mapping[str, Layer], *inputs: Any
) -> tuple[Float[Array, "N features"], dict[str, Float[Array, " experts"]]]:
    """Features, and by layer the mean weight of each expert over the tokens that are no padding."""
    weights: dict[str, Array] = {}

    def note(following: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        name = "/".join((*context.module.path, "kernel"))
        if name in layers and context.method_name == "__call__":
            routing = smile.routing(args[0], layers[name].router, top_k)
            live = jnp.any(args[0] != 0, axis=-1, keepdims=True)
            weights[name] = (routing * live).reshape(-1, routing.shape[-1]).sum(0) / live.sum()
        return following(*args, **kwargs)

    def function(params: Any, *inputs: Any) -> Any:
        with linen.intercept_methods(note):
            return network.apply({"params": params}, *inputs)

    return smile_flax.apply(function, params, layers, *inputs, top_k=top_k), weights


# --- zoos ---------------------------------------------------------------------------------------------------------


def opened(name: str, seed: int) -> Opened:
    """A zoo by name; what is not in the cache is trained. "bars" is made in seconds, and needs no data."""
    if name == "text-full":
        return of_texts(seed)
    if name == "bars":
        return of_images(bars(seed))
    return of_images(images.load(vit.DOMAIN, vit.RECIPES["small"], seed, False, 1, print))


def of_images(suite: images.Suite) -> Opened:
    def inputs(task: str, split: Any) -> tuple[np.ndarray, tuple[Any, ...]]:
        found = suite.split(task, split).images
        return np.arange(len(found)), (found,)

    def scores(features: np.ndarray, task: str) -> np.ndarray:
        return suite.heads[suite.number(task)].logits(features)

    return Opened(vit.zoo(suite), suite.recipe.net, inputs, scores)


def of_texts(seed: int) -> Opened:
    zoo, setting = text.load(seed, engine="flax"), text.prepare(seed)

    @functools.cache
    def inputs(task: str, split: Any) -> tuple[np.ndarray, tuple[Any, ...]]:
        texts = setting.tasks[task].splits[split]
        batches = embedded(setting.minilm, texts, multiple=texts.ids.shape[1])  # all as long as the longest
        rows, *arrays = (np.concatenate([batch[part][: len(batch[0])] for batch in batches]) for part in range(3))
        return rows, tuple(arrays)

    return Opened(zoo, setting.minilm.module, inputs, lambda features, task: features @ setting.heads[task].T)


def bars(seed: int) -> images.Suite:
    """Three tasks of one bright bar on noise: where it stands, lies, or slants is the label."""
    ways: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
        "upright": lambda image: image,
        "flat": np.transpose,
        "slanted": lambda image: np.stack([np.roll(row, number // 2) for number, row in enumerate(image)]),
    }

    def drawn(count: int, number: int, way: Callable[[np.ndarray], np.ndarray]) -> Split:
        generator = np.random.default_rng((seed, number))
        labels = np.arange(count, dtype=np.int32) % 4
        found = generator.integers(0, 200, (count, 28, 28)).astype(np.uint8)
        for image, label in zip(found, labels, strict=True):
            image[:, 3 + 6 * label : 6 + 6 * label] = 255
        return Split(np.stack([way(image) for image in found]), labels)

    tasks = [
        Task(name, 4, drawn(256, 3 * n, way), drawn(64, 3 * n + 1, way), drawn(64, 3 * n + 2, way))
        for n, (name, way) in enumerate(ways.items())
    ]
    schedules = [vit.Schedule(steps, 32, 3e-3) for steps in (60, 40, 40)]
    recipe = vit.Recipe(vit.Vit(dim=32, depth=1, heads=2), *schedules, tasks=tuple(ways), images=(256, 64, 64))
    return vit.build(recipe, tasks, drawn(256, 9, lambda image: image[::-1]), seed, lambda line: None)


# --- rows and reports ---------------------------------------------------------------------------------------------


def kept(file: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines; none where there is no file."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def keep(file: Path, row: Mapping[str, Any]) -> None:
    """Adds a row to a file of JSON lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as opened:
        opened.write(json.dumps(row) + "\n")


def normalised(accuracies: Mapping[str, float], experts: Mapping[str, float]) -> float:
    """The mean over tasks of the accuracy in per cent of the expert's."""
    return 100 * float(np.mean([accuracies[task] / experts[task] for task in experts]))


def by_zoo(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[Any]]]:
    """The rows of each zoo."""
    for name in dict.fromkeys(row["zoo"] for row in rows):
        yield name, [row for row in rows if row["zoo"] == name]


def write_tables(file: Path, title: str, tables: str) -> None:
    """Puts the tables between two marks of a page, whose other text stays; makes the page where there is none."""
    page = file.read_text() if file.exists() else f"# {title}\n\n{START}\n{END}\n"
    before, _, rest = page.partition(START)
    file.write_text(f"{before}{START}\n\n{tables}\n{END}{rest.partition(END)[2]}")
