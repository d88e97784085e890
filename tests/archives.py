"""Archives made byte by byte, honest and hostile, for the tests of prompt/sources; nothing big touches the disk."""

import bz2
import gzip
import io
import lzma
import struct
import tarfile
import time
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import zstandard

from salalocal.prompt.sources import PackLimits, Reading, read_sources

BLOCK = 512
END = bytes(2 * BLOCK)

PACKERS = {
    "": lambda data: data,
    ".gz": lambda data: gzip.compress(data, mtime=0),
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}


def octal(value: int, width: int) -> bytes:
    return b"%0*o\0" % (width - 1, value)


def tar_header(
    name: bytes,
    size: int | bytes = 0,
    kind: bytes = b"0",
    link: bytes = b"",
    changes: Mapping[int, bytes] | None = None,
) -> bytes:
    """One header block with a fitting checksum; `size` may be raw bytes, `changes` are written at their offsets."""
    block = bytearray(BLOCK)
    fields = {
        0: name[:100],
        100: octal(0o644, 8),
        108: octal(0, 8),
        116: octal(0, 8),
        124: size if isinstance(size, bytes) else octal(size, 12),
        136: octal(1_600_000_000, 12),
        156: kind,
        157: link,
        257: b"ustar\x0000",
    }
    for offset, value in {**fields, **(changes or {})}.items():
        block[offset : offset + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def tar_member(name: bytes, data: bytes = b"", kind: bytes = b"0", link: bytes = b"") -> bytes:
    return tar_header(name, len(data), kind, link) + padded(data)


def pax_member(records: Mapping[str, bytes], name: bytes, data: bytes) -> bytes:
    """A member with a pax header before it."""
    body = b""
    for key, value in records.items():
        rest = b" " + key.encode() + b"=" + value + b"\n"
        length = len(rest) + 1
        while len(b"%d" % length) + len(rest) != length:
            length = len(b"%d" % length) + len(rest)
        body += b"%d" % length + rest
    return tar_member(b"pax", body, b"x") + tar_member(name, data)


def tar(*members: bytes) -> bytes:
    return b"".join(members) + END


def sparse_header(name: bytes, real_size: int, runs: list[tuple[int, int]]) -> bytes:
    """A GNU "S" header with up to four runs of its map; more are said to follow."""
    fields = b"".join(b"%011o\0%011o\0" % run for run in runs[:4])
    real = real_size.to_bytes(12, "big")
    real = bytes([0x80 | real[0]]) + real[1:]
    changes = {257: b"ustar  \0", 386: fields, 482: bytes([len(runs) > 4]), 483: real}
    return tar_header(name, sum(size for _, size in runs), b"S", changes=changes)


def tar_of(files: Iterable[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar as Python's own library writes it."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as archive:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def zip_of(files: Iterable[tuple[str | zipfile.ZipInfo, bytes]], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A zip as Python's own library writes it."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in files:
            archive.writestr(name, data, compress_type=method)
    return out.getvalue()


def zip_by_hand(
    entries: Iterable[tuple[bytes, bytes, int]], offsets: list[int] | None = None, num_bytes: int | None = None
) -> bytes:
    """A zip of (name, data, flags); `offsets` and `num_bytes` let the central directory lie."""
    body, directory = b"", b""
    for index, (name, data, flags) in enumerate(entries):
        packed = zlib.compress(data, 9, -15)
        size = len(data) if num_bytes is None else num_bytes
        offset = len(body) if offsets is None else offsets[index]
        told = (20, flags, 8, 0, 33, zlib.crc32(data), len(packed), size, len(name), 0)
        body += struct.pack("<4s5H3I2H", b"PK\x03\x04", *told) + name + packed
        directory += struct.pack("<4s6H3I5H2I", b"PK\x01\x02", 20, *told, 0, 0, 0, 0, offset) + name
    count = len(directory) and directory.count(b"PK\x01\x02")
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, count, count, len(directory), len(body), 0)
    return body + directory + end


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def read(folder: Path, name: str, data: bytes, **limits: int | float | bool) -> Reading:
    """Read these bytes as a file of this name."""
    return read_sources([written(folder / name, data)], PackLimits(**limits))  # type: ignore[arg-type]


def paths(reading: Reading) -> list[str]:
    return [document.path for document in reading.documents]


def reasons(reading: Reading) -> dict[str, str]:
    return {skip.path: skip.reason for skip in reading.skips}


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fail if the block takes more CPU time of this thread."""
    start = time.thread_time()
    yield
    assert time.thread_time() - start < seconds
