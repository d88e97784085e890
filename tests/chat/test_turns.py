"""Ctrl-C as a soft stop, wherever it is pressed from."""

import os
import signal
import threading
from typing import Any, cast

import pytest
from fake_view import FakeView

from salalocal.chat.turns import play, stopping_on_interrupt
from salalocal.session.events import Finish, ReadProgress, TextDelta, Usage


class FakeSession:
    num_cancels = 0

    def cancel(self) -> None:
        self.num_cancels += 1


def test_the_first_is_soft_and_the_second_is_not() -> None:
    session = FakeSession()
    with stopping_on_interrupt(cast(Any, session)):
        os.kill(os.getpid(), signal.SIGINT)
        assert session.num_cancels == 1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_other_threads_leave_signals_alone() -> None:
    handlers = []

    def work() -> None:
        with stopping_on_interrupt(cast(Any, FakeSession())):
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGINT)]


def test_the_end_of_a_turn_and_a_pause_are_given_back() -> None:
    view, session = FakeView(), cast(Any, FakeSession())
    finish = Finish("stop", Usage(1, 0, 1, 0, 0.0, 0.0, 0))
    progress = [ReadProgress("a", 1, 1, n, 2, n, 2, 0, 0.1, is_paused=n == 2) for n in (1, 2)]
    assert play(session, [TextDelta("a", (1,)), finish], view) is finish
    assert play(session, progress, view) is progress[1]
    assert play(session, progress[:1], view) is None
    assert play(session, [], view) is None
    assert len(view.events) == 5
