"""The streams and the error lines."""

import io
from pathlib import Path

import pytest

from salalocal.terminal.console import make_terminal, one_line, save_bug_report, show_error


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_an_error_is_one_line_and_its_hint_another() -> None:
    stream = io.StringIO()
    show_error("what\nwhere", ["do\x1b[2J this"], stream)
    assert stream.getvalue() == "error: what where\nhint: do\\x1b[2J this\n"
    stream = io.StringIO()
    show_error("alone", [], stream)
    assert stream.getvalue() == "error: alone\n"


@pytest.mark.parametrize("stream", [io.StringIO(), Tty()])
def test_lines_are_at_most_300_characters(stream: io.StringIO) -> None:
    show_error("word " * 200, ["x" * 500, "[bold]no markup[/bold] :smile:"], stream)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3 and "[bold]no markup[/bold] :smile:" in lines[2]
    if not stream.isatty():
        assert all(len(line) <= 300 for line in lines) and lines[0].endswith("...")


def test_one_line_keeps_short_text() -> None:
    assert one_line("a  b\tc\n", 300) == "a b c"
    assert one_line("word " * 9, 20) == "word word word w ..."


def test_a_pipe_gets_model_text_byte_by_byte_and_a_terminal_does_not() -> None:
    pipe, tty = io.StringIO(), Tty()
    make_terminal(out=pipe, err=io.StringIO()).write("a\x1b[2J\r\n")
    make_terminal(out=tty, err=io.StringIO()).write("a\x1b[2J\r\n")
    assert pipe.getvalue() == "a\x1b[2J\r\n"
    assert tty.getvalue() == "a\\x1b[2J\\x0d\n"


def test_quiet_drops_narration(capsys: pytest.CaptureFixture[str]) -> None:
    for is_quiet in (True, False):
        make_terminal(is_quiet).tell("[x] done\x07 :smile:")
    captured = capsys.readouterr()
    assert captured.err == "[x] done\\x07 :smile:\n" and captured.out == ""


@pytest.mark.parametrize(
    ("variables", "is_live", "has_colour"),
    [
        ({"TERM": "xterm"}, True, True),
        ({"TERM": "dumb"}, False, False),
        ({"TERM": "xterm", "NO_COLOR": "1"}, True, False),
    ],
)
def test_terminals_differ(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], is_live: bool, has_colour: bool
) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    err = Tty()
    terminal = make_terminal(out=Tty(), err=err)
    assert terminal.is_live == terminal.has_rich_output == is_live
    terminal.tell("x", style="bold red")
    assert ("\x1b[1;31m" in err.getvalue()) == has_colour


def test_a_bug_report_is_private(tmp_path: Path) -> None:
    try:
        raise ZeroDivisionError("oops")
    except ZeroDivisionError as error:
        path = save_bug_report(error, tmp_path / "log")
    assert "ZeroDivisionError: oops" in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_bug_report_finds_a_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = save_bug_report(ValueError("x"), tmp_path / "file" / "log")
    assert path.exists()
    path.unlink()
