"""Progress of a read on stderr: a bar with the current file, rate and time left; a line every few seconds in a pipe."""

import time

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from salalocal.prompt.visible import quoted_name
from salalocal.session.events import ReadProgress
from salalocal.terminal.console import Terminal

_REFRESHES_PER_S = 8
_LINE_EVERY_S = 5.0
_NARROW = 72


class ReadView:
    """Shows one read after the other; `close` before anything else is written to the terminal."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal
        self._live: Live | None = None
        self._next_line_s: float | None = None

    def show(self, event: ReadProgress) -> None:
        """Draw the progress; the end of the documents and a pause leave one line behind."""
        is_end_of_documents = event.path and event.document == event.num_documents and not event.document_left
        if is_end_of_documents or event.is_paused or event.num_tokens == event.total_tokens:
            self.close()
            if event.is_paused or is_end_of_documents:
                self._terminal.tell(_pause_line(event) if event.is_paused else _done_line(event), style="dim")
        elif not self._terminal.is_quiet:
            self._draw(event)

    def close(self) -> None:
        """Take the bar away; safe to call at any time."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        self._next_line_s = None

    def _draw(self, event: ReadProgress) -> None:
        if not self._terminal.is_live:
            self._tell_sometimes(event)
            return
        if self._live is None:
            self._live = Live(console=self._terminal.err, transient=True, refresh_per_second=_REFRESHES_PER_S)
            self._live.start()
        self._live.update(_bar(event, self._terminal.err.width))

    def _tell_sometimes(self, event: ReadProgress) -> None:
        now_s = time.monotonic()
        if self._next_line_s is None:
            self._next_line_s = now_s + _LINE_EVERY_S
        elif now_s >= self._next_line_s:
            self._next_line_s = now_s + _LINE_EVERY_S
            self._terminal.tell(f"reading: {_share(event)}, {_rate(event)}, {_left(event)}, {_place(event)}")


def _bar(event: ReadProgress, width: int) -> RenderableType:
    first = Text(_place(event), style="dim", no_wrap=True, overflow="ellipsis")
    figures = f"{event.num_tokens * 100 // event.total_tokens}% {_rate(event)}"
    if width >= _NARROW:
        figures = f"{event.num_tokens:,}/{event.total_tokens:,} {figures}, {_left(event)}"
    else:
        figures += f", {_left(event)}"
    row = Table.grid(padding=(0, 1))
    row.width = width
    row.add_column(ratio=1)
    row.add_column(no_wrap=True)
    row.add_row(ProgressBar(total=event.total_tokens, completed=event.num_tokens), figures)
    return Group(first, row)


def _place(event: ReadProgress) -> str:
    if not event.path:
        return "the conversation"
    file = f"file {event.document} of {event.num_documents}"
    return f"{file}: {quoted_name(event.path, 40)} {event.document_tokens:,}/{event.document_total:,}"


def _share(event: ReadProgress) -> str:
    percent = event.num_tokens * 100 // event.total_tokens
    return f"{event.num_tokens:,} of {event.total_tokens:,} tokens ({percent}%)"


def _rate(event: ReadProgress) -> str:
    return f"{event.tokens_per_s:,.0f} tok/s"


def _left(event: ReadProgress) -> str:
    if event.tokens_per_s <= 0:
        return "time left unknown"
    return f"{duration((event.total_tokens - event.num_tokens) / event.tokens_per_s)} left"


def _done_line(event: ReadProgress) -> str:
    cached = f"; {event.cached_tokens:,} more were read before" if event.cached_tokens else ""
    files = "1 file" if event.num_documents == 1 else f"{event.num_documents:,} files"
    return f"read {files}: {event.new_tokens:,} tokens in {duration(event.elapsed_s)}, {_rate(event)}{cached}"


def _pause_line(event: ReadProgress) -> str:
    return f"paused at {_share(event)}"


def duration(seconds: float) -> str:
    """Seconds in a form for people: `0.8 s`, `42 s`, `3:07`, `1:02:33`."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
