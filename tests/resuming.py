"""Helpers of tests about merges that are stopped and go on."""

import errno
import os
from pathlib import Path

import cfmerge
from cfmerge.formats.journal import JOURNAL, trusted
from cfmerge.formats.ranges import Covered


def full():
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def left(folder: Path) -> list[Path]:
    return sorted(folder.glob("**/.*.cfmerge-*"))


def lines(staging: Path) -> list[dict]:
    return trusted(staging / JOURNAL)


def done(staging: Path) -> Covered:
    return Covered(tuple(one) for line in lines(staging) for one in line.get("ranges", ()))


def read_again(reads, before: Covered) -> list:
    """Reads of what was done before."""
    return [one for one in reads if any(before.holds(one[0], entry, 1) for entry in range(one[1], one[1] + one[2]))]


def assert_same(result, expected, contents) -> None:
    assert contents(result.output) == contents(expected.output)
    assert (result.notes, result.warnings, result.reports) == (expected.notes, expected.warnings, expected.reports)


def merged(family, output, method="average", **options):
    return cfmerge.merge(family.base, family.experts, method, output=output, **options)
