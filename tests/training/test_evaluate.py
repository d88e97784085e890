"""The held-out cells: always the same archives and questions, a fifth about missing names; a stopped run goes on."""

import random
from pathlib import Path

import pytest
from training_cases import small_corpus

from salalocal.errors import RequestError
from salalocal.evals.asking import Subject
from salalocal.evals.questionnaire import Watch
from salalocal.settings import Settings
from training import evaluate
from training.archive import ArchiveMaker
from training.corpus import Corpus
from training.evaluate import MISSING, ROOM_TOKENS, WEIGHTS, Archive, archives
from training.invent import word_list

EVERY_KIND = [*WEIGHTS, MISSING]
SILENT = Watch(lambda progress: None, lambda line: None)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return small_corpus()


@pytest.fixture
def words(corpus: Corpus) -> list[str]:
    return word_list((line for f in corpus.packages["beacon"] for line in f.lines), corpus.tokenizer, True) or ["zork"]


def test_a_larger_cell_holds_the_archives_of_a_smaller_one(corpus: Corpus, words: list[str]) -> None:
    small = list(archives(corpus, words, 1500, 10, EVERY_KIND))
    large = list(archives(corpus, words, 1500, 20, EVERY_KIND))
    assert [a.digest for a in small] == [a.digest for a in large][: len(small)]
    assert len({a.digest for a in large}) == len(large)
    assert sum(len(a.turns) for a in large) == 20
    other = list(archives(corpus, words, 1400, 10, EVERY_KIND))
    assert not {a.digest for a in other} & {a.digest for a in small}


def test_a_fifth_asks_for_what_is_not_there_and_the_rest_for_what_is(corpus: Corpus, words: list[str]) -> None:
    turns = [(archive, turn) for archive in archives(corpus, words, 2000, 30, EVERY_KIND) for turn in archive.turns]
    assert sum(turn.kind == MISSING for _, turn in turns) == 6
    for archive, turn in turns:
        text = "".join(line for document in archive.documents for line in document.lines)
        if turn.kind == MISSING:
            assert turn.answer.removeprefix("The ").removesuffix(" is not in these files.") not in text
        elif turn.kind == "where":
            path = archive.documents[turn.document].path
            assert path in turn.answer and turn.key in "".join(archive.documents[turn.document].lines)
        else:
            assert turn.answer in text


def test_only_the_kinds_asked_for_and_no_question_twice(corpus: Corpus, words: list[str]) -> None:
    for archive in archives(corpus, words, 2000, 10, ["where", "value"]):
        assert {turn.kind for turn in archive.turns} <= {"where", "value"}
        assert len({turn.question for turn in archive.turns}) == len(archive.turns)
    with pytest.raises(ValueError, match="too little to ask for nothing"):
        list(archives(corpus, words, 600, 1, ["nothing"]))


@pytest.mark.parametrize("length", [900, 3000, 14_000])
def test_an_archive_fills_its_length_and_leaves_room(corpus: Corpus, words: list[str], length: int, seed: int) -> None:
    maker = ArchiveMaker(corpus, words, random.Random(seed))
    documents = evaluate.files(maker, length)
    used = len(maker.prompt(documents)[0])
    every = sum(len(file.ids) for file in corpus.packages["beacon"])
    assert used <= length - ROOM_TOKENS
    assert used >= min(length - ROOM_TOKENS - 700, every // 2)
    assert len({document.path for document in documents}) == len(documents)


def test_an_answer_has_to_be_the_expected_text() -> None:
    assert evaluate.mark("A = 1", "A = 1").is_right
    assert not evaluate.mark("A = 1.", "A = 1").is_right and not evaluate.mark("", "A = 1").is_right


def asked(given: list[Archive], way: evaluate.Way, folder: Path) -> dict[str, object]:
    report = evaluate.measure(Settings("builtin", "cpu", max_tokens=evaluate.ANSWER_TOKENS), given, way, folder, SILENT)
    return evaluate.record_of(report, evaluate.shares(report))


def test_a_repeated_run_asks_nothing_anew(
    corpus: Corpus, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = list(archives(corpus, words, 1000, 5, EVERY_KIND))
    record = asked(given, "picked", tmp_path / "work")
    shares = record["shares"]
    assert isinstance(shares, dict) and shares["1000"]["all"]["asked"] == 5 and shares["1000"][MISSING]["asked"] == 1
    assert 0 <= shares["1000"]["all"]["low"] <= shares["1000"]["all"]["share"] <= shares["1000"]["all"]["high"] <= 1
    wrong = record["wrong"]
    assert isinstance(wrong, list) and len(wrong) == 5 - shares["1000"]["all"]["right"]
    read = record["tokens_read"]
    # The archive is read once, whatever is asked about it.
    assert isinstance(read, int) and read < 1000 + 5 * ROOM_TOKENS
    lines = list(evaluate.lines(shares))
    assert lines[0].split()[:2] == ["1000", "all"] and "/  5" in lines[0]
    monkeypatch.setattr(Subject, "open", None)
    assert asked(given, "picked", tmp_path / "work") == record
    with pytest.raises(RequestError, match="differs in sparse"):
        asked(given, "silent", tmp_path / "work")


def test_the_answers_come_through_the_sparse_layers(corpus: Corpus, words: list[str], tmp_path: Path) -> None:
    given = list(archives(corpus, words, 1000, 5, ["value"]))
    found = [asked(given, way, tmp_path / way)["shares"] for way in evaluate.WAYS]
    picked, dense, silent = (shares["1000"]["all"]["right"] for shares in found if isinstance(shares, dict))
    assert silent < picked == dense  # so few tokens are read densely in any case
