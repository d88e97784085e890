"""Files that a crash cannot tear: written beside their place, synced, renamed, the folder synced; for every writer.

A file is in its place as a whole or not at all, and a rename is never seen before the bytes it names.
"""

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

TEMPORARY = ".writing-"


def write_beside(folder: Path, write: Callable[[BinaryIO], object], mode: int = 0o666) -> Path:
    """Write and sync a new hidden file in the folder; gives back its path, to be renamed.

    `mode` is narrowed by the umask, as for any new file. Raises: OSError; the file is gone then.
    """
    path = folder / f"{TEMPORARY}{secrets.token_hex(8)}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    try:
        with os.fdopen(os.open(path, flags, mode), "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return path


def replace_file(path: Path, write: Callable[[BinaryIO], object], mode: int = 0o666) -> None:
    """Put a whole new file in the place of an old one, or leave the old one. Raises: OSError."""
    beside = write_beside(path.parent, write, mode)
    try:
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable, where the system can sync folders. Raises: OSError."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_strays(folder: Path) -> None:
    """Take away what a killed writer left; two writers at once on one folder are a mistake, and one of them fails."""
    for path in folder.glob(f"{TEMPORARY}*"):
        path.unlink(missing_ok=True)
