"""The decision: paired differences with their errors, the rule, and questions that are those of the evaluation."""

import math
import random

import pytest
from training_cases import small_corpus, words_of

from training.archive import ArchiveMaker
from training.evaluate import MISSING, WEIGHTS, archives
from training.score import answer_spans
from training.transcript import Prompt
from training.verdict import Difference, asked_alone, decide


def test_a_difference_counts_what_changed_only() -> None:
    found = Difference.of([True, True, False, False, False], [True, False, True, True, True])
    assert (found.gained, found.lost, found.more) == (3, 1, 2)
    assert found.error == pytest.approx(math.sqrt(4 - 4 / 5))
    assert Difference.of([True] * 4, [True] * 4).error == 0


def test_every_part_of_the_rule_can_fail() -> None:
    kinds = {"4k": ["where"] * 8 + [MISSING] * 2, "8k": ["value"] * 10}
    old = {"4k": [False] * 8 + [True] * 2, "8k": [True] * 10}
    new = {"4k": [True] * 7 + [False] + [True] * 2, "8k": [True] * 10}
    good = decide(kinds, old, new, 1.01)
    assert good["ships"] and good["more_right"] == 7
    assert not decide(kinds, old, new, 1.03)["met"]["perplexity_kept"]
    assert not decide(kinds, old, old, 1.0)["met"]["more_right"]
    worse = decide(kinds, old, new | {"8k": [True] * 7 + [False] * 3}, 1.0)
    assert worse["met"]["more_right"] and not worse["met"]["no_length_worse"] and not worse["ships"]
    mute = decide(kinds, old, new | {"4k": [True] * 8 + [False] * 2}, 1.0)
    assert not mute["met"]["missing_names_denied"] and not mute["ships"]


def test_questions_are_asked_alone_and_answered_as_the_evaluation_expects(seed: int) -> None:
    corpus = small_corpus()
    words = words_of(corpus, True) or ["zork"]
    maker = ArchiveMaker(corpus, words, random.Random(seed))
    for archive in archives(corpus, words, 1500, 5, [*WEIGHTS, MISSING]):
        prompt = Prompt(list(archive.documents), *maker.prompt(archive.documents))
        found = list(asked_alone(archive, corpus.tokenizer, prompt))
        assert [kind for kind, _ in found] == [turn.kind for turn in archive.turns]
        for turn, (_, sample) in zip(archive.turns, found, strict=True):
            ((first, stop),) = answer_spans(sample)
            text = maker.tokenizer.decode(sample.ids[:stop].tolist(), skip_special_tokens=False)
            assert text.endswith(f"{turn.question}<|im_end|>\n<|im_start|>assistant\n{turn.answer}<|im_end|>")
            assert first > sample.boundary
