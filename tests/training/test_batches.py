"""Batches: what the auxiliary losses look at, and which kind of question each answer id belongs to."""

import random

import numpy as np
from training_cases import small_corpus, small_maker, words_of

from training.batches import KINDS, Stream, collate, maker_for
from training.needles import NeedleMaker
from training.stages import Phase, only
from training.transcript import ANSWER


def test_linked_rows_of_documents_and_answers_are_shown_the_way(seed: int) -> None:
    maker = NeedleMaker(small_maker(seed))
    samples = [maker.sample(700) for _ in range(6)]
    hops = collate(samples, 0.5, 200, random.Random(seed)).hints.hops
    for number, sample in enumerate(samples):
        wanted = np.flatnonzero(sample.hops[1:] >= 0)
        real = hops.index[number][hops.is_real[number]].numpy()
        source = hops.source[number][hops.is_real[number]].numpy()
        linked = [row for row in wanted if sample.marks[row + 1] != ANSWER]
        assert set(linked) <= set(real.tolist())
        assert (source == sample.hops[1:][real]).all()


def test_kinds_name_the_question_of_every_answer_id(seed: int) -> None:
    phase = Phase(only(600, 4), 1.0, 0.5, (1.0, 1.0), needle_share=0.4, aimed_share=0.2)
    batch = next(iter(Stream(small_corpus(), words_of(small_corpus(), False), phase, f"{seed}")))
    kinds, is_answer = batch.kinds.numpy(), (batch.marks == ANSWER).numpy()
    assert kinds.shape == is_answer.shape
    assert (kinds[~is_answer] == 0).all()
    assert {KINDS[kind] for kind in kinds[is_answer]} - {KINDS[0]}


def test_samples_without_a_question_are_drawn_again(seed: int) -> None:
    draw = maker_for(small_maker(seed), 1.0)
    assert all(draw(512).turns for _ in range(20))
