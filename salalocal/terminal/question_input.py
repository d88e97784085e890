"""Where the questions of a chat come from: an edited prompt at a terminal, lines in a pipe; for chat_view."""

import os
import sys
from pathlib import Path
from typing import BinaryIO, Protocol, TextIO

from prompt_toolkit import PromptSession
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.input import Input, create_input
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import Output, create_output
from prompt_toolkit.output.vt100 import Vt100_Output

from salalocal.errors import RequestError

PROMPT = ">>> "
CONTINUATION = "... "


class QuestionInput(Protocol):
    """A source of lines."""

    is_interactive: bool

    def read(self) -> str | None:
        """The next line or multi-line text; None at the end. Raises: KeyboardInterrupt."""
        ...


class LineInput:
    """One question a line, from a pipe or a file."""

    is_interactive = False

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def read(self) -> str | None:
        """The next line without its end; bytes that are not UTF-8 become U+FFFD."""
        line = self._stream.readline()
        return line.decode("utf-8", "replace").rstrip("\r\n") if line else None


class PromptInput:
    """A prompt with history and several lines: Enter sends; Alt-Enter or a backslash at the end goes on."""

    is_interactive = True

    def __init__(self, history_path: Path, terminal: TextIO | None = None) -> None:
        keyboard: Input | None = create_input(terminal) if terminal is not None else None
        self._session: PromptSession[str] = PromptSession(
            multiline=True,
            key_bindings=_key_bindings(),
            history=_open_history(history_path),
            prompt_continuation=CONTINUATION,
            input=keyboard,
            output=_open_output(),
        )

    def read(self) -> str | None:
        """What the user typed; None for Ctrl-D. Raises: KeyboardInterrupt for Ctrl-C at an empty prompt."""
        try:
            return self._session.prompt(PROMPT)
        except EOFError:
            return None


def _open_output() -> Output:
    output = create_output(stdout=sys.stderr)
    if isinstance(output, Vt100_Output):
        output.enable_cpr = False  # asks for the cursor's place; a terminal that does not answer gets a warning
    return output


def _key_bindings() -> KeyBindings:
    bindings = KeyBindings()

    @bindings.add("enter")
    def _enter(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\") and buffer.document.is_cursor_at_the_end:
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def _alt_enter(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @bindings.add("c-c")
    def _interrupt(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt())

    return bindings


def _open_history(path: Path) -> History:
    """Earlier questions, in a file that only the user can read; in memory if there can be no file."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600))
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(path))


def open_questions(history_path: Path, is_stdin_taken: bool) -> QuestionInput:
    """The keyboard if stdin is a terminal, else lines from stdin; the controlling terminal if stdin is a document.

    Raises: RequestError if stdin is a document and there is no terminal to ask from.
    """
    if not is_stdin_taken:
        return PromptInput(history_path) if sys.stdin.isatty() else LineInput(sys.stdin.buffer)
    try:
        terminal = Path("/dev/tty").open(encoding="utf-8")  # noqa: SIM115 (lives as long as the chat)
    except OSError:
        raise RequestError(
            "stdin is read as a document, and there is no terminal to ask questions from",
            'use: salalocal ask -f - "question"',
        ) from None
    return PromptInput(history_path, terminal)
