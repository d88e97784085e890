"""States saved in memory, found again by the tokens they hold; for sessions.

A lightning state cannot be rewound, so a state serves a prompt only if all its tokens are a prefix of that prompt.
"""

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from salalocal.model.state import ModelState

BYTES_PER_TOKEN = 4


def token_bytes(ids: Sequence[int]) -> bytes:
    """Token ids as bytes, so that one prefix test is one comparison of memory."""
    return array("I", ids).tobytes()


@dataclass(frozen=True, eq=False)
class SavePoint:
    """A state nobody changes any more: its tokens, and the logits [V] of the next token where they are known."""

    tokens: bytes
    state: ModelState
    logits: Tensor | None
    is_pinned: bool

    @property
    def num_tokens(self) -> int:
        """How many tokens the state holds."""
        return len(self.tokens) // BYTES_PER_TOKEN


class PrefixStore:
    """The save points of one session, thinned to a number of points; the newest and the pinned are always kept.

    Points share the rows of keys and values; what a point costs is one set of lightning states.
    """

    def __init__(self, max_points: int) -> None:
        self._max_points = max(2, max_points)
        self._points: list[SavePoint] = []

    def __len__(self) -> int:
        return len(self._points)

    def put(self, point: SavePoint) -> None:
        """Keep a state under its tokens; replaces a point with the same tokens. The state must not change any more."""
        self._points = [kept for kept in self._points if kept.tokens != point.tokens]
        self._points.append(point)
        while len(self._points) > self._max_points:
            removable = [kept for kept in self._points[:-1] if not kept.is_pinned]
            self._points.remove(min(removable or self._points[:-1], key=self._gap_without))

    def longest(self, tokens: bytes) -> SavePoint | None:
        """The longest saved state that a prompt of these tokens can go on from."""
        usable = [
            point
            for point in self._points
            if tokens.startswith(point.tokens) and (point.logits is not None or len(point.tokens) < len(tokens))
        ]
        return max(usable, key=lambda point: len(point.tokens), default=None)

    def keep_prefixes_of(self, tokens: bytes) -> None:
        """Drop every point that a prompt of these tokens, or one that extends it, could not go on from."""
        self._points = [point for point in self._points if tokens.startswith(point.tokens)]

    def _gap_without(self, point: SavePoint) -> float:
        """How many tokens lie between the neighbours of a point; the deepest point is worth the most."""
        lengths = [0, *sorted(kept.num_tokens for kept in self._points)]
        index = lengths.index(point.num_tokens)
        return lengths[index + 1] - lengths[index - 1] if index + 1 < len(lengths) else math.inf
