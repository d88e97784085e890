"""Multi-round co-reference: the asked answer is among its equals, in order, and nothing but it is right."""

import re
from collections import Counter

import pytest
import tiny_tokenizer

from salalocal.errors import RequestError
from salalocal.evals.mrcr import ANSWER_TOKENS, MrcrRequest, mrcr_cases
from salalocal.session.tokens import TextCodec

ORDINALS = {"first": 0, "second": 1, "third": 2, "fourth": 3, "fifth": 4, "sixth": 5, "seventh": 6, "eighth": 7}


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> TextCodec:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer.write_tokenizer(folder)
    return TextCodec.from_folder(folder)


def test_the_asked_answer_is_found_by_counting(codec: TextCodec, seed: int) -> None:
    cases = list(mrcr_cases(MrcrRequest((5000, 9000), (2, 8), samples=2, seed=seed), codec))
    assert len({case.key for case in cases}) == len(cases) == 8
    for case in cases:
        question = case.make()
        *turns, last = question.conversation.turns
        ordinal, what, opening = re.fullmatch(
            r'Repeat the (\w+) (.+) that you wrote, word for word, with "(\w{10})" in front of it\. Write nothing .+',
            last.question,
        ).groups()  # type: ignore[union-attr]
        equal = [codec.tokenizer.decode(turn.answer or ()) for turn in turns if turn.question == f"Write a {what}."]
        assert len(equal) == len(set(equal)) == case.labels["needles"]
        wanted = equal[ORDINALS[ordinal]]
        assert question.expected == (f"{opening} {wanted}",)
        assert question.mark(f"{opening} {wanted}").is_right and question.mark(f"{opening}\n{wanted}").is_right
        assert not question.mark(wanted).is_right and question.mark(wanted).score == 0
        other = equal[ORDINALS[ordinal] - 1]
        assert not question.mark(f"{opening} {other}").is_right
        repeats = Counter(turn.question for turn in turns)
        assert repeats[f"Write a {what}."] == case.labels["needles"] and len(repeats) > 3
        tokens = sum(len(segment.ids) for segment in codec.template.render(question.conversation))
        assert case.labels["length"] - 800 < tokens + ANSWER_TOKENS <= case.labels["length"]


def test_equal_seeds_ask_equally(codec: TextCodec, seed: int) -> None:
    made = [
        [case.make().conversation for case in mrcr_cases(MrcrRequest((4096,), (2,), 2, s), codec)]
        for s in (seed, seed, seed + 1)
    ]
    assert made[0] == made[1] != made[2]


def test_what_cannot_be_asked_is_refused(codec: TextCodec) -> None:
    for values, said in (
        ({"needles": (1,)}, "--needles 1"),
        ({"needles": (9,)}, "--needles 9"),
        ({"needles": ()}, "no"),
    ):
        with pytest.raises(RequestError, match=said):
            MrcrRequest((4096,), **values)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="--ctx 100"):
        MrcrRequest((100,))
    (case,) = mrcr_cases(MrcrRequest((2048,), (8,), 1), codec)
    with pytest.raises(RequestError, match="too few for 8 texts"):
        case.make()
