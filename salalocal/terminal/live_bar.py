"""A bar on stderr while work goes on, or a line every few seconds where stderr is no terminal; for the views.

Keys are not echoed while the bar stands: an echoed `^C` would leave a line of it behind.
"""

import time
from collections.abc import Callable

from rich.console import RenderableType
from rich.live import Live

from salalocal.terminal.console import Terminal
from salalocal.terminal.keyboard import EchoSwitch

LINE_EVERY_S = 5.0
_REFRESHES_PER_S = 4


class LiveBar:
    """One bar; `close` before anything else is written to the terminal. Units: next_line_s as `time.monotonic`.

    Without a `next_line_s` the first line comes `LINE_EVERY_S` after the first draw.
    """

    def __init__(self, terminal: Terminal, next_line_s: float | None = None) -> None:
        self._terminal = terminal
        self._live: Live | None = None
        self._echo: EchoSwitch | None = None
        self._next_line_s = next_line_s

    def draw(self, bar: Callable[[int], RenderableType], line: Callable[[], str]) -> None:
        """Show `bar` of the terminal's width, or tell `line` if it is time for one; nothing on a quiet terminal."""
        if self._terminal.is_quiet:
            return
        if not self._terminal.is_live:
            self._tell_sometimes(line)
            return
        if self._live is None:
            self._echo = EchoSwitch()
            self._live = Live(console=self._terminal.err, transient=True, refresh_per_second=_REFRESHES_PER_S)
            self._live.start()
        self._live.update(bar(self._terminal.err.width))

    def close(self) -> None:
        """Take the bar away; safe to call at any time."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        if self._echo is not None:
            self._echo.restore()
            self._echo = None

    def _tell_sometimes(self, line: Callable[[], str]) -> None:
        now_s = time.monotonic()
        if self._next_line_s is None:
            self._next_line_s = now_s + LINE_EVERY_S
        elif now_s >= self._next_line_s:
            self._next_line_s = now_s + LINE_EVERY_S
            self._terminal.tell(line())
