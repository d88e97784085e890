"""Guesses of what an answer goes on with, from what stands in the prompt and the answer already; for decoders.

An answer about files copies from them. Where the last tokens have stood before, those that followed there are a good
guess; a model checks all of them in one step, so a wrong guess costs time and never changes the answer. Source: prompt
lookup decoding (Saxena 2023).
"""

from collections.abc import Sequence

import numpy as np

NGRAM_TOKENS = 3
# A step that checks guesses takes longer than one that does not; guesses rest after so many that came to nothing.
_PATIENCE = 4
_REST_TOKENS = 32


class PromptLookup:
    """The tokens so far, and where each run of `NGRAM_TOKENS` of them stood last."""

    def __init__(self, ids: Sequence[int]) -> None:
        self._ids = list(ids)
        prompt = np.asarray(self._ids, dtype=np.int64)
        keys = _keys(prompt)
        self._order = np.argsort(keys, kind="stable")
        self._keys = keys[self._order]
        self._answer: dict[tuple[int, ...], int] = {}
        self._misses, self._rest = 0, 0

    def push(self, token: int) -> None:
        """Take in a token of the answer."""
        end = len(self._ids)
        if end >= NGRAM_TOKENS:
            self._answer[tuple(self._ids[end - NGRAM_TOKENS :])] = end
        self._ids.append(token)
        self._rest = max(0, self._rest - 1)

    def guess(self, count: int) -> list[int]:
        """At most `count` tokens that may come next; none while guesses rest."""
        if self._rest or len(self._ids) < NGRAM_TOKENS:
            return []
        last = tuple(self._ids[-NGRAM_TOKENS:])
        start = self._answer.get(last)
        if start is None:
            start = self._in_prompt(last)
        return [] if start is None else self._ids[start : start + count]

    def learn(self, num_accepted: int) -> None:
        """How many tokens of the last guess were right."""
        self._misses = 0 if num_accepted else self._misses + 1
        if self._misses == _PATIENCE:
            self._misses, self._rest = 0, _REST_TOKENS

    def _in_prompt(self, last: tuple[int, ...]) -> int | None:
        key = _keys(np.asarray(last, dtype=np.int64))[0]
        place = int(np.searchsorted(self._keys, key, side="right")) - 1
        # The prompt's own last run has nothing behind it.
        while place >= 0 and self._keys[place] == key:
            start = int(self._order[place]) + NGRAM_TOKENS
            if start < len(self._order) + NGRAM_TOKENS - 1 and tuple(self._ids[start - NGRAM_TOKENS : start]) == last:
                return start
            place -= 1
        return None


def _keys(ids: "np.ndarray[tuple[int], np.dtype[np.int64]]") -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    """One number for every run of `NGRAM_TOKENS` ids; ids of up to 21 bits share none."""
    count = max(0, len(ids) - NGRAM_TOKENS + 1)
    keys = np.zeros(count, dtype=np.int64)
    for place in range(NGRAM_TOKENS):
        keys = (keys << 21) ^ ids[place : place + count]
    return keys
