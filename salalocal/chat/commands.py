"""Slash commands: a line such as `/add notes.md` goes in, the session changes, lines come out through the view."""

import dataclasses
import difflib
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from salalocal.chat.turns import play
from salalocal.chat.view import ChatView
from salalocal.engine.sampling_params import SamplingParams
from salalocal.errors import RequestError
from salalocal.prompt.sources import PackLimits, read_sources
from salalocal.session.events import Finish
from salalocal.session.session import NUM_SOURCES, Session
from salalocal.session.start import tell_skips
from salalocal.settings import READERS

SAMPLING_NAMES = ("temperature", "top_p", "top_k", "min_p", "max_tokens", "seed")


@dataclass
class Chat:
    """A running chat: what the commands may look at and change."""

    session: Session
    view: ChatView
    limits: PackLimits = field(default_factory=PackLimits)
    is_over: bool = False

    @property
    def sampling(self) -> SamplingParams:
        """How answers are drawn."""
        return self.session.sampling


@dataclass(frozen=True)
class Command:
    """A slash command: its name, its arguments in words, what it does, and the function that does it."""

    name: str
    arguments: str
    summary: str
    run: Callable[[Chat, str], bool | None]


def run_command(chat: Chat, line: str) -> bool:
    """Run a line that starts with a slash; True if Ctrl-C stopped it.

    Raises: RequestError for an unknown command or wrong arguments.
    """
    name, _, rest = line.strip().partition(" ")
    command = COMMANDS.get(name)
    if command is None:
        close = difflib.get_close_matches(name, COMMANDS, 1)
        guess = f" (did you mean {close[0]}?)" if close else ""
        raise RequestError(f"unknown command {name[:40]}{guess}: /help lists them; a space in front asks it instead")
    return bool(command.run(chat, rest.strip()))


def _help(chat: Chat, _rest: str) -> None:
    rows = [(f"{command.name} {command.arguments}".strip(), command.summary) for command in COMMANDS.values()]
    rows += [
        ("Alt-Enter, or \\ at the end", "go on in the next line"),
        ("Ctrl-C", "stop the answer and keep it; pause reading; twice: leave"),
        ("Ctrl-D", "leave"),
    ]
    chat.view.show_table(rows)


def _tokens(chat: Chat, _rest: str) -> None:
    chat.view.show_tokens(chat.session.token_report())


def _sources(chat: Chat, rest: str) -> None:
    try:
        limit = int(rest) if rest else NUM_SOURCES
    except ValueError:
        limit = 0
    if limit < 1:
        raise RequestError(f"/sources takes a number from 1 on, not {rest[:40]!r}", "/sources 20")
    chat.view.show_sources(chat.session.sources(limit))


def _undo(chat: Chat, _rest: str) -> None:
    turn = chat.session.undo()
    chat.view.tell(f"took back: {turn.question[:200]}")


def _retry(chat: Chat, _rest: str) -> bool:
    if chat.sampling.temperature == 0:
        chat.view.tell("greedy sampling gives the same answer again; /set temperature 0.8 varies it")
    last = play(chat.session, chat.session.retry(), chat.view)
    return isinstance(last, Finish) and last.reason == "cancelled"


def _add(chat: Chat, rest: str) -> bool:
    paths = _split(rest, "/add")
    if "-" in paths:
        raise RequestError("/add cannot read standard input: the questions come from there", "/add PATH ...")
    num_before = len(chat.session.pack or ())
    try:
        reading = read_sources(paths, chat.limits)
        chat.session.add(reading)
    except KeyboardInterrupt:
        if not chat.view.is_interactive:
            raise
        chat.view.tell("stopped: nothing was added")
        return True
    tell_skips(reading, chat.view.tell)
    chat.view.tell(f"documents added: {len(chat.session.pack or ()) - num_before:,}")
    return read_documents(chat)


def _drop(chat: Chat, rest: str) -> bool:
    paths = _split(rest, "/drop")
    chat.session.drop(paths)
    chat.view.tell(f"documents left: {len(chat.session.pack or ()):,}")
    return read_documents(chat)


def _set(chat: Chat, rest: str) -> None:
    name, _, value = rest.replace("=", " ").partition(" ")
    if not name:
        chat.view.show_table([(field, str(getattr(chat.sampling, field))) for field in SAMPLING_NAMES])
        return
    name = name.removeprefix("--").replace("-", "_")
    if name not in SAMPLING_NAMES:
        raise RequestError(f"no setting {name[:40]!r}", f"/set knows {', '.join(SAMPLING_NAMES)}")
    value = value.strip()
    try:
        parsed = None if name == "seed" and value in ("none", "off") else READERS[name](value)
    except ValueError as due:
        raise RequestError(
            f"{name} is {value[:40]!r}, not {due}", f"for example: /set {name} {_EXAMPLES[name]}"
        ) from None
    changed: dict[str, Any] = {name: parsed}
    chat.session.sampling = dataclasses.replace(chat.sampling, **changed)
    chat.view.tell(f"{name} = {parsed}")


def _bye(chat: Chat, _rest: str) -> None:
    chat.is_over = True


def _split(rest: str, name: str) -> list[str]:
    try:
        words = shlex.split(rest)
    except ValueError as error:
        raise RequestError(f"{name}: {error}", "put quotes around a path with spaces") from None
    if not words:
        raise RequestError(f"{name} needs a path", f"{name} PATH ...")
    return words


def read_documents(chat: Chat) -> bool:
    """Read what of the documents is not read yet; True if Ctrl-C paused it."""
    is_paused = play(chat.session, chat.session.read(), chat.view) is not None
    if is_paused:
        chat.view.tell("reading is paused, nothing is lost: the next question goes on from here")
    return is_paused


_EXAMPLES = {"temperature": "0.8", "top_p": "0.9", "top_k": "40", "min_p": "0.05", "max_tokens": "1024", "seed": "7"}
COMMANDS = {
    command.name: command
    for command in (
        Command("/help", "", "this list", _help),
        Command("/tokens", "", "the documents and how many tokens they take", _tokens),
        Command("/sources", "[N]", "the lines that the last answer was read from", _sources),
        Command("/undo", "", "take back the last question and its answer", _undo),
        Command("/retry", "", "answer the last question again", _retry),
        Command("/add", "PATH ...", "read more files, folders or archives", _add),
        Command("/drop", "PATH ...", "forget documents, by the names that /tokens shows", _drop),
        Command("/set", "[NAME VALUE]", "show or change how answers are drawn", _set),
        Command("/bye", "", "leave", _bye),
    )
}
