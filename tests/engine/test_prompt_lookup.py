"""Guesses against a search by hand."""

import random

import pytest

from salalocal.engine.prompt_lookup import NGRAM_TOKENS, PromptLookup


def last_place(ids: list[int], in_answer_from: int) -> int | None:
    """Where the last run of tokens stood before, the answer's runs before the prompt's, the latest of each."""
    last = ids[-NGRAM_TOKENS:]
    ends = [end for end in range(NGRAM_TOKENS, len(ids)) if ids[end - NGRAM_TOKENS : end] == last]
    return max(ends) if ends else None


def test_guesses_follow_the_last_place_where_the_last_tokens_stood(seed: int) -> None:
    rng = random.Random(seed)
    prompt = [rng.randrange(4) for _ in range(60)]
    lookup, ids = PromptLookup(prompt), list(prompt)
    for _ in range(80):
        place = last_place(ids, len(prompt))
        assert lookup.guess(5) == ([] if place is None else ids[place : place + 5])
        token = rng.randrange(4)
        lookup.push(token)
        ids.append(token)


def test_ids_that_share_a_sum_are_told_apart() -> None:
    lookup = PromptLookup([5, 9, 7, 1, 2**20, 9, 7, 3, 5, 9, 7])
    assert lookup.guess(2) == [1, 2**20]


@pytest.mark.parametrize("ids", [[], [1], [1, 2], [1, 2, 3]])
def test_short_prompts_have_no_guess(ids: list[int]) -> None:
    assert PromptLookup(ids).guess(4) == []


def test_guesses_rest_when_they_come_to_nothing() -> None:
    lookup = PromptLookup([1, 2, 3, 4, 1, 2, 3])
    assert lookup.guess(3) == [4, 1, 2]
    for _ in range(4):
        lookup.learn(0)
    assert lookup.guess(3) == []
    for token in (*range(100, 129), 1, 2, 3):
        lookup.push(token)
    assert lookup.guess(2) == [100, 101]
