"""From a network to a `Zoo`: base, experts and multi-task model, out of the cache where they are there."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from cfmerge import activations
from cfmerge.demo import archives, glyphs
from cfmerge.demo import data as demo_data
from cfmerge.demo.data import Split, Task
from cfmerge_accuracy import debian
from cfmerge_accuracy import fisher as fishers
from cfmerge_accuracy.cache import cached, digest
from cfmerge_accuracy.images import data, heads
from cfmerge_accuracy.images.heads import Head, Heads
from cfmerge_accuracy.processes import HERE, Processes, machine, one_core_each
from cfmerge_accuracy.zoo import Params, Zoo
from cfmerge_accuracy.zoo import Split as SplitName

SHARED_CODE = (archives, glyphs, demo_data, debian, data, heads)  # with a domain's own, all that decides a training
GRAM_IMAGES, FISHER_IMAGES, BATCH = 512, 256, 128


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Sizes and steps.

    Attributes:
        net: a Flax module with an attribute `dim`, the width of its features.
        pretraining, expert, multitask: schedules as the domain's `fit` takes them; no pre-training: the domain's `init`
            returns the base; none for multitask: no model of all tasks is trained.
        tasks: of `data.TASKS`.
        images: of a task's (train, validation, test), at most.
        fit: trains experts in the place of the domain's.
        code: modules whose text decides what this `fit` trains.
    """

    net: Any
    pretraining: Any
    expert: Any
    multitask: Any
    tasks: tuple[str, ...] = data.TASKS
    images: tuple[int, int, int] = (8000, 200, 500)
    fit: Callable[..., Params] | None = None
    code: tuple[ModuleType, ...] = ()


@dataclasses.dataclass(frozen=True)
class Domain:
    """What is particular to one kind of network.

    Attributes:
        name: of the domain; `cfmerge_accuracy.<name>.suite.DOMAIN` is it.
        code: modules whose text decides what is trained, besides `SHARED_CODE`.
        sizes: names of the network's attributes.
        init: `(net, key) -> params`.
        fit: `(net, schedule, params, seed, {position of a head: split}, heads) -> params`.
        features: `(net, params, images (batch, 28, 28)) -> (batch, dim)`.
        variables: what the network's `apply` takes, of params.
        prefix: of kernels' names in params, before those that the network gives them.
        settled: `(net, params, tasks) -> params`: what is done with the base once it is pre-trained; None: nothing.
        shrinkage: of the heads' covariance within classes.
    """

    name: str
    code: tuple[ModuleType, ...]
    sizes: tuple[str, ...]
    init: Callable[[Any, jax.Array], Params]
    fit: Callable[..., Params]
    features: Callable[[Any, Params, Any], jax.Array]
    variables: Callable[[Params], Params]
    prefix: str = ""
    settled: Callable[[Any, Params, Sequence[Task]], Params] | None = None
    shrinkage: float = 0.1

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled by its name: jitted functions are not."""
        return _of_name, (self.name,)

    def settings(self, net: Any) -> dict[str, Any]:
        return {name: getattr(net, name) for name in self.sizes}


def _of_name(name: str) -> Domain:
    found: Domain = importlib.import_module(f"cfmerge_accuracy.{name}.suite").DOMAIN
    return found


def load(domain: Domain, recipe: Recipe, seed: int, quick: bool, jobs: int, report: Callable[[str], None]) -> Suite:
    """Fetches images, and builds in at most `jobs` processes; `quick`: without Debian's packages, in this process.

    Raises:
        CfmergeError: data cannot be fetched.
    """
    report(f"{domain.name}, seed {seed}: data")
    cache = archives.cache_directory()
    start = None
    if recipe.pretraining:
        start = data.quick_pretraining(seed) if quick else data.pretraining(cache, seed)
    tasks = _drawn(domain.name, recipe, seed, cache)
    with contextlib.nullcontext(HERE) if quick else one_core_each(jobs) as processes:
        return build(domain, recipe, tasks, start, seed, report, processes)


def _drawn(name: str, recipe: Recipe, seed: int, cache: Path) -> tuple[Task, ...]:
    """The tasks; drawing letters takes a while."""

    def make() -> Params:
        tasks = data.load_tasks(cache, seed, recipe.tasks, recipe.images)
        return {
            task.name: {"classes": np.array(task.classes)}
            | {split: dict(vars(getattr(task, split))) for split in get_args(SplitName)}
            for task in tasks
        }

    of = {"seed": seed, "tasks": recipe.tasks, "images": recipe.images}
    found = cached(f"{name}-{seed}-images", make, of=of, code=SHARED_CODE)
    splits = {task: {split: Split(**found[task][split]) for split in get_args(SplitName)} for task in recipe.tasks}
    return tuple(Task(task, found[task]["classes"].item(), **splits[task]) for task in recipe.tasks)


def build(
    domain: Domain,
    recipe: Recipe,
    tasks: Sequence[Task],
    start: Split | None,
    seed: int,
    report: Callable[[str], None],
    processes: Processes = HERE,
) -> Suite:
    """Trains, or finds in the cache, a base on the images of `start` (None: it needs none) and what is made of it."""
    net, call, seconds = recipe.net, processes.call, dict[str, float]()
    trains, code = recipe.fit or domain.fit, (*SHARED_CODE, *domain.code)

    def made(
        name: str, make: Callable[[], Params], of: Mapping[str, Any], data: Sequence[np.ndarray], *more: ModuleType
    ) -> Params:
        whole = {"name": name, "seed": seed, "net": domain.settings(net), **of}
        return cached(f"{domain.name}-{seed}-{name}", make, of=whole, code=(*code, *more), data=data)

    def fit(name: str, schedule: Any, begin: Params, splits: dict[int, Split], above: Sequence[Head]) -> Params:
        by, more = (domain.fit, ()) if name == "base" else (trains, recipe.code)

        def make() -> Params:
            report(f"{domain.name}, seed {seed}: training {name}, {schedule.steps} steps of {schedule.batch}")
            begun = time.perf_counter()
            number = 0 if name == "base" else 1 + min(splits) if len(splits) == 1 else 1 + len(tasks)
            found = call(by, net, schedule, begin, [seed, number], splits, above)
            return {"params": found, "seconds": np.full(1, time.perf_counter() - begun, np.float32)}

        images = [array for split in splits.values() for array in (split.images, split.labels)]
        arrays = [*images, *jax.tree.leaves((begin, above))]
        found = made(name, make, {"schedule": dataclasses.asdict(schedule)}, arrays, *more)
        seconds[name] = round(float(found["seconds"][0]), 1)
        return found["params"]

    def embeddings(task: Task) -> Head:
        some = Split(task.train.images[:4000], task.train.labels[:4000])
        of = {"classes": task.classes, "shrinkage": domain.shrinkage}
        arrays = [*jax.tree.leaves(base), some.images, some.labels]
        head = made(f"{task.name}-head", lambda: call(_embedded, domain, net, base, some, task.classes), of, arrays)
        return Head(**head)

    if start is None:
        base = made("start", lambda: call(domain.init, net, jax.random.key(seed)), {}, [])
    else:
        classes = int(start.labels.max()) + 1
        begin = made("start", lambda: call(_begin, domain, net, classes, seed), {"classes": classes}, [])
        base = fit("base", recipe.pretraining, begin["params"], {0: start}, [Head(**begin["head"])])
    if domain.settled:
        seen = [*jax.tree.leaves(base), *(task.train.images for task in tasks)]
        base = made("settled", functools.partial(call, domain.settled, net, base, tasks), {}, seen)
    own = [embeddings(task) for task in tasks]
    splits = {number: task.train for number, task in enumerate(tasks)}
    todo = [("multitask", recipe.multitask, splits)] if recipe.multitask else []  # takes longest
    todo += [(task.name, recipe.expert, {number: task.train}) for number, task in enumerate(tasks)]
    with ThreadPoolExecutor(processes.at_once) as threads:
        fitted = list(threads.map(lambda one: fit(one[0], one[1], base, one[2], own), todo))
    multitask = fitted.pop(0) if recipe.multitask else None
    found = dict(zip([task.name for task in tasks], fitted, strict=True))
    return Suite(domain, recipe, seed, tuple(tasks), tuple(own), base, found, multitask, seconds)


def _begin(domain: Domain, net: Any, classes: int, seed: int) -> Params:
    """Random parameters, and the head of the pre-training."""
    below, above = jax.random.split(jax.random.key(seed))
    return {"params": domain.init(net, below), "head": heads.random_head(above, classes, net.dim)._asdict()}


def _embedded(domain: Domain, net: Any, base: Params, images: Split, classes: int) -> Params:
    features = np.concatenate([np.asarray(domain.features(net, base, part)) for part in parts(images.images)])
    return heads.class_embeddings(features, images.labels, classes, domain.shrinkage)._asdict()


def parts(images: np.ndarray) -> list[np.ndarray]:
    """In batches, the last one shorter."""
    return [images[first : first + BATCH] for first in range(0, len(images), BATCH)]


@dataclasses.dataclass(frozen=True, eq=False)
class Suite:
    """What was trained, and the answers that a `Zoo` gives about it."""

    domain: Domain
    recipe: Recipe
    seed: int
    tasks: tuple[Task, ...]
    heads: tuple[Head, ...]
    base: Params
    experts: Mapping[str, Params]
    multitask: Params | None
    seconds: Mapping[str, float]

    def zoo(self) -> Zoo:
        return Zoo(
            name=self.domain.name,
            seed=self.seed,
            tasks=tuple(task.name for task in self.tasks),
            base=self.base,
            experts=self.experts,
            multitask=self.multitask,
            labels=lambda task, split: self.split(task, split).labels,
            logits=self.logits,
            grams=functools.cache(self.grams),
            fishers=functools.cache(self.fishers),
            facts=self.facts(),
            judged_by=self.judged_by(),
        )

    def judged_by(self) -> str:
        """Of `Zoo.judged_by`."""
        of = {"net": self.domain.settings(self.recipe.net), **machine("jax", "jaxlib", "flax")}
        examples = [vars(split) for task in self.tasks for split in (task.validation, task.test)]
        arrays = jax.tree.leaves((self.heads, examples))
        return digest(of, (*self.domain.code, heads, sys.modules[__name__]), arrays)

    def number(self, task: str) -> int:
        return [one.name for one in self.tasks].index(task)

    def split(self, task: str, split: SplitName) -> Split:
        found: Split = getattr(self.tasks[self.number(task)], split)
        return found

    @functools.cached_property
    def _on_device(self) -> dict[tuple[str, str], list[jax.Array]]:
        return {}

    def logits(self, params: Params, task: str, split: SplitName) -> np.ndarray:
        """`(N, classes)`, in the order of the split's images."""
        if (task, split) not in self._on_device:
            self._on_device[task, split] = [jax.device_put(p) for p in parts(self.split(task, split).images)]
        found = [self.domain.features(self.recipe.net, params, part) for part in self._on_device[task, split]]
        return self.heads[self.number(task)].logits(np.concatenate([np.asarray(part) for part in found]))

    def batches(self, task: str) -> list[np.ndarray]:
        """The training images of which Grams are made."""
        return parts(self.split(task, "train").images[:GRAM_IMAGES])

    def grams(self, task: str) -> Mapping[str, np.ndarray]:
        """By the kernel's name in the tree; of a convolution, of the patches under its window."""

        def make() -> Params:
            variables = self.domain.variables(self.experts[task])
            found = activations.collect_linen(self.recipe.net, variables, self.batches(task), prefix=self.domain.prefix)
            return {name: np.asarray(gram) for name, gram in found.items()}

        return flatten_dict(self._measured("grams", task, make), sep="/")

    def fishers(self, task: str) -> Params:
        """Of the first training images; running statistics have none."""
        images = self.split(task, "train").images[:FISHER_IMAGES]
        return self._measured("fisher", task, lambda: self.fisher(self.experts[task], images, task))

    def fisher(self, params: Params, images: np.ndarray, task: str) -> Params:
        """Diagonal Fisher information under the task's head, a tree like `params`."""
        every, number = heads.stacked(self.heads), jnp.asarray(self.number(task))
        total = jax.tree.map(np.zeros_like, params)
        for key, image in zip(jax.random.split(jax.random.key(self.seed), len(images)), images, strict=True):
            square = _square(self.domain, self.recipe.net, params, key, image, number, every)
            total = jax.tree.map(np.add, total, square)
        mean: Params = jax.tree.map(lambda leaf: np.asarray(leaf / np.float32(len(images))), total)
        return {
            name: jax.tree.map(np.zeros_like, leaf) if name == "batch_stats" else leaf for name, leaf in mean.items()
        }

    def _measured(self, what: str, task: str, make: Callable[[], Params]) -> Params:
        images = self.split(task, "train").images
        arrays = [*jax.tree.leaves(self.experts[task]), *jax.tree.leaves(self.heads), images]
        net = self.domain.settings(self.recipe.net)
        of = {"what": what, "net": net, "images": [GRAM_IMAGES, FISHER_IMAGES]}
        code = (*self.domain.code, heads, fishers, activations.collect)
        return cached(f"{self.domain.name}-{self.seed}-{task}-{what}", make, of=of, code=code, data=arrays)

    def facts(self) -> dict[str, Any]:
        schedules = {name: getattr(self.recipe, name) for name in ("pretraining", "expert", "multitask")}
        trunk = {name: leaf for name, leaf in self.base.items() if name != "batch_stats"}
        return {
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(trunk)),
            "network": self.domain.settings(self.recipe.net),
            "schedules": {name: dataclasses.asdict(schedule) for name, schedule in schedules.items() if schedule},
            "images": {t.name: [len(t.train), len(t.validation), len(t.test)] for t in self.tasks},
            "classes": {task.name: task.classes for task in self.tasks},
            "chance": {task.name: round(1 / task.classes, 4) for task in self.tasks},
            "seconds": dict(self.seconds),
        }


@functools.partial(jax.jit, static_argnames=("domain", "net"))
def _square(
    domain: Domain, net: Any, params: Params, key: jax.Array, image: jax.Array, task: jax.Array, every: Heads
) -> Params:
    def log_likelihoods(params: Params) -> jax.Array:
        return heads.log_likelihoods(domain.features(net, params, image[None]), task[None], every)[0]

    return fishers.drawn_square(log_likelihoods, params, key)
