"""A quantization on screen: finished steps and a card go in, a bar on stderr and a table go out; for `quantize`."""

import shlex
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from salalocal.quant.quantizer import StepProgress
from salalocal.quant.recipe import ROW
from salalocal.session.quantizing import QuantizedModel
from salalocal.terminal.console import Terminal
from salalocal.terminal.eval_view import divergence_lines
from salalocal.terminal.live_bar import LINE_EVERY_S, LiveBar
from salalocal.terminal.progress import duration
from salalocal.terminal.tables import size


class QuantizeView:
    """Shows the steps of one quantization; `close` before anything else is written to the terminal."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal
        self._live_bar = LiveBar(terminal, time.monotonic() + LINE_EVERY_S)
        self._num_resumed = 0

    def show(self, progress: StepProgress) -> None:
        """Draw a finished step; where an earlier run has stopped is told in a line that stays."""
        if progress.is_resumed:
            self._num_resumed = progress.step
            return
        if self._num_resumed:
            self._terminal.tell(f"going on: {self._num_resumed} of {progress.num_steps} steps were done before")
            self._num_resumed = 0
        if progress.step == progress.num_steps:
            self.close()
            parts = [f"quantized in {duration(progress.elapsed_s)}", *_memory(progress)]
            self._terminal.tell(", ".join(parts), style="dim")
        else:
            done = f"quantizing: {progress.step} of {progress.num_steps} steps"
            self._live_bar.draw(lambda width: _bar(progress, width), lambda: f"{done}, {_figures(progress)}")

    def close(self) -> None:
        """Take the bar away; safe to call at any time."""
        self._live_bar.close()


def _bar(progress: StepProgress, width: int) -> RenderableType:
    row = Table.grid(padding=(0, 1))
    row.width = width
    row.add_column(ratio=1)
    row.add_column(no_wrap=True)
    row.add_row(ProgressBar(total=progress.num_steps, completed=progress.step), f"{progress.step}/{progress.num_steps}")
    return Group(Text(_figures(progress), style="dim", no_wrap=True, overflow="ellipsis"), row)


def _figures(progress: StepProgress) -> str:
    parts = [progress.name]
    if progress.error is not None:
        parts.append(f"error {progress.error:.4f}")
    parts.append("time left unknown" if progress.left_s is None else f"{duration(progress.left_s)} left")
    return ", ".join([*parts, *_memory(progress)])


def _memory(progress: StepProgress) -> Iterator[str]:
    if progress.peak_bytes:
        yield f"peak memory {size(progress.peak_bytes)}"
    if progress.device_peak_bytes:
        yield f"on the card {size(progress.device_peak_bytes)}"


def card_lines(model: QuantizedModel) -> Iterator[str]:
    """The card as lines: sizes, errors by kind of matrix, what was lost on text, and how to use the result."""
    card, options = model.card, model.card["identity"]["options"]
    errors = card["relative_errors"]
    yield _title(options)
    yield f"{size(card['source_bytes'])} -> {size(card['result_bytes'])}"
    yield ""
    has_outputs = any(error["outputs"] is not None for error in errors.values())
    measures = ("weights", "outputs") if has_outputs else ("weights",)
    yield f"{'relative error':<15}" + "".join(f"{measure:>8}: mean   worst" for measure in measures)
    for kind in dict.fromkeys(map(_kind, errors)):
        yield _error_line(kind, [error for name, error in errors.items() if _kind(name) == kind], measures)
    yield _error_line("all", list(errors.values()), measures)
    yield ""
    if "quality" in card:
        yield from divergence_lines(card["quality"])
        yield ""
    yield f"salalocal chat --model {shlex.quote(str(model.folder))}"


def card_json(model: QuantizedModel) -> dict[str, Any]:
    """The card as plain data, with the folder."""
    return {"folder": str(model.folder), **model.card}


def _title(options: dict[str, Any]) -> str:
    if options["group_size"] == ROW:
        return f"{options['method']}, {options['bits']} bits, one scale a row"
    return f"{options['method']}, {options['bits']} bits, groups of {options['group_size']}"


def _kind(tensor: str) -> str:
    return tensor.split(".")[-2]


def _error_line(kind: str, errors: list[dict[str, Any]], measures: tuple[str, ...]) -> str:
    columns = [[error[measure] for error in errors] for measure in measures]
    return f"{kind:<15}" + "".join(f"{sum(column) / len(column):>14.4f} {max(column):>7.4f}" for column in columns)
