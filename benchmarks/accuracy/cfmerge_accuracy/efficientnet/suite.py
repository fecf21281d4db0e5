"""EfficientNet-Lite0 as a `Zoo`: trained where the cache does not hold it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from cfmerge.demo import archives
from cfmerge.demo import train as demo_train
from cfmerge.demo.data import Task
from cfmerge.demo.train import Schedule
from cfmerge_accuracy.convolutional import model as convolutional
from cfmerge_accuracy.convolutional import train as convolutional_train
from cfmerge_accuracy.efficientnet import model, train, weights
from cfmerge_accuracy.efficientnet.model import EfficientNet, Stage
from cfmerge_accuracy.images import data
from cfmerge_accuracy.images import suite as images
from cfmerge_accuracy.images.suite import Recipe, Suite
from cfmerge_accuracy.text import train as text_train
from cfmerge_accuracy.zoo import Params, Zoo

STATISTICS_IMAGES = 384  # of all tasks together, in equal shares


def init(net: EfficientNet, key: jax.Array) -> Params:
    """ImageNet's weights; of a smaller network than theirs, random ones."""
    if net.stages == model.STAGES:
        return weights.from_torch(weights.imagenet(archives.cache_directory()))
    return jax.device_get(jax.jit(net.init)(key, np.zeros((1, 28, 28), np.uint8)))


def settled(net: EfficientNet, base: Params, tasks: Sequence[Task]) -> Params:
    """The base with running statistics of the tasks' training images, as a merged model has in the end."""
    return jax.device_get(convolutional.reestimated(net, base, pool(tasks)))


def pool(tasks: Sequence[Task]) -> np.ndarray:
    """Training images of these tasks, in equal shares, without labels: `(STATISTICS_IMAGES, 28, 28)`."""
    share = STATISTICS_IMAGES // len(tasks)
    return np.concatenate([task.train.images[:share] for task in tasks])


DOMAIN = images.Domain(
    name="efficientnet",
    code=(demo_train, convolutional, convolutional_train, model, train, weights, text_train),
    sizes=("side", "stages", "stem", "dim", "momentum"),
    init=init,
    fit=train.fit,
    features=convolutional.features,
    variables=lambda params: params,
    prefix="params/",
    settled=settled,
    shrinkage=0.3,
)
FULL = Recipe(EfficientNet(), None, Schedule(150, 32, 1e-3), None, data.TASKS[:3], (4000, 256, 512))
QUICK = Recipe(
    EfficientNet(side=28, stages=(Stage(1, 3, 2, 1, 8), Stage(2, 3, 2, 2, 16)), stem=8, dim=64),
    *(None, Schedule(20, 16, 3e-3), None),
    tasks=data.QUICK,
    images=(256, 64, 64),
)


def load(seed: int, *, quick: bool = False, jobs: int = 1, report: Callable[[str], None] = print) -> Zoo:
    """ImageNet's base and the experts of one seed; no model of all tasks.

    Args:
        seed: of splits and training.
        quick: a tiny network of random weights and seconds of training, without Debian's packages.
        jobs: processes that train at the same time, at most.
        report: is told what is being trained.

    Raises:
        CfmergeError: data or weights cannot be fetched.
    """
    return zoo(images.load(DOMAIN, QUICK if quick else FULL, seed, quick, jobs, report))


def zoo(made: Suite) -> Zoo:
    """Without input covariances: a depthwise kernel has one for each channel."""

    def finish(params: Params, tasks: Sequence[str]) -> Params:
        own = [made.tasks[made.number(task)] for task in tasks]
        return jax.device_get(convolutional.reestimated(made.recipe.net, params, pool(own)))

    def grams(task: str) -> Mapping[str, np.ndarray]:
        return {}

    return dataclasses.replace(made.zoo(), grams=grams, finish=finish)
