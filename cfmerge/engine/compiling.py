"""How programs are compiled: kept on disk between runs, and quickly where there is little to compute.

    with cached(): ...        JAX's persistent compilation cache is on, in the user's cache directory
    jax.jit(function, compiler_options=options(quick))

A program in the cache is code that this process will run: see `user_cache` for whose it is. Whatever is wrong with the
cache, the merge goes on without it.
"""

import contextlib
import functools
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from cfmerge.engine.user_cache import Unusable, machine, own_directory, shrink
from cfmerge.planning.work import Work

LIMIT = 256 << 20  # bytes; a merge of one model adds about one to three million
ERRORS = "Error (reading|writing) persistent compilation cache entry"  # how JAX's warnings begin

FEW = 1 << 20  # entries of base and experts together, up to which compiling well would take longer than it saves
QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}


# --- quickly --------------------------------------------------------------------------------------------------------


def is_quick(work: Work) -> bool:
    """Whether the programs of these files run so briefly that they are to be compiled quickly.

    Trees in memory may come again and again, by calls that compile once.
    """
    return work.from_files and (1 + len(work.experts)) * work.entries <= FEW


@functools.cache
def options(quick: bool) -> dict[str, Any] | None:
    """The compiler's options, for `jit`; none where XLA does not know them."""
    if not quick or jax.default_backend() != "cpu":
        return None
    try:
        jax.jit(lambda: 0, compiler_options=QUICK)()
    except jax.errors.JaxRuntimeError:
        return None
    return QUICK


# --- the cache ------------------------------------------------------------------------------------------------------


class _Runs:
    """The runs that use the cache now: the first turns it on, the last turns it off."""

    lock, count, context = threading.Lock(), 0, contextlib.ExitStack()


@contextlib.contextmanager
def cached() -> Iterator[None]:
    """Turns on JAX's persistent compilation cache, in the user's `compiled/MACHINE`; afterwards it is as before.

    A cache that the user has set, or turned off (`JAX_ENABLE_COMPILATION_CACHE=false`), stays as it is. A directory
    that cannot be used is told in a warning.
    """
    with _Runs.lock:
        ours = _setting("jax_enable_compilation_cache") and not _setting("jax_compilation_cache_dir")
        if _Runs.count == 0 and ours:
            try:
                folder = own_directory("compiled", machine())
            except Unusable as why:
                warnings.warn(f"compilation cache: {why}; programs are compiled anew in every run", stacklevel=3)
            else:
                _Runs.context.enter_context(_turned_on(folder))
        _Runs.count += 1
    try:
        yield
    finally:
        with _Runs.lock:
            _Runs.count -= 1
            if _Runs.count == 0:
                _Runs.context.close()


def _setting(name: str) -> Any:
    return getattr(jax.config, name)


@contextlib.contextmanager
def _turned_on(folder: Path) -> Iterator[None]:
    settings = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before, failed = {name: _setting(name) for name in settings}, threading.Event()
    with warnings.catch_warnings():
        _catch_errors(failed)
        _set(settings)
        try:
            yield
        finally:
            if _setting("jax_compilation_cache_dir") == settings["jax_compilation_cache_dir"]:
                _set(before)
            if failed.is_set():
                shrink(folder, -1)
            shrink(folder.parent, LIMIT)


def _set(settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # it has opened the directory that was set before


def _catch_errors(failed: threading.Event) -> None:
    """Sets the event at JAX's warnings of an entry that cannot be read or written, and shows all others.

    JAX compiles then. But it never replaces an entry: one that was cut short by a kill or a full disk would stay.
    """
    show = warnings.showwarning

    def shown(message: Any, *where: Any, **how: Any) -> None:
        if "persistent compilation cache entry" in str(message):
            failed.set()
        else:
            show(message, *where, **how)

    warnings.filterwarnings("always", message=ERRORS)  # were they errors, they would end the merge
    warnings.showwarning = shown
