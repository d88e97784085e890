"""Questionnaires: the model is loaded only for open questions, reports add up, a stopped run goes on."""

from pathlib import Path

import pytest
import tiny_model

from salalocal.errors import BackendError, MemoryBudgetError
from salalocal.evals import asking
from salalocal.evals.asking import Case, Question, Subject
from salalocal.evals.haystack import ask_about
from salalocal.evals.questionnaire import Place, Questionnaire, Watch, answer_all, open_haystack
from salalocal.evals.scoring import Mark
from salalocal.evals.study import StudyProgress
from salalocal.session.start import Sources
from salalocal.settings import Settings

PACK = tiny_model.make_pack(a="the value of data\n" * 5)


def cases(num_cases: int, stop_at: int = -1) -> list[Case]:
    def case(number: int) -> Case:
        def make() -> Question:
            if number == stop_at:
                raise KeyboardInterrupt
            return Question(ask_about(PACK, f"what {number}?"), ("x",), lambda text: Mark(number / 4, number == 4))

        return Case(str(number), str(number), {"length": 100 + number % 2, "depth": number}, 100, make)

    return [case(number) for number in range(num_cases)]


def questionnaire(made: list[Case]) -> Questionnaire:
    return Questionnaire("made", ("length", "depth"), {"seed": 1}, made, 200)


@pytest.fixture
def subject(tmp_path: Path, seed: int) -> Subject:
    folder = tiny_model.write_tiny_model(tmp_path / "model", seed)
    return Subject.find(Settings(model=str(folder), device="cpu", max_tokens=4), lambda line: None)


def watch(told: list[str], seen: list[StudyProgress]) -> Watch:
    return Watch(seen.append, told.append)


def test_a_stopped_run_goes_on_and_a_finished_one_needs_no_model(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    seen: list[StudyProgress] = []
    place = Place(tmp_path / "records")
    with pytest.raises(KeyboardInterrupt):
        answer_all(subject, questionnaire(cases(5, stop_at=3)), place, watch(told, seen))
    report = answer_all(subject, questionnaire(cases(5)), place, watch(told, seen))
    assert "3 of 5 questions were answered before; --fresh asks anew" in told
    assert [record["key"] for record in report.records] == list("01234")
    monkeypatch.setattr(asking, "open_runtime", None)
    assert answer_all(subject, questionnaire(cases(5)), place, watch([], [])) == report
    assert seen[-1].num_done == seen[-1].num_tasks == 5 and seen[-1].num_right == 1
    with pytest.raises(TypeError):
        answer_all(subject, questionnaire(cases(5)), Place(place.folder, is_fresh=True), watch([], []))


def test_a_report_adds_up(subject: Subject, tmp_path: Path) -> None:
    report = answer_all(subject, questionnaire(cases(5)), Place(tmp_path / "records"), watch([], []))
    assert (report.total.right, report.total.asked, report.total.score) == (1, 5, 0.5)
    shares = report.shares("length")
    assert list(shares) == [(100,), (101,)] and [share.asked for share in shares.values()] == [3, 2]
    plain = report.to_json()
    assert plain["evaluation"] == "made" and plain["seed"] == 1 and plain["device"] == "cpu"
    assert len(plain["cells"]) == 5 and plain["cells"][4]["depth"] == 4 and plain["cells"][4]["right"] == 1
    assert [row["asked"] for row in plain["by_length"]] == [3, 2] and plain["total"]["share"] == 0.2
    assert plain["answers_not_ended"] == report.num_cut == 5  # four tokens, and no end token is ever likely
    assert plain["results"] == str(tmp_path / "records")


def test_records_have_a_place_of_their_own(subject: Subject, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    folders = [answer_all(subject, questionnaire(cases(1)), Place(), watch([], [])).folder for _ in range(2)]
    assert folders[0] == folders[1] and folders[0].is_relative_to(tmp_path) and folders[0].name.startswith("made-")


def test_memory_and_device_are_checked_first(tmp_path: Path, subject: Subject) -> None:
    large = Questionnaire("made", ("length",), {}, cases(1), 2 * 10**9)
    with pytest.raises(MemoryBudgetError):
        answer_all(subject, large, Place(tmp_path / "a"), watch([], []))
    assert not (tmp_path / "a").exists()
    settings = Settings(model=subject.settings.model, device="cuda:99")
    with pytest.raises(BackendError):
        answer_all(
            Subject(settings, subject.folder, subject.codec), questionnaire(cases(1)), Place(tmp_path), watch([], [])
        )


def test_a_length_beyond_the_model_is_told(subject: Subject, tmp_path: Path) -> None:
    told: list[str] = []
    beyond = Questionnaire("made", ("length",), {}, cases(1), tiny_model.CONTEXT_LIMIT + 1)
    answer_all(subject, beyond, Place(tmp_path / "records"), watch(told, []))
    assert "the model was made for contexts of up to 20,000 tokens: longer ones go beyond that" in told


def test_a_haystack_is_told(subject: Subject, tmp_path: Path) -> None:
    told: list[str] = []
    (tmp_path / "a.txt").write_text("the value\n" * 9)
    assert open_haystack(subject, Sources((str(tmp_path / "a.txt"),), "path"), told.append).name == "1 file"
    assert open_haystack(subject, Sources(), told.append).name == "the shipped texts"
    assert [line.split(",")[0] for line in told] == ["haystack: 1 file", "haystack: the shipped texts"]
