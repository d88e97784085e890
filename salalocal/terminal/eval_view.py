"""An evaluation on screen: progress and figures go in, a bar on stderr and lines go out; for `eval`, `quantize`."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from salalocal.evals.comparison import EvalProgress
from salalocal.terminal.console import Terminal
from salalocal.terminal.live_bar import LiveBar
from salalocal.terminal.progress import duration

_NARROW = 60


class EvalView:
    """Shows one evaluation; `close` before anything else is written to the terminal."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal
        self._live_bar = LiveBar(terminal)

    def show(self, progress: EvalProgress) -> None:
        """Draw how far it is; the end leaves one line behind."""
        if progress.num_tokens >= progress.total_tokens:
            self.close()
            self._terminal.tell(f"evaluated in {duration(progress.elapsed_s)}, {_rate(progress)}", style="dim")
        else:
            self._live_bar.draw(lambda width: _bar(progress, width), lambda: f"evaluating: {_figures(progress)}")

    def close(self) -> None:
        """Take the bar away; safe to call at any time."""
        self._live_bar.close()


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
