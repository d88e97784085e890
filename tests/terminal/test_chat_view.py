"""What a conversation puts on which stream."""

import io

import pytest

from salalocal.errors import PackError
from salalocal.session.events import Event, Finish, ReadProgress, TextDelta, ThinkingDelta, Usage
from salalocal.session.tokens import DocumentTokens, TokenReport
from salalocal.terminal.chat_view import AnswerView, TerminalChatView, stats_lines
from salalocal.terminal.console import make_terminal
from salalocal.terminal.question_input import LineInput

USAGE = Usage(3280, 3244, 20, 0, 0.5, 2.0, 300 * 2**20)


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def show(
    events: list[Event], *, is_tty: bool = False, is_silent: bool = False, is_quiet: bool = False
) -> tuple[str, str]:
    out, err = (Tty(), Tty()) if is_tty else (io.StringIO(), io.StringIO())
    view = AnswerView(make_terminal(is_quiet, out=out, err=err), is_silent=is_silent)
    for event in events:
        view.show(event)
    view.close()
    view.close()
    return out.getvalue(), err.getvalue()


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")


def test_a_pipe_gets_the_answer_byte_by_byte_and_one_line_end() -> None:
    out, err = show([TextDelta("a\x1b[1m__x", (1,)), TextDelta("", (2,)), TextDelta("__", (3,)), Finish("stop", USAGE)])
    assert out == "a\x1b[1m__x__\n"
    assert err == "context 3,280 = 3,244 cached + 36 new · 20 tokens · 10.0 tok/s · peak 300 MiB\n"


@pytest.mark.parametrize("text", ["a\n", ""])
def test_an_answer_ends_its_line_once(text: str) -> None:
    assert show([TextDelta(text, (1,)), Finish("stop", USAGE)])[0] == (text or "\n")


def test_nothing_said_is_nothing_written() -> None:
    assert show([Finish("cancelled", USAGE)])[0] == ""


def test_a_silent_view_writes_no_answer() -> None:
    assert show([TextDelta("a", (1,)), Finish("stop", USAGE)], is_silent=True)[0] == ""


def test_quiet_leaves_the_answer_alone() -> None:
    assert show([ThinkingDelta("t", (0,)), TextDelta("a", (1,)), Finish("stop", USAGE)], is_quiet=True) == ("a\n", "")


@pytest.mark.parametrize("is_tty", [False, True])
def test_thinking_is_folded_into_one_line(is_tty: bool) -> None:
    events: list[Event] = [ThinkingDelta("secret", (1, 2)), ThinkingDelta("s", (3,)), TextDelta("answer", (4,))]
    out, err = show([*events, Finish("stop", USAGE)], is_tty=is_tty)
    assert "secret" not in out + err and "thought for 3 tokens" in err and "answer" in out
    assert err.count("thought for") == 1


def test_an_answer_that_never_came_is_said() -> None:
    _, err = show([ThinkingDelta("t", (1,)), Finish("length", USAGE)])
    assert "no answer" in err and "cut off at max_tokens" in err


def test_a_terminal_gets_markdown_without_escapes_of_the_model() -> None:
    out, err = show([TextDelta("# Title\n\nx\x1b[2J", (1,)), Finish("cancelled", USAGE)], is_tty=True)
    assert "Title" in out and "# Title" not in out and "\x1b[2J" not in out and "\\x1b[2J" in out
    assert "stopped by Ctrl-C" in err


def test_a_dumb_terminal_gets_plain_visible_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    out, err = show(
        [ReadProgress("a", 1, 1, 1, 2, 1, 2, 0, 0.1), TextDelta("# T\x1b", (1,)), Finish("stop", USAGE)], is_tty=True
    )
    assert out == "# T\\x1b\n" and "\x1b" not in err


def test_stats_take_two_lines_where_one_is_too_narrow() -> None:
    finish = Finish("repetition", USAGE)
    assert len(stats_lines(finish, 200)) == 1
    lines = stats_lines(finish, 60)
    assert lines[0] == "context 3,280 = 3,244 cached + 36 new" and "loop" in lines[1]


def chat_view(questions: bytes = b"") -> tuple[TerminalChatView, io.StringIO, io.StringIO]:
    out, err = io.StringIO(), io.StringIO()
    return TerminalChatView(make_terminal(out=out, err=err), LineInput(io.BytesIO(questions))), out, err


def test_everything_but_answers_goes_to_stderr() -> None:
    view, out, err = chat_view(b"what?\nand?")
    report = TokenReport((DocumentTokens("a\x1bb.py", 12, 34),), 5, context_limit=1000)
    view.show_tokens(report)
    view.show_table([("/help", "this [list]")])
    view.tell("told")
    view.tell_error(PackError("bad", "good"))
    assert [view.read_question(), view.read_question(), view.read_question()] == ["what?", "and?", None]
    assert out.getvalue() == "" and not view.is_interactive
    shown = err.getvalue()
    for part in ('"a\\x1bb.py"', "17  in all", "/help", "this [list]", "told\n", "error: bad\nhint: good\n"):
        assert part in shown
