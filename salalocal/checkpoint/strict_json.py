"""JSON of strangers: a file or bytes come in, a dict with bounded size and depth and no doubled keys goes out; for
the checkpoint room.

Everything that is wrong with the input becomes one CheckpointError line; the bounds hold before anything large is
allocated.
"""

import json
import os
import stat
from collections import Counter
from pathlib import Path
from typing import BinaryIO

from salalocal.errors import CheckpointError

MAX_DEPTH = 64
MAX_VALUES = 1_000_000  # about 200 MB of Python objects at worst, and 125,000 tensors in a header
MAX_NON_ASCII_BYTES = 16_000_000  # Python keeps such text with up to four bytes a character


def one_line(text: object, limit: int = 80) -> str:
    """`text` on one line with control characters escaped, cut in the middle beyond `limit` characters."""
    text = str(text)
    half = (limit - 3) // 2
    # Escapes only lengthen, so the ends suffice; a name may have a hundred million characters.
    head, tail = (text, "") if len(text) <= limit else (text[:limit], text[-half:])
    shown = _escaped(head)
    if len(shown) <= limit and not tail:
        return shown
    return f"{shown[:half]}...{(_escaped(tail) or shown)[-half:]}"


def _escaped(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def open_regular(path: Path) -> BinaryIO:
    """Opens a file for reading, never blocking on a pipe or a device.

    Raises: CheckpointError if it is missing, unreadable or no regular file.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise CheckpointError(f"{one_line(path, 160)}: cannot be read: {reason}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{one_line(path, 160)}: not a regular file")
    return os.fdopen(descriptor, "rb")


def read_json_file(path: Path, max_bytes: int) -> dict[str, object]:
    """Reads a file that holds one JSON object.

    Raises: CheckpointError, naming the file, if it is missing, larger than `max_bytes` or not such an object.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise CheckpointError(f"{one_line(path, 160)}: {size:,} bytes, the limit is {max_bytes:,}")
        return parse_object(file.read(max_bytes), one_line(path, 160))


def parse_object(data: bytes, where: str) -> dict[str, object]:
    """Parses bytes that hold one JSON object; `where` begins the error line.

    Raises: CheckpointError for bad text, doubled keys, NaN or infinity, and depth or size over the limits.
    """
    if not data.isascii() and len(data) > MAX_NON_ASCII_BYTES:
        raise CheckpointError(
            f"{where}: {len(data):,} bytes of JSON that is not ASCII, the limit is {MAX_NON_ASCII_BYTES:,}"
        )
    if data.count(b",") + data.count(b"[") + data.count(b"{") > MAX_VALUES:
        raise CheckpointError(f"{where}: JSON with more than {MAX_VALUES:,} values")
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_without_doubles, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where}: not UTF-8 at byte {error.start:,}") from error
    except RecursionError as error:
        raise CheckpointError(f"{where}: JSON nested deeper than {MAX_DEPTH} levels") from error
    except ValueError as error:
        raise CheckpointError(f"{where}: bad JSON: {one_line(error, 120)}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: JSON should be an object, is {type(value).__name__}")
    _check_depth(value, where)
    return value


def _without_doubles(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) < len(pairs):
        doubled = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"key '{one_line(doubled, 60)}' stands twice in one object")
    return result


def _no_constant(text: str) -> object:
    raise ValueError(f"{text} is not a JSON number")


def _check_depth(value: object, where: str) -> None:
    level: list[object] = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for item in level
            if isinstance(item, dict | list)
            for child in (item.values() if isinstance(item, dict) else item)
            if isinstance(child, dict | list)
        ]
        if not level:
            return
    raise CheckpointError(f"{where}: JSON nested deeper than {MAX_DEPTH} levels")
