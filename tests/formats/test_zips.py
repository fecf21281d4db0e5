"""Zip files of stored members: read as Python's zipfile reads them, refused where their numbers cannot be."""

import io
import struct
import threading
import zipfile
import zlib

import numpy as np
import pytest

from cfmerge.errors import CfmergeError
from cfmerge.formats import zips
from cfmerge.formats.base import FileLayout
from cfmerge.formats.zips import StoredZip, lay

OUT = "save it uncompressed"


def write(path, layout: FileLayout, parts: dict[str, bytes]):
    """A file of a layout, sparse where nothing is given."""
    with path.open("wb") as file:
        file.truncate(layout.size)
        for offset, content in layout.fixed:
            file.seek(offset)
            file.write(content)
        for name, content in parts.items():
            file.seek(layout.places[name])
            file.write(content)
    with path.open("r+b") as file:
        for checked in layout.checksums:
            if checked.size < 1 << 20:
                file.seek(checked.first)
                crc = zlib.crc32(file.read(checked.size))
                for place in checked.places:
                    file.seek(place)
                    file.write(crc.to_bytes(4, "little"))
    return path


def archive(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return buffer.getvalue()


def refused(path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(CfmergeError) as caught:
        StoredZip(path, OUT)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_members_are_those_that_zipfile_reads(tmp_path):
    (tmp_path / "a.zip").write_bytes(archive(one=b"1" * 300, größe=b"", three=bytes(range(256))))
    found = StoredZip(tmp_path / "a.zip", OUT)
    with zipfile.ZipFile(tmp_path / "a.zip") as expected:
        assert list(found.members) == expected.namelist()
        for name in expected.namelist():
            assert bytes(found.checked(name)) == expected.read(name)


def test_a_file_that_was_streamed_is_read(tmp_path):
    class Stream(io.RawIOBase):
        content = bytearray()

        def writable(self):
            return True

        def write(self, data):
            self.content += data
            return len(data)

    stream = Stream()
    with zipfile.ZipFile(stream, "w") as file:
        file.writestr("a", b"abc")
    (tmp_path / "a.zip").write_bytes(stream.content)
    assert bytes(StoredZip(tmp_path / "a.zip", OUT).checked("a")) == b"abc"


def test_pytorch_s_files_are_such(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"w": torch.arange(40.0)}, tmp_path / "model.pt")
    found = StoredZip(tmp_path / "model.pt", OUT)
    assert np.frombuffer(found.checked("model/data/0"), np.float32).tolist() == list(range(40))


def test_what_is_laid_is_read_by_zipfile(tmp_path):
    layout = lay({"größe/a": (b"head", 10), "b": (b"whole", 0), "c": (b"", 0), "d": (b"", 3)})
    path = write(tmp_path / "a.zip", layout, {"größe/a": b"0123456789", "d": b"xyz"})
    with zipfile.ZipFile(path) as file:
        assert file.testzip() is None
        assert {name: file.read(name) for name in file.namelist()} == {
            "größe/a": b"head0123456789", "b": b"whole", "c": b"", "d": b"xyz"
        }  # fmt: skip
    own = StoredZip(path, OUT)
    assert all(member.start % 64 == 0 for member in own.members.values())
    assert bytes(own.checked("größe/a")) == b"head0123456789"


def test_more_than_4_gb_and_more_than_65535_members_are_told_in_64_bits(tmp_path):
    layout = lay({**{f"m{n}": (b"", 1) for n in range(66_000)}, "large": (b"", 5 << 30), "last": (b"end", 0)})
    path = write(tmp_path / "a.zip", layout, {})  # sparse: 5 GB of nothing
    with zipfile.ZipFile(path) as file:
        assert len(file.namelist()) == 66_002
        assert file.getinfo("large").file_size == 5 << 30
        assert file.read("last") == b"end"
    own = StoredZip(path, OUT)
    assert own.members["large"].size == 5 << 30
    assert bytes(own.checked("last")) == b"end"


def test_truncated_files_are_refused_at_every_length(tmp_path):
    whole = archive(a=b"abc" * 5, b=b"d")
    for length in range(len(whole)):
        assert "fetch the file again" in refused(tmp_path / "a.zip", whole[:length])


def test_compressed_members_are_refused_with_the_way_out(tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("bomb", bytes(1 << 20))
    told = refused(tmp_path / "a.zip", buffer.getvalue())
    assert "'bomb' is compressed (deflate)" in told
    assert OUT in told


def central(content: bytes, name: bytes) -> int:
    """Where an entry of the directory begins."""
    return content.rindex(name) - zips.CENTRAL.size


FITS = "member 'b' is corrupt: its header at"
CHANGED = {  # what is changed in the directory's entry of "b": (place in it, new bytes, words of the message)
    "size of more than the file": (20, struct.pack("<2L", 10**6, 10**6), FITS),
    "two sizes": (20, struct.pack("<2L", 2, 3), FITS),
    "encrypted": (8, b"\1", FITS),
    "64 bits that are not there": (24, b"\xff" * 4, "'b'"),
    "on another member": (42, bytes(4), FITS),
    "behind the end": (42, b"\xf0" * 4, FITS),
    "name of another member": (46, b"a", "'a' is corrupt: its header at 34"),
    "no entry": (0, b"XX", "truncated or corrupt"),
}


@pytest.mark.parametrize("case", CHANGED)
def test_directories_that_cannot_be_are_refused(tmp_path, case):
    place, new, words = CHANGED[case]
    content = bytearray(archive(a=b"abc", b=b"d"))
    at = central(bytes(content), b"b") + place
    content[at : at + len(new)] = new
    assert words in refused(tmp_path / "a.zip", bytes(content))


def test_members_that_overlap_are_refused(tmp_path):
    """A zip bomb without compression: many members that are the same bytes."""
    inner = archive(b=b"d" * 50)
    content = bytearray(archive(a=inner[: inner.index(b"PK\1\2")], b=b"d" * 50))
    at = central(bytes(content), b"b") + 42
    content[at : at + 4] = struct.pack("<L", content.index(b"PK\3\4", 4))
    assert "is corrupt: its header at" in refused(tmp_path / "a.zip", bytes(content))


def test_changed_bytes_are_found_once_and_by_every_thread(tmp_path, monkeypatch):
    content = bytearray(archive(a=b"abc" * 1000, b=b"d" * 1000))
    content[content.index(b"abcabc") + 500] ^= 4
    (tmp_path / "a.zip").write_bytes(content)
    found = StoredZip(tmp_path / "a.zip", OUT)
    calls, crc32 = [], zlib.crc32
    monkeypatch.setattr(zips.zlib, "crc32", lambda data: calls.append(1) or crc32(data))
    with pytest.raises(CfmergeError, match=r"'a' should have the CRC-32 .* its bytes were changed"):
        found.checked("a")
    calls.clear()
    threads = [threading.Thread(target=found.checked, args=("b",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
