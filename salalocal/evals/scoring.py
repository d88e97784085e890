"""Whether an answer is right, and what a count of right answers is worth; for every evaluation that asks questions.

The interval of a share p of n answers is Wilson's, at 95 %:

    (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n),  z = 1.96
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

Z_95 = 1.959964


@dataclass(frozen=True)
class Mark:
    """What one answer got: `score` from 0 to 1, and whether it is right as a whole."""

    score: float
    is_right: bool


@dataclass(frozen=True)
class Share:
    """How many of the asked questions were answered rightly, and the mean score; `low` and `high` bound the share."""

    right: int
    asked: int
    score: float

    @classmethod
    def of(cls, marks: Iterable[Mark]) -> "Share":
        """The share of right answers among marks; there must be one at least."""
        given = list(marks)
        return cls(sum(mark.is_right for mark in given), len(given), sum(mark.score for mark in given) / len(given))

    @property
    def share(self) -> float:
        """The share of right answers, from 0 to 1."""
        return self.right / self.asked

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % Wilson interval of the share."""
        return wilson(self.right, self.asked)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        low, high = self.interval
        figures = {"share": self.share, "low": low, "high": high, "score": self.score}
        return {"right": self.right, "asked": self.asked} | {name: round(x, 4) for name, x in figures.items()}


def wilson(right: int, asked: int) -> tuple[float, float]:
    """The 95 % Wilson interval of a share of at least one question."""
    share = right / asked
    middle = share + Z_95**2 / (2 * asked)
    reach = Z_95 * math.sqrt(share * (1 - share) / asked + Z_95**2 / (4 * asked**2))
    scale = 1 + Z_95**2 / asked
    return max(0.0, (middle - reach) / scale), min(1.0, (middle + reach) / scale)


def mark_all(answer: str, expected: Sequence[str], wrong: Sequence[str] = ()) -> Mark:
    """Right if every expected text is in the answer and no wrong one; the score is the share of those that are there.

    Case and the width of spaces do not count; a text is only found as whole words, so that 7 is not found in 1702.
    """
    plain = _plain(answer)
    found = sum(_has(plain, _plain(text)) for text in expected)
    is_spoiled = any(_has(plain, _plain(text)) for text in wrong)
    return Mark(0.0 if is_spoiled else found / len(expected), found == len(expected) and not is_spoiled)


def mark_value(answer: str, name: str, value: str) -> Mark:
    """Right if the answer gives the value of a name as a whole, and no other number where the value is one.

    Quotes around the value do not count. The name itself is left out first, and a comment that a quoted line ends in.
    """
    plain = _COMMENT.sub("", _plain(answer))
    wanted = _unquoted(_plain(value))
    rest = plain.replace(_plain(name), " ")
    if _NUMBER.fullmatch(wanted):
        numbers = set(_NUMBER.findall(rest))
        return _whole(numbers == {wanted})
    return _whole(_has(rest, wanted))


def mark_text(answer: str, expected: str, opening: str) -> Mark:
    """How much of a longer text an answer repeats: the ratio of difflib behind the opening, 0 without the opening.

    Right if it is the whole text and nothing else, but for the width of spaces. Source: the grading rule of MRCR.
    """
    stripped = answer.strip()
    if not stripped.startswith(opening):
        return Mark(0.0, False)
    said, wanted = _spaced(stripped.removeprefix(opening)), _spaced(expected)
    return Mark(SequenceMatcher(None, said, wanted, autojunk=False).ratio(), said == wanted)


_NUMBER = re.compile(r"(?<![\w.])-?[0-9][0-9_,]*(?:\.[0-9]+)?(?![\w]|\.[0-9])")
_COMMENT = re.compile(r"(?<=\S)\s+(?:#|//)\s.*")
_QUOTES = "\"'`"


def _whole(is_right: bool) -> Mark:
    return Mark(float(is_right), is_right)


def _spaced(text: str) -> str:
    return " ".join(text.split())


def _plain(text: str) -> str:
    return _spaced(text).casefold()


def _unquoted(text: str) -> str:
    return text[1:-1] if len(text) > 2 and text[0] == text[-1] and text[0] in _QUOTES else text


def _has(text: str, wanted: str) -> bool:
    start = r"(?<!\w)" if wanted[:1].isalnum() else ""
    end = r"(?!\w)" if wanted[-1:].isalnum() else ""
    return re.search(start + re.escape(wanted) + end, text) is not None
