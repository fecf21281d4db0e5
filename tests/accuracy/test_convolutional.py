"""The convolutional suite on synthetic images: trees, statistics, Grams, Fishers, determinism."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

import cfmerge
from cfmerge.demo.data import Split, Task
from cfmerge.demo.train import Schedule
from cfmerge.models import Kind, classify
from cfmerge_accuracy.convolutional import model, suite, train
from cfmerge_accuracy.convolutional.model import ConvNet
from cfmerge_accuracy.images import suite as images_suite
from cfmerge_accuracy.images.suite import Recipe, Suite

TINY = Recipe(
    ConvNet(widths=(4, 8), strides=(2, 2), dim=16, momentum=0.8),
    *(Schedule(12, 16, 1e-2), Schedule(6, 16, 3e-3), Schedule(6, 16, 3e-3)),
    tasks=("bars", "spots"),
)


def images(kind: int, count: int, seed: int) -> Split:
    """Two classes: where a bar is (kind 0), or how bright a spot is (kind 1), in noise."""
    generator = np.random.default_rng([kind, seed])
    labels = generator.integers(0, 2, count).astype(np.int32)
    drawn = generator.integers(0, 60, (count, 28, 28))
    for image, label in zip(drawn, labels, strict=True):
        if kind == 0:
            image[4 + 14 * label : 10 + 14 * label] += 150
        else:
            image[10:18, 10:18] += 60 + 130 * label
    return Split(drawn.astype(np.uint8), labels)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def trained(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Suite:
    """One training for all tests: the others find it in the cache."""
    monkeypatch.setenv("CFMERGE_CACHE", str(cache))
    monkeypatch.setattr(images_suite, "GRAM_IMAGES", 24)
    monkeypatch.setattr(images_suite, "FISHER_IMAGES", 4)
    monkeypatch.setattr(suite, "STATISTICS_IMAGES", 32)
    tasks = [
        Task(name, 2, train=images(kind, 64, 0), validation=images(kind, 20, 1), test=images(kind, 20, 2))
        for kind, name in enumerate(TINY.tasks)
    ]
    return suite.build(TINY, tasks, images(0, 64, 3), seed=0, report=lambda message: None)


def test_only_the_trunk_is_merged_and_statistics_are_known_as_such(trained: Suite) -> None:
    zoo = suite.zoo(trained)
    leaves = {"/".join(key.key for key in path): leaf for path, leaf in jax.tree.leaves_with_path(zoo.base)}
    kinds = {name: p.kind for name, p in classify({n: (a.shape, str(a.dtype)) for n, a in leaves.items()}).items()}
    assert {name for name, kind in kinds.items() if kind is Kind.OTHER} == {
        f"batch_stats/norm_{index}/{which}" for index in range(2) for which in ("mean", "var")
    }
    assert kinds["params/conv_1/kernel"] is Kind.CONVOLUTION
    assert kinds["params/features/kernel"] is Kind.MATRIX
    assert kinds["params/conv_0/kernel"] is Kind.VECTOR  # one input channel
    assert Kind.HEAD not in kinds.values()
    assert all(isinstance(leaf, np.ndarray) and leaf.dtype == np.float32 for leaf in leaves.values())


def test_a_second_build_finds_the_same_in_the_cache(trained: Suite) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("trained again")

    start, told = images(0, 64, 3), []
    domain = dataclasses.replace(suite.DOMAIN, fit=fail)
    again = images_suite.build(domain, TINY, trained.tasks, start, 0, told.append)
    assert told == []
    for one, other in zip(jax.tree.leaves(trained.experts), jax.tree.leaves(again.experts), strict=True):
        np.testing.assert_array_equal(one, other)


def test_training_repeats(trained: Suite) -> None:
    splits = {1: trained.tasks[1].train}
    fitted = [train.fit(TINY.net, TINY.expert, trained.base, [0, 2], splits, trained.heads) for _ in range(2)]
    for one, other in zip(*(jax.tree.leaves(tree) for tree in fitted), strict=True):
        np.testing.assert_array_equal(one, other)
    for one, other in zip(jax.tree.leaves(fitted[0]), jax.tree.leaves(trained.experts["spots"]), strict=True):
        np.testing.assert_array_equal(one, other)


def test_batches_walk_through_each_split(trained: Suite) -> None:
    splits = {number: task.train for number, task in enumerate(trained.tasks)}
    batches = list(train.drawn(Schedule(8, 16, 0.1), splits, trained.heads, np.random.default_rng(0)))
    rows = np.concatenate([labels for _, labels in batches])
    seen = {image.tobytes() for drawn, _ in batches for image in drawn}
    assert rows.shape == (128,)
    assert set(rows) == {0, 1, 2, 3}  # two classes of each of two heads
    assert len(seen) > 120  # no image comes again before all of its split have come


def test_reestimated_statistics_are_those_of_the_images(trained: Suite) -> None:
    zoo = suite.zoo(trained, "re-estimated")
    merged = cfmerge.merge_params(zoo.base, zoo.experts, cfmerge.methods.average())
    finished = zoo.finish(merged, zoo.tasks)
    for one, other in zip(*(jax.tree.leaves(tree["params"]) for tree in (merged, finished)), strict=True):
        np.testing.assert_array_equal(one, other)
    pool = np.concatenate([task.train.images[:16] for task in trained.tasks])
    outputs = np.asarray(jax.lax.conv_general_dilated(
        model.normalised(pool)[..., None], merged["params"]["conv_0"]["kernel"], (2, 2), "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    ))  # fmt: skip
    found = finished["batch_stats"]["norm_0"]
    np.testing.assert_allclose(found["mean"], outputs.mean(axis=(0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(found["var"], outputs.var(axis=(0, 1, 2)), rtol=1e-3)


def test_the_variants_share_experts(trained: Suite) -> None:
    averaged, estimated = suite.zoo(trained), suite.zoo(trained, "re-estimated")
    assert (averaged.name, estimated.name) == ("convolutional", "convolutional-reestimated")
    assert averaged.experts is estimated.experts
    assert averaged.finish(averaged.base, averaged.tasks) is averaged.base


def test_logits_labels_and_ensemble(trained: Suite) -> None:
    zoo = suite.zoo(trained)
    for task in zoo.tasks:
        assert zoo.logits(zoo.base, task, "validation").shape == (20, 2)
        assert zoo.labels(task, "test").shape == (20,)
    assert set(zoo.ensemble("validation")) == set(TINY.tasks)


def test_moments_fit_the_tree(trained: Suite) -> None:
    zoo = suite.zoo(trained)
    grams, fishers = ([of(task) for task in zoo.tasks] for of in (zoo.grams, zoo.fishers))
    assert {name: gram.shape for name, gram in grams[0].items()} == {
        "params/conv_0/kernel": (9, 9), "params/conv_1/kernel": (36, 36), "params/features/kernel": (8, 8),
    }  # fmt: skip
    for method, moments in (("regmean", grams), ("fisher", fishers)):
        merged = cfmerge.merge_params(zoo.base, zoo.experts, cfmerge.methods.make(method), moments=moments)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(merged))
    assert all((leaf >= 0).all() for leaf in jax.tree.leaves(fishers))


def test_an_unknown_variant_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(cfmerge.CfmergeError, match="averaged, re-estimated"):
        suite.load(0, variant="other")  # type: ignore[arg-type]
