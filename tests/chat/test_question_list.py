"""Where the questions of a one-shot command come from."""

import io
from pathlib import Path

import pytest

from salalocal.chat.question_list import read_questions
from salalocal.errors import RequestError


class Keyboard(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_an_argument_wins_over_stdin() -> None:
    assert read_questions(" what? ", None, io.StringIO("other")) == ["what?"]


def test_stdin_is_one_question_with_all_its_lines() -> None:
    assert read_questions(None, None, io.StringIO("what\nis it?\n")) == ["what\nis it?"]


def test_a_file_has_one_a_line(tmp_path: Path) -> None:
    path = tmp_path / "q.txt"
    path.write_bytes("\ufeffone?\r\n\n  two?\n".encode())
    assert read_questions(None, path, None) == ["one?", "two?"]
    assert read_questions(None, Path("-"), io.StringIO("one?\ntwo?")) == ["one?", "two?"]


@pytest.mark.parametrize(
    ("question", "path", "stdin"),
    [
        (None, None, Keyboard("typed")),
        (None, None, None),
        ("", None, None),
        (None, None, io.StringIO(" \n")),
        ("what?", Path("q.txt"), None),
        (None, Path("-"), None),
        (None, Path("missing.txt"), None),
    ],
)
def test_what_cannot_be(question: str | None, path: Path | None, stdin: io.StringIO | None) -> None:
    with pytest.raises(RequestError):
        read_questions(question, path, stdin)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "q").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(RequestError, match="UTF-8"):
        read_questions(None, tmp_path / "q", None)
