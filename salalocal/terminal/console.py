"""The two streams of a command: data on stdout, narration on stderr; the error lines; for every face at a terminal."""

import io
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.text import Text

from salalocal.prompt.visible import visible

MAX_LINE = 300


@dataclass(frozen=True)
class Terminal:
    """Where a command writes: `out` carries the answer or the data, `err` everything else.

    `is_live` says that stderr can redraw a line; `is_quiet` drops narration and progress, never errors.
    """

    out: Console
    err: Console
    is_quiet: bool = False

    @property
    def is_live(self) -> bool:
        """True if progress may be redrawn in place on stderr."""
        return self.err.is_terminal and not self.err.is_dumb_terminal

    @property
    def has_rich_output(self) -> bool:
        """True if answers are drawn as Markdown: stdout is a terminal that can move its cursor."""
        return self.out.is_terminal and not self.out.is_dumb_terminal

    def tell(self, line: str, style: str = "") -> None:
        """One line of narration on stderr; a terminal breaks it between words, a pipe gets it whole."""
        if not self.is_quiet:
            self.err.print(Text(visible(line), style=style), soft_wrap=not self.err.is_terminal)

    def write(self, text: str) -> None:
        """Model text or data on stdout: made visible on a terminal, byte-exact in a pipe."""
        stream = self.out.file
        stream.write(visible(text) if self.out.is_terminal else text)
        stream.flush()


def prepare_streams() -> None:
    """Make stdout and stderr take any text: UTF-8 byte by byte in a pipe, what the terminal can show on a terminal."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller: what is meant for it must not land in the other one
            setattr(sys, name, io.TextIOWrapper(io.FileIO(os.devnull, "w"), encoding="utf-8"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            if stream.isatty():
                stream.reconfigure(errors="backslashreplace")
            else:
                stream.reconfigure(encoding="utf-8", errors="backslashreplace", newline="\n")


def make_terminal(is_quiet: bool = False, out: IO[str] | None = None, err: IO[str] | None = None) -> Terminal:
    """Consoles over stdout and stderr that honour NO_COLOR, TERM=dumb and pipes."""
    return Terminal(_console(out or sys.stdout), _console(err or sys.stderr), is_quiet)


def _console(stream: IO[str]) -> Console:
    return Console(file=stream, markup=False, emoji=False, highlight=False)


def one_line(text: str, max_chars: int) -> str:
    """Text made visible on one line, cut at its end if it is too long."""
    line = visible(" ".join(text.split()))
    return line if len(line) <= max_chars else line[: max_chars - 4].rstrip() + " ..."


def show_error(message: str, hints: Sequence[str] = (), stream: IO[str] | None = None) -> None:
    """One `error:` line and its `hint:` lines on stderr, each at most 300 characters."""
    stream = stream or sys.stderr
    console = _console(stream)
    console.print(
        Text.assemble(("error:", "bold red"), " ", one_line(message, MAX_LINE - len("error: "))), soft_wrap=True
    )
    for hint in hints:
        console.print(Text.assemble(("hint:", "bold"), " ", one_line(hint, MAX_LINE - len("hint: "))), soft_wrap=True)


def save_bug_report(error: BaseException, folder: Path) -> Path:
    """Write the traceback of a bug of ours to a new file that only the user can read, and name it."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        folder = Path(tempfile.gettempdir())
    handle, name = tempfile.mkstemp(prefix="bug-", suffix=".log", dir=folder)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write("".join(traceback.format_exception(error)))
    return Path(name)
