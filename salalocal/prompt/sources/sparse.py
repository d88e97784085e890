"""Sparse members of a tar: their maps, in all four GNU forms, and their bytes with the holes filled; for tar.py.

A few bytes of map can stand for terabytes of zeros, so a file that is mostly holes is never filled: it is no text.
Source: GNU tar manual, "Storing Sparse Files".
"""

from collections.abc import Iterator
from dataclasses import dataclass

from salalocal.prompt.sources.faults import Damage
from salalocal.prompt.sources.streams import PIECE_BYTES, ByteReader
from salalocal.prompt.sources.tar_fields import decimal, number

_BLOCK = 512
_MAX_ENTRIES = 65_536
_ZEROS = bytes(PIECE_BYTES)


@dataclass(frozen=True)
class SparseMap:
    """Where the stored runs of bytes belong in a file of `real_size` bytes: (offset, size), ascending."""

    real_size: int
    runs: tuple[tuple[int, int], ...]

    @property
    def stored_bytes(self) -> int:
        return sum(size for _, size in self.runs)

    @property
    def is_mostly_holes(self) -> bool:
        """Whether more than one byte of a hundred is a hole: then it is no text, and is not filled."""
        return self.real_size - self.stored_bytes > self.real_size // 100


def old_map(block: bytes, source: ByteReader) -> SparseMap:
    """Read the map of a GNU "S" header and of the extension blocks behind it. Raises Damage."""
    numbers = _old_numbers(block[386:482])
    is_extended = block[482] != 0
    while is_extended:
        extension = source.read(_BLOCK)
        numbers += _old_numbers(extension[:504])
        is_extended = extension[504] != 0
        if len(numbers) > 2 * _MAX_ENTRIES:
            raise Damage(f"a sparse map of more than {_MAX_ENTRIES:,} entries")
    return _checked(number(block[483:495], "real size"), numbers)


def _old_numbers(fields: bytes) -> list[int]:
    numbers = []
    for at in range(0, len(fields), 24):
        if not fields[at]:
            break
        numbers += [number(fields[at : at + 12], "sparse map"), number(fields[at + 12 : at + 24], "sparse map")]
    return numbers


def record_map(records: dict[bytes, bytes]) -> SparseMap:
    """Read the map of pax formats 0.0 and 0.1. Raises Damage."""
    words = records.get(b"GNU.sparse.map", b"").split(b",")
    numbers = [decimal(word, "sparse map") for word in words if word]
    return _checked(decimal(records[b"GNU.sparse.size"], "real size"), numbers)


def leading_map(source: ByteReader, real_size: int, size: int) -> SparseMap:
    """Read the map of pax format 1.0, decimal lines at the head of the data. Raises Damage."""
    blocks: list[bytes] = []
    num_lines, num_expected = 0, 1
    while num_lines < num_expected:
        if len(blocks) * _BLOCK >= size:
            raise Damage("a sparse map without end")
        blocks.append(source.read(_BLOCK))
        num_lines += blocks[-1].count(b"\n")
        if num_expected == 1 and num_lines:
            num_expected = 1 + 2 * decimal(b"".join(blocks).partition(b"\n")[0], "sparse map")
        if num_expected > 2 * _MAX_ENTRIES or len(blocks) > _MAX_ENTRIES:
            raise Damage(f"a sparse map of more than {_MAX_ENTRIES:,} entries")
    lines = b"".join(blocks).split(b"\n")[1:num_expected]
    numbers = [decimal(line, "sparse map") for line in lines]
    return _checked(real_size, numbers)


def _checked(real_size: int, numbers: list[int]) -> SparseMap:
    runs = tuple(zip(numbers[::2], numbers[1::2], strict=False))
    end = 0
    for offset, size in runs:
        if offset < end:
            raise Damage("a sparse map that runs backwards")
        end = offset + size
    if end > real_size or len(numbers) % 2:
        raise Damage("a sparse map that does not fit its file")
    return SparseMap(real_size, runs)


def filled(source: ByteReader, sparse: SparseMap) -> Iterator[bytes]:
    """Give out the whole file, zeros for its holes. Raises Damage."""
    at = 0
    for offset, size in (*sparse.runs, (sparse.real_size, 0)):
        while at < offset:
            zeros = _ZEROS[: offset - at]
            at += len(zeros)
            yield zeros
        yield from source.pieces(size)
        at += size
