"""The progress of a read, drawn and told."""

import io

import pytest

from salalocal.session.events import ReadProgress
from salalocal.terminal.console import make_terminal
from salalocal.terminal.progress import ReadView, duration


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def event(done: int, total: int = 1000, **changes: object) -> ReadProgress:
    values: dict[str, object] = {
        "path": "src/a.py",
        "document": 1,
        "num_documents": 2,
        "document_tokens": done,
        "document_total": 600,
        "num_tokens": done,
        "total_tokens": total,
        "cached_tokens": 0,
        "elapsed_s": done / 100,
    }
    return ReadProgress(**values | changes)  # type: ignore[arg-type]


END = event(1000, path="b.py", document=2, document_tokens=400, document_total=400)


def test_a_pipe_gets_a_line_every_few_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    err, clock = io.StringIO(), 0.0
    monkeypatch.setattr("salalocal.terminal.progress.time.monotonic", lambda: clock)
    view = ReadView(make_terminal(err=err, out=io.StringIO()))
    for done in range(100, 1000, 100):
        clock += 2.0
        view.show(event(done))
    view.show(END)
    lines = err.getvalue().splitlines()
    assert lines[0] == 'reading: 400 of 1,000 tokens (40%), 100 tok/s, 6.0 s left, file 1 of 2: "src/a.py" 400/600'
    assert len(lines) == 3 and lines[-1] == "read 2 files: 1,000 tokens in 10 s, 100 tok/s"


def test_a_short_read_leaves_one_line() -> None:
    err = io.StringIO()
    ReadView(make_terminal(err=err, out=io.StringIO())).show(END)
    assert err.getvalue() == "read 2 files: 1,000 tokens in 10 s, 100 tok/s\n"


@pytest.mark.parametrize("width", [40, 60, 72, 120])
def test_a_terminal_gets_a_bar_that_fits(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    err = Tty()
    view = ReadView(make_terminal(err=err, out=io.StringIO()))
    view.show(event(300, path="a/very/long/path/" * 9 + "\x1b[2Jname.py"))
    view.close()
    view.close()
    shown = err.getvalue()
    assert "30%" in shown and "100 tok/s" in shown and "7.0 s left" in shown
    assert "\x1b[2J" not in shown
    assert ("300/1,000" in shown) == (width >= 72)


def test_a_pause_is_said_and_the_question_is_not() -> None:
    err = io.StringIO()
    view = ReadView(make_terminal(err=err, out=io.StringIO()))
    view.show(event(500, is_paused=True))
    view.show(event(1000, path="", document=2, document_tokens=20, document_total=20))
    assert err.getvalue() == "paused at 500 of 1,000 tokens (50%)\n"


def test_what_was_read_before_is_said() -> None:
    err = io.StringIO()
    view = ReadView(make_terminal(err=err, out=io.StringIO()))
    view.show(event(1000, document=2, document_tokens=5, document_total=5, cached_tokens=600, elapsed_s=4.0))
    assert err.getvalue() == "read 2 files: 400 tokens in 4.0 s, 100 tok/s; 600 more were read before\n"


def test_quiet_says_nothing() -> None:
    err = Tty()
    view = ReadView(make_terminal(is_quiet=True, err=err, out=io.StringIO()))
    for shown in (event(500), event(600, is_paused=True), END):
        view.show(shown)
    assert err.getvalue() == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.4, "59 s"), (60, "1:00"), (187, "3:07"), (3753, "1:02:33")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
