"""Aimed samples: many questions for files, near names, missing names that are missing, numbers from anywhere."""

import re
from collections import Counter

import pytest
from training_cases import small_maker

from training.aimed import AimedMaker
from training.score import answer_spans

NUMBER = re.compile(r'<document index="(\d+)">')


@pytest.fixture
def maker(seed: int) -> AimedMaker:
    return AimedMaker(small_maker(seed))


def test_a_third_asks_for_files_and_every_answer_holds(maker: AimedMaker) -> None:
    kinds: Counter[str] = Counter()
    firsts = set()
    decode = maker.archives.tokenizer.decode
    for _ in range(25):
        sample = maker.sample(2048)
        assert len(sample.ids) == 2049
        files = decode(sample.ids[: sample.boundary].tolist(), skip_special_tokens=False)
        numbers = [int(found) for found in NUMBER.findall(files)]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        assert numbers[-1] < 1000
        firsts.add(numbers[0])
        body = NUMBER.sub("", files)
        for turn, (first, stop) in zip(sample.turns, answer_spans(sample), strict=True):
            kinds[turn.kind] += 1
            assert decode(sample.ids[first : stop - 1].tolist()) == turn.answer
            if turn.kind == "missing":
                name = turn.answer.removeprefix("The ").removesuffix(" is not in these files.")
                assert all(name not in line for line in body.split("\n") if not line.startswith("<source>"))
            elif turn.kind == "where":
                path = turn.answer.partition("`")[2].removesuffix("`.")
                document = files.partition(f"<source>{path}</source>")[2].partition("</document>")[0]
                assert turn.key in document
            elif turn.kind != "chat":
                assert turn.answer in files
    assert kinds["where"] > 0.15 * kinds.total()
    assert kinds["missing"] > 0 and kinds["twin"] > 0
    assert 1 in firsts and max(firsts) > 1


def test_near_names_differ_and_keep_their_form(maker: AimedMaker) -> None:
    for name in ("MAX_RETRY_COUNT", "load", "read_all_lines"):
        near = {maker.near(name) for _ in range(20)}
        assert name not in near or len(near) > 1
        assert all(other.isupper() == name.isupper() for other in near if other[0].isalpha())


def test_crowded_archives_have_many_files_and_long_ones_few(maker: AimedMaker) -> None:
    crowded = [len(maker.real_files(1500, is_crowded=True)) for _ in range(10)]
    deep = [len(maker.real_files(1500, is_crowded=False)) for _ in range(10)]
    assert sum(crowded) > 1.3 * sum(deep)
