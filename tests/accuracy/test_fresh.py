"""The fresh zoos: their names, methods and scales, and the variants of the vision domain that are among them."""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from cfmerge import CfmergeError
from cfmerge.demo.data import Split
from cfmerge_accuracy import compare, methods, suite
from cfmerge_accuracy.images import heads
from cfmerge_accuracy.vision import adapters, model, train
from cfmerge_accuracy.vision import suite as vision

TINY = model.Vit(dim=16, depth=1, heads=2)


def test_fresh_spells_out_its_zoos_once():
    assert suite.named(["vision", "fresh", "vision-lora"]) == ["vision", *suite.FRESH_ZOOS]
    assert not set(suite.FRESH_ZOOS) & set(suite.ZOOS)
    with pytest.raises(CfmergeError, match="did you mean 'vision-lora'"):
        suite.named(["vision-lore"])


def test_only_zoos_of_several_steps_try_scales():
    assert suite.factors("efficientnet", quick=False) == ()
    assert suite.factors("vision-steps-four", quick=False) == compare.FACTORS
    assert suite.factors("vision", quick=True) == (0.5, 2.0)


def test_fresh_zoos_are_merged_by_their_own_methods(tmp_path, monkeypatch):
    asked = {}

    def one(name, seed, options, chosen, report):
        asked[name] = [entry.name for entry in chosen]
        return {"zoo": name, "seed": seed, "tasks": [], "references": {"experts": {}}, "methods": []}

    monkeypatch.setattr(suite, "_one", one)
    monkeypatch.setattr("cfmerge_accuracy.report.write", lambda folder: [])
    suite.run(suite.Options(tmp_path, zoos=["vision", "vision-lora"], seeds=[0]), print)
    assert asked["vision-lora"] == list(methods.FRESH)
    assert "auto" not in asked["vision"]
    suite.run(suite.Options(tmp_path / "few", zoos=["vision-lora"], seeds=[0], methods=["ace"]), print)
    assert asked["vision-lora"] == ["ace"]


def test_variants_share_the_base_and_have_steps_and_tasks_of_their_own():
    whole, four, lora = (vision.recipe(variant) for variant in ("", "steps-four", "lora-shared"))
    assert (four.net, four.pretraining) == (lora.net, lora.pretraining) == (whole.net, whole.pretraining)
    assert four.expert.steps == 4 * whole.expert.steps
    assert four.tasks == whole.tasks[:3]
    assert vision.recipe("steps-once").expert == whole.expert
    assert lora.expert.shared
    assert not vision.recipe("lora").expert.shared
    for bad in ({"variant": "other"}, {"variant": "lora", "scale": "large"}):
        with pytest.raises(CfmergeError, match=r"no (variant|scale)"):
            vision.recipe(**bad)


@pytest.fixture(scope="module")
def trained():
    """For each of own and shared starts: what two experts changed, by path."""
    params = model.init(TINY, jax.random.key(0))
    generator = np.random.default_rng(0)
    split = Split(generator.integers(0, 256, (32, 28, 28)).astype(np.uint8), np.arange(32, dtype=np.int32) % 3)
    head = heads.random_head(jax.random.key(1), 3, TINY.dim)
    before, found = flatten_dict(params), {}
    for shared in (False, True):
        schedule = adapters.LowRank(6, 8, 1e-2, rank=2, shared=shared)
        experts = [adapters.fit(TINY, schedule, params, [0, number], {0: split}, [head]) for number in (1, 2)]
        found[shared] = [{path: leaf - before[path] for path, leaf in flatten_dict(one).items()} for one in experts]
    return found


def test_low_rank_additions_change_kernels_of_blocks_alone(trained):
    for path, delta in trained[False][0].items():
        changed = path[-1] == "kernel" and path[0] == "block_0"
        assert np.linalg.matrix_rank(delta, tol=1e-5) == (2 if changed else 0) if delta.ndim == 2 else not delta.any()


@pytest.mark.parametrize("shared", [False, True])
def test_adapters_start_alike_if_they_share_their_start(trained, shared):
    one, other = (each["block_0", "mlp_in", "kernel"] for each in trained[shared])
    assert not np.array_equal(one, other)
    spaces = [np.linalg.svd(delta)[0][:, :2] for delta in (one, other)]
    overlap = np.linalg.svd(spaces[0].T @ spaces[1])[1]
    assert (overlap.min() > 0.99) == shared


def test_all_that_training_sees_is_drawn_from_its_splits():
    split = Split(np.arange(5 * 784).reshape(5, 28, 28).astype(np.uint8), np.arange(5, dtype=np.int32) % 3)
    above = [heads.Head(np.ones((3, 4), np.float32), np.ones(3, np.float32))] * 2
    images, labels = train.drawn(train.Schedule(3, 4, 0.1), [0], {1: split}, above)
    assert images.shape == (3, 4, 28, 28)
    assert set(labels.ravel()) == {3, 4, 5}
    assert {image.tobytes() for image in images.reshape(-1, 28, 28)} == {image.tobytes() for image in split.images}
