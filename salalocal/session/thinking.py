"""Tells thinking from answering in a stream of text: an answer that opens with <think> thinks up to </think>."""

import enum
from collections.abc import Iterable, Iterator

from salalocal.session.events import TextDelta, ThinkingDelta

OPENING = "<think>"
CLOSING = "</think>"


class Part(enum.Enum):
    """What a piece of model text belongs to."""

    THINKING = "thinking"
    ANSWER = "answer"


class ThinkingSplitter:
    """Takes text piece by piece and says which part each character belongs to; the two marks themselves vanish.

    Holds back only what could still become a mark.
    """

    def __init__(self) -> None:
        self._held = ""
        self._part: Part | None = None
        self._is_after_thinking = False

    @property
    def is_thinking(self) -> bool:
        """True between the two marks."""
        return self._part is Part.THINKING

    def push(self, text: str) -> list[tuple[Part, str]]:
        """The pieces that are certain now, in order; possibly none."""
        self._held += text
        pieces: list[tuple[Part, str]] = []
        if self._part is None:
            self._open()
        if self._part is Part.THINKING:
            pieces += self._think()
        if self._part is Part.ANSWER:
            if self._is_after_thinking:
                self._held = self._held.lstrip("\n")
                self._is_after_thinking = not self._held
            pieces += self._take(Part.ANSWER, len(self._held))
        return pieces

    def flush(self) -> list[tuple[Part, str]]:
        """What was held back, at the end of the stream."""
        return self._take(self._part or Part.ANSWER, len(self._held))

    def _open(self) -> None:
        start = self._held.lstrip()
        if start.startswith(OPENING):
            self._held = start.removeprefix(OPENING)
            self._part = Part.THINKING
        elif not OPENING.startswith(start):
            self._part = Part.ANSWER

    def _think(self) -> list[tuple[Part, str]]:
        end = self._held.find(CLOSING)
        if end >= 0:
            pieces = self._take(Part.THINKING, end)
            self._held = self._held.removeprefix(CLOSING)
            self._part, self._is_after_thinking = Part.ANSWER, True
            return pieces
        held_back = next(n for n in range(len(CLOSING) - 1, -1, -1) if self._held.endswith(CLOSING[:n]))
        return self._take(Part.THINKING, len(self._held) - held_back)

    def _take(self, part: Part, length: int) -> list[tuple[Part, str]]:
        piece, self._held = self._held[:length], self._held[length:]
        return [(part, piece)] if piece else []


def route(pieces: Iterable[TextDelta]) -> Iterator[TextDelta | ThinkingDelta]:
    """The pieces of an answer with its thinking told apart; no token id is lost or given twice."""
    splitter = ThinkingSplitter()
    ids: tuple[int, ...] = ()
    for piece in pieces:
        ids += piece.token_ids
        for part, text in splitter.push(piece.text):
            yield _delta(part, text, ids)
            ids = ()
    for part, text in splitter.flush():
        yield _delta(part, text, ids)
        ids = ()
    if ids:
        yield _delta(Part.THINKING if splitter.is_thinking else Part.ANSWER, "", ids)


def split_thinking(text: str) -> tuple[str, str]:
    """What was thought and what was answered in a whole text."""
    splitter = ThinkingSplitter()
    pieces = splitter.push(text) + splitter.flush()
    thinking, answer = ("".join(piece for part, piece in pieces if part is wanted) for wanted in Part)
    return thinking, answer


def _delta(part: Part, text: str, ids: tuple[int, ...]) -> TextDelta | ThinkingDelta:
    return ThinkingDelta(text, ids) if part is Part.THINKING else TextDelta(text, ids)
