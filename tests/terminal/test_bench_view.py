"""A benchmark on screen: tables that fit, rows that other programs read, progress in a pipe and on a terminal."""

import csv
import dataclasses
import io
import json

import pytest

from salalocal.bench.cards import find_card
from salalocal.bench.ceilings import Ceilings
from salalocal.bench.report import BenchReport, Machine
from salalocal.bench.subject import Drawn, SubjectFacts
from salalocal.bench.walk import BenchProgress, DepthResult, Failure, SubjectResult
from salalocal.bench.work import QWEN3_8B, DenseCost
from salalocal.terminal.bench_plot import plot_bench
from salalocal.terminal.bench_view import BenchView, bench_text, duration_s
from salalocal.terminal.console import make_terminal


def depth(num_tokens: int, read_s: float) -> DepthResult:
    return DepthResult(
        num_tokens=num_tokens,
        read_s=read_s,
        chunk_tokens=8192,
        chunk_end=num_tokens,
        chunks_s=(0.40, 0.41, 0.42),
        drawn=Drawn(0.01, 0.05, (0.30, 0.32, 0.31)),
        gen_tokens=128,
        peak_memory_bytes=9 * 2**30,
        tested_at="2026-11-23T10:00:00Z",
    )


def report() -> BenchReport:
    ours = SubjectFacts(
        "random", "released shape, 9.5 B parameters, random int4 weights", 1, 1, "bf16", "int8", "bf16", 8192, 9 * 2**30
    )
    dense = SubjectFacts(
        "dense", "Qwen3-8B shape, full attention, random bf16 weights", 1, 1, "bf16", "bf16", "bf16", 8192
    )
    cost = DenseCost(QWEN3_8B, 2)
    results = [
        SubjectResult(ours, cost, [depth(65_536, 1.9), depth(2**20, 33.0)]),
        SubjectResult(
            dense,
            cost,
            [depth(65_536, 4.0)],
            [Failure(2**20, "out of memory: the cache of 1,048,576 tokens needs 144 GiB")],
        ),
    ]
    return BenchReport(
        Machine("a CPU", "NVIDIA H100 80GB HBM3", "CUDA", 8, "2.11.0"),
        results,
        Ceilings(3.0e12, 3.1e12, 7.1e14, "bfloat16", 1.2e15),
        (find_card("RTX 5090"),),
        notes=["a note for the reader"],
    )


def test_markdown_has_a_table_for_each_subject_and_says_what_is_projected() -> None:
    text = bench_text(report(), "md", None)
    lines = text.splitlines()
    tables = [index for index, line in enumerate(lines) if line.startswith("|-")]
    assert len(tables) == 4
    for index in tables:
        table = [line for line in lines[index - 1 : index + 3] if line.startswith("|")]
        assert len({line.count("|") for line in table}) == 1 and len({len(line) for line in table}) == 1
    assert "\n\n- 1m: out of memory" in text  # apart from the table, and an item of a list
    assert "| 64k |" in text.replace("     ", " ").replace("  ", " ") and "1m: out of memory: the cache" in text
    assert "2.10x" in text  # (4.0 + 0.01) / (1.9 + 0.01)
    assert text.count("projection") >= 2 and "RTX 5090" in text
    assert "reading 3,100 GB/s" in text and "in int8 1,200 TFLOP/s" in text and "a note for the reader" in text


@pytest.mark.parametrize("width", [40, 72, 100])
def test_nothing_is_wider_than_the_terminal(width: int) -> None:
    text = bench_text(report(), "md", width)
    assert max(map(len, text.splitlines())) <= width
    assert "first token" in text and "33.0 s" in text and "\n\n\n" not in text


def test_json_and_jsonl_hold_the_same_rows() -> None:
    document = json.loads(bench_text(report(), "json", 40))
    rows = [json.loads(line) for line in bench_text(report(), "jsonl", 40).splitlines()]
    assert document["tests"] == rows and len(rows) == 7
    assert {"avg_ts", "stddev_ts", "n_prompt", "n_gen", "n_depth", "samples_ns"} <= set(rows[0])


def test_csv_has_one_line_a_row_without_samples() -> None:
    rows = list(csv.DictReader(io.StringIO(bench_text(report(), "csv", 40))))
    assert len(rows) == 7 and "samples_ns" not in rows[0]
    assert rows[0]["n_prompt"] == "8192" and rows[-1]["error"].startswith("out of memory")


def test_an_interrupted_report_without_ceilings_is_shown_too() -> None:
    partial = dataclasses.replace(report(), ceilings=None, is_interrupted=True)
    text = bench_text(partial, "md", None)
    assert "-, -" in text and "projection" not in text


def test_one_sample_has_no_spread() -> None:
    once = dataclasses.replace(depth(65_536, 1.9), chunks_s=(0.4,), drawn=Drawn(0.01, 0.05, (0.3,)))
    single = report()
    single.results[0].depths[0] = once
    assert "20,480 |" in bench_text(single, "md", None)


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.0123, "0.012 s"), (0.9999, "1.00 s"), (9.99, "9.99 s"), (46.43, "46.4 s"), (1228.4, "1,228 s")],
)
def test_seconds_have_three_digits(seconds: float, shown: str) -> None:
    assert duration_s(seconds) == shown


def test_a_pipe_gets_a_line_every_few_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    err, clock = io.StringIO(), 0.0
    monkeypatch.setattr("salalocal.terminal.live_bar.time.monotonic", lambda: clock)
    view = BenchView(make_terminal(err=err, out=io.StringIO()))
    for step in range(1, 9):
        clock += 3.0
        view.show(BenchProgress("builtin", "writing" if step == 7 else "reading", 512 * step, 4096, 1024.0))
    view.close()
    assert err.getvalue().splitlines() == [
        "builtin: reading, 37%, 1,024 tok/s, 2.5 s left",
        "builtin: reading, 62%, 1,024 tok/s, 1.5 s left",
        "builtin: writing at 3584",
    ]


@pytest.mark.parametrize("width", [40, 80])
def test_a_bar_fits_the_terminal(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    class Tty(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    err = Tty()
    view = BenchView(make_terminal(err=err, out=io.StringIO()))
    view.show(BenchProgress("builtin", "reading", 2048, 4096, 1024.0))
    view.close()
    assert "1,024 tok/s, 2.0 s left" in err.getvalue() and ("2,048/4,096" in err.getvalue()) == (width == 80)
    assert "50%" in err.getvalue()
    rows = [part for line in err.getvalue().split("\n") for part in line.split("\r")]
    assert all(len(part.split("\x1b")[0]) <= width for part in rows)


def test_the_plot_has_every_series_and_keeps_within_its_frame() -> None:
    picture = plot_bench(report())
    svg = picture.svg()
    assert svg.count("<circle") == 2 * (2 + 1 + 2 + 1)
    assert "projection, not measured" in svg and "dense: out of memory" in svg and "stroke-dasharray" in svg
    assert "33.0 s" in svg and "NVIDIA H100" in svg
    for name in ("cx", "cy"):
        places = [float(part.split('"')[0]) for part in svg.split(f'{name}="')[1:]]
        assert all(0 < place < (picture.width if name == "cx" else picture.height) for place in places)


def test_a_single_depth_and_nothing_at_all_can_be_drawn() -> None:
    single = report()
    single.results = [SubjectResult(single.results[0].facts, single.results[0].cost, [depth(65_536, 1.9)])]
    assert plot_bench(single).svg().count("<circle") == 4
    empty = dataclasses.replace(single, results=[])
    assert "<circle" not in plot_bench(empty).svg()
