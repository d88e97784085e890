"""A zip -> its members, in the order they are stored, never extracted; for prompt/sources/archive.

The central directory is held against the local headers before anything is inflated: same name, method, sizes and
checksum, no two entries over the same bytes, nothing outside the file. Each member read is held against its CRC.
Source: PKWARE APPNOTE.TXT 6.3.10, sections 4.3 to 4.5.
"""

import stat
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import BinaryIO

from salalocal.prompt.sources.document import Member
from salalocal.prompt.sources.faults import Damage, LimitHit
from salalocal.prompt.sources.limits import Meter, PackLimits
from salalocal.prompt.sources.streams import DECODERS, PIECE_BYTES, counted, decode_all

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_LOCATOR = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQ2H2I4Q")
_MAX_COMMENT_BYTES = 65_535
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF
_ENCRYPTED = 1 | 1 << 6 | 1 << 13
_HAS_DESCRIPTOR = 1 << 3
_METHODS = {8: "deflate", 12: "bzip2", 93: "zstd", 95: "xz"}
_UNIX = 3
_ZIP64_FIELD = 1
_END_MARK = b"PK\x05\x06"


@dataclass(frozen=True)
class _Entry:
    name: bytes
    flags: int
    method: int
    crc: int
    packed_bytes: int
    num_bytes: int
    offset: int
    mtime: float
    mode: int
    data_at: int = 0


class ZipReader:
    """Walks a zip that can be seeked. Members stand apart, so the reading can go on behind a damaged one."""

    can_go_on = True

    def __init__(self, handle: BinaryIO, limits: PackLimits, meter: Meter) -> None:
        self._handle = handle
        self._limits = limits
        self._meter = meter
        self._num_file_bytes = handle.seek(0, 2)
        self.whole = 0
        self.total: int | None = None
        self.notes: list[str] = []

    def members(self) -> Iterator[Member]:
        """Yield each member. Raises Damage before the first one when the tables do not fit each other."""
        directory_at, directory_bytes, self.total = self._find_directory()
        entries = self._directory(directory_at, directory_bytes, self.total)
        entries = sorted(self._placed(entries, directory_at), key=lambda entry: entry.offset)
        self._check_order(entries, directory_at)
        for entry in entries:
            yield self._member(entry)
            self.whole += 1

    def _at(self, offset: int, num_bytes: int) -> bytes:
        self._handle.seek(offset)
        data = self._handle.read(num_bytes)
        if len(data) < num_bytes:
            raise Damage(f"cut at byte {offset + len(data):,}")
        return data

    def _find_directory(self) -> tuple[int, int, int]:
        """Find the central directory: (offset, bytes, entries)."""
        tail_at = max(0, self._num_file_bytes - _END.size - _MAX_COMMENT_BYTES)
        tail = self._at(tail_at, self._num_file_bytes - tail_at)
        found = _find_end(tail)
        if found < 0:
            raise Damage("no end record, the zip is cut")
        end_at = tail_at + found
        numbers: tuple[int, ...] = _END.unpack_from(tail, found)[1:7]
        if _FULL16 in numbers or _FULL32 in numbers:
            end_at, numbers = self._end64(end_at) or (end_at, numbers)
        disk, first_disk, here, total, size, offset = numbers
        if disk or first_disk or here != total:
            raise Damage("one volume of a zip of several")
        if offset + size != end_at:
            raise Damage(f"the central directory is not where the end record at byte {end_at:,} says")
        if total > self._limits.max_members:
            raise LimitHit(f"more than {self._limits.max_members:,} members (--max-members)")
        return offset, size, total

    def _end64(self, end_at: int) -> tuple[int, tuple[int, ...]] | None:
        locator_at = end_at - _LOCATOR.size
        if locator_at < 0:
            return None
        mark, _, end64_at, _ = _LOCATOR.unpack(self._at(locator_at, _LOCATOR.size))
        if mark != b"PK\x06\x07":
            return None
        if end64_at + _END64.size > locator_at:
            raise Damage(f"the zip64 locator at byte {locator_at:,} makes no sense")
        fields = _END64.unpack(self._at(end64_at, _END64.size))
        if fields[0] != b"PK\x06\x06" or end64_at + 12 + fields[1] != locator_at:
            raise Damage(f"the zip64 end record at byte {end64_at:,} makes no sense")
        return end64_at, fields[4:]

    def _directory(self, at: int, num_bytes: int, num_entries: int) -> list[_Entry]:
        most = num_entries * (_CENTRAL.size + 3 * _FULL16)
        if num_bytes > min(most, self._limits.max_total_bytes):
            raise Damage("the central directory is longer than its entries")
        if num_bytes > self._limits.max_member_bytes:
            raise LimitHit(f"a central directory of {num_bytes:,} bytes (--max-member)")
        table = self._at(at, num_bytes)
        entries = []
        place = 0
        for _ in range(num_entries):
            if place + _CENTRAL.size > num_bytes:
                raise Damage("the central directory is shorter than its entries")
            entry, length = _central_entry(table, place, at + place)
            entries.append(entry)
            place += length
        if place != num_bytes:
            raise Damage("the central directory does not hold as many entries as it says")
        return entries

    def _placed(self, entries: Iterable[_Entry], directory_at: int) -> Iterator[_Entry]:
        """Hold each entry against its local header and find where its data begin."""
        for entry in entries:
            self._meter.tick()
            if entry.offset + _LOCAL.size > directory_at:
                raise Damage(f"an entry that points to byte {entry.offset:,}, behind the last member")
            local = _LOCAL.unpack(self._at(entry.offset, _LOCAL.size))
            mark, _, flags, method, _, _, crc, packed, size, num_name, num_extra = local
            name = self._at(entry.offset + _LOCAL.size, num_name)
            is_late = bool(flags & _HAS_DESCRIPTOR)
            told = (crc in (entry.crc, 0)) if is_late else crc == entry.crc
            told = told and packed in _local_sizes(entry.packed_bytes, is_late)
            told = told and size in _local_sizes(entry.num_bytes, is_late)
            if mark != b"PK\x03\x04" or name != entry.name or method != entry.method or not told:
                raise Damage(f"the local header at byte {entry.offset:,} is not what the central directory says")
            data_at = entry.offset + _LOCAL.size + num_name + num_extra
            yield replace(entry, data_at=data_at, flags=entry.flags | flags)

    def _check_order(self, entries: list[_Entry], directory_at: int) -> None:
        end = 0
        has_gap = False
        for entry in entries:
            if entry.offset < end:
                raise Damage(f"entries overlap at byte {entry.offset:,}")
            has_gap = has_gap or entry.offset - end > (24 if end else 0)
            end = entry.data_at + entry.packed_bytes
        if end > directory_at:
            raise Damage(f"entries overlap the central directory at byte {directory_at:,}")
        if has_gap or directory_at - end > 24:
            self.notes.append("bytes between the members belong to none of them and were not read")

    def _member(self, entry: _Entry) -> Member:
        member = Member(entry.name, entry.num_bytes, mtime=entry.mtime)
        if entry.flags & _ENCRYPTED:
            member.refusal = "needs a password"
        elif stat.S_ISLNK(entry.mode):
            member.refusal = "symbolic link, not followed"
        elif stat.S_IFMT(entry.mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
            member.refusal = "not a regular file"
        elif entry.method and entry.method not in _METHODS:
            member.refusal = f"compression method {entry.method} is not supported"
        else:
            member.chunks = self._content(entry)
        return member

    def _content(self, entry: _Entry) -> Iterator[bytes]:
        crc = 0
        num_bytes = 0
        pieces = self._stored(entry)
        for piece in counted(_inflated(pieces, entry.method) if entry.method else pieces, self._meter):
            crc = zlib.crc32(piece, crc)
            num_bytes += len(piece)
            if num_bytes > entry.num_bytes:
                break
            yield piece
        if num_bytes != entry.num_bytes:
            raise Damage(f"a member of {entry.num_bytes:,} bytes holds another number of them")
        if crc != entry.crc:
            raise Damage("the checksum of a member is wrong")

    def _stored(self, entry: _Entry) -> Iterator[bytes]:
        for at in range(entry.data_at, entry.data_at + entry.packed_bytes, PIECE_BYTES):
            yield self._at(at, min(PIECE_BYTES, entry.data_at + entry.packed_bytes - at))


def _inflated(pieces: Iterator[bytes], method: int) -> Iterator[bytes]:
    decoder = DECODERS[_METHODS[method]]()
    for piece in pieces:
        if decoder.eof:
            raise Damage("data behind the end of a member's stream")
        yield from decode_all(decoder, piece, _METHODS[method])
    if not decoder.eof or decoder.unused_data:
        raise Damage("a member's stream does not end where the member does")


def _find_end(tail: bytes) -> int:
    """Find the last end record whose comment reaches just to the end of the file; -1 when there is none."""
    found = len(tail)
    while (found := tail.rfind(_END_MARK, 0, found)) >= 0:
        if found + _END.size <= len(tail) and found + _END.size + _END.unpack_from(tail, found)[7] == len(tail):
            break
    return found


def _local_sizes(num_bytes: int, is_late: bool) -> tuple[int, ...]:
    """The values a local header may hold for a size: itself, or its place in a zip64 field, or nothing yet."""
    return (num_bytes, _FULL32, 0) if is_late else (num_bytes, _FULL32)


def _central_entry(table: bytes, place: int, at: int) -> tuple[_Entry, int]:
    mark, made_by, _, flags, method, clock, day, crc, packed, size, *rest = _CENTRAL.unpack_from(table, place)
    num_name, num_extra, num_comment, disk, _, outer, offset = rest
    length = _CENTRAL.size + num_name + num_extra + num_comment
    if mark != b"PK\x01\x02" or place + length > len(table):
        raise Damage(f"the central directory is damaged at byte {at:,}")
    name_at = place + _CENTRAL.size
    name = table[name_at : name_at + num_name]
    extra = table[name_at + num_name : name_at + num_name + num_extra]
    size, packed, offset = _with_zip64(extra, (size, packed, offset), at)
    if disk not in (0, _FULL16):
        raise Damage("one volume of a zip of several")
    mode = outer >> 16 if made_by >> 8 == _UNIX else 0
    return _Entry(name, flags, method, crc, packed, size, offset, _mtime(day, clock), mode), length


def _with_zip64(extra: bytes, sizes: tuple[int, ...], at: int) -> tuple[int, ...]:
    """Take the sizes that do not fit their 32 bits from the zip64 field, in the order they are missing."""
    if _FULL32 not in sizes:
        return sizes
    place = 0
    while place + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, place)
        if kind == _ZIP64_FIELD:
            field = extra[place + 4 : place + 4 + length]
            wide = iter(struct.unpack(f"<{len(field) // 8}Q", field[: len(field) // 8 * 8]))
            return tuple(next(wide, size) if size == _FULL32 else size for size in sizes)
        place += 4 + length
    raise Damage(f"the entry at byte {at:,} lacks its zip64 sizes")


def _mtime(day: int, clock: int) -> float:
    try:
        when = datetime(1980 + (day >> 9), day >> 5 & 15, day & 31, clock >> 11, clock >> 5 & 63, tzinfo=UTC)
    except ValueError:
        return 0.0  # times only help to order files
    return when.timestamp()
