"""Stores in the hands of users: names, places, books edited by hand, tables of scores, lost files, weights 0 and 1."""

import json
import random
import resource
import shutil

import ml_dtypes
import numpy as np
import pytest
from laid import laid
from toys import small

import cfmerge
from cfmerge import temporal
from cfmerge.cli.scores import by_name, table

BASE, *TREES = [small(number) for number in range(13)]
RULES = (
    "ema(weight=0.3)", "ema(weight=0.3, seed='first')", "ema(weight=0)", "ema(weight=0, seed='first')", "ema(weight=1)",
    "ema(technique='task_arithmetic(scale=0.4)')", "ema(technique='magmax(scale=1.0)')", "all", "paint(weight=0)",
    "all(by_time='sqrt', backwards=True)", "all(by_time='exponential', with_base=True)", "all(technique='ace')",
    "all(technique='magmax(scale=0.7)')", "all(technique='ties(density=0.5)')", "last", "base",
)  # fmt: skip


def made(path, deploy="all", count=0, base=BASE, **how):
    time = temporal.Time(path, base, init="base", deploy=deploy, **how)
    for number in range(count):
        time.store(TREES[number], f"t{number + 1}")
    return time


def close(tree, other):
    for name in other:
        np.testing.assert_allclose(np.asarray(tree[name], np.float32), other[name], atol=3e-6)


@pytest.mark.parametrize("seed", range(10))
def test_any_order_of_calls_gives_what_the_rules_give_in_memory(seed, tmp_path):
    """Or refuses what needs experts that are no longer kept, and has changed nothing then."""
    draw = random.Random(seed)
    rules, how = draw.sample(RULES, 2), {"window": draw.choice([None, 1, 3]), "keep": draw.choice([None, 1, 3])}
    try:
        time = temporal.Time(tmp_path / "store", BASE, init=rules[0], deploy=rules[1], **how)
    except cfmerge.CfmergeError as error:
        if "lets go of older experts" not in str(error):
            raise
        time = temporal.Time(tmp_path / "store", BASE, init=rules[0], deploy=rules[1], window=how["window"])
    there = []
    for call in draw.choices(["store", "forget", "init", "deploy", "again"], [4, 2, 1, 1, 1], k=14):
        if call == "store":
            there.append(time.step)
            time.store(TREES[there[-1] % 12], f"t{there[-1]}")
        elif call == "forget" and there:
            leaving = draw.choice(there)
            try:
                time.forget(f"t{leaving}")
                there.remove(leaving)
            except cfmerge.CfmergeError as error:
                if "no longer kept" not in str(error):
                    raise
        elif call == "again":
            time = temporal.Time(time.path)
        assert time.done == [f"t{number}" for number in there]
        if call in {"init", "deploy"}:
            seen = there[-how["window"] :] if how["window"] else there
            kept = {one.number - 1 for one in time._store.book.experts if not one.gone}
            trees = [TREES[number % 12] for number in seen if not how["window"] or number in kept]
            close(getattr(time, call)(like=BASE), temporal.combined(rules[call == "deploy"], BASE, trees))


@pytest.mark.parametrize("name", ["任" * 80, "e.pt", "v1.0", "a/b\\c", "..", "[/red]", "é ü", "a" * 300, "-x", "a=b"])
def test_a_task_may_be_called_anything_that_can_be_shown(name, tmp_path):
    time = made(tmp_path / "store")
    time.store(TREES[0], name)
    time.store(cfmerge.save(TREES[1], tmp_path / "expert"), f"{name} 2")
    close(time.deploy(like=BASE), temporal.combined("all", BASE, TREES[:2]))
    assert all(path.is_dir() for path in (time.path / "experts").iterdir())
    time.forget(name)
    assert temporal.Time(time.path).done == [f"{name} 2"]


@pytest.mark.parametrize("name", ["a\nb", "x\0y", "\ud800"])
def test_a_task_that_cannot_be_shown_is_refused(name, tmp_path):
    time = made(tmp_path / "store")
    with pytest.raises(cfmerge.CfmergeError, match="characters that cannot be shown"):
        time.store(TREES[0], name)
    assert temporal.Time(time.path).done == []


def test_a_task_that_is_none_of_the_named_ones_is_told(tmp_path):
    time = made(tmp_path / "store", tasks=["cars", "birds"])
    with pytest.raises(cfmerge.CfmergeError, match="'bird' is none of its tasks; did you mean 'birds'"):
        time.store(TREES[0], "bird")


@pytest.mark.parametrize("beside", [[], ["notes"]])
def test_a_model_of_the_user_is_not_taken_for_the_stores_base(beside, tmp_path):
    place = cfmerge.save(TREES[5], tmp_path / "models" / "base").parent
    for name in beside:
        (place / name).mkdir()
    with pytest.raises(cfmerge.CfmergeError, match="name another directory"):
        made(place)
    close(cfmerge.open(place / "base"), TREES[5])
    assert sorted(path.name for path in place.iterdir()) == sorted(["base", *beside])


def test_a_store_that_was_stopped_while_it_was_made_is_made(tmp_path):
    cfmerge.save(BASE, tmp_path / "store" / "base")
    (tmp_path / "store" / "base.json").write_text("{}")
    close(made(tmp_path / "store", count=1).deploy(like=BASE), TREES[0])


def test_another_tree_as_base_of_a_store_that_is_there_is_told(tmp_path):
    made(tmp_path / "store")
    assert temporal.Time(tmp_path / "store", BASE).done == []
    with pytest.raises(cfmerge.CfmergeError, match=r"is not the one that the store .* 3 of 3 tensors differ"):
        temporal.Time(tmp_path / "store", TREES[0])


@pytest.mark.parametrize("rule", ["all", "last", "ema(weight=1)"])
@pytest.mark.parametrize("form", ["npz", "module.", "float32"])
def test_the_first_model_goes_out_in_the_form_of_the_later_ones(rule, form, tmp_path, make_model):
    """With the base's config, names and dtypes, whatever the expert has."""
    dtype = ml_dtypes.bfloat16 if form == "float32" else np.float32
    base = make_model(tmp_path / "base", {name: array.astype(dtype) for name, array in BASE.items()}, config={"a": 1})
    time = made(tmp_path / "store", rule, base=base)
    for number, tree in enumerate(TREES[:2]):
        named = {f"module.{name}" if form == "module." else name: array for name, array in tree.items()}
        expert = cfmerge.save(named, tmp_path / (f"e{number}.npz" if form == "npz" else f"e{number}"))
        time.store(expert, f"t{number}")
        served = cfmerge.open(time.deploy())
        assert (sorted(served), served.config) == (sorted(BASE), {"a": 1})
        assert {info.dtype for info in served.tensors.values()} == {np.dtype(dtype)}
        assert (time.path / "deploy" / "model.safetensors").is_file()


def test_a_dtype_is_that_of_the_base_as_it_goes_out_too(tmp_path):
    served = cfmerge.open(made(tmp_path / "store", dtype="bfloat16").deploy())
    assert {info.dtype.name for info in served.tensors.values()} == {"bfloat16"}


@pytest.mark.parametrize("place", ["", "experts/mine", "experts/0001-t1", "states/mine", "base", "time.json"])
def test_a_model_is_not_written_among_the_stores_own_files(place, tmp_path):
    time = made(tmp_path / "store", count=1)
    with pytest.raises(cfmerge.CfmergeError, match="lies among the store's own files"):
        time.deploy(time.path / place, overwrite=True)
    close(time.deploy(time.path / "mine", like=BASE), TREES[0])


@pytest.mark.parametrize("rule", ["all", "all(technique=ties)", "last", "ema(weight=0.5)"])
def test_a_window_from_which_an_expert_is_forgotten_sees_those_that_are_kept(rule, tmp_path):
    time = made(tmp_path / "store", rule, count=5, window=3, keep=3)
    time.forget("t4")
    close(time.deploy(like=BASE), temporal.combined(rule, BASE, [TREES[2], TREES[4]]))


def test_forgetting_says_which_experts_it_would_need(tmp_path):
    time = made(tmp_path / "store", "ema(weight=0.3)", count=4, keep=2)
    with pytest.raises(cfmerge.CfmergeError, match=r"'t3' cannot be forgotten: .*other weights.* without 't1', 't2'"):
        time.forget("t3")
    time = made(tmp_path / "other", "last", count=2, keep=1)
    with pytest.raises(cfmerge.CfmergeError, match=r"'t2' cannot be forgotten: last reads the newest .* without 't1'"):
        time.forget("t2")


def test_running_models_and_experts_that_are_lost(tmp_path):
    time = made(tmp_path / "store", "ema(weight=0.3)", count=3)
    time.deploy()
    shutil.rmtree(time.path / "states")
    close(time.deploy(like=BASE), temporal.combined("ema(weight=0.3)", BASE, TREES[:3]))
    shutil.rmtree(time.path / "states")
    shutil.rmtree(time.path / "experts" / "0002-t2")
    with pytest.raises(cfmerge.CfmergeError, match="experts/0002-t2, the expert 't2', is not there any more"):
        time.deploy()
    time.forget("t2")
    close(time.deploy(like=BASE), temporal.combined("ema(weight=0.3)", BASE, [TREES[0], TREES[2]]))


@pytest.mark.parametrize("change", ["removed", "changed"])
def test_a_link_that_is_lost_can_be_forgotten(change, tmp_path):
    time, path = made(tmp_path / "store", count=1), cfmerge.save(TREES[1], tmp_path / "expert")
    time.store(path, "t2", link=True)
    time.deploy()
    shutil.rmtree(path)
    if change == "changed":
        cfmerge.save(TREES[2], path)
    time.forget("t2")
    close(time.deploy(like=BASE), TREES[0])


def test_an_adapter_is_stored_with_its_config_however_it_is_named(tmp_path, make_model):
    base = make_model(tmp_path / "base")
    name, random = "model.layers.0.self_attn.q_proj", np.random.default_rng(0)
    parts = {"A": random.standard_normal((2, 8)), "B": random.standard_normal((8, 2))}
    weights = {f"base_model.model.{name}.lora_{k}.weight": part.astype(np.float32) for k, part in parts.items()}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 16, "target_modules": ["q_proj"]}
    place = laid(tmp_path / "run", {"adapter_model.safetensors": weights, "adapter_config.json": config})
    time = made(tmp_path / "store", "all", base=base)
    time.store(place, "v.pt")
    time.store(place / "adapter_model.safetensors", "file")
    whole = cfmerge.open(base)[f"{name}.weight"] + 8 * parts["B"] @ parts["A"]
    np.testing.assert_allclose(cfmerge.open(time.deploy())[f"{name}.weight"], whole, atol=1e-5)


def test_a_link_may_name_a_model_on_the_hub(tmp_path, monkeypatch):
    snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / "abc"
    cfmerge.save(TREES[0], snapshot)
    laid(snapshot.parents[1], {"refs/main": "abc"})
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    time = made(tmp_path / "store", cache_dir=str(tmp_path / "hub"), base="org/name")
    close(time.init(like=BASE), TREES[0])
    time.store(cfmerge.save(TREES[1], tmp_path / "expert"), "t1")
    time.store("org/name", "t2")
    time.store("org/name", "t3", link=True)
    close(time.deploy(like=BASE), temporal.combined("all", TREES[0], [TREES[1], TREES[0], TREES[0]]))


@pytest.mark.filterwarnings("error")
def test_a_picture_draws_names_as_they_are_written(tmp_path):
    tasks = ["\u4efb\u52a1", "$\\frac{$", "_hidden", "a|b", "x" * 200]
    history = {step: dict.fromkeys([*tasks, "held"], 0.5) for step in (0, 1)}
    temporal.report_of(history, tasks[:1], tasks, ["held"]).save(tmp_path)
    assert (tmp_path / "scores.png").stat().st_size > 1000


def test_integers_that_differ_are_told_before_the_expert_is_stored(tmp_path):
    base = BASE | {"count": np.array([1])}
    expert = TREES[0] | {"count": np.array([2])}
    time = made(tmp_path / "store", base=base)
    with pytest.raises(cfmerge.CfmergeError, match=r"integers 'count' .* A store takes these when it is made"):
        time.store(expert, "t1")
    assert time.done == []
    time = made(tmp_path / "other", base=base, rules=[{"match": "count", "method": "keep-base"}])
    time.store(expert, "t1")
    assert cfmerge.open(time.deploy())["count"] == [1]
    time = made(tmp_path / "last", "last", base=base)  # nothing is merged
    time.store(expert, "t1")
    assert cfmerge.open(time.deploy())["count"] == [2]


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        ({"order": []}, "the experts' numbers should rise, from 1 to 0"),
        ({"window": -2}, "window counts experts, at least 1; found -2"),
        ({"keep": 0}, "keep counts experts"),
        ({"experts": [{"task": "t1", "number": 7, "path": "experts/0001-t1"}]}, "found \\[7\\]"),
        ({"order": ["t1", "x"]}, "tasks should be those of `order`"),
    ],
)
def test_a_book_that_contradicts_itself_is_told_and_no_file_is_removed(edit, told, tmp_path):
    time = made(tmp_path / "store", count=2)
    book = json.loads((time.path / "time.json").read_text())
    (time.path / "time.json").write_text(json.dumps(book | edit))
    with pytest.raises(cfmerge.CfmergeError, match=told):
        temporal.Time(time.path).deploy()
    with pytest.raises(cfmerge.CfmergeError, match=told):
        time.store(TREES[2], "t3")
    assert len(list((time.path / "experts").iterdir())) == 2


def test_a_store_without_its_hashes_says_so(tmp_path):
    time = made(tmp_path / "store")
    (time.path / "base.json").unlink()
    with pytest.raises(cfmerge.CfmergeError, match=r"base.json: cannot be read"):
        temporal.Time(time.path).deploy()


def test_a_full_disk_is_told_and_changes_nothing(tmp_path):
    time = made(tmp_path / "store", count=1)
    before, limits = (time.path / "time.json").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(cfmerge.CfmergeError, match=r"store .*: cannot be written: File too large"):
            time.evaluate({"t1": 0.5})
        with pytest.raises(cfmerge.CfmergeError, match="cannot be written"):
            made(tmp_path / "new", base=str(time.path / "base"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (time.path / "time.json").read_bytes() == before
    assert not list(time.path.glob(".*.part"))
    assert made(tmp_path / "new", base=str(time.path / "base")).done == []


def test_a_place_that_cannot_be_written_is_told(tmp_path):
    with pytest.raises(cfmerge.CfmergeError, match=r"store /proc/none: cannot be written"):
        made("/proc/none", base=str(cfmerge.save(BASE, tmp_path / "base")))
    time = made(tmp_path / "store", count=1)
    (time.path / ".lock").unlink()
    (time.path / ".lock").mkdir()
    with pytest.raises(cfmerge.CfmergeError, match="cannot be written: Is a directory"):
        time.deploy()


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbfcars,0.5\nbirds,0.6\n", b"task;score\r\ncars;0.5\r\nbirds; 0.6", b"cars\t0.5\n\nbirds\t0.6\n",
        b'\xef\xbb\xbf{"cars": 0.5, "birds": 0.6}',
    ],
)  # fmt: skip
def test_tables_as_spreadsheets_write_them(content, tmp_path):
    (tmp_path / "scores").write_bytes(content)
    assert table(tmp_path / "scores") == {"cars": 0.5, "birds": 0.6}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"cars;0,81\nbirds;0,6\n", "'cars': expected a number, found '0,81'; write 0.81"),
        (b"task,score\ncars,81%\n", "found '81%'; write 0.81 or 81"),
        (b"cars,n/a\nbirds,0.5\n", "'cars': expected a number, found 'n/a'"),
        (b"cars,81%\nbirds,0.5\n", "found '81%'"),
        (b"cars,0.5\n cars ,0.6\n", "'cars' stands there twice"),
        (b'{"cars": 0.5, "cars": 0.6}', "'cars' stands there twice"),
        (b"step,task,score\n0,cars,0.5\n", "expected two columns, task and score .*--step N"),
        (b'{"cars":' + b"9" * 400 + b"}", "expected a number"),
        (b"[" * 100000, "is not valid JSON"),
        (b'"' + b"a" * 200000 + b'",1\n', "is no CSV"),
    ],
)
def test_tables_that_cannot_be_read_say_why(content, told, tmp_path):
    (tmp_path / "scores").write_bytes(content)
    with pytest.raises(cfmerge.CfmergeError, match=told) as caught:
        table(tmp_path / "scores")
    assert len(str(caught.value)) < 500


def test_a_score_is_given_once():
    with pytest.raises(cfmerge.CfmergeError, match="'cars' has a score already"):
        by_name(["cars=0.5", "cars=0.7"])
