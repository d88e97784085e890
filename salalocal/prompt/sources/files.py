"""One file on the disk -> its bytes, opened once, checked on the handle and held to the size it had then.

For the folder reader and the arguments themselves. Only regular files are read; nothing here can block.
"""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from salalocal.prompt.sources.document import Member
from salalocal.prompt.sources.faults import Changed, Refused
from salalocal.prompt.sources.kinds import HEAD_BYTES
from salalocal.prompt.sources.limits import Meter
from salalocal.prompt.sources.streams import PIECE_BYTES

# Not every system has every flag: no waiting for a pipe's writer, no controlling terminal, bytes as they are.
_FLAGS = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_BINARY"))
_NO_LINKS = getattr(os, "O_NOFOLLOW", 0)
_KINDS = {
    stat.S_IFIFO: "named pipe (give - and pipe into salalocal)",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
    stat.S_IFLNK: "symbolic link, not followed",
    stat.S_IFDIR: "folder",
}


@dataclass
class OpenFile:
    """A regular file, open, with what the system said of it when it was opened."""

    handle: BinaryIO
    status: os.stat_result

    def pieces(self, meter: Meter, member: Member | None = None) -> Iterator[bytes]:
        """Read the file up to the size it had when it was opened.

        A file of size 0 is read to its end, since those under /proc have none. Growth is noted on the member.
        Raises Changed when the file shrank or was rewritten meanwhile; Refused when it cannot be read.
        """
        left = self.status.st_size or None
        while piece := self._read(PIECE_BYTES if left is None else min(PIECE_BYTES, left)):
            meter.read(len(piece))
            yield piece
            left = None if left is None else left - len(piece)
        after = os.fstat(self.handle.fileno())
        if after.st_size > self.status.st_size > 0:
            if member is not None:
                member.notes.append(f"grew while it was read: the first {self.status.st_size:,} bytes were kept")
        elif left or after.st_size < self.status.st_size or after.st_mtime_ns != self.status.st_mtime_ns:
            raise Changed("changed while it was read")

    def head(self) -> bytes:
        """Look at the first bytes, and go back to the start. Raises Refused."""
        data = self._read(HEAD_BYTES)
        self.handle.seek(0)
        return data

    def _read(self, num_bytes: int) -> bytes:
        try:
            return self.handle.read(num_bytes)
        except OSError as error:
            raise Refused(system_reason(error)) from error

    def has_changed(self) -> bool:
        """Whether the file has another size or time than when it was opened."""
        after = os.fstat(self.handle.fileno())
        return (after.st_size, after.st_mtime_ns) != (self.status.st_size, self.status.st_mtime_ns)


def open_file(path: str | Path, follows_link: bool = False) -> OpenFile:
    """Open a regular file without waiting for anything. Raises Refused with the kind or the system's reason."""
    try:
        # Looked at first, since opening alone can make a device act; looked at again on what was opened.
        _check_regular(os.stat(path, follow_symlinks=follows_link))  # noqa: PTH116
        descriptor = os.open(path, _FLAGS | (0 if follows_link else _NO_LINKS))
        handle = os.fdopen(descriptor, "rb", buffering=0)
    except OSError as error:
        raise Refused(system_reason(error)) from error
    try:
        status = os.fstat(handle.fileno())
        _check_regular(status)
    except BaseException:
        handle.close()
        raise
    return OpenFile(handle, status)


def system_reason(error: OSError) -> str:
    """Give the system's words for why a file cannot be read."""
    return f"cannot be read: {error.strerror or type(error).__name__}"


def _check_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise Refused(_KINDS.get(stat.S_IFMT(status.st_mode), "not a regular file"))
