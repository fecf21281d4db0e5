"""The vision domain as one `Zoo`: trained where the cache does not hold it."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from cfmerge import activations
from cfmerge.demo import archives, glyphs
from cfmerge.demo import data as demo_data
from cfmerge.demo.data import Split, Task
from cfmerge.errors import CfmergeError
from cfmerge_accuracy.cache import trained
from cfmerge_accuracy.vision import data, debian, measure, model, train
from cfmerge_accuracy.vision.model import Head, Vit
from cfmerge_accuracy.vision.train import Schedule
from cfmerge_accuracy.zoo import Params, Zoo
from cfmerge_accuracy.zoo import Split as SplitName

TRAINING_CODE = (archives, glyphs, demo_data, data, debian, model, train)
GRAM_IMAGES, FISHER_IMAGES, BATCH = 512, 256, 128


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Sizes and steps; `images` of a task's (train, validation, test)."""

    vit: Vit
    pretraining: Schedule
    expert: Schedule
    multitask: Schedule
    tasks: tuple[str, ...] = data.TASKS
    images: tuple[int, int, int] = (8000, 200, 500)


RECIPES = {
    "small": Recipe(Vit(), Schedule(3500, 32, 1.5e-3), Schedule(600, 32, 5e-4), Schedule(1600, 32, 5e-4)),
    # CLIP ViT-B/32's vision tower; for a GPU.
    "large": Recipe(
        Vit(side=224, patch=32, dim=768, depth=12, heads=12),
        *(Schedule(6000, 128, 2e-4), Schedule(1500, 128, 5e-5), Schedule(6000, 128, 5e-5)),
    ),
}
QUICK = Recipe(
    Vit(dim=64, depth=2),
    *(Schedule(150, 32, 3e-3), Schedule(60, 32, 1e-3), Schedule(120, 32, 1e-3)),
    tasks=data.QUICK,
    images=(512, 50, 100),
)


def load(seed: int, *, quick: bool = False, scale: str = "small", report: Callable[[str], None] = print) -> Zoo:
    """The base, the experts and the multi-task model of one seed.

    Args:
        seed: of splits, initial weights and training.
        quick: three tasks, a small network and some seconds of training, without Debian's packages.
        scale: "small", or "large" for a GPU.
        report: is told what is being trained.

    Raises:
        CfmergeError: data cannot be fetched, or the scale is unknown.
    """
    if scale not in RECIPES:
        raise CfmergeError(f"vision: no scale {scale!r}; there are {', '.join(RECIPES)}")
    recipe = QUICK if quick else RECIPES[scale]
    cache = archives.cache_directory()
    report(f"vision, seed {seed}: data")
    tasks = data.load_tasks(cache, seed, recipe.tasks, recipe.images)
    start = data.quick_pretraining(seed) if quick else data.pretraining(cache, seed)
    return build(recipe, tasks, start, seed, report).zoo()


def build(
    recipe: Recipe, tasks: Sequence[Task], start: Split, seed: int, report: Callable[[str], None] = print
) -> Suite:
    """Trains, or finds in the cache, a base on the images of `start` and what is made of it."""
    seconds: dict[str, float] = {}

    def fit(name: str, schedule: Schedule, params: Params, splits: dict[int, Split], heads: Sequence[Head]) -> Params:
        def make() -> Params:
            report(f"vision, seed {seed}: training {name}, {schedule.steps} steps of {schedule.batch}")
            begun = time.perf_counter()
            number = 0 if name == "base" else 1 + min(splits) if len(splits) == 1 else 1 + len(tasks)
            found = train.fit(recipe.vit, schedule, params, [seed, number], splits, heads)
            return {"params": found, "seconds": np.full(1, time.perf_counter() - begun, np.float32)}

        of = {"name": name, "seed": seed, "vit": _settings(recipe.vit), "schedule": dataclasses.asdict(schedule)}
        images = [array for split in splits.values() for array in (split.images, split.labels)]
        arrays = [*images, *jax.tree.leaves((params, heads))]
        made = trained(f"vision-{seed}-{name}", make, of=of, code=TRAINING_CODE, data=arrays)
        seconds[name] = round(float(made["seconds"][0]), 1)
        return made["params"]

    initial, above = jax.random.split(jax.random.key(seed))
    heads = [model.random_head(above, int(start.labels.max()) + 1, recipe.vit.dim)]
    base = fit("base", recipe.pretraining, model.init(recipe.vit, initial), {0: start}, heads)
    heads = [_class_embeddings(recipe.vit, base, task) for task in tasks]
    own = {number: task.train for number, task in enumerate(tasks)}
    experts = {task.name: fit(task.name, recipe.expert, base, {n: own[n]}, heads) for n, task in enumerate(tasks)}
    multitask = fit("multitask", recipe.multitask, base, own, heads)
    return Suite(recipe, seed, tuple(tasks), tuple(heads), base, experts, multitask, seconds)


def _class_embeddings(vit: Vit, base: Params, task: Task) -> Head:
    """From at most 4,000 training images."""
    some = Split(task.train.images[:4000], task.train.labels[:4000])
    found = np.concatenate([np.asarray(_features(vit, base, part)) for part in _parts(some.images)])
    return model.class_embeddings(found, some.labels, task.classes)


@functools.partial(jax.jit, static_argnames=("vit",))
def _features(vit: Vit, params: Params, images: jax.Array) -> jax.Array:
    return train.features(vit, params, images)


def _parts(images: np.ndarray) -> list[np.ndarray]:
    return [images[first : first + BATCH] for first in range(0, len(images), BATCH)]


def _settings(vit: Vit) -> dict[str, int]:
    return {name: getattr(vit, name) for name in ("side", "patch", "dim", "depth", "heads")}


@dataclasses.dataclass(frozen=True, eq=False)
class Suite:
    """What was trained, and the answers that a `Zoo` gives about it."""

    recipe: Recipe
    seed: int
    tasks: tuple[Task, ...]
    heads: tuple[Head, ...]
    base: Params
    experts: Mapping[str, Params]
    multitask: Params
    seconds: Mapping[str, float]

    def zoo(self) -> Zoo:
        return Zoo(
            name="vision",
            seed=self.seed,
            tasks=tuple(task.name for task in self.tasks),
            base=self.base,
            experts=self.experts,
            multitask=self.multitask,
            labels=lambda task, split: self._split(task, split).labels,
            logits=self.logits,
            grams=functools.cache(self.grams),
            fishers=functools.cache(self.fishers),
            regmean_pp=functools.cache(self.regmean_pp),
            facts=self.facts(),
        )

    def _number(self, task: str) -> int:
        return [one.name for one in self.tasks].index(task)

    def _split(self, task: str, split: SplitName) -> Split:
        found: Split = getattr(self.tasks[self._number(task)], split)
        return found

    @functools.cached_property
    def _on_device(self) -> dict[tuple[str, str], list[jax.Array]]:
        return {}

    def logits(self, params: Params, task: str, split: SplitName) -> np.ndarray:
        """`(N, classes)`, in the order of the split's images."""
        if (task, split) not in self._on_device:
            self._on_device[task, split] = [jax.device_put(p) for p in _parts(self._split(task, split).images)]
        found = [_features(self.recipe.vit, params, part) for part in self._on_device[task, split]]
        return self.heads[self._number(task)].logits(np.concatenate([np.asarray(part) for part in found]))

    def _batches(self, task: str) -> list[np.ndarray]:
        return _parts(self._split(task, "train").images[:GRAM_IMAGES])

    def _measured(self, what: str, task: str, make: Callable[[], Params]) -> Params:
        data = [*jax.tree.leaves(self.experts[task]), *jax.tree.leaves(self.heads), self._split(task, "train").images]
        of = {"what": what, "vit": _settings(self.recipe.vit), "images": [GRAM_IMAGES, FISHER_IMAGES]}
        code = (model, train, measure, activations.collect)
        return trained(f"vision-{self.seed}-{task}-{what}", make, of=of, code=code, data=data)

    def grams(self, task: str) -> Mapping[str, np.ndarray]:
        def make() -> Params:
            variables = {"params": self.experts[task]}
            found = activations.collect_linen(self.recipe.vit, variables, self._batches(task))
            return unflatten_dict({name: np.asarray(gram) for name, gram in found.items()}, sep="/")

        return flatten_dict(self._measured("grams", task, make), sep="/")

    def fishers(self, task: str) -> Params:
        def make() -> Params:
            images = self._split(task, "train").images[:FISHER_IMAGES]
            number = self._number(task)
            return measure.fisher(self.recipe.vit, self.experts[task], self.seed, images, number, self.heads)

        return self._measured("fisher", task, make)

    def regmean_pp(self) -> Params:
        names = [task.name for task in self.tasks]
        batches = [self._batches(name) for name in names]
        return activations.regmean_pp(self.recipe.vit, self.base, [self.experts[name] for name in names], batches)

    def facts(self) -> dict[str, Any]:
        schedules = {
            name: dataclasses.asdict(getattr(self.recipe, name)) for name in ("pretraining", "expert", "multitask")
        }
        return {
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(self.base)),
            "network": _settings(self.recipe.vit),
            "schedules": schedules,
            "images": {t.name: [len(t.train), len(t.validation), len(t.test)] for t in self.tasks},
            "classes": {task.name: task.classes for task in self.tasks},
            "chance": {task.name: round(1 / task.classes, 4) for task in self.tasks},
            "seconds": dict(self.seconds),
        }
