"""Zips of every kind: zip64, streamed, every method, and tables that contradict each other."""

import io
import stat
import struct
import zipfile
import zlib
from pathlib import Path

import pytest
from archives import paths, read, reasons, zip_by_hand, zip_of

from salalocal.errors import PackError

TEXT = b"line of text\n" * 1_000


class Unseekable(io.RawIOBase):
    """A pipe, for which zipfile writes sizes behind the data."""

    def __init__(self) -> None:
        self.data = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self.data += data
        return len(data)


def test_streamed_and_zip64_zips(tmp_path: Path) -> None:
    pipe = Unseekable()
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("a.txt", "b.txt"):
            with archive.open(name, "w", force_zip64=name == "b.txt") as member:
                member.write(TEXT)
    reading = read(tmp_path, "x.zip", bytes(pipe.data))
    assert [document.text for document in reading.documents] == [TEXT.decode()] * 2
    assert reading.notes == ()


def test_comments_folders_links_and_unknown_methods(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("link")
    link.create_system = 3
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.comment = b"a comment with PK\x05\x06 in it"
        archive.mkdir("folder")
        archive.writestr("folder/a.txt", TEXT, zipfile.ZIP_BZIP2)
        archive.writestr("folder/b.txt", TEXT, zipfile.ZIP_LZMA)
        archive.writestr(link, b"/etc/passwd")
    reading = read(tmp_path, "x.zip", out.getvalue())
    assert paths(reading) == ["folder/a.txt"]
    assert reasons(reading) == {
        "folder/b.txt": "compression method 14 is not supported",
        "link": "symbolic link, not followed",
    }


def test_zstd_members(tmp_path: Path) -> None:
    import zstandard

    packed = zstandard.compress(TEXT)
    told = (63, 0, 93, 0, 33, zlib.crc32(TEXT), len(packed), len(TEXT), 5, 0)
    body = struct.pack("<4s5H3I2H", b"PK\x03\x04", *told) + b"a.txt" + packed
    directory = struct.pack("<4s6H3I5H2I", b"PK\x01\x02", 63, *told, 0, 0, 0, 0, 0) + b"a.txt"
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 1, 1, len(directory), len(body), 0)
    assert read(tmp_path, "x.zip", body + directory + end).documents[0].text == TEXT.decode()


def replaced(data: bytes, mark: bytes, offset: int, value: bytes) -> bytes:
    at = data.index(mark) + offset
    return data[:at] + value + data[at + len(value) :]


@pytest.mark.parametrize(
    ("mark", "offset", "value", "reason"),
    [
        (b"PK\x03\x04", 30, b"X", "not what the central directory says"),
        (b"PK\x03\x04", 14, b"\0\0\0\0", "not what the central directory says"),
        (b"PK\x03\x04", 8, b"\0\0", "not what the central directory says"),
        (b"PK\x01\x02", 0, b"PK\x01\x03", "central directory is damaged"),
        (b"PK\x01\x02", 42, b"\xff\xff\0\0", "behind the last member"),
        (b"PK\x05\x06", 10, b"\x09\0", "one volume of a zip of several"),
        (b"PK\x05\x06", 16, b"\0\0\0\0", "is not where the end record"),
        (b"PK\x05\x06", 20, b"\1\0", "no end record"),
    ],
)
def test_tables_that_contradict_each_other(mark: bytes, offset: int, value: bytes, reason: str, tmp_path: Path) -> None:
    data = zip_of([("a.txt", TEXT), ("b.txt", TEXT)])
    with pytest.raises(PackError, match=reason):
        read(tmp_path, "x.zip", replaced(data, mark, offset, value))


@pytest.mark.parametrize("num_bytes", [len(TEXT) - 1, len(TEXT) + 1, 10])
def test_sizes_that_lie(num_bytes: int, tmp_path: Path) -> None:
    with pytest.raises(PackError, match="holds another number of them"):
        read(tmp_path, "x.zip", zip_by_hand([(b"a.txt", TEXT, 0)], num_bytes=num_bytes))


def test_one_entry_twice_overlaps(tmp_path: Path) -> None:
    with pytest.raises(PackError, match="entries overlap"):
        read(tmp_path, "x.zip", zip_by_hand([(b"a.txt", TEXT, 0), (b"a.txt", TEXT, 0)], offsets=[0, 0]))


def test_bytes_of_no_member_are_noted(tmp_path: Path) -> None:
    one, two = zip_of([("hidden.txt", TEXT)]), zip_of([("a.txt", TEXT)])
    hidden = one[: one.index(b"PK\x01\x02")]
    at = two.index(b"PK\x01\x02")
    directory = replaced(two[at:], b"PK\x01\x02", 42, struct.pack("<I", len(hidden)))
    directory = replaced(directory, b"PK\x05\x06", 16, struct.pack("<I", len(hidden) + at))
    reading = read(tmp_path, "x.zip", hidden + two[:at] + directory)
    assert paths(reading) == ["a.txt"]
    assert "belong to none of them" in reading.notes[0]


def test_members_too_large_are_not_inflated(tmp_path: Path) -> None:
    data = zip_of([("big.txt", bytes(50_000_000)), ("a.txt", b"text\n")])
    reading = read(tmp_path, "x.zip", data, max_member_bytes=1_000_000, max_total_bytes=1_000_000)
    assert paths(reading) == ["a.txt"]
    assert reasons(reading) == {"big.txt": "too large: 50.0 MB, cap 1,000,000 bytes (--max-member)"}
