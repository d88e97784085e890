"""A pull on screen: progress and the report go in, bars on stderr and lines on stdout come out; for `pull`."""

import time
from collections.abc import Iterator
from typing import Any

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from salalocal.checkpoint.pull import CHECKING, DONE, FETCHING, FileProgress, PullProgress
from salalocal.session.pulling import PullReport
from salalocal.terminal.console import Terminal
from salalocal.terminal.live_bar import LINE_EVERY_S, LiveBar
from salalocal.terminal.progress import duration
from salalocal.terminal.tables import size

_NARROW = 72


class PullView:
    """Shows one pull; `close` before anything else is written to the terminal."""

    def __init__(self, terminal: Terminal) -> None:
        self._live_bar = LiveBar(terminal, time.monotonic() + LINE_EVERY_S)

    def show(self, progress: PullProgress) -> None:
        """Draw how far all files are, and those that are being worked on."""
        if all(file.phase == DONE for file in progress.files):
            self.close()
        else:
            self._live_bar.draw(lambda width: _bars(progress, width), lambda: f"pulling: {_figures(progress)}")

    def close(self) -> None:
        """Take the bars away; safe to call at any time."""
        self._live_bar.close()


def pull_lines(report: PullReport) -> Iterator[str]:
    """What is to be fetched, or where the model is now and what to do with it."""
    listing = report.listing
    if report.plan is not None and report.folder is None:
        for state in report.plan.files:
            here = _state(state.num_here_bytes, state.file.num_bytes)
            yield f"{size(state.file.num_bytes):>9}  {here:<8}  {state.file.name}"
        yield f"to fetch: {size(report.fetched_bytes)} of {size(listing.num_bytes)}"
        yield f"free on the disk: {size(report.plan.free_bytes)}"
        return
    yield f"{listing.hub_id}, commit {listing.commit}"
    yield f"{len(listing.files)} files, {size(listing.num_bytes)}, every hash is right"
    if report.fetched_bytes:
        rate = f", {size(int(report.fetched_bytes / max(report.elapsed_s, 1e-3)))}/s"
        yield f"fetched {size(report.fetched_bytes)} in {duration(report.elapsed_s)}{rate}"
    yield str(report.folder)


def pull_json(report: PullReport) -> dict[str, Any]:
    """The report as plain data."""
    listing, plan = report.listing, report.plan
    here = {} if plan is None else {state.file.name: state.num_here_bytes for state in plan.files}
    return {
        "model": listing.hub_id,
        "revision": report.revision,
        "commit": listing.commit,
        "folder": None if report.folder is None else str(report.folder),
        "total_bytes": listing.num_bytes,
        "fetch_bytes": report.fetched_bytes,
        "free_bytes": None if plan is None else plan.free_bytes,
        "files": [
            {
                "name": file.name,
                "bytes": file.num_bytes,
                "here_bytes": here.get(file.name, file.num_bytes),
                "digest": file.digest,
            }
            for file in listing.files
        ],
        "not_fetched": list(listing.left_out),
    }


def _state(here_bytes: int, num_bytes: int) -> str:
    if here_bytes == num_bytes:
        return "here"
    return f"{here_bytes * 100 // num_bytes}% here" if here_bytes else "to fetch"


def _bars(progress: PullProgress, width: int) -> RenderableType:
    working = [file for file in progress.files if file.phase in (CHECKING, FETCHING) and file.total_bytes]
    rows = [Text(_figures(progress), no_wrap=True, overflow="ellipsis")]
    return Group(*rows, *(_file_row(file, width) for file in working))


def _file_row(file: FileProgress, width: int) -> RenderableType:
    row = Table.grid(padding=(0, 1))
    row.width = width
    row.add_column(ratio=2 if width >= _NARROW else 1, no_wrap=True, overflow="ellipsis")
    if width >= _NARROW:
        row.add_column(ratio=1)
    row.add_column(no_wrap=True)
    bar = [ProgressBar(total=file.total_bytes, completed=file.num_bytes)] if width >= _NARROW else []
    row.add_row(Text(file.name, style="dim"), *bar, _file_figures(file, width >= _NARROW))
    return row


def _file_figures(file: FileProgress, is_wide: bool) -> str:
    percent = f"{file.num_bytes * 100 // file.total_bytes}%"
    if file.note:
        return f"{percent} waits: {file.note}" if is_wide else f"{percent} waits"
    if file.phase == CHECKING:
        return f"{percent} checking"
    if file.bytes_per_s < 1:
        return percent
    rate = f"{percent} {size(int(file.bytes_per_s))}/s"
    return f"{rate}, {duration(file.left_s)} left" if is_wide and file.left_s is not None else rate


def _figures(progress: PullProgress) -> str:
    percent = progress.num_bytes * 100 // max(1, progress.total_bytes)
    parts = [f"{percent}% of {size(progress.total_bytes)}"]
    if progress.bytes_per_s:
        parts.append(f"{size(int(progress.bytes_per_s))}/s")
    if progress.left_s is not None:
        parts.append(f"{duration(progress.left_s)} left")
    done = sum(file.phase == DONE for file in progress.files)
    parts.append(f"{done}/{len(progress.files)} files")
    waiting = next((file.note for file in progress.files if file.note), "")
    return ", ".join([*parts, waiting] if waiting else parts)
