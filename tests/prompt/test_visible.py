"""What may reach a terminal: nothing unseen passes, nothing seen is lost, and pieces join to the whole."""

import random
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from salalocal.prompt.visible import quoted_name, visible, visible_name

HIDDEN = [
    *(chr(code) for code in range(0x20) if chr(code) not in "\n\t"),
    *map(chr, range(0x7F, 0xA0)),
    *"\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069",
    *map(chr, range(0xE0000, 0xE0080)),
    "\udc1b",
]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain\n\ttext é 東 🙂", "plain\n\ttext é 東 🙂"),
        ("\x1b[2J", "\\x1b[2J"),
        ("a\x07\x7f\x9b", "a\\x07\\x7f\\x9b"),
        ("\r", "\\x0d"),
        ("\u202egpj", "\\u202egpj"),
        ("\U000e0041", "\\U000e0041"),
        ("\ud800", "\\ud800"),
    ],
)
def test_visible_examples(text: str, shown: str) -> None:
    assert visible(text) == shown


@pytest.mark.parametrize("char", HIDDEN, ids=ascii)
def test_every_control_is_shown_by_both(char: str) -> None:
    for shown in (visible(f"a{char}b"), visible_name(f"a{char}b")):
        assert char not in shown
        assert shown.isprintable()


@given(st.text(st.characters() | st.sampled_from(HIDDEN)), st.integers(0, 50))
def test_pieces_join_to_the_whole(text: str, cut: int) -> None:
    assert visible(text[:cut]) + visible(text[cut:]) == visible(text)
    shown = visible(text)
    assert not any(char in shown for char in HIDDEN)
    assert visible(shown) == shown
    shown.encode()


@given(st.text())
def test_names_hold_nothing_that_draws_nothing(name: str) -> None:
    shown = visible_name(name)
    categories = {unicodedata.category(char) for char in shown}
    assert not categories & {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
    assert visible_name(shown) == shown


def test_names_show_marks_of_no_width_and_other_spaces() -> None:
    assert visible_name("a\u200bb\ufeffc\u00add\u00a0e\u3000f\u2028g\ufe0fh\u3164") == (
        "a\\u200bb\\ufeffc\\xadd\\xa0e\\u3000f\\u2028g\\ufe0fh\\u3164"
    )
    assert visible("family: \u200d") == "family: \u200d"
    assert visible_name("a\nb\tc") == "a\\x0ab\\x09c"


def test_quoted_names_are_quoted_and_bounded(seed: int) -> None:
    assert quoted_name("a.txt") == '"a.txt"'
    assert quoted_name('a"\x1b[2J') == '"a\\"\\x1b[2J"'
    rng = random.Random(seed)
    for _ in range(200):
        name = "".join(
            chr(rng.choice([rng.randrange(32, 127), rng.randrange(0xD800)])) for _ in range(rng.randrange(3000))
        )
        shown = quoted_name(name, 60)
        assert len(shown) <= 62
        assert shown[1:-1].isprintable() or "Cn" in {unicodedata.category(char) for char in shown}
    assert quoted_name("start" + "x" * 500 + "end.py").startswith('"start')
    assert quoted_name("start" + "x" * 500 + "end.py").endswith('end.py"')


def test_visible_is_fast() -> None:
    text = "def f(x):\n    return x + 1  # déjà vu\n" * 200_000  # 7 MB; a quadratic rule would not come back
    assert visible(text) == text
    assert len(visible("\x1b" * 1_000_000)) == 4_000_000
