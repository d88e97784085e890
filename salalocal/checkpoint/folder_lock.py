"""A folder that one process works in at a time: its path comes in, a context goes out; for pulls, quantizations and
studies."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from salalocal.checkpoint.strict_json import one_line
from salalocal.errors import BusyError


@contextmanager
def only_one(folder: Path, work: str) -> Iterator[None]:
    """Lock a folder against other processes, where the system can; the end of the process unlocks it.

    Raises: BusyError, saying that another process does this `work`.
    """
    if os.name == "nt":
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BusyError(f"{one_line(folder, 160)}: another process {work}", "let it finish") from error
        yield
    finally:
        os.close(descriptor)
