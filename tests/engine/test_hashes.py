"""Digests of input files are kept while the files do not change."""

import hashlib
import os
import threading

import pytest

from cfmerge.products import hashes


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A file that changed long ago, for a clock that is ahead; and a cache of its own."""
    monkeypatch.setenv("CFMERGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hashes, "SETTLED", -1e9)
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"first")
    return path


@pytest.fixture
def computed(monkeypatch):
    """The files that were read."""
    read, original = [], hashes._computed

    def counted(path, stop):
        read.append(path.name)
        return original(path, stop)

    monkeypatch.setattr(hashes, "_computed", counted)
    return read


def _digest(path, **how):
    return hashes.sha256(path, threading.Event(), **how)


def test_a_file_is_read_once(file, computed):
    assert not hashes.is_known(file)
    assert _digest(file) == _digest(file) == hashlib.sha256(b"first").hexdigest()
    assert hashes.is_known(file)
    assert computed == [file.name]
    _digest(file, fresh=True)
    assert computed == [file.name] * 2


@pytest.mark.parametrize("how", ["in place", "another file"])
def test_a_changed_file_is_read_again_though_size_and_time_are_as_before(file, computed, how):
    _digest(file)
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    if how == "another file":
        file.rename(file.with_suffix(".old"))
    file.write_bytes(b"other")
    os.utime(file, ns=times)
    assert file.stat().st_mtime_ns == times[1]
    assert _digest(file) == hashlib.sha256(b"other").hexdigest()


def test_what_changed_a_moment_ago_is_not_kept(file, computed, monkeypatch):
    monkeypatch.setattr(hashes, "SETTLED", 60)
    assert _digest(file) == _digest(file)
    assert computed == [file.name] * 2


def test_a_file_that_changes_while_it_is_read_is_not_kept(file, monkeypatch):
    original = hashes._computed

    def changing(path, stop):
        digest = original(path, stop)
        path.write_bytes(b"later on")
        return digest

    monkeypatch.setattr(hashes, "_computed", changing)
    _digest(file)
    monkeypatch.setattr(hashes, "_computed", original)
    assert _digest(file) == hashlib.sha256(b"later on").hexdigest()


def test_damage_in_the_cache_is_passed_over(file, tmp_path):
    expected = _digest(file)
    (kept,) = (path for path in (tmp_path / "cache/sha256").rglob("*") if path.is_file())
    for damage in (b"", expected[:10].encode(), b"\xff" * 64):
        kept.write_bytes(damage)
        assert _digest(file) == expected


def test_a_cache_of_others_is_not_used(file, computed, tmp_path):
    _digest(file)
    (tmp_path / "cache/sha256").chmod(0o777)
    _digest(file)
    assert computed == [file.name] * 2
    assert not hashes.is_known(file)


def test_a_stopped_run_keeps_nothing(file):
    stop = threading.Event()
    stop.set()
    assert hashes.sha256(file, stop) == ""
    assert not hashes.is_known(file)
