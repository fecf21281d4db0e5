"""A store whose process is killed: at each moment that the file system can see, the call is made again and agrees."""

import contextlib
import hashlib
import shutil
import sys

import numpy as np
import pytest

import cfmerge
from cfmerge import temporal

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
