"""A study on screen: bar and lines, tables that fit 40 columns, the heat map."""

import io
import re
from pathlib import Path
from typing import Any

import pytest

from salalocal.evals.perplexity import Loss, PerplexityReport
from salalocal.evals.questionnaire import Report
from salalocal.evals.study import StudyProgress
from salalocal.terminal.console import make_terminal
from salalocal.terminal.heat_map import heat_map
from salalocal.terminal.study_view import (
    StudyView,
    mrcr_lines,
    needle_lines,
    perplexity_lines,
    recall_lines,
    ruler_lines,
)


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def progress(num_done: int, share: float, num_right: int | None = 2) -> StudyProgress:
    return StudyProgress("16k at 50 %", num_done, 10, num_right, 5000, share, 5.0)


def report(axes: tuple[str, ...], records: list[dict[str, Any]]) -> Report:
    usual = {"reason": "stop", "answer": "x"}
    marked = [{**usual, "score": float(record["right"]), **record} for record in records]
    return Report({"evaluation": "made", "model": "builtin"}, Path("/records"), axes, tuple(marked))


def grid() -> Report:
    cells = [(length, depth) for length in (4096, 16384) for depth in (100.0, 33.3, 0.0)]
    records = [
        {"length": length, "depth": depth, "right": (length, depth) != (16384, 33.3) or sample == 0}
        for length, depth in cells
        for sample in range(2)
    ]
    return report(("length", "depth"), records)


def test_a_pipe_gets_a_line_every_few_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    err, clock = io.StringIO(), 0.0
    monkeypatch.setattr("salalocal.terminal.live_bar.time.monotonic", lambda: clock)
    view = StudyView(make_terminal(err=err))
    for now_s, done in ((0.0, 1), (1.0, 2), (5.0, 5), (5.5, 6)):
        clock = now_s
        view.show(progress(done, done / 10))
    view.show(progress(10, 1.0))
    assert err.getvalue().splitlines() == [
        "measuring: 5 of 10, 2 right, now 16k at 50 %, 1,000 tok/s, 5.0 s left",
        "measured in 5.0 s, 1,000 tok/s",
    ]


@pytest.mark.parametrize(("columns", "shown"), [("100", "2 right, now 16k at 50 %"), ("40", "16k at 50 %, 5.0 s left")])
def test_a_terminal_gets_a_bar_that_goes_away(columns: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    err = Tty()
    view = StudyView(make_terminal(err=err))
    view.show(progress(5, 0.5))
    view.close()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", err.getvalue())
    assert shown in text and "5/10 50%" in text
    assert max(len(line) for line in re.split(r"[\r\n]+", text)) <= int(columns)
    view.show(progress(10, 1.0, None))
    assert "measured in 5.0 s" in err.getvalue()


def test_nothing_is_known_before_the_first_token(monkeypatch: pytest.MonkeyPatch) -> None:
    err, clock = io.StringIO(), 0.0
    monkeypatch.setattr("salalocal.terminal.live_bar.time.monotonic", lambda: clock)
    view = StudyView(make_terminal(err=err))
    for now_s in (0.0, 6.0):
        clock = now_s
        view.show(StudyProgress("4k", 0, 3, 0, 0, 0.0, 0.0))
    assert err.getvalue() == "measuring: 0 of 3, now 4k, 0 tok/s, unknown time left\n"


def test_a_needle_table() -> None:
    assert list(needle_lines(grid())) == [
        "depth    4k  16k",
        "0 %     100  100",
        "33.3 %  100   50",
        "100 %   100  100",
        "",
        "4k  6/6 100.0 % (61 to 100 %)",
        "16k 5/6  83.3 % (44 to 97 %)",
        "",
        "all: 11/12 91.7 % (64.6 to 98.5 %)",
    ]


def test_scores_that_are_no_shares_are_told_apart() -> None:
    records = [{"task": task, "length": 4096, "right": False, "score": 0.5} for task in ("single", "frequent-words")]
    records[0]["reason"] = "length"
    lines = list(ruler_lines(report(("task", "length"), records)))
    assert lines[:3] == ["score            4k", "single           50", "frequent-words   50"]
    assert lines[-2:] == ["mean score: 50.0 %", "answers that did not end by themselves: 1"]
    records = [{"needles": count, "length": 4096, "right": True} for count in (8, 2)]
    assert list(mrcr_lines(report(("needles", "length"), records)))[1:3] == ["2 needles  100", "8 needles  100"]


def test_recall_names_what_was_wrong() -> None:
    common = {"path": "a.py", "line": 7, "name": "LIMIT"}
    records = [
        {"kind": "setting", "part": 10, "right": True, **common},
        {"kind": "constant", "part": 1, "right": False, "answer": "LIMIT is\nnot " + "x" * 99, **common},
    ]
    lines = list(recall_lines(report(("kind", "part"), records)))
    assert lines[0].startswith("constant 0/1   0.0 %") and lines[3].startswith("0 to 10 %   0/1")
    assert lines[4].startswith("90 to 100 % 1/1 100.0 %")
    assert lines[-1].startswith("wrong: a.py:7 LIMIT: LIMIT is not xxx") and lines[-1].endswith("...")


def test_perplexity_by_position() -> None:
    by_end = {1024: Loss(2000.0, 1000, 4000), 4096: Loss(1000.0, 1000, 4000)}
    shown = list(perplexity_lines(PerplexityReport({}, Path("x"), 1, sum(by_end.values(), Loss()), by_end)))
    assert shown == [
        "perplexity 4.482, 0.5410 bits a byte, 2,000 tokens",
        "",
        "      position perplexity    tokens",
        "      below 1k      7.389     1,000",
        "      below 4k      2.718     1,000",
    ]


def test_tables_of_few_lengths_fit_40_columns() -> None:
    for lines in (needle_lines(grid()), perplexity_lines(PerplexityReport({}, Path("x"), 1, Loss(1, 1, 1), {}))):
        assert max(map(len, lines)) <= 50


def test_a_heat_map_has_a_cell_for_each_length_and_depth(tmp_path: Path) -> None:
    picture = heat_map(grid())
    svg = picture.svg()
    assert svg.count("<title>") == 6 and "16,384 tokens, depth 33.3 %: 1 of 2" in svg
    assert ">4k<" in svg and ">16k<" in svg and "11 of 12 right, 91.7 % (64.6 to 98.5 %)" in svg
    assert len(set(re.findall(r'fill="(#\w+)"><title>', svg))) == 2
    picture.save(tmp_path / "map.svg")
    assert (tmp_path / "map.svg").read_text() == svg
