"""The samples that training sees: the runtime's own prompt form, answers that the files hold, exact copy positions."""

import hashlib
import random

import numpy as np
import pytest
from training_cases import small_corpus, small_maker

from salalocal.prompt.pack import PromptPack
from salalocal.prompt.sources import Document, Reading
from salalocal.prompt.template import ChatTemplate, Conversation, Turn
from salalocal.prompt.tokenizer import Tokenizer
from training.archive import ArchiveMaker
from training.score import answer_spans
from training.tokenizer import BUILTIN
from training.transcript import ANSWER


@pytest.fixture
def maker(seed: int) -> ArchiveMaker:
    return small_maker(seed)


def test_the_prompt_is_the_runtimes_prompt(maker: ArchiveMaker) -> None:
    documents = list({d.path: d for d in maker.archive(2000, 4)}.values())
    turns = [t for t in maker.turns(documents, 4) if len(maker.encode(t.answer)) < 40][:2]
    ids, line_at, path_at = maker.prompt(documents)
    sample = maker.conversation(documents, ids, line_at, path_at, turns, 4000)
    sources = []
    for document in documents:
        data = "".join(document.lines).encode()
        sources.append(Document(document.path, data.decode(), hashlib.sha256(data).hexdigest(), len(data)))
    pack = PromptPack.build(Reading(tuple(sources), (), ()), order="given")
    template = ChatTemplate.from_folder(BUILTIN, Tokenizer.from_folder(BUILTIN))
    first, second = turns
    answer = tuple(maker.encode(first.answer))
    conversation = Conversation(pack=pack, turns=(Turn(first.question, answer), Turn(second.question)))
    rendered = [i for segment in template.render(conversation) for i in segment.ids]
    assert sample.ids[: len(rendered)].tolist() == rendered


def test_answers_stand_in_the_files_and_are_copied_from_where_they_stand(maker: ArchiveMaker) -> None:
    sample = maker.sample(2048)
    assert len(sample.ids) == 2049
    assert sample.turns
    decode = maker.tokenizer.decode
    files = decode(sample.ids[: sample.boundary].tolist())
    for turn, (first, stop) in zip(sample.turns, answer_spans(sample), strict=True):
        assert decode(sample.ids[first : stop - 1].tolist()) == turn.answer
        assert sample.ids[stop - 1] == maker.im_end
        if turn.kind not in ("missing", "chat", "where"):
            assert turn.answer in files
    copied = np.flatnonzero((sample.sources >= 0) & (sample.sources < sample.boundary))
    assert (sample.marks[copied] == ANSWER).all()
    assert (sample.ids[copied] == sample.ids[sample.sources[copied]]).mean() > 0.95


def test_the_same_seed_gives_the_same_sample() -> None:
    corpus = small_corpus()
    one, two = (ArchiveMaker(corpus, ["alpha", "beta", "gamma"], random.Random(5)).sample(1024) for _ in range(2))
    assert one.ids.tolist() == two.ids.tolist()


def test_an_asked_name_that_is_missing_is_nowhere_in_the_files(maker: ArchiveMaker) -> None:
    documents = maker.archive(1500, 3)
    text = "".join(line for d in documents for line in d.lines)
    for _ in range(30):
        answer = maker.missing(documents, maker.candidates(documents)).answer
        name = answer.removesuffix(" is not in these files.").removeprefix("The ")
        assert name not in text
