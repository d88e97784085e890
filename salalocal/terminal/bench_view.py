"""A benchmark on screen and in files: progress and a report come in, a bar on stderr, tables and rows go out; for
`bench`."""

import csv
import io
import json
import textwrap
from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from salalocal.bench.cards import Projection
from salalocal.bench.ceilings import Ceilings
from salalocal.bench.report import BenchReport
from salalocal.bench.subject import SubjectFacts
from salalocal.bench.walk import BenchProgress, DepthResult, SubjectResult
from salalocal.session.plan import short_tokens
from salalocal.terminal.console import Terminal, one_line
from salalocal.terminal.live_bar import LiveBar
from salalocal.terminal.progress import duration
from salalocal.terminal.tables import size

FORMATS = ("md", "json", "jsonl", "csv")

_NARROW = 60
_MAX_NAME = 40
_SAMPLES = ("samples_ns", "samples_ts")
_FIRST_TOKEN = "first token: everything read up to there, and the first draw"
_MEMORY = "memory: the most so far, with room for the deepest context from the start"
_ROOFLINE = "roofline: the least time by FLOP and bytes, counted from the shape, in % of the time measured"
_PROJECTION = "projection, not measured: the figures above times what the data sheets say of the two cards"


class BenchView:
    """Shows the walks of one benchmark; `close` before anything else is written to the terminal."""

    def __init__(self, terminal: Terminal) -> None:
        self._live_bar = LiveBar(terminal)

    def show(self, progress: BenchProgress) -> None:
        """Draw how far a walk is."""
        self._live_bar.draw(lambda width: _bar(progress, width), lambda: _line(progress))

    def close(self) -> None:
        """Take the bar away; safe to call at any time."""
        self._live_bar.close()


def _bar(progress: BenchProgress, width: int) -> RenderableType:
    row = Table.grid(padding=(0, 1))
    row.width = width
    row.add_column(ratio=1)
    row.add_column(no_wrap=True)
    share = f"{progress.num_tokens:,}/{progress.total_tokens:,}" if width >= _NARROW else _percent(progress)
    row.add_row(ProgressBar(total=progress.total_tokens, completed=progress.num_tokens), share)
    figures = _line(progress) if width >= _NARROW else _short_line(progress)
    return Group(Text(figures, style="dim", no_wrap=True, overflow="ellipsis"), row)


def _line(progress: BenchProgress) -> str:
    parts = [f"{one_line(progress.subject, _MAX_NAME)}: {progress.activity}"]
    if progress.activity == "writing":
        parts[0] += f" at {short_tokens(progress.num_tokens)}"
    elif progress.tokens_per_s:
        parts += [_percent(progress), _pace(progress)]
    return ", ".join(parts)


def _short_line(progress: BenchProgress) -> str:
    is_reading = progress.activity == "reading" and progress.tokens_per_s
    return f"{one_line(progress.subject, 12)}: {_pace(progress) if is_reading else progress.activity}"


def _pace(progress: BenchProgress) -> str:
    left_s = (progress.total_tokens - progress.num_tokens) / progress.tokens_per_s
    return f"{progress.tokens_per_s:,.0f} tok/s, {duration(left_s)} left"


def _percent(progress: BenchProgress) -> str:
    return f"{progress.num_tokens * 100 // progress.total_tokens}%"


def bench_text(report: BenchReport, output: str, width: int | None) -> str:
    """The report in one of `FORMATS`; tables are stacked where `width` columns do not hold them (None: any width)."""
    if output == "json":
        return json.dumps(report.to_json(), indent=2) + "\n"
    if output == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in report.rows())
    if output == "csv":
        return _csv(report)
    lines = list(_markdown(report, width))
    return "".join(f"{line}\n" for line in lines)


def _csv(report: BenchReport) -> str:
    rows = [{key: value for key, value in row.items() if key not in _SAMPLES} for row in report.rows()]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def _markdown(report: BenchReport, width: int | None) -> Iterator[str]:
    for result in report.results:
        yield from _wrapped(_subject_line(result.facts), width)
        yield ""
        yield from _result_lines(report, result, width)
        yield ""
    for other in report.results[1:]:
        yield from _comparison_lines(report.results[0], other, width)
    if report.projections:
        yield from _wrapped(_PROJECTION, width)
        yield ""
        yield from _projection_lines(report, width)
        yield ""
    about = (_machine_line(report), *_ceiling_lines(report.ceilings), _FIRST_TOKEN, _MEMORY, _ROOFLINE)
    for line in (*about, *report.notes):
        yield from _item(line, width)


def _subject_line(facts: SubjectFacts) -> str:
    parts = [f"{facts.math} math", f"{facts.cache} cache", f"chunks of {facts.chunk_size:,} tokens"]
    if facts.planned_bytes is not None:
        parts.append(f"planned memory {size(facts.planned_bytes)}")
    return f"{facts.description}; {', '.join(parts)}"


def _result_lines(report: BenchReport, result: SubjectResult, width: int | None) -> Iterator[str]:
    heads = ("context", "prefill tok/s", "first token", "decode tok/s", "memory", "roofline read, write")
    rows = [_depth_row(report, result, depth) for depth in result.depths]
    if rows:
        yield from _table(heads, rows, width)
    if rows and result.failures:
        yield ""
    for failure in result.failures:
        yield from _item(f"{short_tokens(failure.num_tokens)}: {failure.reason}", width)


def _depth_row(report: BenchReport, result: SubjectResult, depth: DepthResult) -> tuple[str, ...]:
    read_share, write_share = report.prefill_share(result, depth), report.decode_share(result, depth)
    return (
        short_tokens(depth.num_tokens),
        _with_spread([depth.chunk_tokens / seconds for seconds in depth.chunks_s]),
        duration_s(depth.first_token_s),
        _with_spread([depth.gen_tokens / seconds for seconds in depth.drawn.runs_s]),
        "-" if depth.peak_memory_bytes is None else size(depth.peak_memory_bytes),
        f"{_share(read_share)}, {_share(write_share)}",
    )


def _comparison_lines(ours: SubjectResult, other: SubjectResult, width: int | None) -> Iterator[str]:
    """How the first result does against the second, where both got."""
    others = {depth.num_tokens: depth for depth in other.depths}
    rows = [
        (
            short_tokens(depth.num_tokens),
            f"{others[depth.num_tokens].first_token_s / depth.first_token_s:.2f}x",
            f"{others[depth.num_tokens].token_s / depth.token_s:.2f}x",
        )
        for depth in ours.depths
        if depth.num_tokens in others
    ]
    if rows:
        yield from _wrapped(f"{other.facts.name} takes so many times as long as {ours.facts.name}, in this run:", width)
        yield ""
        yield from _table(("context", "to the first token", "to a token drawn"), rows, width)
        yield ""


def _projection_lines(report: BenchReport, width: int | None) -> Iterator[str]:
    heads = ("card (projection)", "model", "context", "prefill tok/s", "first token", "decode tok/s", "memory")
    yield from _table(heads, [_projection_row(projection) for projection in report.projections], width)


def _projection_row(projection: Projection) -> tuple[str, ...]:
    fits = {True: "fits", False: "too large", None: "-"}[projection.fits]
    return (
        projection.card,
        projection.subject,
        short_tokens(projection.num_tokens),
        rate(projection.prefill_tokens_per_s),
        duration_s(projection.first_token_s),
        rate(projection.decode_tokens_per_s),
        fits,
    )


def _machine_line(report: BenchReport) -> str:
    machine = report.machine
    threads = "1 thread" if machine.num_threads == 1 else f"{machine.num_threads} threads"
    place = machine.gpu_info or f"{machine.cpu_info}, {threads}"
    cap = "" if report.memory_cap_bytes is None else f", held to {size(report.memory_cap_bytes)}"
    return f"measured on {place}{cap}, torch {machine.torch_version}"


def _ceiling_lines(ceilings: Ceilings | None) -> Iterator[str]:
    if ceilings is None:
        return
    parts = [
        f"reading {ceilings.read_bytes_per_s / 1e9:,.0f} GB/s",
        f"copying {ceilings.copy_bytes_per_s / 1e9:,.0f} GB/s",
        f"products in {ceilings.float_dtype} {_tera(ceilings.float_flops_per_s)}",
    ]
    if ceilings.int8_flops_per_s is not None:
        parts.append(f"in int8 {_tera(ceilings.int8_flops_per_s)}")
    yield f"ceilings measured in this run: {', '.join(parts)}"


def _tera(flops_per_s: float) -> str:
    tera = flops_per_s / 1e12
    return f"{tera:,.0f} TFLOP/s" if tera >= 10 else f"{tera:.2f} TFLOP/s"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], width: int | None) -> Iterator[str]:
    """A Markdown table with aligned columns, or one block of lines a row where the width does not hold it."""
    widths = [max(len(head), *(len(row[column]) for row in rows)) for column, head in enumerate(heads)]
    if width is not None and sum(widths) + 3 * len(widths) + 1 > width:
        yield from _stacked(heads, rows)
        return
    yield "| " + " | ".join(f"{head:>{w}}" for head, w in zip(heads, widths, strict=True)) + " |"
    yield "|" + "|".join("-" * (w + 1) + ":" for w in widths) + "|"
    for row in rows:
        yield "| " + " | ".join(f"{cell:>{w}}" for cell, w in zip(row, widths, strict=True)) + " |"


def _stacked(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    indent = max(map(len, heads)) + 2
    for number, row in enumerate(rows):
        if number:
            yield ""
        for head, cell in zip(heads, row, strict=True):
            yield f"{head:<{indent}}{cell}"


def _wrapped(line: str, width: int | None) -> list[str]:
    return [line] if width is None else textwrap.wrap(line, width)


def _item(line: str, width: int | None) -> list[str]:
    """One of a list: in Markdown, lines that follow each other would run together."""
    return [f"- {line}"] if width is None else textwrap.wrap(f"- {line}", width, subsequent_indent="  ")


def _with_spread(rates: Sequence[float]) -> str:
    """The median, and half of what lies between the least and the most."""
    ordered = sorted(rates)
    middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    return f"{rate(middle)} ± {rate((ordered[-1] - ordered[0]) / 2)}" if len(rates) > 1 else rate(middle)


def rate(tokens_per_s: float) -> str:
    """Tokens a second with three digits or more: `0.4`, `75.5`, `12,345`."""
    return f"{tokens_per_s:,.0f}" if tokens_per_s >= 99.95 else f"{tokens_per_s:.1f}"


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share * 100:.0f} %" if share >= 0.0995 else f"{share * 100:.1f} %"


def duration_s(seconds: float) -> str:
    """Seconds with three digits, for tables: `0.183 s`, `6.80 s`, `46.4 s`, `228 s`."""
    digits = 3 if seconds < 0.9995 else 2 if seconds < 9.995 else 1 if seconds < 99.95 else 0
    return f"{seconds:,.{digits}f} s"
