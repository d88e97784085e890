"""Lines from a pipe, and a prompt at a terminal driven by real keys."""

import io
from pathlib import Path

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput

from salalocal.errors import RequestError
from salalocal.terminal import question_input
from salalocal.terminal.question_input import LineInput, PromptInput, open_questions


def test_lines() -> None:
    lines = LineInput(io.BytesIO(b"one\r\ntwo\xff\n\nlast"))
    assert [lines.read() for _ in range(5)] == ["one", "two\ufffd", "", "last", None]
    assert not lines.is_interactive


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> "object":
    monkeypatch.setattr(question_input, "create_output", lambda stdout: DummyOutput())
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        yield pipe


def typed(keys: PipeInput, path: Path, text: str) -> str | None:
    keys.send_text(text)
    return PromptInput(path).read()


def test_enter_sends(keys: PipeInput, tmp_path: Path) -> None:
    assert typed(keys, tmp_path / "h", "what?\r") == "what?"


@pytest.mark.parametrize("more", ["\\\r", "\x1b\r"])
def test_a_backslash_or_alt_enter_goes_on(keys: PipeInput, tmp_path: Path, more: str) -> None:
    assert typed(keys, tmp_path / "h", f"one{more}two\r") == "one\ntwo"


def test_pasted_lines_stay_together(keys: PipeInput, tmp_path: Path) -> None:
    assert typed(keys, tmp_path / "h", "\x1b[200~one\ntwo\x1b[201~\r") == "one\ntwo"


def test_ctrl_d_ends_and_ctrl_c_leaves_an_empty_prompt(keys: PipeInput, tmp_path: Path) -> None:
    assert typed(keys, tmp_path / "h", "\x04") is None
    with pytest.raises(KeyboardInterrupt):
        typed(keys, tmp_path / "h", "\x03")


def test_ctrl_c_first_clears_what_was_typed(keys: PipeInput, tmp_path: Path) -> None:
    assert typed(keys, tmp_path / "h", "wrong\x03right\r") == "right"


def test_history_is_kept_and_private(keys: PipeInput, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "history"
    typed(keys, path, "first\r")
    assert path.stat().st_mode & 0o777 == 0o600
    assert typed(keys, path, "\x1b[A\r") == "first"


def test_without_a_place_for_history_there_is_none(keys: PipeInput, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert typed(keys, tmp_path / "file" / "h", "x\r") == "x"


def test_stdin_as_document_needs_a_terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing(*_args: object, **_options: object) -> None:
        raise OSError(6, "No such device")

    monkeypatch.setattr(Path, "open", missing)
    with pytest.raises(RequestError, match="no terminal"):
        open_questions(tmp_path / "h", is_stdin_taken=True)
