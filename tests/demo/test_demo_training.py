"""The demo's network, its training, its files and its picture, on tiny sizes."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cfmerge
from cfmerge import demo
from cfmerge.demo import checkpoints, data, model, plot, train
from cfmerge.errors import CfmergeError

TRUNK = model.Trunk(dim=16, hidden=24, depth=2)


@pytest.fixture(scope="module")
def params():
    return model.init_trunk(TRUNK, jax.random.key(0))


@pytest.fixture(scope="module")
def split():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 4, 64).astype(np.int32)
    images = generator.integers(0, 100, (64, 28, 28))
    images[np.arange(64), :, labels * 7] = 255
    return data.Split(images.astype(np.uint8), labels)


def test_features_have_unit_norm(params):
    images = jax.random.uniform(jax.random.key(1), (3, 28, 28))
    features = train.features(TRUNK, params, images)
    assert features.shape == (3, 16)
    np.testing.assert_allclose(jnp.linalg.norm(features, axis=-1), 1, atol=1e-4)


def test_parameters_are_named_for_the_merge(params):
    shapes = {name: value.shape for name, value in model.flatten(params).items()}
    assert shapes["block_1.mlp_in.kernel"] == (16, 24)
    assert shapes["image_embedding.kernel"] == (784, 16)
    assert {name.rsplit(".", 1)[1] for name in shapes} == {"kernel", "bias", "scale"}
    jax.tree.map(np.testing.assert_array_equal, model.unflatten(model.flatten(params)), params)


def test_head_rows_are_orthogonal():
    head = model.init_head(jax.random.key(2), 5, 16)
    np.testing.assert_allclose(head @ head.T, model.LOGIT_SCALE**2 * np.eye(5), atol=1e-3)


def test_shift_moves_by_at_most_two_pixels():
    image = jnp.zeros((20, 28, 28)).at[:, 14, 14].set(1)
    moved = train.shift(jax.random.key(0), image)
    rows, columns = np.nonzero(np.asarray(moved).max(axis=0))
    assert moved.shape == image.shape
    assert np.abs(rows - 14).max() <= 2
    assert np.abs(columns - 14).max() <= 2


def test_each_image_is_judged_among_its_own_head(params):
    images = jax.random.uniform(jax.random.key(1), (2, 28, 28))
    rows = jnp.asarray(model.init_head(jax.random.key(2), 5, 16))
    group = jnp.array([0, 0, 0, 1, 1])
    both = train.loss(TRUNK, params, images, jnp.array([1, 4]), rows, group)
    first = train.loss(TRUNK, params, images[:1], jnp.array([1]), rows[:3], jnp.zeros(3, int))
    second = train.loss(TRUNK, params, images[1:], jnp.array([1]), rows[3:], jnp.zeros(2, int))
    np.testing.assert_allclose(both, (first + second) / 2, rtol=1e-5)


def test_training_repeats_and_learns(params, split):
    head = model.init_head(jax.random.key(2), 4, 16)
    schedule = train.Schedule(steps=40, batch=32, learning_rate=1e-2)
    first, second = (train.fit(TRUNK, schedule, params, jax.random.key(3), split, [head]) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)
    assert train.accuracy(TRUNK, first, split, head) > train.accuracy(TRUNK, params, split, head) + 0.2


def test_checkpoints_are_read_and_merged(tmp_path, params):
    experts = {}
    for name, change in (("a", 0.1), ("b", -0.2)):
        experts[name] = tmp_path / name
        checkpoints.save_model(tmp_path / name, TRUNK, jax.tree.map(lambda x, by=change: x + by, params))
    checkpoints.save_model(tmp_path / "base", TRUNK, params)
    cfmerge.merge(base=tmp_path / "base", experts=experts, method="average", output=tmp_path / "merged")
    merged = checkpoints.load_model(tmp_path / "merged")
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y - 0.05, atol=1e-6), merged, params)
    assert json.loads((tmp_path / "base" / "config.json").read_text())["dim"] == 16


def test_an_output_that_is_no_demo_is_kept(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(CfmergeError, match="--overwrite"):
        demo.run(tmp_path)
    with pytest.raises(CfmergeError, match="does not hold a demo"):
        demo.run(tmp_path, overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_picture_is_drawn(tmp_path, split):
    tasks = [data.Task(name, 4, split, split, split) for name in ("one", "two")]
    plot.draw(tmp_path / "demo.png", {row: {"one": 0.5, "two": 1.0} for row in demo.ROWS}, tasks)
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_result_as_json():
    row = {"letters": 0.5}
    result = demo.DemoResult({"ace": row}, {"ace": row}, {"base": Path("out") / "base"}, 1.5, 0, True)
    content = json.loads(result.to_json())
    assert content["accuracies"] == {"ace": row}
    assert content["paths"] == {"base": str(Path("out") / "base")}
