"""An evaluation on screen: progress and figures go in, a bar on stderr and lines go out; for `eval`, `quantize`."""

import time
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from salalocal.evals.comparison import EvalProgress
from salalocal.terminal.console import Terminal
from salalocal.terminal.keyboard import EchoSwitch
from salalocal.terminal.progress import duration

_REFRESHES_PER_S = 4
_LINE_EVERY_S = 5.0
_NARROW = 60


class EvalView:
    """Shows one evaluation; `close` before anything else is written to the terminal."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal
        self._live: Live | None = None
        self._echo: EchoSwitch | None = None
        self._next_line_s: float | None = None

    def show(self, progress: EvalProgress) -> None:
        """Draw how far it is; the end leaves one line behind."""
        if progress.num_tokens >= progress.total_tokens:
            self.close()
            self._terminal.tell(f"evaluated in {duration(progress.elapsed_s)}, {_rate(progress)}", style="dim")
        elif not self._terminal.is_quiet:
            self._draw(progress)

    def close(self) -> None:
        """Take the bar away; safe to call at any time."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        if self._echo is not None:
            self._echo.restore()
            self._echo = None

    def _draw(self, progress: EvalProgress) -> None:
        if not self._terminal.is_live:
            self._tell_sometimes(progress)
            return
        if self._live is None:
            self._echo = EchoSwitch()
            self._live = Live(console=self._terminal.err, transient=True, refresh_per_second=_REFRESHES_PER_S)
            self._live.start()
        self._live.update(_bar(progress, self._terminal.err.width))

    def _tell_sometimes(self, progress: EvalProgress) -> None:
        now_s = time.monotonic()
        if self._next_line_s is None:
            self._next_line_s = now_s + _LINE_EVERY_S
        elif now_s >= self._next_line_s:
            self._next_line_s = now_s + _LINE_EVERY_S
            self._terminal.tell(f"evaluating: {_figures(progress)}")


def divergence_lines(figures: Mapping[str, Any]) -> Iterator[str]:
    """A comparison, as plain data, in three lines."""
    before, after = figures["perplexity_original"], figures["perplexity_quantized"]
    yield f"{'perplexity':<15} {before:.3f} -> {after:.3f} ({(after / before - 1) * 100:+.2f} %)"
    mean, high = figures["kl_mean_nats"], figures["kl_p99_nats"]
    yield f"{'KL divergence':<15} {mean:.4f} nats a token, 99th percentile {high:.3f}"
    yield f"{'top-1 agreement':<15} {figures['top1_agreement'] * 100:.1f} % of {figures['num_tokens']:,} tokens"


def _bar(progress: EvalProgress, width: int) -> RenderableType:
    share = f"{progress.num_tokens:,}/{progress.total_tokens:,}"
    percent = f"{progress.num_tokens * 100 // progress.total_tokens}%"
    row = Table.grid(padding=(0, 1))
    row.width = width
    row.add_column(ratio=1)
    row.add_column(no_wrap=True)
    row.add_row(
        ProgressBar(total=progress.total_tokens, completed=progress.num_tokens), share if width >= _NARROW else percent
    )
    return Group(Text(_figures(progress), style="dim", no_wrap=True, overflow="ellipsis"), row)


def _figures(progress: EvalProgress) -> str:
    percent = progress.num_tokens * 100 // progress.total_tokens
    left_s = progress.elapsed_s * (progress.total_tokens / progress.num_tokens - 1)
    return f"{progress.model} model, {percent}%, {_rate(progress)}, {duration(left_s)} left"


def _rate(progress: EvalProgress) -> str:
    return f"{progress.num_tokens / max(progress.elapsed_s, 1e-9):,.0f} tok/s"
