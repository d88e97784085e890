"""An opened file or stream -> its members if it is an archive, itself if it is not; for prompt/sources.

The one place that knows which reader opens what, and what to say when a reader stops half-way.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import BinaryIO, Protocol

from salalocal.errors import PackError
from salalocal.prompt.sources.collect import Collector, Place
from salalocal.prompt.sources.document import Member, Skip
from salalocal.prompt.sources.faults import Damage, LimitHit
from salalocal.prompt.sources.kinds import HEAD_BYTES, archive_kind, is_tar
from salalocal.prompt.sources.limits import Meter, PackLimits
from salalocal.prompt.sources.streams import DECODERS, ByteReader, counted, decompressed, file_pieces
from salalocal.prompt.sources.tar import TarReader
from salalocal.prompt.sources.zip import ZipReader
from salalocal.prompt.visible import quoted_name

_STREAM_SUFFIXES = (".gz", ".bz2", ".xz", ".zst", ".zstd")
_TAR_SUFFIXES = (".tar", ".tgz", ".tbz", ".tbz2", ".txz", ".tzst")


class ArchiveReader(Protocol):
    """What tar, zip and single compressed files have in common."""

    can_go_on: bool
    whole: int
    total: int | None
    notes: list[str]

    def members(self) -> Iterator[Member]: ...


class _SingleReader:
    """One compressed file that is no archive: a member named as the file is, without the compressor's suffix."""

    can_go_on = False
    total: int | None = 1

    def __init__(self, name: str, source: ByteReader) -> None:
        self._name = name
        self._source = source
        self.whole = 0
        self.notes: list[str] = []

    def members(self) -> Iterator[Member]:
        name = next((self._name.removesuffix(end) for end in _STREAM_SUFFIXES if self._name.endswith(end)), self._name)
        yield Member(name.encode(), 0, self._source.pieces())
        self.whole += 1


def is_archive(head: bytes, name: str) -> bool:
    """Tell an archive by its first bytes; blocks of zeros are an empty tar if they are called so.

    Raises Damage for a file that is called an archive and begins as none does.
    """
    lower = name.lower()
    if archive_kind(head) or (head and not any(head) and lower.endswith(_TAR_SUFFIXES)):
        return True
    if head and lower.endswith((*_STREAM_SUFFIXES, *_TAR_SUFFIXES, ".zip")):
        raise Damage("its first bytes are those of no archive")
    return False


def open_stream(pieces: Iterable[bytes], kind: str, name: str, meter: Meter) -> ArchiveReader:
    """Open a tar, plain or compressed, or one compressed file, that is read from front to back. Raises Damage."""
    if kind not in DECODERS:
        return TarReader(ByteReader(counted(pieces, meter)))
    source = ByteReader(counted(decompressed(pieces, kind), meter))
    head = source.peek(HEAD_BYTES)
    return TarReader(source) if is_tar(head) or not any(head) else _SingleReader(name, source)


def open_seekable(handle: BinaryIO, name: str, limits: PackLimits, meter: Meter) -> ArchiveReader:
    """Open an archive of any kind in a file that stands at its start. Raises Damage."""
    kind = archive_kind(handle.read(HEAD_BYTES))
    handle.seek(0)
    if kind == "zip":
        return ZipReader(handle, limits, meter)
    return open_stream(file_pieces(handle, meter), kind, name, meter)


def read_archive(open_reader: Callable[[], ArchiveReader], name: str, collector: Collector, place: Place) -> None:
    """Put all members of an archive on the collector's shelf.

    Raises PackError when the archive is damaged or a cap is hit; with `partial` that is a note instead, and what was
    whole before it stays.
    """
    reader: ArchiveReader | None = None
    try:
        reader = open_reader()
        if isinstance(reader, _SingleReader):
            place = replace(place, has_rules=place.has_rules and bool(place.prefix))
        elif not place.prefix:
            collector.shelf.is_container = True
        for member in reader.members():
            try:
                collector.take(member, place)
            except Damage as damage:
                if not (reader.can_go_on and collector.limits.partial):
                    raise
                collector.shelf.skips.append(Skip(collector.latest, f"damaged: {damage.reason}"))
                collector.shelf.notes.append(f"gap: {quoted_name(collector.latest)} is damaged ({damage.reason})")
    except Damage as damage:
        whole, total = (reader.whole, reader.total) if reader else (0, None)
        where = f"member {whole + 1:,} of {total or '?'}; {_members(whole)} before it"
        hint = "--partial reads what was whole before the damage"
        stop_reading(f"{quoted_name(name)} is damaged at {where} ({damage.reason})", hint, collector)
    except LimitHit as hit:
        stop_at_limit(f"{quoted_name(name)}: {hit.reason}", collector)
    if reader is not None:
        collector.shelf.notes.extend(f"{quoted_name(name)}: {note}" for note in reader.notes)


def stop_at_limit(message: str, collector: Collector) -> None:
    """End the reading of one source at a cap, naming where, and what takes most."""
    largest = collector.largest()
    hint = "raise that cap if you trust the source, or leave out what is large"
    stop_reading(f"{message}, at {quoted_name(collector.latest)}", f"{hint}: {largest}" if largest else hint, collector)


def stop_reading(message: str, hint: str, collector: Collector) -> None:
    """End the reading of one source: a PackError, or, with `partial`, a note on the gap."""
    if not collector.limits.partial:
        raise PackError(message, hint)
    collector.shelf.notes.append(
        f"gap: {message}; what was read before it is kept, but could not be checked to its end"
    )


def _members(count: int) -> str:
    return f"{count:,} whole member{'' if count == 1 else 's'}"
