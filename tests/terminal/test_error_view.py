"""Errors that know more than their message."""

import io

from salalocal.errors import PackError, SalaLocalError
from salalocal.session.tokens import ContextOverflow, DocumentTokens, TokenReport
from salalocal.terminal.error_view import show_salalocal_error


def shown(error: SalaLocalError) -> list[str]:
    stream = io.StringIO()
    show_salalocal_error(error, stream)
    return stream.getvalue().splitlines()


def test_message_and_hint() -> None:
    assert shown(PackError("bad", "good")) == ["error: bad", "hint: good"]
    assert shown(PackError("bad")) == ["error: bad"]


def test_an_overflow_lists_the_largest_files() -> None:
    documents = tuple(DocumentTokens(f"{number}.py", 100 * number, 1) for number in range(1, 13))
    lines = shown(ContextOverflow(TokenReport(documents, 5), 1000))
    assert lines[:2] == ["1,200  12.py", "1,100  11.py"]
    assert lines[10:12] == ["  300  2 smaller files", "7,805  in all"]
    assert lines[12].startswith("error: 7,805 tokens do not fit a context of 1,000 tokens") and len(lines) == 14
    assert "7,800 in 12 files" in lines[12] and "leave files out" in lines[13]


def test_an_overflow_by_a_question_does_not_blame_the_files() -> None:
    error = ContextOverflow(TokenReport((DocumentTokens("a.py", 90, 1),), 3000), 1000)
    assert "90 in 1 file, 3,000 in questions" in error.message
    assert "shorter question" in error.hint and "a.py" not in error.hint
