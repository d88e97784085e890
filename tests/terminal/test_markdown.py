"""Markdown on a terminal loses nothing of what a model quotes."""

import io
import random

import pytest
from rich.console import Console

from salalocal.terminal.markdown import AnswerMarkdown, MarkdownStream, first_block


def draw(text: str, width: int = 200) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False)
    console.print(AnswerMarkdown(text))
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().rstrip().splitlines())


@pytest.mark.parametrize(
    "text",
    [
        "__init__ and a_b_c and _x_ and ___",
        "<div class='a'>x</div> &amp; &lt;",
        r"a \* b \_ c \[d\] \\ \n",
        "one\ntwo\n  indented: 1\n    more: 2",
        "value\n-----",
        "[ref]: somewhere",
        "<https://example.org>",
        "2 * 3 * 4 = 24",
        "C:\\new\\table",
        "snake_case__double __all__ = ['a_b']",
    ],
)
def test_code_in_prose_stays_as_it_is(text: str) -> None:
    assert draw(text) == text


def test_markdown_is_drawn() -> None:
    drawn = draw(
        "# Title\n\n- item **bold** `code`\n\n1. first\n\n```python\nx_y = '<b>'\n```\n\n"
        "| a | b |\n|---|---|\n| 1 | 2 |"
    )
    assert "#" not in drawn and "**" not in drawn and "`" not in drawn and "|" not in drawn
    for part in ("Title", "• item bold code", "1 first", "x_y = '<b>'"):
        assert part in drawn


def test_links_show_where_they_lead() -> None:
    assert draw("[text](http://example.org/x)") == "text (http://example.org/x)"


@pytest.mark.parametrize(
    ("text", "finished"),
    [
        ("", ""),
        ("one", ""),
        ("one\n", ""),
        ("one\n\ntwo", "one\n\n"),
        ("```\na\n\nb", ""),
        ("```\na\n\n```\n", ""),
        ("```\na\n```\n\nz", "```\na\n```\n\n"),
        ("````\n```\n\n````\n\nz", "````\n```\n\n````\n\n"),
        ("one\n   ", ""),
        ("one\n\ntwo\n\n", "one\n\n"),
        ("\n\nx", "\n"),
    ],
)
def test_what_is_finished(text: str, finished: str) -> None:
    assert text[: first_block(text)] == finished


def stream(pieces: list[str]) -> str:
    file = io.StringIO()
    console = Console(file=file, width=60, color_system=None, force_terminal=False)
    drawn = MarkdownStream(console)
    for piece in pieces:
        drawn.push(piece)
    drawn.finish()
    drawn.finish()
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def test_any_cut_draws_the_same(seed: int) -> None:
    rng = random.Random(seed)
    text = "# A\n\nsome text\nmore\n\n```\ncode\n\nmore code\n```\n\n- x\n- y\n\nend __x__"
    whole = stream([text])
    for _ in range(10):
        cuts = sorted(rng.randrange(len(text)) for _ in range(9))
        assert stream([text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]) == whole


def test_escapes_of_the_model_do_not_reach_the_terminal() -> None:
    drawn = stream(["a\x1b", "[2Jb\u202e ", "\x1b]52;c;AAAA\x07"])
    assert "\x1b" not in drawn and "\\x1b[2Jb" in drawn and "\u202e" not in drawn


def test_a_block_taller_than_the_screen_shows_its_end() -> None:
    file = io.StringIO()
    console = Console(file=file, width=40, height=10, force_terminal=True, color_system=None)
    drawn = MarkdownStream(console)
    drawn.push("".join(f"line {n}\n" for n in range(50)))
    assert drawn._live is not None
    drawn._live.refresh()
    shown = file.getvalue()
    assert "line 49" in shown and "line 3\n" not in shown
    drawn.finish()
    assert "line 3" in file.getvalue()
