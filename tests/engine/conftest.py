"""Fixtures of tests about merges that are stopped and go on."""

import pytest

from cfmerge.engine import cutting
from cfmerge.formats import journal as journals
from cfmerge.formats.journal import FileJournal
from cfmerge.formats.safetensors import SafetensorsFile
from cfmerge.products import carry_out


@pytest.fixture
def small_units(monkeypatch):
    """Units of a few entries; every one of them is in the journal at once."""
    monkeypatch.setattr(cutting, "ENTRIES", 128)
    monkeypatch.setattr(cutting, "STACKED", 64)
    monkeypatch.setattr(journals, "EVERY", 0.0)


@pytest.fixture
def stop(monkeypatch):
    """`stop(after, error)`: a run ends by the error when so many units are marked.

    `without`: those count that are marked when an expert was left out.
    """

    def arrange(
        after: int, error: BaseException | type[BaseException] = KeyboardInterrupt, without: bool = False
    ) -> None:
        left = iter(range(after))

        def mark(self, ranges, told=None):
            if (self.header["left_out"] or not without) and next(left, None) is None:
                raise error
            return FileJournal.mark(self, ranges, told)

        monkeypatch.setattr(carry_out, "FileJournal", type("Stopping", (FileJournal,), {"mark": mark}))

    return arrange


@pytest.fixture
def go_on(monkeypatch):
    """Takes the stop away; reads are noted from then on: `[(tensor, first, count)]`."""

    def arrange() -> list[tuple[str, int, int]]:
        reads, read = [], SafetensorsFile.read
        monkeypatch.setattr(carry_out, "FileJournal", FileJournal)

        def noted(self, name, first=0, count=None):
            reads.append((name, first, self.tensors[name].size if count is None else count))
            return read(self, name, first, count)

        monkeypatch.setattr(SafetensorsFile, "read", noted)
        return reads

    return arrange
