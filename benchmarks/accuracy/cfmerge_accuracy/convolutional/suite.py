"""The convolutional domain as a `Zoo`: trained where the cache does not hold it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import numpy as np

from cfmerge.demo import train as demo_train
from cfmerge.demo.data import Split, Task
from cfmerge.demo.train import Schedule
from cfmerge.errors import CfmergeError
from cfmerge_accuracy.convolutional import model, train
from cfmerge_accuracy.convolutional.model import ConvNet
from cfmerge_accuracy.images import data
from cfmerge_accuracy.images import suite as images
from cfmerge_accuracy.images.suite import Recipe, Suite
from cfmerge_accuracy.vision import model as vision_model  # how images are normalised
from cfmerge_accuracy.zoo import Params, Zoo

Variant = Literal["averaged", "re-estimated"]
NAMES = {"averaged": "convolutional", "re-estimated": "convolutional-reestimated"}
STATISTICS_IMAGES = 720  # of all tasks together: any number of them up to six gets an equal share
TASKS = ("mnist", "animals", "upper", "optdigits", "greek", "cyrillic")


def settled(net: ConvNet, base: Params, tasks: Sequence[Task]) -> Params:
    """The base with running statistics of the tasks' training images, as a merged model has once they are re-estimated.

    Heads that are fixed under the statistics of clothes would not fit such a model.
    """
    return jax.device_get(model.reestimated(net, base, pool(tasks)))


def pool(tasks: Sequence[Task]) -> np.ndarray:
    """Training images of these tasks, in equal shares, without labels: `(STATISTICS_IMAGES, 28, 28)`."""
    share = STATISTICS_IMAGES // len(tasks)
    return np.concatenate([task.train.images[:share] for task in tasks])


DOMAIN = images.Domain(
    name="convolutional",
    code=(demo_train, vision_model, model, train),
    sizes=("widths", "strides", "dim", "momentum"),
    init=model.init,
    fit=train.fit,
    features=model.features,
    variables=lambda params: params,
    prefix="params/",
    settled=settled,
    shrinkage=0.3,
)
FULL = Recipe(ConvNet(), Schedule(1000, 64, 2e-3), Schedule(400, 64, 5e-4), Schedule(1200, 64, 1e-3), TASKS)
QUICK = Recipe(
    ConvNet(widths=(16, 32, 64), strides=(2, 2, 2), momentum=0.9),
    *(Schedule(60, 32, 3e-3), Schedule(80, 32, 1e-3), Schedule(80, 32, 1e-3)),
    tasks=data.QUICK,
    images=(512, 50, 100),
)


def load(
    seed: int,
    *,
    quick: bool = False,
    variant: Variant = "averaged",
    jobs: int = 1,
    report: Callable[[str], None] = print,
) -> Zoo:
    """The base, the experts and the multi-task model of one seed.

    Args:
        seed: of splits, initial weights and training.
        quick: three tasks, a tiny network and seconds of training, without Debian's packages.
        variant: "averaged" leaves the running statistics of a merged model as they were merged; "re-estimated" takes
            those of the tasks' training images, without labels, before the model is used. The experts are the same.
        jobs: processes that train at the same time, at most.
        report: is told what is being trained.

    Raises:
        CfmergeError: data cannot be fetched, or there is no such variant.
    """
    if variant not in NAMES:
        raise CfmergeError(f"convolutional: no variant {variant!r}; there are {', '.join(NAMES)}")
    return zoo(images.load(DOMAIN, QUICK if quick else FULL, seed, quick, jobs, report), variant)


def build(
    recipe: Recipe, tasks: Sequence[Task], start: Split, seed: int, report: Callable[[str], None] = print
) -> Suite:
    """Trains, or finds in the cache, a base on the images of `start` and what is made of it."""
    return images.build(DOMAIN, recipe, tasks, start, seed, report)


def zoo(made: Suite, variant: Variant = "averaged") -> Zoo:
    def finish(params: Params, tasks: Sequence[str]) -> Params:
        own = [made.tasks[made.number(task)] for task in tasks]
        return jax.device_get(model.reestimated(made.recipe.net, params, pool(own)))

    found = dataclasses.replace(made.zoo(), name=NAMES[variant])
    return found if variant == "averaged" else dataclasses.replace(found, finish=finish)
