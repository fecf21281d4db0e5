"""The digest of a plan: a hash of everything that decides what is written, so that the same work is known again."""

import hashlib
import inspect
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfmerge.core.registry import registry

if TYPE_CHECKING:
    from cfmerge.planning.resolved import Resolved


def digest_of(plan: "Resolved") -> str:
    """The digest of a plan: of its recipes, methods, inputs (names, sizes, times of files; headers) and jobs."""
    told = hashlib.sha256()
    for text in _told(plan):
        told.update(text.encode() + b"\0")
    return told.hexdigest()


def _told(plan: "Resolved") -> Iterator[str]:
    for label, one in plan.results.items():
        yield label
        yield one.recipe.to_yaml()
    yield from _foreign_code()
    if plan.statistics:
        yield repr(plan.statistics.metadata())
        kept = Path(plan.recipe.statistics or "").expanduser()
        files = sorted(path for path in kept.rglob("*") if path.is_file()) if plan.recipe.statistics else []
        # Statistics that are in memory are known by no file: such a merge is the same as no other.
        yield from map(_state, files) if files else iter([secrets.token_hex()])
    moments: list[Any] = [expert.moments for expert in plan.work.experts if expert.moments is not None]
    for source in (plan.base, *plan.experts, *moments):
        yield repr([(name, info.shape, info.dtype.name) for name, info in source.tensors.items()])
        yield repr(getattr(source, "config", None))
        yield from map(_state, source.files)
    yield repr(plan.edits)
    yield repr([getattr(source, "told", "") for source in (plan.base, *plan.experts)])
    for job in plan.jobs:
        yield repr((job.name, job.assignment.action, job.writes, job.sources, job.dtype.name))


def _state(file: Path) -> str:
    state = file.stat()
    return f"{file.absolute()} {state.st_size} {state.st_mtime_ns} {state.st_ctime_ns}"


def _foreign_code() -> Iterator[str]:
    """The source files of registered methods that are not cfmerge's own; by chance where there is no file."""
    factories = [inspect.unwrap(entry.factory) for entry in registry().values()]
    for factory in (one for one in factories if not one.__module__.startswith("cfmerge.")):
        file = Path(factory.__code__.co_filename)
        yield file.read_text(errors="replace") if file.is_file() else secrets.token_hex()
