"""A question that a user answers with yes or no, before something is lost; for `rm`."""

import sys

from salalocal.errors import RequestError
from salalocal.terminal.console import one_line

_MAX_QUESTION = 300


def confirm(question: str, without_asking: str) -> bool:
    """Ask on stderr; anything but y or yes means no.

    Raises: RequestError where nobody can answer; its hint is the command that asks nothing.
    """
    if not sys.stdin.isatty():
        raise RequestError("stdin is no terminal, so nobody can be asked", without_asking)
    sys.stderr.write(f"{one_line(question, _MAX_QUESTION)} [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")
