"""One-shot questions: every question is asked by itself about the same read; answers come out, for ask."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from salalocal.chat.turns import play
from salalocal.chat.view import EventView
from salalocal.session.attribution import Source
from salalocal.session.events import Finish
from salalocal.session.session import Session


@dataclass(frozen=True)
class Answer:
    """A question with its answer, how the turn ended, and the lines of the documents that it was read from."""

    question: str
    text: str
    finish: Finish
    sources: tuple[Source, ...] = ()


def answer_questions(session: Session, questions: Sequence[str], view: EventView) -> Iterator[Answer]:
    """Answer each question from the documents alone, not from the questions before it; stops after a cancelled one."""
    for question in questions:
        num_turns = len(session.turns)
        last = play(session, session.ask(question), view)
        if not isinstance(last, Finish):
            return
        text, sources = "", tuple[Source, ...]()
        if len(session.turns) > num_turns:
            sources = session.sources().sources if session.pack is not None else ()
            text = session.undo().answer
        yield Answer(question, text, last, sources)
        if last.reason == "cancelled":
            return
