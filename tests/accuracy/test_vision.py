"""The vision suite on synthetic images: splits that share nothing, frozen heads, training, and what a zoo answers."""

import dataclasses
import gzip
import io
import subprocess
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import cfmerge
from cfmerge.demo.data import Split, Task
from cfmerge.errors import CfmergeError
from cfmerge_accuracy import debian
from cfmerge_accuracy.images import data, heads
from cfmerge_accuracy.vision import model, suite, train

TINY = model.Vit(dim=16, depth=1, heads=2)
RECIPE = suite.Recipe(TINY, *[train.Schedule(60, 16, 1e-2)] * 3, tasks=("mnist", "animals"), images=(64, 16, 16))


def bars(count: int, classes: int, seed: int, upright: bool) -> Split:
    """Noisy images with one bright bar; where it stands is the label."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count, dtype=np.int32) % classes
    images = generator.integers(0, 60, (count, 28, 28)).astype(np.uint8)
    for image, label in zip(images, labels, strict=True):
        (image if upright else image.T)[:, 4 + 6 * label : 7 + 6 * label] = 250
    return Split(images, labels)


def task(name: str, upright: bool) -> Task:
    splits = (bars(count, 3, seed, upright) for seed, count in enumerate((64, 16, 16)))
    return Task(name, 3, *splits)


@pytest.fixture(scope="module")
def tasks() -> tuple[Task, ...]:
    return task("mnist", True), task("animals", False)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CFMERGE_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def made(tasks, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CFMERGE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield suite.build(RECIPE, tasks, bars(64, 3, 9, True), 0, report=lambda line: None)


# --- data -----------------------------------------------------------------------------------------------------------


def test_no_image_is_in_two_splits():
    images = np.random.default_rng(0).integers(0, 256, (40, 28, 28)).astype(np.uint8)
    labels = np.arange(40, dtype=np.int32) % 4
    whole = Task("x", 4, Split(images, labels), Split(images[10:25], labels[10:25]), Split(images[:12], labels[:12]))
    found = data.limited(whole, (20, 8, 6), np.random.default_rng(1))
    assert [len(found.train), len(found.validation), len(found.test)] == [15, 8, 6]
    kept = [image.tobytes() for split in (found.train, found.validation, found.test) for image in split.images]
    assert len(set(kept)) == len(kept)
    by_bytes = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
    assert all(by_bytes[i.tobytes()] == label for i, label in zip(found.train.images, found.train.labels, strict=True))


def test_faces_of_the_splits_are_disjoint():
    faces = [*data.TRAIN_FACES, *data.VALIDATION_FACES, *data.TEST_FACES]
    assert len(set(faces)) == len(faces)
    assert not any(face.startswith("cm") for face in faces)


def test_families_of_the_splits_are_disjoint(tmp_path, monkeypatch):
    generator = np.random.default_rng(0)
    family = {}
    faces = []
    for number in range(40):
        images = generator.integers(0, 256, (10, 28, 28)).astype(np.uint8)
        family |= {image.tobytes(): f"family{number // 2}" for image in images}
        faces.append((f"family{number // 2}", images))
    monkeypatch.setattr(data, "drawn_faces", lambda cache, characters: tuple(faces))
    found = data._latin("glyph_digits", tmp_path, generator)
    groups = [{family[i.tobytes()] for i in getattr(found, s).images} for s in ("train", "validation", "test")]
    assert [len(group) for group in groups] == [14, 2, 4]
    assert len(set.union(*groups)) == 20


def test_tasks_are_the_same_for_the_same_seed(monkeypatch, tmp_path):
    monkeypatch.setattr(data, "FACES", {"train": data.TRAIN_FACES[:2], **dict(list(data.FACES.items())[1:])})
    first, again, other = (data.load_tasks(tmp_path, seed, ("greek",), (40, 20, 20))[0] for seed in (0, 0, 1))
    assert first.classes == 24
    assert len(first.train), len(first.test) == (40, 20)
    np.testing.assert_array_equal(first.train.images, again.train.images)
    assert not np.array_equal(first.train.images, other.train.images)


def test_a_face_is_drawn_large_and_centred():
    from cfmerge.demo import glyphs

    images = data.draw(glyphs.face_path("DejaVuSans").read_bytes(), "AMi")
    assert images.shape == (3, 28, 28)
    columns = np.flatnonzero(images[1].max(axis=0))
    assert 18 <= len(columns) <= 26
    for image in images:
        rows = np.flatnonzero(image.max(axis=1))
        assert abs((rows[0] + rows[-1]) / 2 - 13.5) <= 1


def test_outlines_are_where_brightness_changes():
    image = np.zeros((1, 28, 28), np.uint8)
    image[0, 5:10, 5:10] = 100
    found = data.outlines(image)[0]
    assert found[5, 5] == found[7, 10] == found[10, 7] == 200
    assert found[7, 7] == found[20, 20] == found[0, 0] == 0


def test_clothes_are_turned_as_their_labels_say(monkeypatch, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (60, 28, 28)).astype(np.uint8)
    files = {
        "train-images-idx3-ubyte.gz": gzip.compress(bytes(16) + images.tobytes()),
        "train-labels-idx1-ubyte.gz": gzip.compress(bytes(8) + bytes(n % 10 for n in range(60))),
    }
    monkeypatch.setattr(data.debian, "read", lambda package, cache: files)
    found = data.pretraining(tmp_path, 0)
    np.testing.assert_array_equal(found.labels // 4, np.arange(60) % 10)
    back = np.stack([np.rot90(image, -(label % 4)) for image, label in zip(found.images, found.labels, strict=True)])
    same = (back == images).all(axis=(1, 2))
    assert 15 < same.sum() < 45
    np.testing.assert_array_equal(back[~same], data.outlines(images)[~same])


# --- Debian's packages --------------------------------------------------------------------------------------------


def archive(files: dict[str, bytes]) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return made.getvalue()


def test_a_package_is_read_and_checked(tmp_path):
    wanted = {"a.gz": b"one", "b.gz": b"two"}
    package = debian.Package("some-data", "usr/share/some/", debian.digest(wanted))
    files = {f"./usr/share/some/{name}": content for name, content in wanted.items()}
    (tmp_path / "some-data.tar").write_bytes(archive({**files, "./usr/share/doc/some/copyright": b"free"}))
    assert debian.read(package, tmp_path) == wanted
    (tmp_path / "some-data.tar").write_bytes(archive({**files, "./usr/share/some/c.gz": b"three"}))
    with pytest.raises(CfmergeError, match="SHA-256"):
        debian.read(package, tmp_path)
    (tmp_path / "some-data.tar").write_bytes(b"no archive")
    with pytest.raises(CfmergeError, match="cannot be read"):
        debian.read(package, tmp_path)


def test_a_package_is_downloaded_once(tmp_path, monkeypatch):
    package = debian.Package("some-data", "usr/share/some/", debian.digest({"a": b"one"}))
    calls = []

    def run(command, cwd, stdout, **options):
        calls.append(command[0])
        if command[0] == "apt-get":
            (tmp_path / cwd / "some-data_1_all.deb").write_bytes(b"")
        else:
            stdout.write(archive({"usr/share/some/a": b"one"}))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(debian.subprocess, "run", run)
    assert debian.read(package, tmp_path) == debian.read(package, tmp_path) == {"a": b"one"}
    assert calls == ["apt-get", "dpkg-deb"]
    assert [path.name for path in tmp_path.iterdir()] == ["some-data.tar"]


@pytest.mark.parametrize("missing", [True, False])
def test_without_apt_the_way_out_is_named(tmp_path, monkeypatch, missing):
    def run(command, **options):
        if missing:
            raise FileNotFoundError("no such file: apt-get")
        return subprocess.CompletedProcess(command, 100, "", "E: Unable to locate package\n")

    monkeypatch.setattr(debian.subprocess, "run", run)
    with pytest.raises(CfmergeError, match="apt-get update") as caught:
        debian.read(debian.AENIGMA, tmp_path)
    assert ("no such file" if missing else "Unable to locate") in str(caught.value)
    assert "dpkg-deb --fsys-tarfile fonts-aenigma_" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


# --- the network and its heads --------------------------------------------------------------------------------------


def test_patches_are_cut_row_by_row():
    image = jnp.arange(28.0 * 28).reshape(1, 28, 28)
    patches = model.Vit()._patches(image)
    assert patches.shape == (1, 16, 49)
    np.testing.assert_array_equal(patches[0, 6].reshape(7, 7), image[0, 7:14, 14:21])


def test_features_have_length_one_and_all_kernels_are_matrices(tasks):
    params = model.init(TINY, jax.random.key(0))
    found = model.features(TINY, params, tasks[0].test.images)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-4)
    leaves = flatten_dict(params, sep="/")
    kinds = cfmerge.models.classify({name: (leaf.shape, str(leaf.dtype)) for name, leaf in leaves.items()})
    matrices = {name for name, one in kinds.items() if one.kind == "matrix"}
    assert matrices == {f"block_0/{name}/kernel" for name in ("q", "k", "v", "out", "mlp_in", "mlp_out")}
    assert {one.kind for name, one in kinds.items() if "embedding/kernel" in name or "position" in name} == {
        "embedding"
    }


def test_the_large_network_has_the_shape_of_clip():
    vit = suite.RECIPES["large"].net
    params = jax.eval_shape(vit.init, jax.random.key(0), jnp.zeros((1, 28, 28), jnp.uint8))
    assert params["params"]["position_embedding"].shape == (49, 768)
    assert params["params"]["block_11"]["mlp_in"]["kernel"].shape == (768, 3072)
    features = jax.eval_shape(vit.apply, params, jnp.zeros((2, 28, 28), jnp.uint8))
    assert features.shape == (2, 768)


def test_the_large_network_can_be_trained():
    """Traced with the shapes of a step; to take one is for a GPU."""
    recipe = suite.RECIPES["large"]
    params = jax.eval_shape(recipe.net.init, jax.random.key(0), jnp.zeros((1, 28, 28), jnp.uint8))["params"]
    above = heads.stacked([heads.random_head(jax.random.key(0), 3, recipe.net.dim)])
    images, labels = jnp.zeros((2, recipe.expert.batch, 28, 28), jnp.uint8), jnp.zeros((2, recipe.expert.batch), int)
    fitted = jax.eval_shape(lambda *given: train._fit(recipe.net, recipe.expert, *given), params, images, labels, above)
    assert jax.tree.map(jnp.shape, fitted) == jax.tree.map(jnp.shape, params)


def test_class_embeddings_find_the_classes():
    generator = np.random.default_rng(0)
    labels = np.arange(300) % 3
    noise = generator.normal(0, [3.0, 0.1, 0.1, 0.1], (300, 4))
    features = 5.0 + noise + np.eye(3, 4, 1)[labels]
    head = heads.class_embeddings(features, labels, 3)
    np.testing.assert_allclose(np.linalg.norm(head.embeddings, axis=1), 1, atol=1e-6)
    assert np.mean(np.argmax(head.logits(features), axis=1) == labels) > 0.95


# --- training -------------------------------------------------------------------------------------------------------


def test_only_the_classes_of_the_own_head_count(tasks):
    params = model.init(TINY, jax.random.key(0))
    both = heads.stacked([heads.random_head(jax.random.key(n), 3, 16) for n in range(2)])
    features = model.features(TINY, params, tasks[0].test.images)
    found = heads.log_likelihoods(features, jnp.full(16, 1), both)
    assert np.isneginf(found[:, :3]).all()
    np.testing.assert_allclose(np.exp(found[:, 3:]).sum(axis=1), 1, atol=1e-5)


def test_training_is_deterministic(tasks):
    above = [heads.random_head(jax.random.key(0), 3, 16)]
    params = model.init(TINY, jax.random.key(0))
    schedule = train.Schedule(3, 8, 1e-3)
    first, again, other = (train.fit(TINY, schedule, params, [seed], {0: tasks[0].train}, above) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert not np.array_equal(first["patch_embedding"]["kernel"], other["patch_embedding"]["kernel"])


def test_experts_learn(made):
    zoo = suite.zoo(made)
    for task in zoo.tasks:
        assert zoo.accuracies(zoo.experts[task], "test", [task])[task] > 0.8
        assert zoo.accuracies(zoo.multitask, "test", [task])[task] > 0.6


def test_accuracies_are_kept_for_the_same_images_and_heads(made):
    """Of a model; images that it was trained on do not judge it."""
    first, second = made.tasks
    own, few = made.judged_by(), slice(8)
    trained = dataclasses.replace(first, train=Split(first.train.images[few], first.train.labels[few]))
    judged = dataclasses.replace(first, test=Split(first.test.images[::-1], first.test.labels[::-1]))
    assert dataclasses.replace(made, tasks=(trained, second)).judged_by() == own
    assert dataclasses.replace(made, tasks=(judged, second)).judged_by() != own
    assert dataclasses.replace(made, heads=made.heads[::-1]).judged_by() != own


def test_a_second_run_finds_everything_in_the_cache(made, tasks, cache):
    lines = []
    arguments = RECIPE, tasks, bars(64, 3, 9, True), 0, lines.append
    first = suite.build(*arguments)
    trained, lines[:] = list(lines), []
    again = suite.build(*arguments)
    assert len(trained) == 4
    assert lines == []
    jax.tree.map(np.testing.assert_array_equal, [first.base, first.experts], [again.base, again.experts])
    assert first.seconds == again.seconds


# --- what a zoo answers ---------------------------------------------------------------------------------------------


def test_grams_are_those_of_the_inputs(made):
    zoo = suite.zoo(made)
    grams = zoo.grams("mnist")
    assert grams["block_0/mlp_out/kernel"].shape == (64, 64)
    patches = TINY._patches(model.normalised(made.tasks[0].train.images)).reshape(-1, 49)
    np.testing.assert_allclose(
        grams["patch_embedding/kernel"], patches.T @ patches / len(patches), rtol=1e-3, atol=1e-4
    )


def test_fishers_are_mean_squares_of_gradients(made):
    zoo = suite.zoo(made)
    fisher = zoo.fishers("animals")
    assert jax.tree.structure(fisher) == jax.tree.structure(zoo.base)
    assert all((leaf >= 0).all() for leaf in jax.tree.leaves(fisher))
    every, images = heads.stacked(made.heads), made.tasks[1].train.images[:16]
    one = made.fisher(zoo.base, images, "animals")
    keys = jax.random.split(jax.random.key(0), 16)

    @jax.jit
    def gradient(params, image, key):
        def scores(params):
            return heads.log_likelihoods(model.features(TINY, params, image[None]), jnp.asarray([1]), every)[0]

        label = jax.random.categorical(key, scores(params))
        return jax.grad(lambda params: scores(params)[label])(params)["block_0"]["v"]["kernel"]

    total = sum(gradient(zoo.base, image, key) ** 2 for image, key in zip(images, keys, strict=True)) / 16
    np.testing.assert_allclose(one["block_0"]["v"]["kernel"], total, rtol=1e-3, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*Fisher is below the floor")  # experts that are sure of all labels
def test_methods_with_data_merge(made):
    zoo = suite.zoo(made)
    experts = [zoo.experts[task] for task in zoo.tasks]
    methods = cfmerge.methods.regmean(), cfmerge.methods.fisher(floor=1e-12)
    for chosen, moments in zip(methods, (zoo.grams, zoo.fishers), strict=True):
        merged = cfmerge.merge_params(zoo.base, experts, chosen, moments=[moments(task) for task in zoo.tasks])
        assert 0 <= zoo.accuracies(merged, "validation", ["mnist"])["mnist"] <= 1
    assert jax.tree.structure(zoo.regmean_pp()) == jax.tree.structure(zoo.base)


def test_facts_name_sizes_and_chance(made):
    facts = suite.zoo(made).facts
    assert facts["chance"] == {"mnist": 0.3333, "animals": 0.3333}
    assert facts["images"]["mnist"] == [64, 16, 16]
    assert set(facts["seconds"]) == {"base", "mnist", "animals", "multitask"}


def test_an_unknown_scale_is_refused():
    with pytest.raises(CfmergeError, match="small, large"):
        suite.load(0, scale="huge")
