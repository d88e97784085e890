"""Plays the events of one read or turn into a view, with Ctrl-C as a soft stop; for chat and ask."""

import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

from salalocal.chat.view import EventView
from salalocal.session.events import Event, Finish, ReadProgress
from salalocal.session.session import Session


@contextmanager
def stopping_on_interrupt(session: Session) -> Iterator[None]:
    """While this is open, the first Ctrl-C stops the session softly and a second one raises KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    num_interrupts = 0

    def stop(_signal: int, _frame: FrameType | None) -> None:
        nonlocal num_interrupts
        num_interrupts += 1
        session.cancel()
        if num_interrupts > 1:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def play(session: Session, events: Iterable[Event], view: EventView) -> Finish | ReadProgress | None:
    """Show all events of a read or a turn; gives back the last one if it ends a turn or tells of a paused read."""
    last: Event | None = None
    with stopping_on_interrupt(session):
        for event in events:
            view.show(event)
            last = event
    if isinstance(last, Finish) or (isinstance(last, ReadProgress) and last.is_paused):
        return last
    return None
