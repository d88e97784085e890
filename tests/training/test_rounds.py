"""Conversations of equal requests: the answer is the one that was asked for, copied from where it stands."""

from training_cases import small_maker

from training import wording
from training.rounds import RoundMaker
from training.score import answer_spans


def test_the_repeated_answer_is_the_asked_one(seed: int) -> None:
    maker = RoundMaker(small_maker(seed))
    decode = maker.archives.tokenizer.decode
    num_asked = 0
    for _ in range(12):
        sample = maker.sample(1500)
        history = decode(sample.ids[: sample.boundary].tolist(), skip_special_tokens=False)
        for turn, (first, stop) in zip(sample.turns, answer_spans(sample), strict=True):
            opening, _, text = turn.answer.partition(" ")
            form = next(form for form in wording.FORMS if f"{form} about" in turn.question)
            # With the form behind it: a topic may have such a word too.
            number = next(n for n, ordinal in enumerate(wording.ORDINALS) if f" {ordinal} {form} " in turn.question)
            topic = text.partition(".")[0].removeprefix("This is about ")
            request = wording.REQUEST.format(f=form, t=topic)
            answers = [part.split("assistant\n")[1].split("<|im_end|>")[0] for part in history.split(request)[1:]]
            assert answers[number] == text
            assert opening in turn.question
            num_asked += 1
            copied = [row for row in range(first, stop) if sample.sources[row] >= 0]
            assert len(copied) > 8
            for row in copied:
                assert decode([int(sample.ids[row])]).strip() == decode([int(sample.ids[sample.sources[row]])]).strip()
    assert num_asked > 0
