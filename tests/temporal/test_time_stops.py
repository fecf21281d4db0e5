"""A store whose process is killed: at each moment that the file system can see, the call is made again and agrees."""

import contextlib
import hashlib
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest

import cfmerge
from cfmerge import temporal
from cfmerge.temporal import states
from cfmerge.temporal.merging import merged

WRITES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir")
BASE, *TREES = [
    {"w": np.random.default_rng(number).standard_normal((3, 2)).astype(np.float32), "b": np.arange(4.0, dtype="f4")}
    for number in range(6)
]
_watched = []  # an audit hook cannot be removed


def _hook(event, arguments):
    if _watched and (
        event in WRITES or (event == "open" and isinstance(arguments[1], str) and arguments[1][0] in "wax")
    ):
        _watched[0]()


sys.addaudithook(_hook)


@contextlib.contextmanager
def moments(store, into):
    """Copies of a store at each moment before something in it is made, renamed or removed; each content once."""
    seen, found = set(), []

    def look():
        _watched.clear()
        try:
            if content(store) not in seen:
                seen.add(content(store))
                found.append(shutil.copytree(store, into / str(len(found)), symlinks=True))
        finally:
            _watched.append(look)

    _watched.append(look)
    try:
        yield found
    finally:
        _watched.clear()


def content(store):
    files = [(str(path.relative_to(store)), path.read_bytes() if path.is_file() else b"") for path in store.rglob("*")]
    return hashlib.sha256(repr(sorted(files)).encode()).hexdigest()


def listed(store):
    return sorted(str(path.relative_to(store)) for path in store.rglob("*"))


CALLS = {
    "store": lambda time: time.store(TREES[3], "t4"),
    "deploy": lambda time: time.deploy(),
    "init": lambda time: time.init(),
    "forget": lambda time: time.forget("t3"),
}


@pytest.mark.parametrize(
    ("rule", "how", "call"),
    [
        ("ema(weight=0.3)", {}, "store"),
        ("ema(weight=0.3)", {}, "init"),
        ("ema(weight=0.3)", {"keep": 2}, "store"),
        ("ema(weight=0.3)", {"keep": 2}, "forget"),
        ("all", {"window": 2, "keep": 2}, "store"),
        ("all", {"window": 2, "keep": 2}, "deploy"),
        ("ema(technique='magmax(scale=1.0)')", {}, "forget"),
        ("all(technique='opcm')", {}, "deploy"),
        ("all(technique='ace')", {"window": 3}, "forget"),
        ("all(technique='ace')", {"keep": 1}, "store"),
    ],
)
def test_a_call_that_is_killed_is_made_again(rule, how, call, tmp_path):
    time = temporal.Time(tmp_path / "store", BASE, init="last", deploy=rule, **how)
    for tree, name in zip(TREES[:3], ["t1", "t2", "t3"], strict=False):
        time.store(tree, name)
        if name != "t3":
            time.deploy()
    with moments(time.path, tmp_path) as found:
        CALLS[call](time)
    done, expected = time.done, time.deploy(like=BASE)
    files = listed(time.path)
    assert len(found) > 3
    for copy in found:
        shutil.rmtree(time.path)
        copy.rename(time.path)
        again = temporal.Time(time.path)
        with contextlib.suppress(cfmerge.CfmergeError):  # it is done: there is an expert already, or none any more
            CALLS[call](again)
        assert again.done == done
        got = again.deploy(like=BASE)
        for name in BASE:
            np.testing.assert_array_equal(got[name], expected[name])
        assert listed(time.path) == files


@pytest.mark.parametrize("place", ["states/.ema-0001-0a1b2c3d", "experts/.0002-t9", "..deploy.new", "..init.new"])
def test_a_merge_that_was_killed_and_is_not_gone_on_with_leaves_nothing(place, tmp_path):
    """Another expert has come in between, so that the same merge never comes again."""
    time = temporal.Time(tmp_path / "store", BASE, init="ema(weight=0.5)", deploy="ema(weight=0.5)")
    time.store(TREES[0], "t1")
    left = time.path / f"{place}.cfmerge-12345678"
    left.mkdir(parents=True)
    (left / ".cfmerge-journal").write_text("{}\n{}\n{}\n")
    temporal.Time(time.path).evaluate({"t1": 0.5})
    assert left.exists()  # a merge may go on there
    time.store(TREES[1], "t2")
    time.deploy()
    time.init()
    assert not left.exists()


def test_forgetting_does_not_pile_up_running_models(tmp_path, monkeypatch):
    """One that is made again of all experts is made in steps, and each step needs the one before alone."""
    time = temporal.Time(tmp_path / "store", BASE, init="base", deploy="ema(technique='magmax(scale=1.0)')")
    for number, tree in enumerate(TREES):
        time.store(tree, f"t{number}")
    time.deploy()
    there = []

    def counted(*arguments, **how):
        result = merged(*arguments, **how)
        there.append(len(list((time.path / "states").iterdir())))
        return result

    monkeypatch.setattr(states, "merged", counted)
    time.forget("t0")
    assert (len(there), max(there)) == (4, 3)  # with the one that the book tells of until the end


SCRIPT = """
import sys
import numpy as np
import cfmerge
from cfmerge import temporal
folder = sys.argv[1]
time = temporal.Time(f"{folder}/store", f"{folder}/base", protocol="best-in-time", weight=0.4, keep=1,
                     tasks=["t1", "t2", "t3", "t4"])
for task in time.left:
    start = cfmerge.open(time.init())
    drift = np.random.default_rng(int(task[1])).standard_normal(40_000).astype(np.float32)
    time.store({name: array + drift[: array.size].reshape(array.shape) for name, array in start.items()}, task)
time.deploy(f"{folder}/served", overwrite=True)
"""


@pytest.mark.long
def test_a_training_script_that_is_killed_again_and_again_ends_with_the_same_model(tmp_path):
    """By SIGKILL, at any moment; the script begins anew each time, with what the store says is left."""
    base = {f"w{number}": np.ones((200, 200), np.float32) * number for number in range(8)}
    models = []
    for name in ("whole", "killed"):
        cfmerge.save(base, tmp_path / name / "base")
        draw, kills = random.Random(0), 30 if name == "killed" else 0
        while True:
            process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path / name)])
            if not kills:
                assert process.wait() == 0
                break
            kills -= 1
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(draw.uniform(1.0, 8.0))
            process.kill()
            process.wait()
        models.append({name: array.copy() for name, array in cfmerge.open(tmp_path / name / "served").items()})
    for name in base:
        np.testing.assert_array_equal(models[0][name], models[1][name])
