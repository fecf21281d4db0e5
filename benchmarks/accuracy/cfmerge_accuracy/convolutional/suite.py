"""The convolutional domain as a `Zoo`: trained where the cache does not hold it."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from cfmerge import activations
from cfmerge.demo import archives, glyphs
from cfmerge.demo import data as demo_data
from cfmerge.demo import train as demo_train
from cfmerge.demo.data import Split, Task
from cfmerge.demo.train import Schedule
from cfmerge.errors import CfmergeError
from cfmerge_accuracy.cache import trained
from cfmerge_accuracy.convolutional import model, train
from cfmerge_accuracy.convolutional.model import ConvNet
from cfmerge_accuracy.vision import data, debian
from cfmerge_accuracy.vision import model as vision_model
from cfmerge_accuracy.vision import train as vision_train
from cfmerge_accuracy.vision.model import Head
from cfmerge_accuracy.zoo import Params, Zoo, unchanged
from cfmerge_accuracy.zoo import Split as SplitName

Variant = Literal["averaged", "re-estimated"]
NAMES = {"averaged": "convolutional", "re-estimated": "convolutional-reestimated"}
TRAINING_CODE = (archives, glyphs, demo_data, demo_train, data, debian, vision_model, vision_train, model, train)
GRAM_IMAGES, FISHER_IMAGES, BATCH = 512, 256, 128
SHRINKAGE = 0.3  # of the heads' covariance within classes
STATISTICS_IMAGES = 720  # of all tasks together: any number of them up to six gets an equal share


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Sizes and steps; `images` of a task's (train, validation, test)."""

    net: ConvNet
    pretraining: Schedule
    expert: Schedule
    multitask: Schedule
    tasks: tuple[str, ...] = ("mnist", "animals", "upper", "optdigits", "greek", "cyrillic")
    images: tuple[int, int, int] = (8000, 200, 500)


FULL = Recipe(ConvNet(), Schedule(1000, 64, 2e-3), Schedule(400, 64, 5e-4), Schedule(1200, 64, 1e-3))
QUICK = Recipe(
    ConvNet(widths=(16, 32, 64), strides=(2, 2, 2), momentum=0.9),
    *(Schedule(60, 32, 3e-3), Schedule(80, 32, 1e-3), Schedule(80, 32, 1e-3)),
    tasks=data.QUICK,
    images=(512, 50, 100),
)


def load(
    seed: int, *, quick: bool = False, variant: Variant = "averaged", report: Callable[[str], None] = print
) -> Zoo:
    """The base, the experts and the multi-task model of one seed.

    Args:
        seed: of splits, initial weights and training.
        quick: three tasks, a tiny network and seconds of training, without Debian's packages.
        variant: "averaged" leaves the running statistics of a merged model as they were merged; "re-estimated" takes
            those of the tasks' training images, without labels, before the model is used. The experts are the same.
        report: is told what is being trained.

    Raises:
        CfmergeError: data cannot be fetched, or there is no such variant.
    """
    if variant not in NAMES:
        raise CfmergeError(f"convolutional: no variant {variant!r}; there are {', '.join(NAMES)}")
    recipe = QUICK if quick else FULL
    cache = archives.cache_directory()
    report(f"convolutional, seed {seed}: data")
    tasks = data.load_tasks(cache, seed, recipe.tasks, recipe.images)
    start = data.quick_pretraining(seed) if quick else data.pretraining(cache, seed)
    return build(recipe, tasks, start, seed, report).zoo(variant)


def build(
    recipe: Recipe, tasks: Sequence[Task], start: Split, seed: int, report: Callable[[str], None] = print
) -> Suite:
    """Trains, or finds in the cache, a base on the images of `start` and what is made of it.

    The base's running statistics are those of the tasks' training images, as a merged model's are once they are
    estimated again: heads that are fixed under those of clothes would not fit such a model.
    """
    seconds: dict[str, float] = {}

    def fit(name: str, schedule: Schedule, begin: Params, splits: dict[int, Split], heads: Sequence[Head]) -> Params:
        def make() -> Params:
            report(f"convolutional, seed {seed}: training {name}, {schedule.steps} steps of {schedule.batch}")
            begun = time.perf_counter()
            number = 0 if name == "base" else 1 + min(splits) if len(splits) == 1 else 1 + len(tasks)
            found = train.fit(recipe.net, schedule, begin, [seed, number], splits, heads)
            return {"variables": found, "seconds": np.full(1, time.perf_counter() - begun, np.float32)}

        of = {"name": name, "seed": seed, "net": _settings(recipe.net), "schedule": dataclasses.asdict(schedule)}
        images = [array for split in splits.values() for array in (split.images, split.labels)]
        arrays = [*images, *jax.tree.leaves((begin, heads))]
        made = trained(f"convolutional-{seed}-{name}", make, of=of, code=TRAINING_CODE, data=arrays)
        seconds[name] = round(float(made["seconds"][0]), 1)
        return made["variables"]

    initial, above = jax.random.split(jax.random.key(seed))
    heads = [vision_model.random_head(above, int(start.labels.max()) + 1, recipe.net.dim)]
    base = fit("base", recipe.pretraining, model.init(recipe.net, initial), {0: start}, heads)
    base = jax.device_get(model.reestimated(recipe.net, base, pool(tasks)))
    heads = [_class_embeddings(recipe.net, base, task) for task in tasks]
    own = {number: task.train for number, task in enumerate(tasks)}
    experts = {task.name: fit(task.name, recipe.expert, base, {n: own[n]}, heads) for n, task in enumerate(tasks)}
    multitask = fit("multitask", recipe.multitask, base, own, heads)
    return Suite(recipe, seed, tuple(tasks), tuple(heads), base, experts, multitask, seconds)


def pool(tasks: Sequence[Task]) -> np.ndarray:
    """Training images of these tasks, in equal shares, without labels: `(STATISTICS_IMAGES, 28, 28)`."""
    share = STATISTICS_IMAGES // len(tasks)
    return np.concatenate([task.train.images[:share] for task in tasks])


def _class_embeddings(net: ConvNet, base: Params, task: Task) -> Head:
    """From at most 4,000 training images."""
    some = Split(task.train.images[:4000], task.train.labels[:4000])
    found = np.concatenate([np.asarray(model.features(net, base, part)) for part in _parts(some.images)])
    return vision_model.class_embeddings(found, some.labels, task.classes, SHRINKAGE)


def _parts(images: np.ndarray) -> list[np.ndarray]:
    return [images[first : first + BATCH] for first in range(0, len(images), BATCH)]


def _settings(net: ConvNet) -> dict[str, Any]:
    return {name: getattr(net, name) for name in ("widths", "strides", "dim", "momentum")}


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

    def zoo(self, variant: Variant = "averaged") -> Zoo:
        return Zoo(
            name=NAMES[variant],
            seed=self.seed,
            tasks=tuple(task.name for task in self.tasks),
            base=self.base,
            experts=self.experts,
            multitask=self.multitask,
            labels=lambda task, split: self._split(task, split).labels,
            logits=self.logits,
            grams=functools.cache(self.grams),
            fishers=functools.cache(self.fishers),
            finish=self.finish if variant == "re-estimated" else unchanged,
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
        found = [model.features(self.recipe.net, params, part) for part in self._on_device[task, split]]
        return self.heads[self._number(task)].logits(np.concatenate([np.asarray(part) for part in found]))

    def finish(self, params: Params, tasks: Sequence[str]) -> Params:
        """Running statistics of training images of these tasks, in equal shares."""
        images = pool([self.tasks[self._number(task)] for task in tasks])
        return jax.device_get(model.reestimated(self.recipe.net, params, images))

    def _measured(self, what: str, task: str, make: Callable[[], Params]) -> Params:
        arrays = [*jax.tree.leaves(self.experts[task]), *jax.tree.leaves(self.heads), self._split(task, "train").images]
        of = {"what": what, "net": _settings(self.recipe.net), "images": [GRAM_IMAGES, FISHER_IMAGES]}
        code = (vision_model, vision_train, model, train, activations.collect)
        return trained(f"convolutional-{self.seed}-{task}-{what}", make, of=of, code=code, data=arrays)

    def grams(self, task: str) -> Mapping[str, np.ndarray]:
        """By the kernel's name in the whole tree; of a convolution, of the patches under its window."""

        def make() -> Params:
            batches = _parts(self._split(task, "train").images[:GRAM_IMAGES])
            found = activations.collect_linen(self.recipe.net, self.experts[task], batches, prefix="params/")
            return unflatten_dict({name: np.asarray(gram) for name, gram in found.items()}, sep="/")

        return flatten_dict(self._measured("grams", task, make), sep="/")

    def fishers(self, task: str) -> Params:
        def make() -> Params:
            images = self._split(task, "train").images[:FISHER_IMAGES]
            return train.fisher(self.recipe.net, self.experts[task], self.seed, images, self._number(task), self.heads)

        return self._measured("fisher", task, make)

    def facts(self) -> dict[str, Any]:
        schedules = ("pretraining", "expert", "multitask")
        return {
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(self.base["params"])),
            "network": _settings(self.recipe.net),
            "schedules": {name: dataclasses.asdict(getattr(self.recipe, name)) for name in schedules},
            "images": {t.name: [len(t.train), len(t.validation), len(t.test)] for t in self.tasks},
            "classes": {task.name: task.classes for task in self.tasks},
            "chance": {task.name: round(1 / task.classes, 4) for task in self.tasks},
            "seconds": dict(self.seconds),
        }
