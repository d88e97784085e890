"""Recall: which facts are chosen, where they are said to stand, and files that cannot be asked about."""

import itertools
import random
from collections import Counter
from pathlib import Path

import pytest
import tiny_model

from salalocal.errors import ContextError, PackError, RequestError
from salalocal.evals.facts import Fact
from salalocal.evals.questionnaire import Place, Report, Watch
from salalocal.evals.recall import RecallRequest, chosen_facts, measure_recall
from salalocal.session.start import Sources
from salalocal.settings import Settings


def facts(**counts: int) -> list[Fact]:
    return [Fact(kind, f"{kind}{i}", "1", "a.py", i) for kind, count in counts.items() for i in range(count)]


def test_kinds_take_turns_and_each_is_spread_over_its_facts(seed: int) -> None:
    chosen = chosen_facts(facts(constant=100, signature=3, line=40), RecallRequest(33, seed))
    assert Counter(fact.kind for fact in chosen) == {"constant": 15, "signature": 3, "line": 15}
    assert len(set(chosen)) == 33
    lines = [fact.line for fact in chosen if fact.kind == "constant"]
    assert lines == sorted(lines) and all(6 <= after - before <= 7 for before, after in itertools.pairwise(lines))
    assert chosen == chosen_facts(facts(constant=100, signature=3, line=40), RecallRequest(33, seed))
    for count in (1, 43, 143, 500):
        assert len(chosen_facts(facts(constant=100, signature=3, line=40), RecallRequest(count, seed))) == min(
            143, count
        )
    with pytest.raises(RequestError, match="state nothing"):
        chosen_facts([], RecallRequest())


def measured(folder: Path, files: Path, told: list[str], **more: object) -> Report:
    settings = Settings(model=str(folder / "model"), device="cpu", max_tokens=6, **more)  # type: ignore[arg-type]
    watch = Watch(lambda progress: None, told.append)
    sources = Sources((str(files),), "auto")
    return measure_recall(settings, RecallRequest(6), sources, Place(folder / "records"), watch)


@pytest.fixture
def folder(tmp_path: Path, seed: int) -> Path:
    tiny_model.write_tiny_model(tmp_path / "model", seed)
    (tmp_path / "files").mkdir()
    values = random.Random(seed).sample(range(100, 1000), 8)
    (tmp_path / "files" / "a.py").write_text("".join(f"LIMIT_{i} = {v}\n" for i, v in enumerate(values[:4])))
    (tmp_path / "files" / "b.toml").write_text("".join(f"depth-{i} = {v}\n" for i, v in enumerate(values[4:])))
    return tmp_path


def test_files_are_read_once_and_every_answer_is_checked_against_them(folder: Path) -> None:
    told: list[str] = []
    report = measured(folder, folder / "files", told)
    assert len(report.records) == 6 and report.axes == ("kind", "part")
    assert {key: share.asked for key, share in report.shares("kind").items()} == {("constant",): 3, ("setting",): 3}
    for record in report.records:
        line = (folder / "files" / record["path"]).read_text().splitlines()[record["line"] - 1]
        assert line == f"{record['name']} = {record['expected'][0]}"
        assert 1 <= record["part"] <= 10 and (record["part"] <= 6) == (record["path"] == "a.py" or record["part"] == 6)
    assert [record["cached_tokens"] > 100 for record in report.records] == [False] + [True] * 5
    assert any(line.startswith("files: 2 files, ") for line in told)


def test_what_cannot_be_asked_is_refused_before_the_model_is_loaded(folder: Path) -> None:
    with pytest.raises(ContextError, match="do not fit a context of 64 tokens"):
        measured(folder, folder / "files", [], ctx=64)
    (folder / "plain.txt").write_text("nothing here\n")
    with pytest.raises(RequestError, match="state nothing"):
        measured(folder, folder / "plain.txt", [])
    with pytest.raises(PackError):
        measured(folder, folder / "missing", [])
    with pytest.raises(RequestError, match="--questions 0"):
        RecallRequest(0)
