"""The Hugging Face cache: names from the repository, not from the commit; the folder of a model is its snapshot."""

import builtins
import fnmatch
import hashlib
import json
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from laid import laid, ones

import cfmerge
import cfmerge.recipe
from cfmerge import hub
from cfmerge.errors import CfmergeError
from cfmerge.formats import located
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


# --- names on the hub: a fabricated cache, and a fabricated hub; nothing reaches for the network -------------------


CONFIG = {"model_type": "llama", "hidden_size": 8}


def shard_names(count):
    return [f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]


def snapshot(cache, repository, files, commit=ONE, ref="main"):
    """A model in a cache as huggingface_hub lays it: blobs, a snapshot of links, a ref without a newline."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "blobs").mkdir(exist_ok=True)
    (folder / "refs" / ref).write_text(commit)
    for name, content in files.items():
        digest = hashlib.sha256(content).hexdigest()
        (folder / "blobs" / digest).write_bytes(content)
        link = folder / "snapshots" / commit / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(folder / "blobs" / digest, link.parent))
    return folder / "snapshots" / commit


@pytest.fixture
def model_files(make_model, llama, tmp_path):
    """`model_files(expert, shards)`: the files of a model, by name."""

    def made(expert=0, shards=1):
        folder = make_model(tmp_path / "made" / f"{expert}-{shards}", llama(expert), shards=shards)
        (folder / "tokenizer.json").write_text("{}")
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    return made


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, where the library looks; and no network."""
    pytest.importorskip("huggingface_hub")
    from huggingface_hub import constants

    place = tmp_path / "hub"
    place.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(place))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return place


def test_a_merge_of_models_by_their_names(cache, model_files, make_model, llama, load, tmp_path):
    """The experts are called as their repositories; the card tells and repeats them by commit."""
    snapshot(cache, "org/base", model_files(0, shards=2))
    snapshot(cache, "org/math", model_files(1))
    snapshot(cache, "other/math", model_files(2), TWO, "v1")
    result = cfmerge.merge("org/base", ["org/math", "other/math@v1"], "average", output="out")
    assert [spec.name for spec in result.plan.expert_specs] == ["math", "math-v1"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"math-v1 (other/math@{TWO[:12]})" in card
    assert "- org/base\n- org/math\n- other/math\n" in card
    assert f"base: org/base@{ONE}" in card
    assert f"path: other/math@{TWO}" in card
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    paths = [make_model(tmp_path / f"m{number}", llama(number)) for number in range(3)]
    cfmerge.merge(paths[0], {"math": paths[1], "math-v1": paths[2]}, "average", output="again")
    for name, tensor in load(tmp_path / "again").items():
        np.testing.assert_array_equal(load(tmp_path / "out")[name], tensor)
    cfmerge.merge_recipe(cfmerge.recipe.load(tmp_path / "out" / "README.md"), "third")
    assert (tmp_path / "third" / "README.md").read_bytes() == (tmp_path / "out" / "README.md").read_bytes()


def test_side_files_and_a_cache_of_one_s_own(cache, model_files, make_model, llama, tmp_path):
    own = tmp_path / "own"
    snapshot(own, "org/files", {"config.json": b'{"mine": 1}', "vocab.txt": b"a"})
    paths = [str(make_model(tmp_path / f"m{number}", llama(number))) for number in range(3)]
    how = {"output": "out", "side_files": "org/files", "cache_dir": str(own)}
    cfmerge.merge(paths[0], paths[1:], "average", **how)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"mine": 1}
    assert (tmp_path / "out" / "vocab.txt").read_text() == "a"


def test_names_of_experts_from_the_hub(cache):
    given = ["org/math", "org/math@v1.0", "org/math@refs/pr/1", "b/math", "org/code@main"]
    assert names(*given) == ["math", "math-v1.0", "math-refs-pr-1", "b-math", "code"]


@pytest.mark.parametrize(
    "path",
    ["./org/model", "org/model.safetensors", "/org/model", "model", "a/b/c", "org/.model", "~/model", "../model"],
)
def test_what_has_not_the_form_of_a_name_is_a_path(cache, path):
    assert hub.asked(path) is None
    with pytest.raises(CfmergeError, match=r"no such file or directory$"):
        cfmerge.open_checkpoint(path)


def test_a_path_that_exists_is_no_name(cache, make_model, llama, tmp_path):
    make_model(tmp_path / "org" / "model", {"a": np.ones(2, np.float32)}, config={})
    snapshot(cache, "org/model", {})
    assert list(cfmerge.open_checkpoint("org/model").tensors) == ["a"]


def test_a_model_that_is_not_in_the_cache(cache):
    with pytest.raises(CfmergeError) as caught:
        cfmerge.open_checkpoint("org/model@abc1234")
    message = str(caught.value)
    for part in ("no such file", str(cache), "--download", "hf download org/model --revision abc1234", "40 digits"):
        assert part in message
    assert "\n" not in message


def test_a_model_that_is_in_the_cache_in_part(cache, model_files):
    """A shard of its index is missing: the library says nothing of that."""
    files = model_files(0, shards=2)
    snapshot(cache, "org/model", {name: files[name] for name in files if name != shard_names(2)[1]})
    with pytest.raises(CfmergeError) as caught:
        cfmerge.open_checkpoint("org/model")
    for part in (f"shard {shard_names(2)[1]}", "is missing", "--download", "hf download org/model"):
        assert part in str(caught.value)


def test_without_the_library(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CfmergeError, match=r"pip install 'cfmerge\[hub\]'"):
        cfmerge.open_checkpoint("org/model")


@pytest.fixture
def remote(cache, monkeypatch):
    """`remote.files` is a repository; calls of the library are in `remote.calls`, and land in the cache."""
    import huggingface_hub

    here = SimpleNamespace(files={}, calls=[])
    real = huggingface_hub.snapshot_download

    def download(repository, *, dry_run=False, local_files_only=False, allow_patterns=None, **how):
        if local_files_only:
            return real(repository, local_files_only=True, allow_patterns=allow_patterns, **how)
        place = cache / f"models--{repository.replace('/', '--')}" / "snapshots" / ONE
        if dry_run:
            return [
                SimpleNamespace(filename=name, file_size=len(content), is_cached=(place / name).exists())
                for name, content in here.files.items()
            ]
        chosen = [n for n in here.files if any(fnmatch.fnmatchcase(n, pattern) for pattern in allow_patterns)]
        here.calls.append(sorted(chosen))
        snapshot(cache, repository, {name: here.files[name] for name in chosen if not (place / name).exists()})
        return str(place)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return here


def test_what_is_fetched_is_what_is_read_or_copied(remote, model_files, caplog):
    """JSON first, then the weights in one format and the tokenizer: no copies in other formats, no leftovers."""
    files = model_files(0, shards=2)
    remote.files = files | {
        "pytorch_model.bin": b"x" * 100, "onnx/model.onnx": b"x" * 100, "tf_model.h5": b"x", "optimizer.pt": b"x",
        "vocab.txt": b"a", "README.md": b"#", "../evil.json": b"{}", "training_args.bin": b"x",
    }  # fmt: skip
    with pytest.raises(CfmergeError, match="--download"):
        cfmerge.open_checkpoint("org/model")
    assert not remote.calls
    with caplog.at_level("INFO", "cfmerge"):
        source = cfmerge.open_checkpoint("org/model", download=True)
    assert remote.calls[0] == sorted(name for name in files if name.endswith(".json"))
    assert remote.calls[1] == sorted([*shard_names(2), "vocab.txt"])
    size = sum(len(remote.files[name]) for name in remote.calls[1])
    assert f"org/model: 3 files, {size / 1e6:.2f} MB, are fetched" in caplog.text
    assert len(source.tensors) == 11
    assert sorted(source.side_files) == ["config.json", "tokenizer.json", "vocab.txt"]
    remote.calls.clear()
    cfmerge.open_checkpoint("org/model", download=True)  # the cache comes first
    assert not remote.calls


def test_a_part_in_the_cache_is_completed(remote, cache, model_files, caplog):
    remote.files = model_files(0, shards=2)
    snapshot(cache, "org/model", {name: remote.files[name] for name in remote.files if name != shard_names(2)[1]})
    with caplog.at_level("INFO", "cfmerge"):
        assert len(cfmerge.open_checkpoint("org/model", download=True).tensors) == 11
    assert "org/model: 1 files" in caplog.text


def test_the_weights_of_one_format(remote, model_files):
    """safetensors where they are; of an adapter its weights; of side files no weights at all."""
    weights = model_files(0)["model.safetensors"]
    remote.files = {
        "config.json": b"{}",
        "pytorch_model.bin": b"x",
        "model.safetensors": weights,
        "model.fp16.safetensors": b"x",
    }
    cfmerge.open_checkpoint("org/model", download=True)
    assert remote.calls == [["config.json"], ["model.safetensors"]]
    remote.calls.clear()
    remote.files = {"adapter_config.json": b"{}", "adapter_model.bin": b"x", "adapter_model.safetensors": weights}
    located("org/adapter", True, None)
    assert remote.calls == [["adapter_config.json"], ["adapter_model.safetensors"]]
    remote.calls.clear()
    remote.files = {"config.json": b"{}", "vocab.txt": b"a", "model.safetensors": weights}
    located("org/files", True, None, weights=False)
    assert remote.calls == [["config.json"], ["vocab.txt"]]


def test_a_repository_without_weights(remote):
    remote.files = {"config.json": b"{}", "model.gguf": b"GGUF"}
    with pytest.raises(CfmergeError) as caught:
        cfmerge.open_checkpoint("org/model", download=True)
    assert str(caught.value).startswith("org/model: no weights here")
    assert "/tmp" not in str(caught.value).split("org/model", 1)[0]


def response(status):
    """An answer of the hub, as the library's errors take one."""
    import huggingface_hub.errors as errors

    module = sys.modules[errors.HTTPError.__module__.split(".")[0]]
    return module.Response(status, request=module.Request("GET", "https://hub/api"))


ERRORS = {
    "GatedRepoError": "authors ask for consent",
    "RepositoryNotFoundError": "no such model on the hub",
    "RevisionNotFoundError": "no branch, tag or commit 'v1'",
    "DisabledRepoError": "disabled",
    "HfHubHTTPError": "the hub answers 503",
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE",
    "LocalEntryNotFoundError": "cannot be reached",
    "HFValidationError": "is no name on the hub",
    "DryRunError": "cannot be reached",
    "LocalTokenNotFoundError": "log in",
    "FileMetadataError": "cannot be fetched: long story",
    "XetDownloadError": "cannot be fetched: long story",
    "ConnectionError": "cannot be fetched: long story",
}


@pytest.mark.parametrize("name", list(ERRORS))
def test_each_error_of_the_library_is_one_sentence(cache, monkeypatch, name):
    import huggingface_hub
    from huggingface_hub import errors

    kind = getattr(errors, name, None) or getattr(builtins, name, None)
    if kind is None:
        pytest.skip(f"this version of huggingface_hub has no {name}")
    how = {"response": response(503)} if issubclass(kind, errors.HfHubHTTPError) else {}

    def fails(*arguments, **named):
        raise kind("long story\nwith more lines", **how)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    with pytest.raises(CfmergeError) as caught:
        hub.listed(hub.Asked("org/model", "v1"), None)
    message = str(caught.value)
    assert message.startswith("org/model@v1: ")
    assert ERRORS[name] in message
    assert "\n" not in message


def test_errors_that_are_not_the_library_s_stay(cache, monkeypatch):
    import huggingface_hub

    def fails(*arguments, **named):
        raise ZeroDivisionError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    with pytest.raises(ZeroDivisionError):
        hub.listed(hub.Asked("org/model", ""), None)


def test_the_library_itself_without_a_network(cache):
    """Names that it does not allow, and downloads while it is set to be offline."""
    with pytest.raises(CfmergeError, match="is no name on the hub"):
        cfmerge.open_checkpoint("org/a--b")
    with pytest.raises(CfmergeError, match="hub cannot be reached"):
        cfmerge.open_checkpoint("org/model", download=True)


def test_the_command_line_takes_names(cache, model_files, capsys, monkeypatch):
    from cfmerge.cli import app

    snapshot(cache, "org/model", model_files(0))
    monkeypatch.setenv("COLUMNS", "200")
    app(["inspect", "org/model@main", "--cache-dir", str(cache)], standalone_mode=False)
    shown = capsys.readouterr().out
    assert "lm_head.weight" in shown
    assert "\norg/model@" in shown  # and not the snapshot's path
