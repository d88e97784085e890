"""The echo of keys while an answer is drawn: off, since a typed key or ^C would move the cursor under the drawing."""

import sys
from typing import Any

try:
    import termios
except ImportError:  # Windows
    termios = None  # type: ignore[assignment]


class EchoSwitch:
    """Turns the echo of the terminal on stdin off; `restore` gives it back. Does nothing without a terminal."""

    def __init__(self) -> None:
        self._saved: list[Any] | None = None
        if termios is None or sys.stdin is None or sys.stdin.closed or not sys.stdin.isatty():
            return
        try:
            self._saved = termios.tcgetattr(sys.stdin)
            quiet = list(self._saved)
            quiet[3] &= ~(termios.ECHO | termios.ECHOCTL)
            termios.tcsetattr(sys.stdin, termios.TCSANOW, quiet)
        except termios.error:
            self._saved = None

    def restore(self) -> None:
        """Put the terminal back as it was; safe to call twice."""
        if self._saved is not None:
            termios.tcsetattr(sys.stdin, termios.TCSANOW, self._saved)
            self._saved = None
