"""From what a command raised to an exit code and the lines that explain it; for main.

0 done · 1 a bug of ours · 2 usage · 3 memory · 4 input, or a full disk · 5 hub · 6 device · 7 numbers · 8 busy
130 interrupted · 141 the reader of a pipe went away · 143 terminated
"""

import errno
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, TextIO

import typer

from salalocal.errors import SalaLocalError
from salalocal.settings import is_debugging, state_folder
from salalocal.terminal.console import save_bug_report, show_error
from salalocal.terminal.error_view import show_salalocal_error

BUG, USAGE, DISK_FULL, INTERRUPTED, PIPE_CLOSED, TERMINATED = 1, 2, 4, 130, 141, 143
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# Typer carries its own copy of click from some version on, so its exceptions have no fixed home.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


class Terminated(SystemExit):
    """SIGTERM arrived."""


def run(app: Callable[..., Any], arguments: Sequence[str]) -> int:
    """Run the command line app and give back its exit code; every error is shown as the error contract says."""
    try:
        with _raising_on_sigterm():
            code = app(args=list(arguments), prog_name="salalocal", standalone_mode=False)
            sys.stdout.flush()
    except BaseException as error:
        code = _exit_code(error, "--json" in arguments)
    return code if isinstance(code, int) else 0


def _exit_code(error: BaseException, is_json: bool) -> int:
    if _is_closed_pipe(error):
        _discard(sys.stdout)
        return PIPE_CLOSED
    if isinstance(error, Terminated):
        return TERMINATED
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return INTERRUPTED
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else BUG
    message, hint, code = _explain(error)
    if is_debugging():
        traceback.print_exception(error)
    document = {"error": {"message": message, "hint": hint, "exit_code": code}}
    _end_stdout(json.dumps(document) + "\n" if is_json else "")
    try:
        if isinstance(error, SalaLocalError):
            show_salalocal_error(error)
        else:
            show_error(message, [hint])
        sys.stderr.flush()
    except (OSError, SystemExit):  # stderr is full or, as rich says it, closed: the code is all that can be said
        _discard(sys.stderr)
    return code


def _end_stdout(text: str) -> None:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError:  # nobody reads it, or the disk is full: the lines on stderr say the same
        _discard(sys.stdout)


def _discard(stream: TextIO) -> None:
    """Send what is left for a stream nowhere: otherwise Python would fail once more when it flushes at exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def _explain(error: BaseException) -> tuple[str, str, int]:
    if isinstance(error, SalaLocalError):
        return error.message, error.hint, error.exit_code
    if isinstance(error, _UsageError):
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "salalocal"
        message = str(getattr(error, "format_message", error.__str__)())
        return message[:1].lower() + message[1:].rstrip("."), f"{command} --help", USAGE
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        return (
            f"cannot write {error.filename or 'the output'}: {error.strerror}",
            "make room, or write elsewhere",
            DISK_FULL,
        )
    log = save_bug_report(error, state_folder() / "log")
    message = f"a bug in salalocal, written to {log}: {type(error).__name__}: {error}"
    return message, "please report it with that file; SALALOCAL_DEBUG=1 shows it here", BUG


def _is_closed_pipe(error: BaseException) -> bool:
    cause = error.__context__ if isinstance(error, SystemExit) else error
    return isinstance(cause, OSError) and cause.errno == errno.EPIPE


@contextmanager
def _raising_on_sigterm() -> Iterator[None]:
    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise Terminated(TERMINATED)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
