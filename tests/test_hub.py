"""The Hugging Face cache: names from the repository, not from the commit; the folder of a model is its snapshot."""

import pytest
from laid import laid, ones

import cfmerge
from cfmerge import hub
from cfmerge.errors import CfmergeError
from cfmerge.recipe import parse

ONE, TWO = "1" * 40, "2" * 40


def cached(directory, name, commits=(ONE,), main=ONE):
    """A model's folder in the cache: blobs, links to them, and refs/main."""
    folder = directory / f"models--{name}"
    laid(folder, {"blobs/model.safetensors": ones("a"), **({"refs/main": main} if main else {})})
    for commit in commits:
        (folder / "snapshots" / commit).mkdir(parents=True)
        (folder / "snapshots" / commit / "model.safetensors").symlink_to("../../blobs/model.safetensors")
    return folder


def names(*paths):
    recipe = parse({"base": "b", "experts": [str(path) for path in paths]}, "test")
    return [expert.name for expert in recipe.resolved_experts()]


def test_experts_are_called_by_their_repository(tmp_path):
    alpha, beta = cached(tmp_path, "org--alpha"), cached(tmp_path, "beta-model")
    snapshot = alpha / "snapshots" / ONE
    (tmp_path / "link").symlink_to(snapshot)
    for path in (alpha, snapshot, snapshot / "model.safetensors", tmp_path / "link"):
        assert hub.snapshot(path) == ("org/alpha", "" if path == alpha else ONE)
        assert names(path, beta) == ["alpha", "beta-model"]
    assert hub.snapshot(beta) == ("beta-model", "")
    assert hub.snapshot(tmp_path) is None
    assert names(tmp_path / "models--x", tmp_path / "y") == ["models--x", "y"]


def test_two_commits_of_one_repository(tmp_path):
    folder = cached(tmp_path, "org--alpha", (ONE, TWO))
    assert names(*(folder / "snapshots" / commit for commit in (ONE, TWO))) == ["alpha", "alpha-22222222"]


@pytest.mark.parametrize(("commits", "main"), [((ONE, TWO), TWO + "\n"), ((ONE,), None), ((ONE,), TWO)])
def test_the_folder_of_a_model_is_its_snapshot(tmp_path, commits, main):
    source = cfmerge.open_checkpoint(cached(tmp_path, "org--alpha", commits, main))
    assert source.path.name == (TWO if len(commits) > 1 else ONE)
    assert set(source.tensors) == {"a"}


@pytest.mark.parametrize("commits", [(), (ONE, TWO)])
def test_no_snapshot_or_several(tmp_path, commits):
    folder = cached(tmp_path, "org--alpha", commits, None)
    (folder / "snapshots").mkdir(exist_ok=True)
    with pytest.raises(CfmergeError, match=f"name one: snapshots/{ONE}" if commits else "no snapshot; fetch"):
        cfmerge.open_checkpoint(folder)
