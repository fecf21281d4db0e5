"""The protocol on a store: every rule as in memory, running models that follow, what is kept, forgotten and refused."""

import json
import shutil

import numpy as np
import pytest
from toys import small

import cfmerge
from cfmerge import temporal
from cfmerge.temporal import states

BASE, *TREES = [small(number) for number in range(7)]
NAMES = [f"t{number}" for number in range(1, 7)]
KINDS = {
    "ema(weight=0.3)": "sum",
    "ema(weight=0.3, seed='first')": "sum",
    "ema(technique='task_arithmetic(scale=0.4)')": "sum",
    "ema(technique='magmax(scale=1.0)')": "pairs",
    "ema(technique='ties(density=0.5)', seed='first')": "pairs",
    "all": "sum",
    "all(by_time='squared')": "sum",
    "all(by_time='sqrt', backwards=True)": "sum",
    "all(technique='magmax(scale=0.7)')": "running",
    "all(technique='opcm', with_base=True)": "running",
    "all(technique='ace')": "statistics",
    "all(technique='ace', with_base=True)": "statistics",
    "all(technique='ties(density=0.5)')": "experts",
    "paint(weight=0.4)": "none",
    "last": "none",
    "base": "none",
}


def close(tree, other, tolerance=2e-6):
    for name in other:
        np.testing.assert_allclose(np.asarray(tree[name]), np.asarray(other[name]), atol=tolerance)


def made(path, rule, count=0, **how):
    time = temporal.Time(path, BASE, init="base", deploy=rule, **how)
    for name, tree in zip(NAMES[:count], TREES, strict=False):
        time.store(tree, name)
    return time


@pytest.mark.parametrize("rule", KINDS)
def test_a_store_gives_what_the_rule_gives_in_memory(rule, tmp_path):
    time = made(tmp_path / "store", rule)
    for count in (1, 2, 4):
        for name, tree in list(zip(NAMES, TREES, strict=True))[len(time.done) : count]:
            time.store(tree, name)
        close(time.deploy(like=BASE), temporal.combined(rule, BASE, TREES[:count]))
    time.forget("t2")
    close(time.deploy(like=BASE), temporal.combined(rule, BASE, [TREES[0], *TREES[2:4]]))
    assert states.kind_of(time._store, time.rules[1]) == KINDS[rule]


@pytest.mark.parametrize("rule", ["ema(weight=0.3)", "ema(weight=0.3, seed='first')", "all", "all(technique='ace')"])
def test_a_window_slides_by_the_newest_and_the_oldest_alone(rule, tmp_path):
    time = made(tmp_path / "store", rule, count=4, window=4)
    time.deploy()
    time.store(TREES[4], "t5")
    read = time.plan()[1].reads
    assert set(read) <= {"t1", "t2", "t5"}  # t2 is the oldest now, which may weigh more
    assert time.plan()[1].steady
    close(time.deploy(like=BASE), temporal.combined(rule, BASE, TREES[1:5]))


@pytest.mark.parametrize("rule", ["all", "all(technique='ace')"])
def test_a_linked_expert_may_be_removed_when_it_leaves_the_window(rule, tmp_path):
    """As a trainer removes old steps: the running model is made anew, of the window alone."""
    time = temporal.Time(tmp_path / "store", BASE, init="base", deploy=rule, window=3)
    for number, name in enumerate(NAMES[:4]):
        if number == 3:
            time.deploy()
            shutil.rmtree(tmp_path / "t1")
        time.store(cfmerge.save(TREES[number], tmp_path / name), name, link=True)
    assert set(time.plan()[1].reads) == {"t2", "t3", "t4"}
    close(time.deploy(like=BASE), temporal.combined(rule, BASE, TREES[1:4]))
    shutil.rmtree(tmp_path / "t3")
    time.store(TREES[4], "t5")
    close(time.deploy(like=BASE), temporal.combined(rule, BASE, TREES[2:5]))  # the newest added, the oldest taken off
    shutil.rmtree(tmp_path / "t4")
    time.forget("t2")
    time.store(TREES[5], "t6")
    with pytest.raises(cfmerge.CfmergeError, match=r"expert 't4': .* is not there any more; it was stored as a link"):
        time.deploy(rule="all(technique=ties)")


def test_a_running_mean_that_slides_often_is_as_one_from_the_beginning(tmp_path, monkeypatch):
    monkeypatch.setattr(states, "DRIFT", 3.0)  # made anew in between
    time = made(tmp_path / "store", "all", window=3)
    for number in range(8):
        time.store(TREES[number % 6], f"step {number}")
        time.deploy()
    assert time._store.book.states[0].drift <= 3
    close(time.deploy(like=BASE), temporal.combined("all", BASE, [TREES[5], TREES[0], TREES[1]]))


@pytest.mark.parametrize(
    "rule", [rule for rule, kind in KINDS.items() if kind != "experts" and "backwards" not in rule]
)
def test_the_newest_expert_alone_is_kept_where_a_running_model_is(rule, tmp_path):
    time = made(tmp_path / "store", rule, count=4, keep=1)
    assert [path.name[5:] for path in (time.path / "experts").iterdir()] == ["t4"]
    close(time.deploy(like=BASE), temporal.combined(rule, BASE, TREES[:4]))


@pytest.mark.parametrize("rule", ["all(technique='ties')", "all(by_time='sqrt', backwards=True)"])
def test_letting_go_of_experts_that_a_rule_reads_is_refused(rule, tmp_path):
    with pytest.raises(cfmerge.CfmergeError, match="keep=1 lets go of older experts"):
        made(tmp_path / "store", rule, keep=1)
    assert not (tmp_path / "store").exists()
    with pytest.raises(cfmerge.CfmergeError, match="reads the 3 experts in the window"):
        made(tmp_path / "store", "all", keep=2, window=3)


def test_a_running_model_of_which_no_expert_can_be_taken_says_so(tmp_path):
    time = made(tmp_path / "store", "all(technique='magmax')", count=3, keep=1)
    before = (time.path / "time.json").read_bytes()
    with pytest.raises(cfmerge.CfmergeError, match=r"'t3' cannot be forgotten: .* without 't1', 't2'"):
        time.forget("t3")
    assert (time.path / "time.json").read_bytes() == before


def test_both_axes_share_a_running_model(tmp_path):
    time = temporal.Time(tmp_path / "store", BASE, protocol="best-in-time", weight=0.5)
    for tree, name in zip(TREES[:3], NAMES, strict=False):
        close(time.init(like=BASE), time.deploy(like=BASE))
        time.store(tree, name)
    time.deploy()
    assert len(time._store.book.states) == len(list((time.path / "states").iterdir())) == 1


def test_a_rule_that_is_used_once_leaves_no_running_model(tmp_path):
    time = made(tmp_path / "store", "all", count=3)
    close(time.deploy(like=BASE, rule="ema(weight=0.3)"), temporal.combined("ema(weight=0.3)", BASE, TREES[:3]))
    assert not list((time.path / "states").iterdir())
    time.deploy()
    assert [state.rule for state in time._store.book.states] == ["all"]


def test_a_step_reads_the_base_the_running_model_and_the_newest(tmp_path):
    time = made(tmp_path / "store", "ema(weight=0.3)", count=3)
    time.deploy()
    shutil.rmtree(time.path / "experts")  # none of them is read again
    time.store(TREES[3], "t4")
    close(time.deploy(like=BASE), temporal.combined("ema(weight=0.3)", BASE, TREES[:4]))


def test_experts_come_in_any_format_and_go_out_as_the_base(tmp_path, make_model):
    base = make_model(tmp_path / "base", BASE, config={"architectures": ["Toy"]})
    time = temporal.Time(tmp_path / "store", base, init="last", deploy="all")
    for tree, name, path in zip(TREES, NAMES, ["e.pt", "e.npz", "e.msgpack", "folder"], strict=False):
        time.store(cfmerge.save(tree, tmp_path / path), name)
    served = time.deploy(tmp_path / "served")
    assert json.loads((served / "config.json").read_text()) == {"architectures": ["Toy"]}
    close(cfmerge.open(served), temporal.combined("all", BASE, TREES[:4]))


@pytest.mark.parametrize(
    ("rule", "row"), [("ema(weight=0.5)", "| 2 | t2 | 0.5 |"), ("all(technique='ace')", "| 2 | t2 |")]
)
def test_a_card_tells_the_rule_and_the_experts(rule, row, tmp_path):
    time = made(tmp_path / "store", rule, count=2)
    card = (time.deploy() / "README.md").read_text()
    assert "# A merge over time of 2 experts" in card
    assert f"the rule is **{time.rules[1].text}**" in card
    assert row in card.splitlines()
    assert str(tmp_path) not in card


def test_the_last_expert_goes_out_bit_by_bit(tmp_path):
    time = made(tmp_path / "store", "last", count=2)
    for name, array in time.deploy(like=BASE).items():
        np.testing.assert_array_equal(array, TREES[1][name])


def test_a_narrow_base_has_running_models_in_float32(tmp_path, make_model):
    half = {name: array.astype(np.float16) for name, array in BASE.items()}
    base = make_model(tmp_path / "base", half, None)
    time = temporal.Time(tmp_path / "store", base, init="base", deploy="ema(weight=0.01)", technique="average")
    for tree, name in zip(TREES[:4], NAMES, strict=False):
        time.store({key: array.astype(np.float16) for key, array in tree.items()}, name)
        served = time.deploy(tmp_path / "served", overwrite=True)
    kept = time.path / time._store.book.states[0].path
    assert {info.dtype.name for info in cfmerge.open(kept).tensors.values()} == {"float32"}
    assert {info.dtype.name for info in cfmerge.open(served).tensors.values()} == {"float16"}


def test_a_store_is_opened_again_where_it_was(tmp_path):
    made(tmp_path / "store", "ema(weight=0.3)", count=2, tasks=NAMES, held_out=["other"])
    time = temporal.Time(tmp_path / "store")
    assert (time.done, time.left[0], time.step) == (["t1", "t2"], "t3", 2)
    again = made(tmp_path / "store", "ema(weight=0.3)", tasks=NAMES)
    assert again.done == time.done


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"rule": "ema(weight=0.5)"}, r"was made with deploy='ema\(weight=0.3\)', found deploy='ema\(weight=0.5\)'"),
        ({"rule": "all"}, "or make another store. A model by another rule, once: cfmerge time deploy STORE --rule"),
        ({"window": 3}, "was made with window=None, found window=3"),
        ({"tasks": ["a"]}, "was made with tasks="),
    ],
)
def test_another_protocol_on_a_store_is_refused(other, told, tmp_path):
    made(tmp_path / "store", "ema(weight=0.3)", tasks=["t1"])
    with pytest.raises(cfmerge.CfmergeError, match=told):
        made(tmp_path / "store", **({"rule": "ema(weight=0.3)"} | other))


def test_tasks_may_be_added_behind_those_that_a_store_has(tmp_path):
    made(tmp_path / "store", "all", count=1, tasks=["t1"], held_out=["far"])
    time = temporal.Time(tmp_path / "store", tasks=["t1", "t2"], held_out=["far", "farther"])
    assert time.left == ["t2"]
    time.evaluate({"t2": 0.5, "farther": 0.5})
    for lists in ({"tasks": ["t2", "t1", "t3"]}, {"tasks": ["t1"]}, {"held_out": ["farther"]}):
        with pytest.raises(cfmerge.CfmergeError, match="was made with"):
            temporal.Time(tmp_path / "store", **lists)
    with pytest.raises(cfmerge.CfmergeError, match="'t2': an adaptation task cannot be held out"):
        temporal.Time(tmp_path / "store", held_out=["far", "farther", "t2"])


def test_a_base_may_move_but_not_change(tmp_path, make_model):
    base = make_model(tmp_path / "base", BASE, None)
    time = temporal.Time(tmp_path / "store", base, init="base", deploy="all")
    time.store(TREES[0], "t1")
    moved = base.rename(tmp_path / "moved")
    temporal.Time(tmp_path / "store", moved).deploy()
    shutil.rmtree(moved)
    make_model(moved, BASE | {"model.norm.weight": TREES[0]["model.norm.weight"]}, None)
    with pytest.raises(
        cfmerge.CfmergeError, match=r"is not the one .* 1 of 3 tensors differ, such as 'model.norm.weight'"
    ):
        temporal.Time(tmp_path / "store").deploy()


def test_a_link_that_changes_is_told(tmp_path):
    time, path = made(tmp_path / "store", "all"), cfmerge.save(TREES[0], tmp_path / "expert")
    time.store(path, "t1", link=True)
    assert not (time.path / "experts").exists()
    close(time.deploy(like=BASE), TREES[0])
    cfmerge.save(TREES[1], path, overwrite=True)
    with pytest.raises(cfmerge.CfmergeError, match=r"'t1': .*expert has changed since it was stored as a link"):
        time.deploy()
    shutil.rmtree(path)
    with pytest.raises(cfmerge.CfmergeError, match="is not there any more"):
        time.deploy()


def broken(tree, kind):
    first = next(iter(tree))
    if kind == "NaN":
        return tree | {first: np.where(tree[first] > 1, np.nan, tree[first]).astype(np.float32)}
    return {first: tree[first]} if kind == "missing" else tree | {first: tree[first][:3]}


@pytest.mark.parametrize(("kind", "told"), [("NaN", "holds NaN or infinity"), ("missing", "lacks"), ("shape", "shape")])
@pytest.mark.parametrize("form", ["tree", "files"])
def test_an_expert_that_does_not_fit_is_refused_and_nothing_is_lost(kind, told, form, tmp_path):
    time = made(tmp_path / "store", "all", count=1)
    before, expert = (time.path / "time.json").read_bytes(), broken(TREES[1], kind)
    with pytest.raises(cfmerge.CfmergeError, match=told):
        time.store(expert if form == "tree" else cfmerge.save(expert, tmp_path / "expert"), "t2")
    assert (time.path / "time.json").read_bytes() == before
    assert [path.name for path in (time.path / "experts").iterdir()] == ["0001-t1"]
    close(time.deploy(like=BASE), TREES[0])


def test_calls_out_of_place_are_refused_by_name(tmp_path):
    time = made(tmp_path / "store", "all", count=1, tasks=["t1", "t2"], held_out=["other"])
    for call, told in (
        (lambda: time.store(TREES[0], "t1"), "there is an expert of 't1' already"),
        (lambda: time.store(TREES[0], "other"), "'other', which is held out"),
        (lambda: time.store(TREES[0], " "), "needs the name of its task"),
        (lambda: time.store(TREES[0], "t2", link=True), "cannot be linked"),
        (lambda: time.forget("t3"), "holds no expert 't3'"),
        (lambda: time.evaluate({"t3": 0.5}), "unknown task 't3'; did you mean"),
        (lambda: time.evaluate({"t1": float("nan")}), "expected a finite number"),
        (lambda: time.evaluate({"t1": 0.5}, step=2), "step 2 has not come; the newest is 1"),
        (lambda: time.deploy(rule="all(technique=slerp)"), "slerp takes 2 experts at most"),
        (lambda: temporal.Time(tmp_path / "none"), "there is no such store"),
        (lambda: temporal.Time(tmp_path), "is no store"),
        (lambda: temporal.Time(tmp_path / "new", BASE), "name the rules of a new store"),
        (lambda: temporal.Time(tmp_path / "new", BASE, init="base"), "name both rules"),
        (lambda: temporal.Time(tmp_path / "new", BASE, protocol="best"), "did you mean 'best-in-time'"),
        (lambda: temporal.Time(tmp_path / "new", BASE, protocol="offline", deploy="all"), "says both rules"),
        (lambda: temporal.Time(tmp_path / "new", BASE, protocol="offline", layers=[]), "'layers' is no option"),
        (lambda: temporal.Time(tmp_path / "new", BASE, protocol="offline", window=0), "window counts experts"),
        (lambda: temporal.Time(tmp_path / "new", BASE, protocol="best-in-time"), "name the weight of the newest"),
    ):
        with pytest.raises(cfmerge.CfmergeError, match=told):
            call()
    assert time.done == ["t1"]
    assert not (tmp_path / "new").exists()


def test_a_book_that_cannot_be_read_is_told(tmp_path):
    time = made(tmp_path / "store", "all", count=1)
    (time.path / "time.json").write_text('{"base": 3}')
    with pytest.raises(cfmerge.CfmergeError, match=r"time.json: cannot be read as a store's book"):
        temporal.Time(tmp_path / "store")


def test_two_processes_do_not_change_a_store_at_once(tmp_path):
    time, other = made(tmp_path / "store", "all", count=1), temporal.Time(tmp_path / "store")
    with time._store.changing(), pytest.raises(cfmerge.CfmergeError, match="another process changes it now"):
        other.store(TREES[1], "t2")


def test_a_store_that_another_process_has_changed_is_seen_as_it_is_now(tmp_path):
    time = made(tmp_path / "store", "all", count=1, tasks=NAMES[:2])
    other = temporal.Time(tmp_path / "store")
    other.deploy()
    other.store(TREES[1], "t2")
    other.evaluate({"t1": 0.5, "t2": 0.5})
    assert (time.done, time.left, time.step) == (["t1", "t2"], [], 2)
    assert time.plan()[1].reads == ("t2",)
    assert time.report().rows[2].knowledge_accumulation == 0.5


def test_what_a_stop_has_left_is_removed_and_the_call_made_again(tmp_path, monkeypatch):
    time = made(tmp_path / "store", "ema(weight=0.3)", count=1)
    (time.path / "experts" / "0002-t2").mkdir()  # written, but the book does not tell of it
    monkeypatch.setattr(time._store, "write", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        time.deploy()
    again = temporal.Time(tmp_path / "store")
    again.store(TREES[1], "t2")
    close(again.deploy(like=BASE), temporal.combined("ema(weight=0.3)", BASE, TREES[:2]))
    assert len(list((time.path / "states").iterdir())) == 1


def test_forgetting_removes_the_expert_and_the_models_that_it_is_in(tmp_path):
    time = made(tmp_path / "store", "all", count=2)
    time.deploy()
    time.init()
    time.forget("t2")
    assert not (time.path / "deploy").exists()
    assert not (time.path / "experts" / "0002-t2").exists()
    time.store(TREES[2], "t2")
    assert (time.done, time.step) == (["t1", "t2"], 3)


@pytest.mark.parametrize("rule", KINDS)
def test_a_plan_says_whether_a_step_costs_the_same_however_many_tasks_come(rule, tmp_path):
    time = made(tmp_path / "store", rule, count=3)
    time.deploy()
    time.store(TREES[3], "t4")
    told = time.plan()[1]
    grows = KINDS[rule] == "experts" or "backwards" in rule
    assert told.steady is not grows
    assert ("grow with their number" in told.note) is grows
    assert len(told.reads) > 1 if grows else len(told.reads) <= 1
    assert told.summary()["rule"] == time.rules[1].text


def test_options_of_every_merge_are_kept(tmp_path):
    rules = [{"match": "model.norm.weight", "method": "keep-base"}]
    time = made(tmp_path / "store", "all(technique=ties(density=0.5))", count=2, rules=rules, dtype="bfloat16")
    got = cfmerge.open(time.deploy())
    assert {info.dtype.name for info in got.tensors.values()} == {"bfloat16"}
    np.testing.assert_allclose(got["model.norm.weight"].astype(np.float32), BASE["model.norm.weight"], rtol=1e-2)
    assert temporal.Time(tmp_path / "store", rules=rules).done == ["t1", "t2"]


def test_a_report_has_the_scores_of_each_step(tmp_path):
    time = made(tmp_path / "store", "all", count=1, tasks=["t1", "t2"], held_out=["other"])
    time.evaluate({"t1": 0.2, "t2": 0.2, "other": 0.8}, step=0)
    time.evaluate({"t1": 0.9, "t2": 0.3, "other": 0.6})
    rows = time.report().rows
    assert [row.knowledge_accumulation for row in rows] == pytest.approx([0.2, 0.6])
    assert rows[1].geometric_mean == pytest.approx(0.6)


@pytest.mark.parametrize("technique", ["average", "ace", "ties(density=0.5)"])
def test_integers_may_be_the_newest_experts(technique, tmp_path):
    trees = [tree | {"steps": np.int64(10 * number)} for number, tree in enumerate([BASE, *TREES[:2]])]
    how = {"init": "base", "deploy": f"all(technique={technique})"}
    time = temporal.Time(tmp_path / "base's", trees[0], **how)
    with pytest.raises(cfmerge.CfmergeError, match="'steps'"):
        time.store(trees[1], "t1")
    time = temporal.Time(tmp_path / "newest's", trees[0], unmerged="newest", **how)
    for name, tree in zip(NAMES, trees[1:], strict=False):
        time.store(tree, name)
    got = cfmerge.open(time.deploy())
    assert got["steps"] == 20
    close(got, temporal.combined(time.rules[1], BASE, TREES[:2]))
    with pytest.raises(cfmerge.CfmergeError, match="unmerged='other': write base, or newest"):
        temporal.Time(tmp_path / "other", trees[0], unmerged="other", **how)


def test_a_window_that_slides_along_a_training_run_is_that_of_a_merge_of_its_checkpoints(tmp_path):
    time = temporal.Time(tmp_path / "store", BASE, init="last", deploy="ema(weight=0.2, seed=first)", window=4)
    for number, tree in enumerate(TREES[:6], 1):
        path = cfmerge.save(tree, tmp_path / "run" / f"checkpoint-{number}" / "model.safetensors")
        time.store(path, f"step {number}", link=True)
        served = time.deploy(like=BASE)
    window = temporal.along(tmp_path / "run", last=4, decay="ema=0.8")
    cfmerge.merge_recipe(window.recipe, tmp_path / "out")
    close(served, cfmerge.open(tmp_path / "out"))
