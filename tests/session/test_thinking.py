"""Thinking is told from answering wherever the pieces are cut."""

import random

import pytest

from salalocal.session.events import TextDelta, ThinkingDelta
from salalocal.session.thinking import route, split_thinking

CASES = {
    "plain answer": ("", "plain answer"),
    "<think>a b</think>c": ("a b", "c"),
    "\n <think>a\n</think>\n\nc": ("a\n", "c"),
    "<think>never ends </thin": ("never ends </thin", ""),
    "<think></think>": ("", ""),
    "<thin": ("", "<thin"),
    "< think>x</think>": ("", "< think>x</think>"),
    "x <think>y</think>": ("", "x <think>y</think>"),
    "  \n": ("", "  \n"),
    "": ("", ""),
    "<think>a</think>b</think>c<think>d": ("a", "b</think>c<think>d"),
    "<think>1 < 2 </ </thi </think>z": ("1 < 2 </ </thi ", "z"),
}


@pytest.mark.parametrize("text", CASES)
def test_a_whole_text(text: str) -> None:
    assert split_thinking(text) == CASES[text]


@pytest.mark.parametrize("text", CASES)
def test_any_cut_gives_the_same_and_no_id_is_lost(text: str, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(30):
        pieces, position = [], 0
        while position < len(text):
            step = rng.randrange(4)
            pieces.append(TextDelta(text[position : position + step], (len(pieces),)))
            position += step
        events = list(route(pieces))
        thinking = "".join(event.text for event in events if isinstance(event, ThinkingDelta))
        answer = "".join(event.text for event in events if isinstance(event, TextDelta))
        assert (thinking, answer) == CASES[text]
        assert [token for event in events for token in event.token_ids] == list(range(len(pieces)))


def test_an_answer_is_not_held_back() -> None:
    events = route(iter([TextDelta("a", (1,)), TextDelta("b", (2,))]))
    assert next(events) == TextDelta("a", (1,))


def test_deltas_are_their_text() -> None:
    assert str(TextDelta("a", ())) == "a" == str(ThinkingDelta("a", ()))
