"""Samples with planted lines: every answer follows from the planted lines, and its ids know where they stand."""

import re
from itertools import pairwise

import numpy as np
import pytest
from training_cases import small_corpus, small_maker, words_of

from training.needles import TASK_WEIGHTS, Ask, Bundle, NeedleMaker
from training.score import answer_spans
from training.transcript import ANSWER, Sample
from training.wording import FOUND, NOT_FOUND

FRAME = re.compile(r"\Auser\n|</?document(?:s|_content)?(?: index=.\d+.)?>|</?source>")
ABSENT = re.compile(r"(?:The )?(.*) is not in these files\.")


@pytest.fixture
def maker(seed: int) -> NeedleMaker:
    return NeedleMaker(small_maker(seed))


def files_of(sample: Sample, maker: NeedleMaker) -> str:
    return maker.archives.tokenizer.decode(sample.ids[: sample.boundary].tolist())


def asks_of(maker: NeedleMaker, task: str, kind: str, count: int) -> list[tuple[Bundle, Ask]]:
    found: list[tuple[Bundle, Ask]] = []
    while len(found) < count:
        bundle: Bundle = getattr(maker, task)()
        found += [(bundle, ask) for ask in bundle.asks if ask.kind == kind]
    return found


@pytest.mark.parametrize("length", [512, 2048])
def test_answers_are_copied_from_where_their_sources_say(maker: NeedleMaker, length: int) -> None:
    decode = maker.archives.tokenizer.decode
    num_copied = 0
    for _ in range(20):
        sample = maker.sample(length)
        assert len(sample.ids) == length + 1
        for turn, (first, stop) in zip(sample.turns, answer_spans(sample), strict=True):
            assert decode(sample.ids[first : stop - 1].tolist()) == turn.answer
            for row in range(first, stop):
                source = sample.sources[row]
                assert source < row
                if 0 <= source < sample.boundary:
                    num_copied += 1
                    written, stands = (decode([int(sample.ids[at])]).strip() for at in (row, source))
                    assert written.removeprefix("`") == stands  # a path's first id may hold the quote before it
    assert num_copied > 200


def test_only_answers_and_linked_values_lead_over_another_line(maker: NeedleMaker) -> None:
    tokenizer = maker.archives.tokenizer
    num_linked = 0
    for _ in range(60):
        sample = maker.sample(1024)
        rows = np.flatnonzero(sample.hops >= 0)
        assert (sample.hops[rows] < rows).all()
        linked = rows[sample.marks[rows] != ANSWER]
        num_linked += len(linked)
        for row in linked:
            for position in (row - 1, sample.hops[row]):
                assert tokenizer.decode([int(sample.ids[position])]).isdigit()
                assert tokenizer.decode([int(sample.ids[position + 1])]).startswith(".")
    assert num_linked > 0


def test_an_absent_name_is_nowhere_and_any_other_answer_is_there(maker: NeedleMaker) -> None:
    num_absent = num_found = 0
    for _ in range(80):
        sample = maker.sample(700)
        files = files_of(sample, maker)
        for turn in sample.turns:
            if match := ABSENT.fullmatch(turn.answer):
                num_absent += 1
                text = FRAME.sub("", files)
                assert not re.search(rf"(?<![\w-]){re.escape(match[1])}(?![\w-])", text)
            elif turn.kind in ("constant", "line"):
                num_found += 1
                assert turn.answer in files
            elif turn.kind == "needle":
                num_found += 1
                value = re.split(r" is:? | will be |: ", turn.answer)[-1]
                assert value in files
    assert 0.03 < num_absent / (num_absent + num_found) < 0.35


def test_a_needle_is_answered_with_the_value_of_its_own_line(maker: NeedleMaker) -> None:
    for bundle, ask in asks_of(maker, "needle", "needle", 30):
        end = ask.parts[1].text
        name = ask.answer.removesuffix(end).removeprefix("The ")
        assert name in ask.question
        link = " for " if " for " in name else " of "
        assert any(line.endswith(link + name.partition(link)[2] + end) for line in bundle.lines)


def test_several_values_are_listed_in_the_order_of_their_lines(maker: NeedleMaker) -> None:
    for bundle, ask in asks_of(maker, "values", "values", 20):
        topic, _, listed = ask.answer.removesuffix(".").partition(" are: ")
        name = next(name for name in (topic.partition(f" {link} ")[2] for link in ("for", "of")) if name)
        lines = [line for line in bundle.lines if name in line]
        assert [line.removesuffix(".").rpartition(" ")[2] for line in lines] == listed.split(", ")
        assert len(lines) > 1


def test_several_names_are_answered_in_the_order_of_the_question(maker: NeedleMaker) -> None:
    for bundle, ask in asks_of(maker, "queries", "queries", 20):
        places = []
        for part in ask.parts[2::2]:
            assert part.source is not None
            line = bundle.lines[part.source.line]
            assert line[part.source.start :].startswith(part.text)
            before = line[: part.source.start]
            name = max((before[i:] for i in range(len(before)) if before[i:] in ask.question), key=len)
            places.append(ask.question.index(name))
        assert places == sorted(places) and len(places) > 1


def test_a_chain_leads_from_name_to_name(maker: NeedleMaker) -> None:
    for kind in ("trace-all", "trace-end", "trace-next"):
        for bundle, ask in asks_of(maker, "trace", kind, 8):
            pairs = [text.split(" = ") for text in ask.answer.split(", ")]
            assert all(" = ".join(pair) in bundle.lines for pair in pairs)
            asked = pairs[0][0] if kind == "trace-end" else pairs[0][1]
            assert asked in ask.question
            if kind == "trace-end":
                assert all(first[1] == second[0] for first, second in pairwise(pairs))
                assert pairs[-1][1].isdigit()
            if kind == "trace-all":
                assert all(first[0] == second[1] for first, second in pairwise(pairs))
                assert not any(line.endswith(f" = {pairs[-1][0]}") for line in bundle.lines)


def test_a_quoted_line_has_the_asked_words(maker: NeedleMaker) -> None:
    for bundle, ask in asks_of(maker, "line", "line", 30):
        assert ask.answer in bundle.lines
        hop = ask.parts[0].hop
        phrase = ask.answer[: hop.start] if hop else ask.answer
        assert any(phrase.endswith(" ".join(phrase.split()[-count:])) for count in (2, 3))
        words = ask.answer.split()
        assert any(" ".join(words[i : i + 2]) in ask.question for i in range(len(words)))


def test_a_name_exists_if_a_line_gives_it(maker: NeedleMaker) -> None:
    for bundle, ask in asks_of(maker, "exists", "exists", 20):
        name = ask.answer.removesuffix(" is in these files.").removesuffix(" is not in these files.")
        is_there = any(line.startswith(f"{name} = ") for line in bundle.lines)
        assert ask.answer == (FOUND if is_there else NOT_FOUND).format(k=name)


def test_planted_lines_use_no_held_out_word(maker: NeedleMaker) -> None:
    heldout = set(words_of(small_corpus(), True))
    assert heldout
    assert not heldout & set(maker.inventor.words)
    for _ in range(30):
        for task in TASK_WEIGHTS:
            drawn = set(re.findall(r"[a-z]+", " ".join(getattr(maker, task)().lines)))
            assert not {word for word in drawn & heldout if len(word) > 8}


def test_a_list_of_sentences_fills_a_file(maker: NeedleMaker) -> None:
    bundle = maker.all_keys(900)
    assert 0 <= sum(len(maker.archives.encode(line + "\n")) for line in bundle.lines) - 900 < 60
    assert len({line.partition(" is")[0] for line in bundle.lines}) > 8
    assert bundle.asks
