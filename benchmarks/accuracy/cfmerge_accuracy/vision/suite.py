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
from cfmerge_accuracy.vision import model, train
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


def load(
    seed: int, *, quick: bool = False, scale: str = "small", jobs: int = 1, report: Callable[[str], None] = print
) -> Zoo:
    """The base, the experts and the multi-task model of one seed.

    Args:
        seed: of splits, initial weights and training.
        quick: three tasks, a small network and some seconds of training, without Debian's packages.
        scale: "small", or "large" for a GPU.
        jobs: processes that train at the same time, at most.
        report: is told what is being trained.

    Raises:
        CfmergeError: data cannot be fetched, or the scale is unknown.
    """
    if scale not in RECIPES:
        raise CfmergeError(f"vision: no scale {scale!r}; there are {', '.join(RECIPES)}")
    return zoo(images.load(DOMAIN, QUICK if quick else RECIPES[scale], seed, quick, jobs, report))


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
