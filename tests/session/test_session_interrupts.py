"""A session that is cancelled, left, interrupted or fails in the middle: nothing that counts is lost."""

import random
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import tiny_model
import torch
from session_cases import assert_last_turn_is_greedy, finish_of, open_session
from tiny_model import counting_feeds

from salalocal.errors import MemoryBudgetError, NumericError, RequestError
from salalocal.session.events import Event, Finish, ReadProgress, TextDelta
from salalocal.session.runtime import Runtime


def test_a_cancelled_read_is_paused_without_loss(runtime: Runtime, seed: int) -> None:
    session = open_session(runtime)
    stop_after = random.Random(seed).randrange(1, 8)
    with counting_feeds(runtime) as feeds:
        seen = []
        for event in session.read():
            seen.append(event)
            if len(seen) == stop_after:
                session.cancel()
        # What was asked for while an event was shown is seen after the next chunk.
        assert len(seen) == stop_after + 1 and seen[-1].is_paused and not seen[-2].is_paused
        finish = finish_of(session.ask("go on?"))
    assert finish.reason == "length"
    assert finish.usage.cached_tokens == seen[-1].num_tokens
    assert feeds.num_tokens == finish.usage.context_tokens
    assert_last_turn_is_greedy(runtime, session)


def test_a_read_that_is_no_longer_iterated_is_paused_too(runtime: Runtime) -> None:
    session = open_session(runtime)
    events = session.read()
    at = [next(events), next(events)][-1].num_tokens
    events.close()  # type: ignore[attr-defined]
    assert next(iter(session.read())).cached_tokens == at


def test_a_question_cancelled_while_reading_is_not_kept(runtime: Runtime) -> None:
    session = open_session(runtime)
    events = session.ask("long? " * 100)
    next(events)
    session.cancel()
    rest = list(events)
    assert isinstance(rest[-2], ReadProgress) and rest[-2].is_paused
    assert isinstance(rest[-1], Finish) and rest[-1].reason == "cancelled"
    assert session.turns == ()
    finish_of(session.ask("short?"))
    assert_last_turn_is_greedy(runtime, session)


def test_a_cancelled_answer_is_kept_as_far_as_it_went(runtime: Runtime) -> None:
    session = open_session(runtime)
    events = session.ask("what?")
    said = ""
    for event in events:
        if isinstance(event, TextDelta):
            said += event.text
            session.cancel()
        last = event
    assert isinstance(last, Finish) and last.reason == "cancelled"
    turn = session.turns[-1]
    assert turn.answer == said and turn.reason == "cancelled"
    assert 1 <= len(turn.answer_ids) <= 4, "more than one token after the cancel (a character may take several)"
    finish_of(session.ask("and then?"))
    assert_last_turn_is_greedy(runtime, session)


def test_an_answer_that_is_no_longer_iterated_is_kept(runtime: Runtime) -> None:
    session = open_session(runtime)
    events = session.ask("what?")
    for event in events:
        if isinstance(event, TextDelta):
            break
    events.close()  # type: ignore[attr-defined]
    assert session.turns[-1].reason == "cancelled" and session.turns[-1].answer_ids
    finish_of(session.ask("and then?"))
    assert_last_turn_is_greedy(runtime, session)


def test_an_answer_left_hanging_is_kept_before_anything_else_is_done(runtime: Runtime) -> None:
    session = open_session(runtime)

    def hang(question: str) -> Iterator[Event]:
        events = session.ask(question)
        while not isinstance(next(events), TextDelta):
            pass
        return events

    events = hang("one?")
    finish_of(session.ask("two?"))
    assert [(turn.question, turn.reason) for turn in session.turns] == [("one?", "cancelled"), ("two?", "length")]
    assert_last_turn_is_greedy(runtime, session)
    assert list(events) == []
    events = hang("three?")
    assert session.undo().question == "three?" and list(events) == []
    events = hang("four?")
    list(session.retry())
    assert [turn.question for turn in session.turns] == ["one?", "two?", "four?"] and list(events) == []
    assert session.turns[-1].reason == "length"
    assert_last_turn_is_greedy(runtime, session)


def test_a_question_that_others_overtook_is_refused(runtime: Runtime) -> None:
    session = open_session(runtime)
    early = session.ask("one?")
    finish_of(session.ask("two?"))
    with pytest.raises(RequestError, match="went on"):
        next(early)
    assert [turn.question for turn in session.turns] == ["two?"]


@pytest.mark.parametrize("error", [NumericError("NaN"), KeyboardInterrupt(), torch.OutOfMemoryError("no")], ids=type)
def test_an_error_in_an_answer_takes_the_turn_back(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    session = open_session(runtime)
    finish_of(session.ask("first?"))
    step, num_steps = runtime.engine.model.forward, 0

    def failing(tokens: Any, state: Any) -> Any:
        nonlocal num_steps
        num_steps += tokens.shape[1] == 1
        if num_steps == 3:
            state.layers[0].fork()
            raise error
        return step(tokens, state)

    with monkeypatch.context() as patch:
        patch.setattr(runtime.engine.model, "forward", failing)
        with pytest.raises(MemoryBudgetError if isinstance(error, torch.OutOfMemoryError) else type(error)):
            list(session.ask("second?"))
    assert [turn.question for turn in session.turns] == ["first?"]
    finish_of(session.ask("third?"))
    assert_last_turn_is_greedy(runtime, session)


def test_an_error_while_reading_leaves_the_saved_states(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    session = open_session(runtime)
    prefill, num_calls = runtime.engine.prefill, 0

    def failing(ids: Any, state: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        logits = prefill(ids, state)
        if num_calls == 8:
            raise NumericError("NaN", "")
        return logits

    with monkeypatch.context() as patch:
        patch.setattr(runtime.engine, "prefill", failing)
        with pytest.raises(NumericError):
            list(session.read())
    first = next(iter(session.read()))
    assert 0 < first.cached_tokens < 8 * tiny_model.CHUNK_SIZE
    finish_of(session.ask("what?"))
    assert_last_turn_is_greedy(runtime, session)


def test_interrupts_at_random_moments_never_spoil_a_session(runtime: Runtime, seed: int) -> None:
    """A KeyboardInterrupt anywhere, in the middle of a layer too: the turn is kept whole or not at all."""
    rng = random.Random(seed)
    session = open_session(runtime)
    before = signal.signal(signal.SIGALRM, _interrupt)
    try:
        for number in range(30):
            signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.001, 0.12))
            try:
                for event in session.ask(f"{number}?"):
                    assert event is not None
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                assert all(turn.question != f"{number}?" or turn.answer_ids for turn in session.turns)
            if len(session.turns) > 3:
                session.undo()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    finish_of(session.ask("last?"))
    assert_last_turn_is_greedy(runtime, session)


def _interrupt(_signal: int, _frame: Any) -> None:
    raise KeyboardInterrupt
