"""The vision domain as one `Zoo`: trained where the cache does not hold it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

from cfmerge import activations
from cfmerge.demo.data import Split, Task
from cfmerge.errors import CfmergeError
from cfmerge_accuracy.images import data
from cfmerge_accuracy.images import suite as images
from cfmerge_accuracy.images.suite import Recipe, Suite
from cfmerge_accuracy.vision import adapters, model, train
from cfmerge_accuracy.vision.adapters import LowRank
from cfmerge_accuracy.vision.model import Vit
from cfmerge_accuracy.vision.train import Schedule
from cfmerge_accuracy.zoo import Params, Zoo

DOMAIN = images.Domain(
    name="vision",
    code=(model, train),
    sizes=("side", "patch", "dim", "depth", "heads"),
    init=model.init,
    fit=train.fit,
    features=model.features,
    variables=lambda params: {"params": params},
)
RECIPES = {
    "small": Recipe(Vit(), Schedule(3500, 32, 1.5e-3), Schedule(600, 32, 1e-3), Schedule(1600, 32, 1e-3)),
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


FIRST = 3  # tasks of the zoos of several steps: by the order of `data.TASKS`
STEPS = {"steps-quarter": 0.25, "steps-once": 1.0, "steps-four": 4.0}  # times those of a `vision` expert
LORA = {"lora": False, "lora-shared": True}  # whether all experts of a seed have one start
LORA_RATE = 8e-3  # of 2e-3, 4e-3, 8e-3: by validation, two experts, 200 steps


def recipe(variant: str, quick: bool = False, scale: str = "small") -> Recipe:
    """Sizes and steps; the variants share the base of `vision` and have its first tasks.

    Raises:
        CfmergeError: no such variant or scale.
    """
    if scale not in RECIPES or (variant and scale != "small"):
        raise CfmergeError(
            f"vision: no scale {scale!r}{' of its variants' if variant else ''}; there are {', '.join(RECIPES)}"
        )
    whole = QUICK if quick else RECIPES[scale]
    if not variant:
        return whole
    if variant in STEPS:
        steps = int(STEPS[variant] * whole.expert.steps)
        own: Schedule = dataclasses.replace(whole.expert, steps=steps)
        return dataclasses.replace(whole, tasks=whole.tasks[:FIRST], expert=own, multitask=None)
    if variant in LORA:
        own = LowRank(whole.expert.steps, whole.expert.batch, LORA_RATE, shared=LORA[variant])
        return dataclasses.replace(whole, expert=own, multitask=None, fit=adapters.fit, code=(adapters,))
    raise CfmergeError(f"vision: no variant {variant!r}; there are {', '.join((*STEPS, *LORA))}")


def load(
    seed: int,
    *,
    variant: str = "",
    quick: bool = False,
    scale: str = "small",
    jobs: int = 1,
    report: Callable[[str], None] = print,
) -> Zoo:
    """The base, the experts and the multi-task model of one seed.

    Args:
        seed: of splits, initial weights and training.
        variant: none; "lora" or "lora-shared"; "steps-quarter", "steps-once" or "steps-four".
        quick: three tasks, a small network and some seconds of training, without Debian's packages.
        scale: "small", or "large" for a GPU.
        jobs: processes that train at the same time, at most.
        report: is told what is being trained.

    Raises:
        CfmergeError: data cannot be fetched, or the variant or the scale is unknown.
    """
    made = zoo(images.load(DOMAIN, recipe(variant, quick, scale), seed, quick, jobs, report))
    return dataclasses.replace(made, name=f"vision-{variant}") if variant else made


def build(
    recipe: Recipe, tasks: Sequence[Task], start: Split, seed: int, report: Callable[[str], None] = print
) -> Suite:
    """Trains, or finds in the cache, a base on the images of `start` and what is made of it."""
    return images.build(DOMAIN, recipe, tasks, start, seed, report)


def zoo(made: Suite) -> Zoo:
    def regmean_pp() -> Params:
        names = [task.name for task in made.tasks]
        batches = [made.batches(name) for name in names]
        return activations.regmean_pp(made.recipe.net, made.base, [made.experts[name] for name in names], batches)

    return dataclasses.replace(made.zoo(), regmean_pp=functools.cache(regmean_pp))
