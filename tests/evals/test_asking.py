"""Asking: answers are those of a session, what is common is read once, records say what happened."""

from pathlib import Path

import pytest
import tiny_model

from salalocal.engine.sampling_params import SamplingParams
from salalocal.errors import HubError
from salalocal.evals.asking import Asker, Case, Question, Subject
from salalocal.evals.haystack import Planted, Stack, ask_about
from salalocal.evals.scoring import Mark
from salalocal.prompt.pack import PromptPack
from salalocal.prompt.template import Conversation, Turn
from salalocal.session.events import Finish, TextDelta
from salalocal.session.runtime import Runtime
from salalocal.settings import Settings

TOKENS = 8


@pytest.fixture
def runtime(tmp_path: Path, seed: int) -> Runtime:
    return tiny_model.open_tiny_runtime(tmp_path / "tiny", seed)


def stack(num_documents: int = 6) -> Stack:
    documents = tuple(
        tiny_model.document(f"d{i}.txt", f"the value of data is in {i}\n" * 4) for i in range(num_documents)
    )
    return Stack(documents, (100,) * num_documents)


def in_session(runtime: Runtime, pack: PromptPack, question: str) -> tuple[str, str]:
    session = runtime.session(pack=pack, sampling=SamplingParams(max_tokens=TOKENS))
    events = list(session.ask(question))
    text = "".join(event.text for event in events if isinstance(event, TextDelta))
    return text, next(event.reason for event in events if isinstance(event, Finish))


def test_answers_are_those_of_a_session_however_much_is_reused(runtime: Runtime) -> None:
    asker, cached = Asker(runtime, TOKENS), []
    for depth in (1.0, 0.7, 0.1):
        pack = stack().plant([Planted(depth, f"X = {depth}")])
        read: list[int] = []
        answer = asker.ask(ask_about(pack, "what?"), read.append)
        assert (answer.text, answer.reason) == in_session(runtime, pack, "what?")
        assert answer.context_tokens - answer.cached_tokens == sum(read)
        cached.append(answer.cached_tokens)
    assert cached[0] == 0 and cached[1] > 0.4 * answer.context_tokens and cached[1] > cached[2] >= 0


def test_given_turns_are_read_without_stopping_at_each(runtime: Runtime) -> None:
    ids = tuple(runtime.tokenizer.encode("the value of data"))
    turns = (*(Turn("what is this?", ids) for _ in range(12)), Turn("why?"))
    with tiny_model.counting_feeds(runtime) as feeds:
        answer = Asker(runtime, TOKENS).ask(Conversation(None, None, turns))
    assert len(feeds.calls) == -(-answer.context_tokens // tiny_model.CHUNK_SIZE)
    assert answer.answer_tokens == TOKENS and answer.reason == "length"


def test_a_case_becomes_a_record(runtime: Runtime) -> None:
    marked: list[str] = []

    def mark(text: str) -> Mark:
        marked.append(text)
        return Mark(0.25, False)

    def make() -> Question:
        return Question(ask_about(stack(1).plant(()), "what?"), ("y" * 5000,), mark)

    case = Case("k", "label", {"length": 100}, 50, make)
    task = Asker(runtime, TOKENS).task(case)
    assert (task.key, task.label, task.cost_tokens) == ("k", "label", 50)
    record = task.run(lambda num_tokens: None)
    assert record["length"] == 100 and record["score"] == 0.25 and record["right"] is False
    assert record["answer"] == marked[0] and len(record["expected"][0]) == 4096
    assert record["answer_tokens"] == TOKENS and record["reason"] == "length"


def test_a_subject_is_named_by_its_weights_and_settings(tmp_path: Path, seed: int) -> None:
    names = [str(tiny_model.write_tiny_model(tmp_path / name, seed)) for name in ("a", "b")]
    told: list[str] = []
    first, same = (Subject.find(Settings(model=name, device="cpu"), told.append).identity() for name in names)
    assert told[0].startswith(f"model: {names[0]}")
    assert {name for name in first if first[name] != same[name]} == {"model"}
    other = Subject.find(Settings(model=names[0], device="cpu", chunk_size=64, temperature=1.0), told.append).identity()
    assert {name for name in first if first[name] != other[name]} == {"chunk_size"}
    tiny_model.write_tiny_model(tmp_path / "b", seed + 1)  # the same shapes in files of the same size
    changed = Subject.find(Settings(model=names[1], device="cpu"), told.append).identity()
    assert {name for name in same if same[name] != changed[name]} == {"model_sha256"}
    with pytest.raises(HubError):
        Subject.find(Settings(model="nobody/nothing"), told.append)


def test_an_opened_subject_answers(tmp_path: Path, seed: int) -> None:
    folder = tiny_model.write_tiny_model(tmp_path / "tiny", seed)
    subject = Subject.find(Settings(model=str(folder), device="cpu", max_tokens=5), lambda line: None)
    assert (subject.max_tokens, subject.context_limit) == (5, tiny_model.CONTEXT_LIMIT)
    assert Asker(subject.open(1000), subject.max_tokens).ask(ask_about(stack(2).plant(()), "what?")).answer_tokens == 5
