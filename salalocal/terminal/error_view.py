"""One of our own errors as lines on stderr: what it knows more than its message, then `error:` and `hint:`."""

import sys
from typing import IO

from salalocal.errors import SalaLocalError
from salalocal.terminal.console import show_error

_FILES_SHOWN = 10


def show_salalocal_error(error: SalaLocalError, stream: IO[str] | None = None) -> None:
    """Show an error; files that do not fit the context are listed with their tokens, the largest first."""
    from salalocal.session.tokens import ContextOverflow  # here, since the tokenizer's library takes its time
    from salalocal.terminal.tables import largest_lines

    if isinstance(error, ContextOverflow):
        (stream or sys.stderr).writelines(f"{line}\n" for line in largest_lines(error.report, _FILES_SHOWN))
    show_error(error.message, [error.hint] if error.hint else [], stream)
