"""A tar stream -> its members, read front to back and never extracted; for prompt/sources/archive.

v7, POSIX (ustar, pax) and GNU tars. Every header's checksum must fit and the archive must close with two blocks of
zeros; a single one is noted, as is anything after them. A tar holds no checksums of contents: damage inside a file
shows only when a compressor around it has them.
Source: POSIX.1-2017 pax, "ustar Interchange Format"; GNU tar manual, "Basic Tar Format".
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from salalocal.prompt.sources.document import Member
from salalocal.prompt.sources.faults import Damage
from salalocal.prompt.sources.kinds import tar_checksum_fits
from salalocal.prompt.sources.sparse import SparseMap, filled, leading_map, old_map, record_map
from salalocal.prompt.sources.streams import ByteReader
from salalocal.prompt.sources.tar_fields import decimal, number, pax_records
from salalocal.prompt.visible import quoted_name

_BLOCK = 512
_MAX_EXTRA_BYTES = 1 << 20
_MAX_EXTRAS = 16
_REFUSALS = {
    b"2": "symbolic link, not followed",
    b"3": "character device",
    b"4": "block device",
    b"6": "named pipe",
    b"7": "contiguous file, a type that is not read",
    b"s": "socket",
    b"V": "volume label",
    b"M": "rest of a file from another volume",
}
_FOLDERS = (b"5", b"D")
# POSIX.1 counts no data behind links, devices, folders and pipes, whatever their size field says.
_TYPES_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")


@dataclass
class _Header:
    name: bytes
    size: int
    mtime: float
    type: bytes
    link: bytes
    block: bytes
    records: dict[bytes, bytes] = field(default_factory=dict)


class TarReader:
    """Walks a tar once. `whole` counts the members passed in full; the total is not known before the end."""

    can_go_on = False
    total: int | None = None

    def __init__(self, source: ByteReader) -> None:
        self._source = source
        self._regular_names: set[bytes] = set()
        self.whole = 0
        self.notes: list[str] = []

    def members(self) -> Iterator[Member]:
        """Yield each member; what is not read of its content is passed over. Raises Damage."""
        while (header := self._next_header()) is not None:
            sparse = old_map(header.block, self._source) if header.type == b"S" else None
            size = 0 if header.type in _TYPES_WITHOUT_DATA else header.size
            stop = self._source.position + size + -size % _BLOCK
            yield self._member(header, sparse)
            for _ in self._source.pieces(stop - self._source.position):
                pass
            self.whole += 1
        self._check_end()

    def _member(self, header: _Header, sparse: SparseMap | None) -> Member:
        name, mtime = header.name, header.mtime
        if header.type in _FOLDERS:
            return Member(name.rstrip(b"/") + b"/", 0)
        if header.type == b"1":
            return Member(name, 0, mtime=mtime, refusal=self._hard_link_reason(header.link))
        if header.type not in (b"0", b"S"):
            unknown = f"unknown tar type {quoted_name(header.type.decode('latin-1'))}"
            return Member(name, 0, mtime=mtime, refusal=_REFUSALS.get(header.type, unknown))
        self._regular_names.add(name)
        sparse = sparse or self._pax_sparse(header)
        if sparse is None:
            return Member(name, header.size, self._source.pieces(header.size), mtime)
        if sparse.is_mostly_holes:
            return Member(name, sparse.real_size, mtime=mtime, refusal="binary (sparse file)")
        return Member(name, sparse.real_size, filled(self._source, sparse), mtime)

    def _hard_link_reason(self, target: bytes) -> str:
        shown = quoted_name(target.decode("utf-8", "backslashreplace"))
        if target in self._regular_names:
            return f"hard link: the same file as {shown} before it"
        return f"hard link to {shown}, which is no file before it"

    def _pax_sparse(self, header: _Header) -> SparseMap | None:
        records = header.records
        if b"GNU.sparse.major" in records:
            real_size = decimal(records.get(b"GNU.sparse.realsize", b""), "real size")
            if real_size - header.size > real_size // 100:
                return SparseMap(real_size, ())  # mostly holes whatever its map says
            return leading_map(self._source, real_size, header.size)
        return record_map(records) if b"GNU.sparse.size" in records else None

    def _next_header(self) -> _Header | None:
        extra: dict[bytes, bytes] = {}
        for num_extras in range(_MAX_EXTRAS):
            start = self._source.position
            block = self._source.read(_BLOCK) if self._source.peek(1) else b""
            if not any(block):
                if not block:
                    raise Damage(f"cut at byte {start:,}, before the end mark")
                if num_extras:
                    raise Damage(f"an extension header without a member at byte {start:,}")
                return None
            header = _parsed(block, start)
            if header.type in (b"x", b"X", b"g", b"L", b"K"):
                extra |= self._extra_header(header, start)
            else:
                return _finished(header, extra)
        raise Damage(f"more than {_MAX_EXTRAS} extension headers in a row at byte {self._source.position:,}")

    def _extra_header(self, header: _Header, start: int) -> dict[bytes, bytes]:
        if header.size > _MAX_EXTRA_BYTES:
            raise Damage(f"an extension header of {header.size:,} bytes at byte {start:,}")
        data = self._source.read(header.size)
        self._source.read(-header.size % _BLOCK)
        if header.type == b"L":
            return {b"path": data.partition(b"\0")[0]}
        if header.type == b"K":
            return {b"linkpath": data.partition(b"\0")[0]}
        # What a global header says of names and sizes is for no single member.
        return {} if header.type == b"g" else pax_records(data)

    def _check_end(self) -> None:
        """Behind the first block of zeros: one more, then nothing but zeros to the end of the stream."""
        second = self._source.peek(_BLOCK)
        if not second:
            self.notes.append("the archive ends after one block of zeros instead of two")
        elif any(second):
            raise Damage(f"a lone block of zeros at byte {self._source.position - _BLOCK:,}")
        elif len(second) < _BLOCK:
            raise Damage(f"cut at byte {self._source.position + len(second):,}")
        has_more = False
        for piece in self._source.pieces():  # to the very end: checksums of a compressor are checked there
            has_more = has_more or bool(piece.strip(b"\0"))
        if has_more:
            self.notes.append("something that is not part of the archive follows its end mark and was not read")


def _parsed(block: bytes, start: int) -> _Header:
    if not tar_checksum_fits(block):
        raise Damage(f"the header at byte {start:,} is damaged")
    name = block[:100].partition(b"\0")[0]
    kind = block[156:157]
    if block[257:263] == b"ustar\0" and (prefix := block[345:500].partition(b"\0")[0]):
        name = prefix + b"/" + name
    if kind in (b"0", b"\0"):
        kind = b"5" if name.endswith(b"/") else b"0"
    link = block[157:257].partition(b"\0")[0]
    return _Header(name, number(block[124:136], "size"), _mtime(block[136:148]), kind, link, block)


def _mtime(value: bytes) -> float:
    try:
        return float(number(value, "time"))
    except Damage:
        return 0.0  # times only help to order files: a strange one is no reason to refuse an archive


def _finished(header: _Header, extra: dict[bytes, bytes]) -> _Header:
    header.records = extra
    header.name = extra.get(b"GNU.sparse.name") or extra.get(b"path") or header.name
    header.link = extra.get(b"linkpath", header.link)
    if b"size" in extra:
        header.size = decimal(extra[b"size"], "size")
    return header
