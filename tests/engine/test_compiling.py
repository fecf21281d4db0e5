"""The compilation cache: used by merges of files, the user's alone, and never in a merge's way."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

import cfmerge
from cfmerge.engine import compiling, user_cache

SETTINGS = ("jax_compilation_cache_dir", "jax_enable_compilation_cache", "jax_persistent_cache_min_compile_time_secs")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The directory of cfmerge's cache, where the user has set none of JAX's; it is not there yet."""
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    monkeypatch.delenv("CFMERGE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield tmp_path / "caches/cfmerge/compiled" / user_cache.machine()
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def merged(family, tmp_path, load):
    """`merged()`: the average, by programs that are compiled, or come from the cache."""

    def run():
        jax.clear_caches()
        return load(cfmerge.merge(family.base, family.experts, "average", output=tmp_path / "m", overwrite=True).output)

    return run


def entries(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*-cache"))


def same(a, b):
    return set(a) == set(b) and all(np.array_equal(a[name], b[name]) for name in a)


def test_a_merge_of_files_fills_the_cache_and_restores_the_settings_of_jax(cache, merged):
    before = [getattr(jax.config, name) for name in SETTINGS]
    first = merged()
    made = entries(cache)
    assert len(made) >= 2
    assert (cache.stat().st_mode & 0o777, cache.parent.stat().st_mode & 0o777) == (0o700, 0o700)
    assert [getattr(jax.config, name) for name in SETTINGS] == before
    jax.clear_caches()
    assert float(jax.jit(lambda x: x * 3.25 + 1)(2.0)) == 7.5  # a program of the caller's: it is not kept
    assert same(merged(), first)
    assert entries(cache) == made


WITH_EVENTS = """
import collections, sys, jax
from cfmerge.cli import main
events = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: events.update([event.rsplit("/", 1)[-1]]))
sys.argv = ["cfmerge", *sys.argv[1:]]
try:
    main()
finally:
    print(events["compile_requests_use_cache"], events["cache_hits"])
"""


def test_a_second_process_compiles_nothing(tmp_path, family):
    ours = ("JAX_", "XLA_", "CFMERGE_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    environment |= {"XDG_CACHE_HOME": str(tmp_path / "caches"), "JAX_PLATFORMS": "cpu"}
    experts = [word for path in family.experts for word in ("-e", str(path))]
    words = ["merge", "--base", str(family.base), *experts, "-m", "average", "--quiet", "--overwrite"]
    words += ["-o", str(tmp_path / "out")]

    def run(*more):
        command = [sys.executable, "-c", WITH_EVENTS, *words, *more]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return [int(word) for word in done.stdout.split()], done.stderr

    (asked, hits), _ = run()
    assert asked > hits == 0
    assert run() == ([asked, asked], "")
    assert run("--no-compile-cache") == ([0, 0], "")
    (tmp_path / "caches/cfmerge").chmod(0o777)
    _, told = run()
    assert told.startswith("warning: compilation cache: ")
    assert "can be written by others" in told
    assert "Traceback" not in told


def test_a_cache_that_the_user_has_set_or_turned_off_stays_as_it_is(cache, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    with compiling.cached():
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "own")
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", False)
    with compiling.cached():
        assert jax.config.jax_compilation_cache_dir is None
    assert not cache.exists()


def test_merges_at_once_share_the_cache(cache):
    with compiling.cached():
        with compiling.cached():
            assert jax.config.jax_compilation_cache_dir == str(cache)
        assert jax.config.jax_compilation_cache_dir == str(cache)
    assert jax.config.jax_compilation_cache_dir is None


def test_damaged_entries_change_nothing_and_are_made_again(cache, merged):
    first = merged()
    made = entries(cache)
    for number, entry in enumerate(made):
        entry.write_bytes((b"", b"garbage", entry.read_bytes()[:-9])[number % 3])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(merged(), first)
    assert entries(cache) == []  # JAX would leave them as they are
    assert same(merged(), first)
    assert set(entries(cache)) >= {entry for entry in made if "lambda" not in entry.name}


def test_entries_that_cannot_be_written_change_nothing(cache):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with compiling.cached():
            cache.rmdir()
            cache.write_text("")  # as on a full disk, every write fails
            assert float(jax.jit(lambda x: x * 2.125)(2.0)) == 4.25
    with pytest.warns(UserWarning, match="cannot be made: File exists"), compiling.cached():
        pass
    cache.unlink()
    with pytest.warns(UserWarning, match="another"), compiling.cached():
        warnings.warn("another", stacklevel=2)  # all other warnings are shown


def other_user(cache, monkeypatch):
    cache.mkdir(parents=True, mode=0o700)
    another = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: another)


def all_may_write(cache, monkeypatch):
    cache.mkdir(parents=True)
    cache.chmod(0o777)


def group_may_write_above(cache, monkeypatch):
    cache.mkdir(parents=True, mode=0o700)
    cache.parent.parent.chmod(0o770)


def a_file_is_there(cache, monkeypatch):
    cache.parent.parent.parent.mkdir()
    cache.parent.parent.write_text("")


def read_only(cache, monkeypatch):
    cache.mkdir(parents=True, mode=0o700)
    monkeypatch.setattr(os, "access", lambda path, mode: False)


def no_home(cache, monkeypatch):
    def home(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(Path, "expanduser", home)


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (other_user, "belongs to another user"),
        (all_may_write, "can be written by others"),
        (group_may_write_above, "can be written by others"),
        (a_file_is_there, "cannot be made"),
        (read_only, "cannot be written"),
        (no_home, "no home directory"),
    ],
)
def test_a_directory_that_is_not_the_users_alone_is_not_used(cache, monkeypatch, made, why):
    made(cache, monkeypatch)
    with pytest.warns(UserWarning, match=why), compiling.cached():
        assert jax.config.jax_compilation_cache_dir is None
    assert entries(cache) == []


def test_the_cache_of_an_unwritable_directory_does_not_stop_a_merge(cache, merged, monkeypatch):
    a_file_is_there(cache, monkeypatch)
    with pytest.warns(UserWarning, match="compiled anew"):
        assert merged()


def test_the_files_that_were_not_used_for_the_longest_time_go_first(tmp_path):
    for number in range(4):
        file = tmp_path / f"folder{number % 2}" / f"{number}"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"x" * 100)
        os.utime(file, (1000 + number, 1000))
    user_cache.shrink(tmp_path, 400)
    assert len(list(tmp_path.rglob("?"))) == 4
    user_cache.shrink(tmp_path, 399)
    assert sorted(file.name for file in tmp_path.rglob("?")) == ["3"]
    (tmp_path / "empty").touch()
    user_cache.shrink(tmp_path, -1)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_options_that_xla_does_not_know_are_left_out(monkeypatch):
    compiling.options.cache_clear()
    assert compiling.options(True)
    assert compiling.options(False) is None
    compiling.options.cache_clear()
    monkeypatch.setattr(compiling, "QUICK", {"xla_that_is_gone": 1})
    assert compiling.options(True) is None
    compiling.options.cache_clear()
