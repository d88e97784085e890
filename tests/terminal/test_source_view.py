"""How the lines that an answer was read from are shown, at a terminal and in a pipe."""

import io
import re
from dataclasses import replace

import pytest

from salalocal.session.attribution import AnswerSources, Source
from salalocal.terminal.console import make_terminal
from salalocal.terminal.source_view import show_sources

FOUND = AnswerSources((Source("src/a\x1b[1m.py", 3, 17, 0.1234), Source("b.txt", 9, 9, 0.02)), 12, 0, 12, 64, 1024)


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(found: AnswerSources, stream: io.StringIO) -> list[str]:
    out = io.StringIO()
    show_sources(make_terminal(out=out, err=stream), found)
    assert out.getvalue() == "", "stdout is for answers alone"
    return stream.getvalue().splitlines()


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "60")


def test_a_pipe_gets_a_line_a_source() -> None:
    lines = shown(FOUND, io.StringIO())
    assert lines[0].startswith("12.3 %  src/a") and lines[0].endswith(".py:3-17") and "\x1b" not in lines[0]
    assert lines[1] == "2.0 %  b.txt:9" and len(lines) == 3
    assert "first 64 tokens and the last 1,024" in lines[2]


def test_a_terminal_gets_a_table() -> None:
    lines = shown(FOUND, Tty())
    assert lines[0].split() == ["share", "file", "lines"]
    assert lines[2].split() == ["2.0", "%", "b.txt", "9"]
    plain = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in lines]
    assert all(len(line) <= 60 for line in plain) and "not ranked" in " ".join(plain)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_dense": 12, "num_known": 0}, ["the answer was written from everything"]),
        ({"num_dense": 3, "num_known": 9}, ["no lines stand out", "3 of 12 tokens were written from everything"]),
        ({"num_known": 10}, ["not known for 2 of 12 tokens"]),
        ({}, ["no lines stand out"]),
    ],
)
def test_what_is_not_known_is_said(changes: dict[str, int], words: list[str]) -> None:
    text = "\n".join(shown(replace(FOUND, sources=(), **changes), io.StringIO()))
    assert all(word in text for word in words), text
    assert ("not known" in text) == ("num_known" in changes and "num_dense" not in changes)
