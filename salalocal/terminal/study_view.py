"""A study on screen: progress goes in, a bar on stderr; reports go in, tables for stdout; for the `eval` commands.

A table is one line a depth, task or kind and one column a length, so that it fits 40 columns for a few lengths.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from salalocal.session.plan import short_tokens
from salalocal.terminal.console import Terminal
from salalocal.terminal.live_bar import LiveBar
from salalocal.terminal.progress import duration

if TYPE_CHECKING:
    from salalocal.evals.perplexity import PerplexityReport
    from salalocal.evals.questionnaire import Report
    from salalocal.evals.scoring import Share
    from salalocal.evals.study import StudyProgress

_NARROW = 60


class StudyView:
    """Shows one study; `close` before anything else is written to the terminal."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal
        self._live_bar = LiveBar(terminal)

    def show(self, progress: "StudyProgress") -> None:
        """Draw how far it is; the end leaves one line behind."""
        if progress.num_done == progress.num_tasks:
            self.close()
            self._terminal.tell(f"measured in {duration(progress.elapsed_s)}, {_rate(progress)}", style="dim")
        else:
            self._live_bar.draw(lambda width: _bar(progress, width), lambda: f"measuring: {_figures(progress)}")

    def close(self) -> None:
        """Take the bar away; safe to call at any time."""
        self._live_bar.close()


def needle_lines(report: "Report") -> Iterator[str]:
    """The grid, a line a depth, in percent; then each length with its interval."""
    depths = sorted({record["depth"] for record in report.records})
    yield from _grid(report, ("depth", "length"), "depth", {depth: f"{depth:g} %" for depth in depths})
    yield ""
    yield from _share_lines({short_tokens(key[0]): share for key, share in report.shares("length").items()})
    yield from _end_lines(report)


def ruler_lines(report: "Report") -> Iterator[str]:
    """The scores, a line a task, in percent; then each length with the interval of wholly right answers."""
    tasks = list(dict.fromkeys(record["task"] for record in report.records))
    yield from _grid(report, ("task", "length"), "score", {task: task for task in tasks})
    yield ""
    yield from _share_lines({short_tokens(key[0]): share for key, share in report.shares("length").items()})
    yield from _end_lines(report)


def mrcr_lines(report: "Report") -> Iterator[str]:
    """The scores, a line a number of needles, in percent; then each length with the interval of exact answers."""
    needles = sorted({record["needles"] for record in report.records})
    yield from _grid(report, ("needles", "length"), "score", {count: f"{count} needles" for count in needles})
    yield ""
    yield from _share_lines({short_tokens(key[0]): share for key, share in report.shares("length").items()})
    yield from _end_lines(report)


def recall_lines(report: "Report") -> Iterator[str]:
    """What was right by kind of question and by place in the files, and what was wrong."""
    yield from _share_lines({key[0]: share for key, share in sorted(report.shares("kind").items())})
    yield ""
    parts = sorted(report.shares("part").items())
    yield from _share_lines({f"{10 * (key[0] - 1)} to {10 * key[0]} %": share for key, share in parts})
    yield from _end_lines(report)
    for record in report.records:
        if not record["right"]:
            yield f"wrong: {record['path']}:{record['line']} {record['name']}: {_short(record['answer'])}"


def perplexity_lines(report: "PerplexityReport") -> Iterator[str]:
    """The perplexity in all, and by position in the context."""
    total = report.total.to_json()
    yield f"perplexity {total['perplexity']:.3f}, {total['bits_per_byte']:.4f} bits a byte, {total['tokens']:,} tokens"
    yield ""
    yield f"{'position':>14} {'perplexity':>10} {'tokens':>9}"
    for end, loss in report.by_end.items():
        figures = loss.to_json()
        yield f"{'below ' + short_tokens(end):>14} {figures['perplexity']:>10.3f} {figures['tokens']:>9,}"


def _grid(report: "Report", axes: tuple[str, str], head: str, names: Mapping[Any, str]) -> Iterator[str]:
    """Mean scores in percent: a line for each value of the first axis, a column for each length."""
    lengths = sorted({record["length"] for record in report.records})
    width = max(len(head), *map(len, names.values()))
    shares = report.shares(*axes)
    columns = [max(4, len(short_tokens(length))) for length in lengths]
    shown = [f"{short_tokens(length):>{column}}" for length, column in zip(lengths, columns, strict=True)]
    yield " ".join([f"{head:<{width}}", *shown])
    for value, name in names.items():
        cells = (shares.get((value, length)) for length in lengths)
        figures = [f"{_percent(cell):>{column}}" for cell, column in zip(cells, columns, strict=True)]
        yield " ".join([f"{name:<{width}}", *figures])


def _percent(share: "Share | None") -> str:
    return "-" if share is None else f"{100 * share.score:.0f}"


def _share_lines(shares: "Mapping[str, Share]") -> Iterator[str]:
    """Right answers with their 95 % intervals."""
    width = max(map(len, shares))
    counts = {name: f"{share.right}/{share.asked}" for name, share in shares.items()}
    wide = max(map(len, counts.values()))
    for name, share in shares.items():
        low, high = share.interval
        yield (
            f"{name:<{width}} {counts[name]:>{wide}} {100 * share.share:5.1f} % ({100 * low:.0f} to {100 * high:.0f} %)"
        )


def _end_lines(report: "Report") -> Iterator[str]:
    total = report.total
    low, high = total.interval
    yield ""
    yield f"all: {total.right}/{total.asked} {100 * total.share:.1f} % ({100 * low:.1f} to {100 * high:.1f} %)"
    if abs(total.score - total.share) > 1e-9:
        yield f"mean score: {100 * total.score:.1f} %"
    if report.num_cut:
        yield f"answers that did not end by themselves: {report.num_cut}"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else f"{line[:57]}..."


def _bar(progress: "StudyProgress", width: int) -> RenderableType:
    share = f"{progress.num_done:,}/{progress.num_tasks:,}"
    row = Table.grid(padding=(0, 1))
    row.width = width
    row.add_column(ratio=1)
    row.add_column(no_wrap=True)
    row.add_row(ProgressBar(total=1.0, completed=progress.share), f"{share} {progress.share:.0%}")
    figures = _figures(progress) if width >= _NARROW else f"{progress.label}, {_left(progress)} left"
    return Group(Text(figures, style="dim", no_wrap=True, overflow="ellipsis"), row)


def _figures(progress: "StudyProgress") -> str:
    parts: Sequence[str] = [f"{progress.num_done:,} of {progress.num_tasks:,}"]
    if progress.num_right is not None and progress.num_done:
        parts = [*parts, f"{progress.num_right:,} right"]
    return ", ".join([*parts, f"now {progress.label}", _rate(progress), f"{_left(progress)} left"])


def _left(progress: "StudyProgress") -> str:
    return duration(progress.elapsed_s * (1 / max(progress.share, 1e-9) - 1)) if progress.share else "unknown time"


def _rate(progress: "StudyProgress") -> str:
    return f"{progress.num_read / max(progress.elapsed_s, 1e-9):,.0f} tok/s"
