"""Merges that go on: what an earlier run of the same merge has left, and what a run that ends early leaves.

A journal in the staging directories (`cfmerge.formats.journal`) tells which ranges are done. It is gone on with if its
header has the digest of the plan and the versions of the packages that compute; else everything is done anew.
"""

import contextlib
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cfmerge.align.source import alignment_of
from cfmerge.errors import CfmergeError, NonFiniteError, StoppedError
from cfmerge.formats import DirectorySink
from cfmerge.formats.journal import FileJournal, found_beside
from cfmerge.formats.shards import Unfit
from cfmerge.formats.sinks import total_entries
from cfmerge.planning.resolved import Resolved
from cfmerge.report.card import versions

COMPUTING = ("cfmerge", "jax", "jaxlib", "numpy")  # packages whose other version may give other bytes


class LeftOut(NamedTuple):
    """An expert that was left out: the plan that found it not to be finite, and how."""

    digest: str
    message: str
    source: str
    tensor: str

    @property
    def note(self) -> str:
        return f"expert {self.source!r} was left out: tensor {self.tensor!r} is not finite"


def resumed(
    plan: Resolved,
    sinks: Sequence[DirectorySink],
    journal: FileJournal,
    left_out: Sequence[LeftOut],
    check: Callable[[Resolved], list[str]],
) -> tuple[str, ...]:
    """Notes on what was found of an earlier run; the journal goes on from there, or is begun.

    The tensors are declared to the sinks. `journal.header` has the notes on the models' contents, and how the models
    are brought into one order, so that every process and every later run has the same.

    Args:
        check: the notes on the models' contents, from a look at their tensors.
    """
    header: dict[str, Any] = {
        "digest": plan.digest,
        "versions": _versions(),
        "entries": total_entries(plan.output),
        "left_out": [list(one) for one in left_out],
    }

    def sync() -> None:
        for sink in sinks:
            sink.sync()

    before = journal.read()
    told = "" if before is None else _differs(before, header)
    if before is not None and not told:
        journal.go_on(sync)
        try:
            for sink in sinks:
                sink.declare(plan.output, journal.covered)
        except Unfit as error:
            told, journal.kept = str(error), 0
        else:
            share = f"{journal.covered.entries / max(header['entries'], 1):.0%}"
            done = (f"{share} of the merge was done by an earlier run, and is not done again",)
            return done if journal.kept else ()
    contents = check(plan)
    alignment = alignment_of((plan.base, *plan.experts))
    found = alignment.as_plain() if alignment else None
    for sink in sinks:
        sink.declare(plan.output)
    journal.begin(header | {"contents": contents, "alignment": found}, sync)
    return (f"what an earlier run had done was done anew: {told}",) if told else ()


def joined(plan: Resolved, sinks: Sequence[DirectorySink], journal: FileJournal) -> None:
    """Goes on, in another process, with what `resumed` has begun or found in the first."""

    def sync() -> None:
        for sink in sinks:
            sink.sync()

    journal.join(sync)
    for sink in sinks:
        try:
            sink.declare(plan.output, journal.covered)
        except Unfit as error:
            raise StoppedError(f"{error}; every process must see the directory that the first one writes") from None


def _differs(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Why a journal with that header is not gone on with; empty if it is."""
    then, new = before.get("versions", {}), now["versions"]
    others = [f"{name} was {then.get(name)}, and is {new[name]} now" for name in new if then.get(name) != new[name]]
    return ", ".join(others) or ("" if before["digest"] == now["digest"] else "it was another merge")


def _versions() -> dict[str, str]:
    return {package: version for package, version in versions().items() if package in COMPUTING}


def recall_left_out(plan: Resolved, outputs: Sequence[Path]) -> None:
    """Raises the `NonFiniteError` of this plan that an earlier run met, before it went on without the expert."""
    headers = [header for output in outputs for header in found_beside(output)]
    for header in (header for header in headers if header.get("versions") == _versions()):
        for one in (LeftOut(*own) for own in header["left_out"]):
            if one.digest == plan.digest:
                raise NonFiniteError(one.message, source=one.source, tensor=one.tensor)


@contextlib.contextmanager
def kept_where_it_can_go_on(output: Path, sinks: Sequence[DirectorySink], journal: FileJournal) -> Iterator[None]:
    """Leaves the staging directories, and says so, where a run ends that can be gone on with.

    Not where the input is at fault, and not where nothing is in the journal yet.
    """
    try:
        yield
    except BaseException as error:
        at_fault = isinstance(error, CfmergeError) and not isinstance(error, StoppedError)
        journal.hear()
        for sink in sinks:
            sink.keep(bool(journal.kept) and not at_fault)
        if at_fault or not journal.kept:
            raise
        told = _how_to_go_on(output, sinks, journal)
        if isinstance(error, StoppedError):
            raise StoppedError(error.reason, told) from None
        error.add_note(told)
        raise


def _how_to_go_on(output: Path, sinks: Sequence[DirectorySink], journal: FileJournal) -> str:
    share = journal.safe.entries / max(journal.header["entries"], 1)
    places = ", ".join(str(sink.path) for sink in sinks[:2]) + (", ..." if len(sinks) > 2 else "")
    return (
        f"{share:.0%} of the merge is done and kept in {places}. The same command goes on from there, with --fresh it "
        f"starts anew; to remove what is kept:\n  cfmerge clean {shlex.quote(str(output))} --yes"
    )
