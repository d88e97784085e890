"""A face without a terminal: plays given lines into a chat and records what it is shown."""

from collections.abc import Callable, Sequence

from salalocal.errors import SalaLocalError
from salalocal.session.attribution import AnswerSources
from salalocal.session.events import Event, Finish, TextDelta
from salalocal.session.tokens import TokenReport

INTERRUPT = "<Ctrl-C>"


class FakeView:
    """Implements ChatView. A line INTERRUPT stands for Ctrl-C at the prompt; `on_event` may press it elsewhere."""

    def __init__(self, *lines: str, is_interactive: bool = True) -> None:
        self.is_interactive = is_interactive
        self.events: list[Event] = []
        self.told: list[str] = []
        self.errors: list[SalaLocalError] = []
        self.reports: list[TokenReport] = []
        self.sources: list[AnswerSources] = []
        self.tables: list[list[tuple[str, str]]] = []
        self.on_event: Callable[[Event], None] = lambda event: None
        self._lines = list(lines)

    def read_question(self) -> str | None:
        if self._lines[:1] == [INTERRUPT]:
            self._lines.pop(0)
            raise KeyboardInterrupt
        return self._lines.pop(0) if self._lines else None

    def show(self, event: Event) -> None:
        self.events.append(event)
        self.on_event(event)

    def tell(self, line: str) -> None:
        self.told.append(line)

    def tell_error(self, error: SalaLocalError) -> None:
        self.errors.append(error)

    def show_tokens(self, report: TokenReport) -> None:
        self.reports.append(report)

    def show_sources(self, sources: AnswerSources) -> None:
        self.sources.append(sources)

    def show_table(self, rows: Sequence[tuple[str, str]]) -> None:
        self.tables.append(list(rows))

    @property
    def finishes(self) -> list[Finish]:
        """The ends of the turns so far."""
        return [event for event in self.events if isinstance(event, Finish)]

    @property
    def text(self) -> str:
        """All answers, one behind the other."""
        return "".join(event.text for event in self.events if isinstance(event, TextDelta))
