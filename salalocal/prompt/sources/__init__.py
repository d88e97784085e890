"""Paths of files, folders and archives, and stdin -> documents; for packs, the session and the command line.

Nothing is ever written and nothing is ever cut in silence: what is not read is a skip with its reason, a source that
is damaged or too large is an error, and everything that was guessed is a note.
"""

import os
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from io import BytesIO
from itertools import chain
from pathlib import Path, PurePath
from typing import BinaryIO

from salalocal.errors import PackError, RequestError
from salalocal.prompt.sources.archive import (
    is_archive,
    open_seekable,
    open_stream,
    read_archive,
    stop_at_limit,
    stop_reading,
)
from salalocal.prompt.sources.arrange import arrange
from salalocal.prompt.sources.collect import Collector, Place, Shelf
from salalocal.prompt.sources.document import Document, Member, Reading, Skip
from salalocal.prompt.sources.faults import Changed, Damage, LimitHit, Refused
from salalocal.prompt.sources.files import OpenFile, open_file, system_reason
from salalocal.prompt.sources.folder import FolderReader
from salalocal.prompt.sources.kinds import HEAD_BYTES, archive_kind
from salalocal.prompt.sources.limits import Meter, PackLimits, cap_text
from salalocal.prompt.sources.rules import zip_document_reason
from salalocal.prompt.sources.streams import counted, file_pieces
from salalocal.prompt.visible import quoted_name

__all__ = ["Document", "PackLimits", "Reading", "Skip", "read_sources"]

# A file that was named by itself is read whatever it is called.
_AS_NAMED = Place(level=0, has_rules=False)


def read_sources(
    paths: Sequence[str | Path], limits: PackLimits | None = None, stdin: BinaryIO | None = None
) -> Reading:
    """Read files, folders, archives and, for "-", standard input, in the order given.

    A Path is always a file; only the string "-" is standard input.
    Raises PackError for a path that is not there, a damaged archive, a cap on the whole, or when no text was found;
    RequestError for "-" given twice.
    """
    return _Sources(limits or PackLimits(), stdin).read(paths)


class _Sources:
    def __init__(self, limits: PackLimits, stdin: BinaryIO | None) -> None:
        self._limits = limits
        self._stdin = stdin
        self._meter = Meter(limits)
        self._collector = Collector(limits, self._meter, self._open_nested)
        self._seen: set[tuple[int, int]] = set()

    def read(self, paths: Sequence[str | Path]) -> Reading:
        if sum(path == "-" for path in paths) > 1:
            raise RequestError("standard input (-) can be read only once")
        shelves = []
        for path in paths:
            name = "stdin" if path == "-" else PurePath(path).name or str(path)
            shelf = self._collector.shelf = Shelf(name)
            shelves.append(shelf)
            try:
                if path == "-":
                    self._read_stdin(self._stdin or sys.stdin.buffer)
                else:
                    self._read_path(Path(path))
            except LimitHit as hit:
                stop_at_limit(f"{quoted_name(name)}: {hit.reason}", self._collector)
            except OSError as error:
                raise PackError(f"{quoted_name(name)} {system_reason(error)}") from error
        reading = arrange(shelves)
        if not reading.documents:
            raise _nothing_found(shelves, reading)
        return reading

    def _read_path(self, path: Path) -> None:
        try:
            status = path.stat()
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "no name that a file can have"
            raise PackError(f"cannot read {quoted_name(str(path))}: {reason}", "check the path") from error
        shelf = self._collector.shelf
        if (status.st_dev, status.st_ino) in self._seen:
            shelf.skips.append(Skip(_argument_label(path), "given twice"))
            return
        self._seen.add((status.st_dev, status.st_ino))
        if path.is_dir():
            shelf.name = path.resolve().name or "/"
            shelf.is_container, shelf.hidden_folder = True, f"{shelf.name}/"
            FolderReader(path, self._collector).read()
            return
        try:
            self._read_file(path)
        except Refused as refusal:
            shelf.skips.append(Skip(_argument_label(path), refusal.reason))
        except Damage as damage:
            stop_reading(f"{quoted_name(path.name)} is damaged ({damage.reason})", "", self._collector)

    def _read_file(self, path: Path) -> None:
        """Read one file that was named, or the archive it is; once more if it changes under our hands."""
        for is_last_try in (False, True):
            opened = open_file(path, follows_link=True)
            with opened.handle:
                head = opened.head()
                try:
                    if is_archive(head, path.name):
                        self._read_archive_file(opened, head, path.name)
                    else:
                        label = _argument_label(path)
                        member = Member(os.fsencode(label), opened.status.st_size, mtime=opened.status.st_mtime)
                        member.chunks = opened.pieces(self._meter, member)
                        self._collector.take(member, _AS_NAMED)
                    return
                except Changed as change:
                    if is_last_try:
                        raise PackError(
                            f"{quoted_name(str(path))} {change.reason}, twice", "wait until it is written"
                        ) from change

    def _read_archive_file(self, opened: OpenFile, head: bytes, name: str) -> None:
        if archive_kind(head) == "zip" and (reason := zip_document_reason(name)):
            raise Refused(reason)
        open_reader = partial(open_seekable, opened.handle, name, self._limits, self._meter)
        read_archive(open_reader, name, self._collector, Place())
        if opened.has_changed():
            raise PackError(f"{quoted_name(name)} changed while it was read", "wait until it is written")

    def _read_stdin(self, stdin: BinaryIO) -> None:
        head = _read_head(stdin)
        pieces = chain([head] if head else [], file_pieces(stdin, self._meter))
        kind = archive_kind(head)
        if kind == "zip":
            self._read_piped_zip(pieces)
        elif kind or (head and not any(head)):
            open_reader = partial(open_stream, pieces, kind, "stdin", self._meter)
            read_archive(open_reader, "stdin", self._collector, Place())
        else:
            self._collector.take(Member(b"stdin", 0, counted(pieces, self._meter)), _AS_NAMED)

    def _read_piped_zip(self, pieces: Iterable[bytes]) -> None:
        """Hold a zip in memory, since its table stands at its end and a pipe cannot be read twice."""
        content = bytearray()
        for piece in pieces:
            content += piece
            if len(content) > self._limits.max_member_bytes:
                cap = f"cap {cap_text(self._limits.max_member_bytes)} (--max-member)"
                raise PackError(f"a zip through a pipe is held in memory: too large, {cap}", "give it by its name")
        handle = BytesIO(content)
        content.clear()  # BytesIO has a copy
        open_reader = partial(open_seekable, handle, "stdin", self._limits, self._meter)
        read_archive(open_reader, "stdin", self._collector, Place())

    def _open_nested(self, handle: BytesIO, place: Place) -> None:
        name = place.prefix.rstrip("/")
        open_reader = partial(open_seekable, handle, name, self._limits, self._meter)
        read_archive(open_reader, name, self._collector, place)


def _read_head(stdin: BinaryIO) -> bytes:
    head = b""
    while len(head) < HEAD_BYTES and (piece := stdin.read(HEAD_BYTES - len(head))):
        head += piece
    return head


def _argument_label(path: Path) -> str:
    """A file is called as it was typed; of a path from the root or from outside, only its last part says anything."""
    return path.name if path.is_absolute() or ".." in path.parts else path.as_posix()


def _nothing_found(shelves: Sequence[Shelf], reading: Reading) -> PackError:
    names = ", ".join(quoted_name(shelf.name, 40) for shelf in shelves[:3]) + (" ..." if len(shelves) > 3 else "")
    message = f"no text found in {names}" if shelves else "no files were given"
    if reading.skips:
        first = reading.skips[0]
        more = f" ({len(reading.skips) - 1:,} more skipped)" if len(reading.skips) > 1 else ""
        message += f": {quoted_name(first.path, 60)}: {first.reason}{more}"
    return PackError(message, "salalocal tokens -f ... lists what is skipped and why")
