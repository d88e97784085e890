"""Marks and intervals: what counts as right, and Wilson's interval against its definition."""

import math
import random

import pytest

from salalocal.evals.scoring import Mark, Share, mark_all, mark_text, mark_value, wilson


def test_the_interval_solves_its_definition(seed: int) -> None:
    """Wilson's bounds are the p for which the observed share lies z standard errors away."""
    rng = random.Random(seed)
    for _ in range(50):
        asked = rng.randint(1, 500)
        right = rng.randint(0, asked)
        for bound in wilson(right, asked):
            assert 0 <= bound <= 1
            if 1e-9 < bound < 1 - 1e-9:  # at 0 and 1 rounding alone is left
                away = abs(right / asked - bound) / math.sqrt(bound * (1 - bound) / asked)
                assert away == pytest.approx(1.959964, rel=1e-6)


def test_the_interval_of_all_and_none_is_one_sided() -> None:
    low, high = wilson(20, 20)
    assert high == 1 and low == pytest.approx(0.8389, abs=1e-4)
    low, high = wilson(0, 20)
    assert low == pytest.approx(0, abs=1e-12) and high == pytest.approx(0.1611, abs=1e-4)


def test_a_share_counts_right_answers_and_averages_scores() -> None:
    share = Share.of([Mark(1.0, True), Mark(0.5, False), Mark(0.0, False)])
    assert (share.right, share.asked, share.score) == (1, 3, 0.5)
    plain = share.to_json()
    assert plain["share"] == 0.3333 and plain["low"] < 0.3333 < plain["high"]


@pytest.mark.parametrize(
    ("answer", "expected", "wrong", "mark"),
    [
        ("It is 1234567.", ("1234567",), (), Mark(1.0, True)),
        ("It is 12345678.", ("1234567",), (), Mark(0.0, False)),
        ("the  Quick\nOtter", ("quick otter",), (), Mark(1.0, True)),
        ("1111111 and 2222222", ("1111111", "3333333"), (), Mark(0.5, False)),
        ("1111111 or 2222222", ("1111111",), ("2222222",), Mark(0.0, False)),
        ("def f(self, x):", ("(self, x)",), (), Mark(1.0, True)),
        ("", ("7",), (), Mark(0.0, False)),
    ],
)
def test_expected_texts_are_found_as_whole_words(
    answer: str, expected: tuple[str, ...], wrong: tuple[str, ...], mark: Mark
) -> None:
    assert mark_all(answer, expected, wrong) == mark


@pytest.mark.parametrize(
    ("answer", "name", "value", "is_right"),
    [
        ("MAX_RETRIES = 5", "MAX_RETRIES", "5", True),
        ("The value of MAX_RETRIES is 5.", "MAX_RETRIES", "5", True),
        ("MAX_RETRIES = 15", "MAX_RETRIES", "5", False),
        ("MAX_RETRIES = 5  # was 3 before 2020", "MAX_RETRIES", "5", True),
        ("5 or 6", "MAX_RETRIES", "5", False),
        ("KEY_2 = 7", "KEY_2", "7", True),
        ("KEY_2 is not in these files.", "KEY_2", "2", False),
        ("RATE = 0.25", "RATE", "0.25", True),
        ("RATE = 0.255", "RATE", "0.25", False),
        ('NAME = "slow lane"', "NAME", '"slow lane"', True),
        ("It is slow lane", "NAME", '"slow lane"', True),
        ("It is slow", "NAME", '"slow lane"', False),
        ("DEBUG = False", "DEBUG", "False", True),
        ("DEBUG = True", "DEBUG", "False", False),
        ("version: 2.15.25", "version", "2.15.25", True),
    ],
)
def test_a_value_is_right_as_a_whole(answer: str, name: str, value: str, is_right: bool) -> None:
    assert mark_value(answer, name, value).is_right is is_right


def test_a_repeated_text_is_scored_behind_its_opening() -> None:
    assert mark_text(" abc one  two\nthree ", "one two three", "abc") == Mark(1.0, True)
    part = mark_text("abc one two", "one two three", "abc")
    assert 0.6 < part.score < 0.9 and not part.is_right
    assert mark_text("one two three", "one two three", "abc") == Mark(0.0, False)
    assert not mark_text("abc one two three. Voila!", "one two three", "abc").is_right
