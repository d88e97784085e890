"""The loop of a chat and its rules for Ctrl-C."""

import os
import signal

import pytest
from fake_view import INTERRUPT, FakeView
from tiny_model import make_pack

from salalocal.chat.repl import run_chat
from salalocal.engine.sampling_params import SamplingParams
from salalocal.errors import RequestError
from salalocal.session.events import Event, ReadProgress, TextDelta
from salalocal.session.runtime import Runtime
from salalocal.session.session import Session


@pytest.fixture
def session(runtime: Runtime) -> Session:
    return runtime.session(pack=make_pack(one="alpha = 1\n" * 20), sampling=SamplingParams(max_tokens=40))


def interrupt_at(view: FakeView, kind: type[Event], count: int = 1) -> None:
    """Press Ctrl-C when the count-th event of a kind is shown."""
    seen = 0

    def watch(event: Event) -> None:
        nonlocal seen
        seen += isinstance(event, kind)
        if seen == count and isinstance(event, kind):
            os.kill(os.getpid(), signal.SIGINT)

    view.on_event = watch


def test_documents_are_read_then_questions_answered_until_the_end(session: Session) -> None:
    view = FakeView("what?", "", "   ", "and?")
    assert run_chat(session, view) == 0
    assert [turn.question for turn in session.turns] == ["what?", "and?"]
    assert isinstance(view.events[0], ReadProgress) and view.events[0].path == "one.txt"
    assert view.finishes[0].usage.cached_tokens > 0


def test_bye_ends_it(session: Session) -> None:
    assert run_chat(session, FakeView("/bye", "what?")) == 0
    assert session.turns == ()


def test_errors_are_shown_and_the_chat_goes_on(session: Session) -> None:
    view = FakeView("/nonsense", "x " * 30_000, "what?")
    assert run_chat(session, view) == 0
    assert [error.exit_code for error in view.errors] == [2, 4]
    assert "unknown command /nonsense" in view.errors[0].message and view.errors[0].hint == ""
    assert len(session.turns) == 1


def test_the_first_error_ends_a_chat_in_a_pipe(session: Session) -> None:
    with pytest.raises(RequestError):
        run_chat(session, FakeView("/nonsense", "what?", is_interactive=False))


def test_a_space_in_front_makes_a_question_of_a_path(session: Session) -> None:
    run_chat(session, FakeView(" /etc/passwd is what?"))
    assert session.turns[0].question == "/etc/passwd is what?"


def test_ctrl_c_stops_an_answer_and_keeps_it_and_a_second_one_leaves(session: Session) -> None:
    view = FakeView("what?", INTERRUPT, "never asked")
    interrupt_at(view, TextDelta, 3)
    assert run_chat(session, view) == 130
    assert view.finishes[0].reason == "cancelled"
    assert session.turns[0].answer == view.text and 3 <= len(session.turns[0].answer_ids) < 40


def test_one_ctrl_c_at_the_prompt_is_not_enough(session: Session) -> None:
    view = FakeView(INTERRUPT, "what?", INTERRUPT, INTERRUPT, "never asked")
    assert run_chat(session, view) == 130
    assert len(session.turns) == 1 and sum("once more" in line for line in view.told) == 2


def test_ctrl_c_while_reading_pauses_and_a_question_goes_on(session: Session) -> None:
    view = FakeView("what?")
    interrupt_at(view, ReadProgress, 2)
    assert run_chat(session, view) == 0
    paused = [event for event in view.events if isinstance(event, ReadProgress) and event.is_paused]
    assert len(paused) == 1 and any("nothing is lost" in line for line in view.told)
    assert view.finishes[0].usage.cached_tokens == paused[0].num_tokens
    assert len(session.turns) == 1


def test_ctrl_c_while_a_question_is_read_takes_it_back(session: Session) -> None:
    view = FakeView("long " * 60)
    run_chat(session, FakeView())
    interrupt_at(view, ReadProgress, 1)
    assert run_chat(session, view) == 0
    assert session.turns == () and any("the question is not" in line for line in view.told)


def test_two_ctrl_c_in_an_answer_leave_at_once(session: Session) -> None:
    view = FakeView("what?", "never asked")

    def twice(event: Event) -> None:
        if isinstance(event, TextDelta):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    view.on_event = twice
    assert run_chat(session, view) == 130
    assert view.finishes == []


@pytest.mark.parametrize("kind", [ReadProgress, TextDelta])
def test_ctrl_c_in_a_pipe_ends_the_chat(session: Session, kind: type[Event]) -> None:
    view = FakeView("what?", "never asked", is_interactive=False)
    interrupt_at(view, kind, 2)
    assert run_chat(session, view) == 130
    assert len(view.finishes) == (0 if kind is ReadProgress else 1)


def test_the_handler_of_before_is_put_back(session: Session) -> None:
    before = signal.getsignal(signal.SIGINT)
    run_chat(session, FakeView("what?"))
    assert signal.getsignal(signal.SIGINT) is before
