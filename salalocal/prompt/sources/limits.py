"""What a reader may use: the caps a user can set, and the meter that counts against them; for prompt/sources."""

import time
from dataclasses import dataclass, fields

from salalocal.errors import RequestError
from salalocal.prompt.sources.faults import LimitHit

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


@dataclass(frozen=True)
class PackLimits:
    """Caps on what `read_sources` reads; the flag that raises a cap stands in the message when it is hit.

    Units: bytes, counts and seconds of this thread's CPU time. A folder and an archive are one level each, so an
    archive inside either is opened only from `archive_depth` 2 on. `partial` keeps what was whole before damage
    or a cap, and notes the gap, where otherwise the reading ends in an error.
    """

    max_member_bytes: int = 64 * MIB
    max_total_bytes: int = 2 * GIB
    max_text_bytes: int = 64 * MIB
    max_members: int = 100_000
    max_name_bytes: int = 1_024
    max_path_depth: int = 64
    archive_depth: int = 1
    max_cpu_s: float = 60.0
    partial: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name != "partial" and getattr(self, field.name) <= 0:
                raise RequestError(f"{field.name} must be above zero, not {getattr(self, field.name)}")


class Meter:
    """Counts members, bytes and time over all sources of one reading, across levels of archives."""

    def __init__(self, limits: PackLimits) -> None:
        self._limits = limits
        self._num_members = 0
        self._num_bytes = 0
        self._num_text_bytes = 0
        self._deadline_s = time.thread_time() + limits.max_cpu_s

    def member(self) -> None:
        """Count one more member. Raises LimitHit above the cap."""
        self._num_members += 1
        if self._num_members > self._limits.max_members:
            raise LimitHit(f"more than {self._limits.max_members:,} members (--max-members)")
        self.tick()

    def read(self, num_bytes: int) -> None:
        """Count bytes as they come out of a file or a decompressor. Raises LimitHit above the cap."""
        self._num_bytes += num_bytes
        if self._num_bytes > self._limits.max_total_bytes:
            raise LimitHit(f"more than {cap_text(self._limits.max_total_bytes)} inflated in all (--max-total)")
        self.tick()

    def check_text(self, num_bytes: int) -> None:
        """See whether that much text may still be kept, before it is decoded. Raises LimitHit when not."""
        if self._num_text_bytes + num_bytes > self._limits.max_text_bytes:
            raise LimitHit(f"more than {cap_text(self._limits.max_text_bytes)} of text in all (--max-text)")

    def text(self, num_bytes: int) -> None:
        """Count bytes that are kept as text. Raises LimitHit above the cap."""
        self.check_text(num_bytes)
        self._num_text_bytes += num_bytes

    def tick(self) -> None:
        """Look at the clock. Raises LimitHit when reading has used its CPU time."""
        if time.thread_time() > self._deadline_s:
            raise LimitHit(f"reading took more than {self._limits.max_cpu_s:g} s of CPU time (--max-read-seconds)")


def size_text(num_bytes: int) -> str:
    """Write a size in decimal units, as file managers do: 10.7 GB."""
    size = float(num_bytes)
    for unit in ("bytes", "kB", "MB", "GB", "TB", "PB"):
        if size < 1000 or unit == "PB":
            break
        size /= 1000
    return f"{num_bytes:,} bytes" if unit == "bytes" else f"{size:.1f} {unit}"


def cap_text(num_bytes: int) -> str:
    """Write a cap in the binary unit it was chosen in: 64 MiB."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if num_bytes >= unit and num_bytes % unit == 0:
            return f"{num_bytes // unit} {name}"
    return f"{num_bytes:,} bytes"
