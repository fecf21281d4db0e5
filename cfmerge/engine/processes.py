"""Processes that share one merge: the units that each does, and the results of surveys that all of them need.

Every process makes the same plan and the same units. Each does its own, writes them into the same files, and tells the
others small values: the results of surveys, its account. Values are joined in the order of the units, so that sums have
the same bits however many processes there are.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from cfmerge.engine.journal import bytes_of
from cfmerge.engine.segments import Segment
from cfmerge.engine.surveys import looks_within
from cfmerge.engine.units import Unit


class Processes(Protocol):
    """The processes that share a merge, as one of them sees them.

    Attributes:
        number: which of them this is; 0 is the first, which alone makes, finishes and removes files.
        count: how many there are.
    """

    number: int
    count: int

    def check(self) -> None:
        """Raises the error that another process stops with, or that another process is gone."""
        ...

    def gathered(self, name: str, value: Any) -> list[Any]:
        """The values of all processes, in their order; all of them call it, in one order of names.

        Args:
            value: numbers, texts, arrays, and mappings, lists and tuples of these.
        """
        ...

    def begin(self) -> None:
        """Begins another attempt at the merge."""
        ...

    def telling(self) -> contextlib.AbstractContextManager[None]:
        """A context whose errors all processes stop with."""
        ...

    def at_once(self) -> contextlib.AbstractContextManager[None]:
        """The same; the first process leaves it when all have."""
        ...


class Alone:
    """The only process."""

    number, count = 0, 1

    def check(self) -> None:
        pass

    def gathered(self, name: str, value: Any) -> list[Any]:
        return [value]

    def begin(self) -> None:
        pass

    def telling(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def at_once(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


ALONE = Alone()


def by_the_first(processes: Processes, name: str, do: Callable[[], Any]) -> Any:
    """The value of `do()`, which the first process calls and tells the others."""
    return processes.gathered(name, do() if processes.number == 0 else None)[0]


def dealt(costs: Sequence[float], count: int) -> list[int]:
    """Which of `count` processes does each thing: the largest first, each to the one that has least so far.

    >>> dealt([1, 5, 3, 3], 2)
    [0, 0, 1, 1]
    """
    loads, owners = [0.0] * count, [0] * len(costs)
    for number in sorted(range(len(costs)), key=lambda number: -costs[number]):
        owners[number] = loads.index(min(loads))
        loads[owners[number]] += costs[number]
    return owners


def mine(processes: Processes, units: Sequence[Unit]) -> list[Unit]:
    """The units that this process does. Pieces of a tensor that is looked at first stay together."""
    together: dict[Any, list[int]] = {}
    for number, unit in enumerate(units):
        piece = looks_within(unit.job.method) and unit.segments[0].entries < unit.job.parameter.size
        together.setdefault(unit.job.name if piece else number, []).append(number)
    bundles = list(together.values())
    costs = [sum(sum(bytes_of(units[number]).values()) for number in bundle) for bundle in bundles]
    owners = dealt(costs, processes.count)
    own = [bundle for bundle, owner in zip(bundles, owners, strict=True) if owner == processes.number]
    return [units[number] for number in sorted(number for bundle in own for number in bundle)]


def joined(
    processes: Processes, name: str, units: Sequence[Unit], own: Sequence[tuple[Unit, Any]]
) -> Iterator[tuple[Unit, Any]]:
    """`(unit, value)` of all processes, in the order of the units, out of this process's own."""
    if not units:
        return
    told = [[[list(_named(segment)) for segment in unit.segments], unit.row, value] for unit, value in own]
    everything = [one for each in processes.gathered(name, told) for one in each]
    order = {_named(segment)[:2]: number for number, unit in enumerate(units) for segment in unit.segments}
    jobs = {segment.job.name: segment.job for unit in units for segment in unit.segments}
    everything.sort(key=lambda one: order[tuple(one[0][0][:2])])
    for segments, row, value in everything:
        again = tuple(Segment(jobs[tensor], first, count) for tensor, first, count in segments)
        yield Unit(units[0].work, again, row), value


def _named(segment: Segment) -> tuple[str, int, int | None]:
    return segment.job.name, segment.first, segment.count
