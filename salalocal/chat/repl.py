"""The loop of a chat: lines from the view go to the session or to a slash command, until the user leaves."""

from salalocal.chat.commands import Chat, read_documents, run_command
from salalocal.chat.turns import play
from salalocal.chat.view import ChatView
from salalocal.errors import SalaLocalError
from salalocal.prompt.sources import PackLimits
from salalocal.session.events import Finish
from salalocal.session.session import Session

LEFT, LEFT_BY_INTERRUPT = 0, 130


def run_chat(session: Session, view: ChatView, limits: PackLimits | None = None) -> int:
    """Read the documents, then answer until the user leaves; gives back the exit code. `limits` hold for /add too.

    Ctrl-C at the prompt leaves if it follows another one (that stopped the answer, say) with nothing in between: a
    single one that comes too late for an answer must not throw away what was read.
    Errors are shown and the chat goes on; when questions come from a pipe, the first error ends it.
    """
    chat = Chat(session, view, limits or PackLimits())
    try:
        is_stopped = read_documents(chat)
        while not chat.is_over:
            if is_stopped and not view.is_interactive:
                return LEFT_BY_INTERRUPT
            try:
                line = view.read_question()
            except KeyboardInterrupt:
                if is_stopped:
                    raise
                view.tell("Ctrl-C once more leaves; so do Ctrl-D and /bye")
                is_stopped = True
                continue
            if line is None:
                break
            is_stopped = _take_line(chat, line)
    except KeyboardInterrupt:
        return LEFT_BY_INTERRUPT
    return LEFT


def _take_line(chat: Chat, line: str) -> bool:
    """Do what a line asks for; True if Ctrl-C stopped it."""
    try:
        if line.startswith("/"):
            return run_command(chat, line)
        return bool(line.strip()) and _answer(chat, line.strip())
    except SalaLocalError as error:
        if not chat.view.is_interactive:
            raise
        chat.view.tell_error(error)
        return False


def _answer(chat: Chat, question: str) -> bool:
    num_turns = len(chat.session.turns)
    last = play(chat.session, chat.session.ask(question), chat.view)
    is_stopped = isinstance(last, Finish) and last.reason == "cancelled"
    if is_stopped and len(chat.session.turns) == num_turns:
        chat.view.tell("stopped before the answer began: what was read is kept, the question is not")
    return is_stopped
