"""What `align_study.py` makes of models and measures: curves between two, means of several, zips of other classes."""

import functools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import align_nets
import jax
import numpy as np
from align_nets import CLASSES, Flat, Variables
from flax.traverse_util import unflatten_dict

from cfmerge import activations, align
from cfmerge.activations.spaces import spaces_of_linen
from cfmerge.align import Moments, Permutations, Spaces

POINTS = np.linspace(0, 1, 11)
BATCH = 500  # inputs in one batch of moments and statistics
HEAD = "params/head/"
Who = tuple[int, ...]  # seeds of models of the same ten classes; (replicate,): the two of other classes


# --- models -------------------------------------------------------------------------------------------------------


@functools.cache
def spaces_of(net: str, classes: int = CLASSES) -> Spaces:
    """The spaces of a network, traced."""
    module = align_nets.network(net, classes)
    one = np.zeros((1, 28, 28), np.float32)
    found: Spaces = spaces_of_linen(module, jax.eval_shape(module.init, jax.random.key(0), one), one)
    return found


@functools.lru_cache(maxsize=8)
def models(net: str, who: Who) -> tuple[Variables, ...]:
    """Models of the same classes, one for each seed; or the two of a replicate, of five classes each."""
    images = align_nets.fashion()
    if len(who) > 1:
        return tuple(align_nets.trained(net, seed, images) for seed in who)
    halves = [align_nets.classes_of(who[0], which) for which in (0, 1)]
    seeds = (1000 + 2 * who[0], 1001 + 2 * who[0])
    return tuple(align_nets.trained(net, seed, images, own) for seed, own in zip(seeds, halves, strict=True))


def classes_in(who: Who) -> int:
    """How many classes each of these models has."""
    return CLASSES if len(who) > 1 else CLASSES // 2


def batches(count: int, replicate: int) -> list[np.ndarray]:
    """Unlabelled inputs in batches."""
    found = align_nets.unlabelled(align_nets.fashion(), count, replicate)
    return [found[first : first + BATCH] for first in range(0, len(found), BATCH)]


@functools.lru_cache(maxsize=8)
def moments(net: str, who: Who, inputs: int) -> Moments:
    """Joint moments of models on the same inputs."""
    module, spaces = align_nets.network(net, classes_in(who)), spaces_of(net, classes_in(who))
    found: Moments = activations.collect_joint_linen(module, models(net, who), batches(inputs, who[0]), spaces)
    return found


def tree(flat: Mapping[str, Any]) -> Variables:
    """Variables out of their names."""
    found: Variables = unflatten_dict(dict(flat), sep="/")
    return found


def shared(*flats: Mapping[str, Any], weights: Sequence[float] | None = None) -> Flat:
    """The weighted mean of models, tensor by tensor."""
    shares = [1 / len(flats)] * len(flats) if weights is None else weights
    return {
        name: sum(np.float32(share) * np.asarray(one[name]) for share, one in zip(shares, flats, strict=True))
        for name in flats[0]
    }


# --- matching -----------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=16)
def orders(net: str, who: Who, method: str, inputs: int) -> list[Permutations]:
    """The permutations that a method gives each model."""
    spaces, flats = spaces_of(net, classes_in(who)), [align_nets.flat(one) for one in models(net, who)]
    if len(who) == 1:  # heads are of other classes, and tell nothing
        spaces = Spaces({name: axes for name, axes in spaces.axes.items() if not name.startswith(HEAD)}, spaces.sizes)
        flats = [{name: one[name] for name in spaces.axes} for one in flats]
    named, others = {str(number): one for number, one in enumerate(flats)}, range(1, len(flats))
    if method == "weights":
        return [{}, *(align.weight_matching(spaces, flats[0], flats[n]).permutations for n in others)]
    if method == "activations":
        joint = moments(net, who, inputs)
        return [{}, *(align.activation_matching(spaces, joint, models=(0, n)).permutations for n in others)]
    if method == "merge_many":
        return [*align.merge_many(spaces, named).permutations.values()]
    if method == "c2m3":
        return [*align.universe(spaces, named).permutations.values()]
    return [{} for _ in flats]


def aligned(net: str, who: Who, method: str, inputs: int) -> list[Flat]:
    """The models in one order of neurons."""
    spaces, found = spaces_of(net, classes_in(who)), orders(net, who, method, inputs)
    return [
        align.permute(spaces, align_nets.flat(one), order) for one, order in zip(models(net, who), found, strict=True)
    ]


def repaired(
    net: str, who: Who, merged: Variables, ends: Sequence[Flat], inputs: int, weights: Sequence[float] | None = None
) -> Variables:
    """A merged model whose statistics are set right with inputs: those of its BatchNorms, or REPAIR."""
    module, found = align_nets.network(net, classes_in(who)), batches(inputs, who[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # channels that never change
        if "batch_stats" in merged:
            again: Variables = activations.reset_norms_linen(module, merged, found)
            return again
        spaces = spaces_of(net, classes_in(who))
        again = activations.repair_linen(module, merged, [tree(one) for one in ends], found, spaces, weights=weights)
        return again


# --- the same classes ---------------------------------------------------------------------------------------------


def scored(net: str, variables: Variables) -> tuple[float, float]:
    """Loss and accuracy on test images of all classes."""
    test = align_nets.fashion().test
    found = align_nets.logits(align_nets.network(net), variables, align_nets.inputs(test.images))
    return align_nets.judged(found, test.labels)


def pair(net: str, who: Who, method: str, repair: bool, inputs: int) -> dict[str, Any]:
    """Loss and accuracy along the line between two models in one order."""
    ends = transported(net, net, who) if method == "ot" else aligned(net, who, method, inputs)
    return _curve(net, who, ends, repair, inputs)


def unequal(nets: str, who: Who, method: str, inputs: int) -> dict[str, Any]:
    """Two models of other widths: each by itself, or the line from the first, transported onto the second, to it."""
    first, second = nets.split()
    if method == "members":
        ends = (models(first, who)[0], models(second, who)[1])
        losses, accuracies = zip(*(scored(n, end) for n, end in zip((first, second), ends, strict=True)), strict=True)
        return {"loss": rounded(losses), "accuracy": rounded(accuracies)}
    return _curve(second, who, transported(first, second, who), False, inputs)


def transported(first: str, second: str, who: Who) -> list[Flat]:
    """A model transported onto another by OT fusion, and this one."""
    a, b = align_nets.flat(models(first, who)[0]), align_nets.flat(models(second, who)[1])
    fused = align.ot_fusion(spaces_of(second), a, b, spaces_a=spaces_of(first), share=0.0)
    return [fused.tensors, b]


def _curve(net: str, who: Who, ends: Sequence[Flat], repair: bool, inputs: int) -> dict[str, Any]:
    points = []
    for alpha in POINTS:
        weights = (1 - alpha, alpha)
        merged = tree(shared(*ends, weights=weights))
        if repair:
            merged = repaired(net, who, merged, ends, inputs, weights)
        points.append(scored(net, merged))
    losses, accuracies = zip(*points, strict=True)
    return {"loss": rounded(losses), "accuracy": rounded(accuracies), "barrier": round(barrier(losses), 4)}


def barrier(losses: Sequence[float]) -> float:
    """The most that the loss lies above the line between its ends."""
    return float(np.max(np.asarray(losses) - ((1 - POINTS) * losses[0] + POINTS * losses[-1])))


def rounded(values: Sequence[float]) -> list[float]:
    return [round(float(value), 4) for value in values]


def several(net: str, who: Who, method: str, repair: bool, inputs: int) -> dict[str, Any]:
    """Loss and accuracy of the mean of several models in one order; of each by itself; of their mean logits."""
    if method == "members":
        losses, accuracies = zip(*(scored(net, one) for one in models(net, who)), strict=True)
        return {"loss": rounded([np.mean(losses)]), "accuracy": rounded([np.mean(accuracies)])}
    if method == "ensemble":
        test = align_nets.fashion().test
        module, images = align_nets.network(net), align_nets.inputs(test.images)
        mean = np.mean([align_nets.logits(module, one, images) for one in models(net, who)], axis=0)
        loss, accuracy = align_nets.judged(mean, test.labels)
    else:
        ends = aligned(net, who, method, inputs)
        merged = tree(shared(*ends))
        loss, accuracy = scored(net, repaired(net, who, merged, ends, inputs) if repair else merged)
    return {"loss": rounded([loss]), "accuracy": rounded([accuracy])}


# --- other classes ------------------------------------------------------------------------------------------------


def stops_of(net: str) -> list[str]:
    """The spaces where a zip may stop, from the first layer to the last one in front of the head."""
    names = spaces_of(net, CLASSES // 2).names
    return sorted(name for name in names if name.rpartition("_")[0] in ("params/dense", "params/conv"))


def zipped(net: str, who: Who, method: str, repair: bool, stop: int, inputs: int, budget: float) -> dict[str, Any]:
    """Joint and task accuracy of two models of five classes each, of which so many layers are one trunk."""
    if stop == 0:
        return _judged_jointly(net, who, models(net, who))
    spaces, last = spaces_of(net, classes_in(who)), stops_of(net)[stop - 1]
    own = [align_nets.flat(one) for one in models(net, who)]
    norms = {"reset_norms": True} if net.startswith("batch") else {}
    if method in ("zip", "from weights"):
        similarity: Any = "weights" if method == "from weights" else moments(net, who, inputs)
        made = align.zip_models(spaces, own, similarity, stop_at=last, budget=budget, **norms)
    else:
        own = aligned(net, who, method, inputs)
        made = align.zip_models(spaces, own, None, stop_at=last, method="identity", **norms)
    found = [tree(made.model(name)) for name in made.models]
    if repair and "batch_stats" in found[0]:
        found = [repaired(net, who, one, own, inputs) for one in found]
    elif repair:
        found = _repaired_trunk(net, who, made, own, inputs)
    return _judged_jointly(net, who, found) | {"within": [sum(groups.within) for groups in made.groups.values()]}


def _repaired_trunk(net: str, who: Who, made: Any, ends: Sequence[Flat], inputs: int) -> list[Variables]:
    """The models of a zip whose trunk has channels that vary as those of the aligned models do."""
    module, names = align_nets.network(net, classes_in(who)), [name.removeprefix("params/") for name in made.trunk]
    kernels = [name for name in names if name.endswith("kernel")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # channels that never change
        again = activations.repair_linen(
            module, tree(made.model(made.models[0])), [tree(one) for one in ends], batches(inputs, who[0]),
            match=kernels,
        )  # fmt: skip
    trunk = {name: value for name, value in align_nets.flat(again).items() if name in made.trunk}
    return [tree({**made.tensors(name), **trunk}) for name in made.models]


def _judged_jointly(net: str, who: Who, pair: Sequence[Variables]) -> dict[str, Any]:
    """Accuracy over all classes, by the largest logit of both heads, and of each head on its own classes."""
    test, module = align_nets.fashion().test, align_nets.network(net, classes_in(who))
    images = align_nets.inputs(test.images)
    found = [align_nets.logits(module, one, images) for one in pair]
    halves = [np.array(align_nets.classes_of(who[0], which)) for which in (0, 1)]
    joint = np.concatenate(halves)[np.concatenate(found, axis=-1).argmax(axis=-1)]
    tasks = []
    for half, logits in zip(halves, found, strict=True):
        rows = np.isin(test.labels, half)
        tasks.append(float(np.mean(half[logits[rows].argmax(axis=-1)] == test.labels[rows])))
    return {"joint": round(float(np.mean(joint == test.labels)), 4), "tasks": rounded(tasks)}
