"""Save points are found by their tokens, and thinned so that the useful ones stay."""

import random
from typing import Any, cast

import pytest
import torch

from salalocal.session.prefix import PrefixStore, SavePoint, token_bytes

LOGITS = torch.zeros(3)


def point(ids: list[int], *, logits: torch.Tensor | None = LOGITS, is_pinned: bool = False) -> SavePoint:
    return SavePoint(token_bytes(ids), cast(Any, object()), logits, is_pinned)


def lengths(store: PrefixStore, ids: list[int]) -> list[int]:
    found, tokens = [], token_bytes(ids)
    while (best := store.longest(tokens)) is not None:
        found.append(best.num_tokens)
        tokens = tokens[: len(best.tokens) - 4]
    return found


def test_the_longest_prefix_is_found_and_nothing_else(seed: int) -> None:
    rng = random.Random(seed)
    store = PrefixStore(100)
    known = [[rng.randrange(3) for _ in range(rng.randrange(1, 6))] for _ in range(20)]
    for ids in known:
        store.put(point(ids))
    for _ in range(200):
        prompt = [rng.randrange(3) for _ in range(6)]
        expected = max((len(ids) for ids in known if prompt[: len(ids)] == ids), default=0)
        found = store.longest(token_bytes(prompt))
        assert (found.num_tokens if found else 0) == expected


def test_a_token_that_begins_like_another_is_no_prefix() -> None:
    store = PrefixStore(10)
    store.put(point([1, 2]))
    assert store.longest(token_bytes([1, 2 + 256])) is None


def test_a_state_without_logits_serves_only_longer_prompts() -> None:
    store = PrefixStore(10)
    store.put(point([1, 2, 3], logits=None))
    assert store.longest(token_bytes([1, 2, 3])) is None
    assert store.longest(token_bytes([1, 2, 3, 4])) is not None


def test_the_same_tokens_are_kept_once_and_the_later_state_wins() -> None:
    store = PrefixStore(10)
    store.put(point([1, 2]))
    later = point([1, 2])
    store.put(later)
    assert len(store) == 1 and store.longest(token_bytes([1, 2])) is later


def test_thinning_keeps_pinned_and_newest_points_and_spreads_the_rest() -> None:
    store = PrefixStore(5)
    ids = list(range(100))
    store.put(point(ids[:11], is_pinned=True))
    for length in (10, 20, 30, 40, 50, 60, 70, 80, 12):
        store.put(point(ids[:length]))
    kept = lengths(store, ids)
    assert len(kept) == 5 and 11 in kept and 12 in kept
    assert max(kept) == 80, "the end of the chain is the most useful of all"


@pytest.mark.parametrize("max_points", [-3, 0, 1])
def test_two_points_are_always_kept(max_points: int) -> None:
    store = PrefixStore(max_points)
    for length in range(1, 5):
        store.put(point([7] * length, is_pinned=True))
    assert len(store) == 2


def test_points_of_another_branch_are_dropped() -> None:
    store = PrefixStore(10)
    for ids in ([1], [1, 2], [1, 2, 3], [1, 5], [4]):
        store.put(point(ids))
    store.keep_prefixes_of(token_bytes([1, 2, 9]))
    assert len(store) == 2 and lengths(store, [1, 2, 9]) == [2, 1]
