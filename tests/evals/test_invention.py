"""What is made up: equal for equal seeds, distinct where it has to be."""

import re
from functools import partial

from salalocal.evals import invention


def test_equal_parts_draw_equally_and_others_do_not(seed: int) -> None:
    drawn = [invention.number(invention.seeded("needle", part, 4096)) for part in (seed, seed, seed + 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_draws_do_not_change_between_versions() -> None:
    """Published figures name a seed: what it draws must stay what it was."""
    rng = invention.seeded("needle", 0, 4096, 0)
    assert [invention.number(rng), invention.constant_name(rng), invention.coded_word(rng)] == [
        "4339800",
        "LUCKY_LIZARD_PEBBLE",
        "vufugo",
    ]


def test_forms(seed: int) -> None:
    rng = invention.seeded(seed)
    assert re.fullmatch(r"[1-9]\d{6}", invention.number(rng))
    assert re.fullmatch(r"[A-Z]+_[A-Z]+_[A-Z]+", invention.constant_name(rng))
    assert re.fullmatch(r"[a-z]+-[a-z]+ [a-z]+", invention.spoken_name(rng))
    assert re.fullmatch(r"([a-z][aeiou]){3}", invention.coded_word(rng))
    assert re.fullmatch(r"The \w+ \w+ \w+ the \w+ \w+\.", invention.sentence(rng))
    words = [*invention.ADJECTIVES, *invention.NOUNS, *invention.VERBS]
    assert len(words) == len(set(words))


def test_distinct_draws_again_what_is_taken(seed: int) -> None:
    rng = invention.seeded(seed)
    taken = {str(digit) for digit in range(5)}
    found = invention.distinct(lambda: str(rng.randrange(10)), 5, taken.__contains__)
    assert sorted(found) == ["5", "6", "7", "8", "9"]
    assert len(set(invention.distinct(partial(invention.coded_word, rng), 100))) == 100
