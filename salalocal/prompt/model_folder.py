"""The small text files of a model folder: a path comes in, text or a JSON object goes out, capped and checked; for
the tokenizer and the chat template.

A file that is missing is None. A file that is there and cannot be used is a CheckpointError that names it.
"""

import json
import os
import stat
from pathlib import Path
from typing import Any

from salalocal.errors import CheckpointError
from salalocal.prompt.visible import visible

MAX_VALUES = 3_000_000  # about 300 MiB of Python objects at worst
HINT = "Download the model again, or choose another one with --model."


def damaged(path: Path, reason: object) -> CheckpointError:
    """The error for a file of a model folder that cannot be used; the reason may quote the file."""
    return CheckpointError(f"{_shortened(path, 120)}: {_shortened(reason, 160)}", HINT)


def _shortened(text: object, limit: int) -> str:
    shown = visible(str(text)).replace("\n", " ")
    half = limit // 2 - 2
    return shown if len(shown) <= limit else f"{shown[:half]}...{shown[-half:]}"


def read_text(path: Path, max_bytes: int) -> str | None:
    """The text of a UTF-8 file, None where there is none.

    Raises: CheckpointError if it is no regular file, larger than max_bytes, unreadable or not UTF-8.
    """
    try:
        data = _read_regular(path, max_bytes + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise damaged(path, f"cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if len(data) > max_bytes:
        raise damaged(path, f"larger than {max_bytes:,} bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise damaged(path, f"not UTF-8 at byte {error.start:,}") from error


def _read_regular(path: Path, num_bytes: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("not a regular file")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read(num_bytes)
    finally:
        os.close(descriptor)


def read_json(path: Path, max_bytes: int) -> dict[str, Any] | None:
    """The object of a JSON file, None where there is no file.

    Raises: CheckpointError as read_text, and for bad JSON, a key given twice, deep nesting or too many values.
    """
    text = read_text(path, max_bytes)
    if text is None:
        return None
    if text.count(",") + text.count("[") + text.count("{") > MAX_VALUES:
        raise damaged(path, f"holds more than {MAX_VALUES:,} values")
    try:
        value = json.loads(text, object_pairs_hook=_without_doubles)
    except RecursionError as error:
        raise damaged(path, "nested too deeply") from error
    except ValueError as error:
        raise damaged(path, f"not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise damaged(path, f"should hold a JSON object, holds a {type(value).__name__}")
    return value


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        doubled = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {doubled!r} stands twice in one object")
    return result
