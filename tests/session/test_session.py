"""The laws of a session: what is said does not depend on what was saved, and nothing is read twice without need."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import pytest
import tiny_model
from session_cases import PACK, assert_last_turn_is_greedy, finish_of, open_session, prompt_ids, text_of
from tiny_model import counting_feeds, make_pack, with_stop_token

from salalocal.engine.fused.decoder import GuessStats
from salalocal.engine.picks import AnswerPicks, Picks
from salalocal.engine.sampling_params import SamplingParams
from salalocal.errors import ContextError, NumericError, PackError, RequestError
from salalocal.model.state import ModelState
from salalocal.prompt.sources import Reading
from salalocal.prompt.template import Turn as PromptTurn
from salalocal.session.events import Finish, ReadProgress, TextDelta, ThinkingDelta
from salalocal.session.runtime import Runtime
from salalocal.session.session import Session
from salalocal.session.tokens import QUESTION_TOKENS, ContextOverflow


def test_reading_then_asking_reads_nothing_twice(runtime: Runtime) -> None:
    session = open_session(runtime)
    with counting_feeds(runtime) as feeds:
        progress = list(session.read())
        num_documents = progress[-1].num_tokens
        assert progress[-1].num_tokens == progress[-1].total_tokens and progress[-1].document_left == 0
        assert [event.path for event in progress][-1] == "three.txt"
        assert list(session.read()) == []
        finish = finish_of(session.ask("what is beta?"))
    assert finish.usage.cached_tokens == num_documents
    assert finish.usage.context_tokens == num_documents + finish.usage.new_tokens == feeds.num_tokens
    assert finish.reason == "length" and finish.usage.answer_tokens == 12
    assert_last_turn_is_greedy(runtime, session)


def test_chunks_lie_on_the_grid_and_end_where_states_are_saved(runtime: Runtime) -> None:
    session = open_session(runtime)
    with counting_feeds(runtime) as feeds:
        list(session.read())
    size = runtime.engine.config.chunk_size
    assert feeds.calls[0][0] == 0
    for (start, end), (next_start, _) in zip(feeds.calls, [*feeds.calls[1:], (feeds.calls[-1][1], 0)], strict=True):
        assert end == next_start
        assert start // size == (end - 1) // size, "a call crosses the grid"


def test_events_are_the_answer(runtime: Runtime) -> None:
    session = open_session(runtime)
    events = list(session.ask("what is it?"))
    ids = [token for event in events if isinstance(event, TextDelta | ThinkingDelta) for token in event.token_ids]
    turn = session.turns[-1]
    assert tuple(ids) == turn.answer_ids
    assert text_of(events) == turn.answer == runtime.tokenizer.decode(turn.answer_ids)
    assert isinstance(events[0], ReadProgress)


def test_later_turns_go_on_from_the_state_behind_the_answer(runtime: Runtime) -> None:
    session = open_session(runtime)
    first = finish_of(session.ask("one?"))
    second = finish_of(session.ask("two?"))
    # The last token drawn of an answer that was cut is not in the state yet.
    assert second.usage.cached_tokens == first.usage.context_tokens + first.usage.answer_tokens - 1
    assert_last_turn_is_greedy(runtime, session)
    finish_of(session.ask("three?"))
    assert_last_turn_is_greedy(runtime, session)


def test_an_answer_that_stopped_by_itself_is_wholly_in_the_state(runtime: Runtime) -> None:
    probe = open_session(runtime)
    finish_of(probe.ask("one?"))
    ids = probe.turns[-1].answer_ids
    stop = next((token for token in ids[1:] if token != ids[0]), None)
    if stop is None:
        pytest.skip("the random model says one token only")
    runtime = with_stop_token(runtime, stop)
    session = open_session(runtime)
    first = finish_of(session.ask("one?"))
    assert first.reason == "stop"
    assert session.turns[-1].answer_ids == ids[: ids.index(stop)]
    assert stop not in session.turns[-1].answer_ids
    second = finish_of(session.ask("two?"))
    assert second.usage.cached_tokens == first.usage.context_tokens + first.usage.answer_tokens


def test_without_documents(runtime: Runtime) -> None:
    session = open_session(runtime, pack=None)
    assert list(session.read()) == []
    finish_of(session.ask("hello?"))
    assert_last_turn_is_greedy(runtime, session)


def test_sources_belong_to_the_last_answer(runtime: Runtime) -> None:
    session = open_session(runtime)
    with pytest.raises(RequestError, match="no answer"):
        session.sources()
    finish_of(session.ask("one?"))
    found = session.sources()
    assert found.num_tokens == found.num_known == 12 and found.num_dense == 0
    assert {source.path for source in found.sources} <= {"one.txt", "two.txt", "three.txt"}
    assert session.sources(1).sources[0].share == max(source.share for source in session.sources(1).sources)
    finish_of(session.retry())
    assert session.sources() == found
    finish_of(session.ask("two?"))
    session.undo()
    with pytest.raises(RequestError, match="not known"):
        session.sources()
    finish_of(session.retry())
    assert session.sources() == found
    session.drop("three.txt")
    with pytest.raises(RequestError, match="not known"):
        session.sources()
    session.drop(["one.txt", "two.txt"])
    with pytest.raises(RequestError, match="no answer about documents"):
        session.sources()


def test_undo_and_ask_again(runtime: Runtime) -> None:
    session = open_session(runtime)
    first = finish_of(session.ask("first?"))
    finish_of(session.ask("second?"))
    assert session.undo().question == "second?"
    other = finish_of(session.ask("other?"))
    answered = first.usage.context_tokens + first.usage.answer_tokens
    assert other.usage.cached_tokens in (answered - 1, answered)
    assert_last_turn_is_greedy(runtime, session)
    session.undo()
    session.undo()
    with pytest.raises(RequestError):
        session.undo()


def test_retry_reads_nothing_at_all(runtime: Runtime) -> None:
    session = open_session(runtime)
    finish_of(session.ask("first?"))
    before = session.turns[-1]
    with counting_feeds(runtime) as feeds:
        again = finish_of(session.retry())
    assert feeds.calls == [] and again.usage.new_tokens == 0
    assert session.turns == (before,)
    warm = SamplingParams(temperature=5.0, max_tokens=12, seed=1)
    finish_of(session.retry(warm))
    first_draw = session.turns[-1].answer_ids
    finish_of(session.retry(warm))
    assert session.turns[-1].answer_ids == first_draw != before.answer_ids


def test_a_retry_that_fails_puts_the_old_answer_back(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    session = open_session(runtime)
    with pytest.raises(RequestError):
        session.retry()
    finish_of(session.ask("first?"))
    before = session.turns

    def failing(*_args: Any) -> Any:
        raise NumericError("NaN", "")

    monkeypatch.setattr(runtime.engine, "generate", failing)
    with pytest.raises(NumericError):
        list(session.retry())
    assert session.turns == before


def test_adding_reads_only_what_is_new_and_the_turns(runtime: Runtime) -> None:
    session = open_session(runtime)
    finish_of(session.ask("first?"))
    num_before = session.token_report().document_tokens
    session.add(Reading((tiny_model.document("four.txt", "delta = 4\n" * 30),)))
    with counting_feeds(runtime) as feeds:
        events = list(session.read())
        finish_of(session.ask("second?"))
    assert events[0].cached_tokens >= num_before
    assert feeds.calls[0][0] == events[0].cached_tokens
    assert_last_turn_is_greedy(runtime, session)


def test_dropping_keeps_what_stands_before(runtime: Runtime) -> None:
    session = open_session(runtime)
    list(session.read())
    session.drop(["three.txt"])
    first = finish_of(session.ask("first?"))
    assert first.usage.cached_tokens > session.token_report().documents[0].tokens
    assert_last_turn_is_greedy(runtime, session)
    session.drop(["one.txt", "two.txt"])
    assert session.pack is None
    with pytest.raises(RequestError):
        session.drop(["one.txt"])
    finish_of(session.ask("second?"))
    assert_last_turn_is_greedy(runtime, session)


def test_a_pack_that_does_not_fit_is_refused_with_counts_and_nothing_changes(runtime: Runtime) -> None:
    with counting_feeds(runtime) as feeds, pytest.raises(ContextOverflow) as caught:
        open_session(runtime, context_limit=100)
    assert feeds.calls == []
    assert "nothing was cut" in caught.value.message and "two.txt" in caught.value.hint
    assert caught.value.exit_code == 4 and len(caught.value.report.documents) == 3
    session = open_session(runtime, context_limit=1000)
    before = session.pack
    with pytest.raises(ContextError):
        session.add(Reading((tiny_model.document("large.txt", "x" * 5000),)))
    assert session.pack is before
    with pytest.raises(ContextError):
        session.ask("long " * 1000)
    with pytest.raises(PackError):
        session.add(Reading(()))


def test_an_answer_gets_no_longer_than_the_context_has_room(runtime: Runtime) -> None:
    session = open_session(runtime)
    prompt = prompt_ids(runtime, session, [PromptTurn("what?")])
    session = open_session(runtime, context_limit=len(prompt) + 5)
    finish = finish_of(session.ask("what?"))
    assert finish.reason == "length" and finish.usage.answer_tokens == 5
    with pytest.raises(ContextError):
        session.ask("and?")


def test_empty_questions_are_refused(runtime: Runtime) -> None:
    with pytest.raises(RequestError):
        open_session(runtime).ask(" \n")


def test_stop_strings_end_the_answer_before_them(runtime: Runtime) -> None:
    session = open_session(runtime)
    finish_of(session.ask("what?"))
    answer = session.turns[-1].answer
    stop = answer[len(answer) // 2 :][:2]
    finish_of(session.retry())
    session.undo()
    finish = finish_of(session.ask("what?", stop=[stop]))
    assert finish.reason == "stop"
    turn = session.turns[-1]
    assert turn.answer == answer[: answer.index(stop)]
    assert runtime.tokenizer.decode(turn.answer_ids) == turn.answer, "the stop string is no part of the turn"
    finish_of(session.ask("and?"))
    assert_last_turn_is_greedy(runtime, session)


def test_thinking_is_told_apart(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = runtime.tokenizer.encode("<think>so it is\nthis</think>\n\nthe value")
    engine = runtime.engine

    class Scripted:
        reason = None
        guesses = GuessStats()

        def __init__(self) -> None:
            self.left = list(ids)

        def __next__(self) -> int:
            token = self.left.pop(0)
            self.reason = None if self.left else "length"
            return token

        def picks(self) -> AnswerPicks:
            return AnswerPicks(Picks.none(runtime.config), len(ids), 0)

    monkeypatch.setattr(engine, "generate", lambda *_: Scripted())
    session = open_session(runtime)
    events = list(session.ask("what?"))
    assert text_of(events) == "the value"
    assert "".join(event.text for event in events if isinstance(event, ThinkingDelta)) == "so it is\nthis"
    turn, finish = session.turns[-1], events[-1]
    assert isinstance(finish, Finish)
    assert (turn.answer, turn.thinking, list(turn.answer_ids)) == ("the value", "so it is\nthis", ids)
    assert 0 < finish.usage.thinking_tokens < finish.usage.answer_tokens == len(ids)


def test_states_saved_in_memory_are_bounded(runtime: Runtime) -> None:
    session = Session(runtime, make_pack(**PACK), dataclasses.replace(session_options(runtime), save_bytes=1))
    list(session.read())
    for number in range(4):
        finish_of(session.ask(f"{number}?"))
    assert len(session._store) == 2
    assert_last_turn_is_greedy(runtime, session)


def session_options(runtime: Runtime) -> Any:
    return open_session(runtime)._options


def cache_bytes(states: Iterable[ModelState]) -> int:
    """Bytes of all distinct buffers of keys and values that these states keep alive."""
    buffers = {}
    for state in states:
        for layer in state.layers:
            for name, tensor in layer.tensors().items():
                if name in ("k", "v"):
                    storage = tensor.untyped_storage()
                    buffers[storage.data_ptr()] = storage.nbytes()
    return sum(buffers.values())


def test_many_files_and_added_ones_hold_their_rows_once(runtime: Runtime) -> None:
    session = open_session(runtime, pack=make_pack(**{f"f{n}": f"text {n} " * 60 for n in range(9)}))
    list(session.read())
    num_tokens = session.token_report().total_tokens + QUESTION_TOKENS + session.sampling.max_tokens
    planned = cache_bytes([runtime.engine.new_state(num_tokens)])
    assert len(session._store) > 2
    assert cache_bytes(point.state for point in session._store._points) <= 1.05 * planned
    list(session.ask("what?", SamplingParams(max_tokens=4)))
    session.add(Reading((tiny_model.document("more.txt", "more text " * 40),)))
    list(session.read())
    assert cache_bytes(point.state for point in session._store._points) <= 1.3 * planned
