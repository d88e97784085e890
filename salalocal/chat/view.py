"""What a chat asks of the face it talks through; implemented by terminal/chat_view.py and by tests."""

from collections.abc import Sequence
from typing import Protocol

from salalocal.errors import SalaLocalError
from salalocal.session.attribution import AnswerSources
from salalocal.session.events import Event
from salalocal.session.tokens import TokenReport


class EventView(Protocol):
    """Shows what a session says."""

    def show(self, event: Event) -> None:
        """Show the next event of a read or a turn."""
        ...

    def tell(self, line: str) -> None:
        """One line of narration."""
        ...


class ChatView(EventView, Protocol):
    """A face that can also ask for questions."""

    is_interactive: bool

    def read_question(self) -> str | None:
        """The next line from the user, None at the end. Raises: KeyboardInterrupt when the user leaves with Ctrl-C."""
        ...

    def tell_error(self, error: SalaLocalError) -> None:
        """Show an error after which the chat goes on."""
        ...

    def show_tokens(self, report: TokenReport) -> None:
        """Show the documents with their token counts."""
        ...

    def show_sources(self, sources: AnswerSources) -> None:
        """Show the lines that an answer was read from."""
        ...

    def show_table(self, rows: Sequence[tuple[str, str]]) -> None:
        """Show names with their explanations."""
        ...
