"""A conversation at a terminal or in a pipe: session events in, answers on stdout, everything else on stderr."""

from collections.abc import Sequence

from rich.live import Live
from rich.table import Table
from rich.text import Text

from salalocal.errors import SalaLocalError
from salalocal.prompt.visible import visible
from salalocal.session.attribution import AnswerSources
from salalocal.session.events import Event, Finish, ReadProgress, TextDelta, ThinkingDelta, Usage
from salalocal.session.tokens import TokenReport
from salalocal.terminal.console import Terminal
from salalocal.terminal.error_view import show_salalocal_error
from salalocal.terminal.keyboard import EchoSwitch
from salalocal.terminal.markdown import MarkdownStream
from salalocal.terminal.progress import ReadView
from salalocal.terminal.question_input import QuestionInput
from salalocal.terminal.source_view import show_sources
from salalocal.terminal.tables import size, token_lines

ENDINGS = {
    "length": "cut off at max_tokens",
    "repetition": "stopped: the answer went round in a loop",
    "cancelled": "stopped by Ctrl-C",
}


class AnswerView:
    """Shows reads and turns; for ask, and the lower half of the chat's view."""

    def __init__(self, terminal: Terminal, is_silent: bool = False) -> None:
        self._terminal = terminal
        self._is_silent = is_silent
        self._read_view = ReadView(terminal)
        self._markdown: MarkdownStream | None = None
        self._thinking: Live | None = None
        self._num_thinking = 0
        self._last_character = ""
        self._echo = EchoSwitch()

    def show(self, event: Event) -> None:
        """Show the next event of a read or a turn."""
        match event:
            case ReadProgress():
                self._read_view.show(event)
            case ThinkingDelta():
                self._think(event)
            case TextDelta():
                self._say(event.text)
            case Finish():
                self.end_drawing()
                self._finish(event)

    def tell(self, line: str) -> None:
        """One line of narration."""
        self.end_drawing()
        self._terminal.tell(line, style="dim")

    def close(self) -> None:
        """Give the terminal back; safe to call twice."""
        self.end_drawing()
        self._echo.restore()

    def end_drawing(self) -> None:
        """End what is being drawn; safe to call at any time, and needed after an error."""
        self._read_view.close()
        if self._thinking is not None:
            self._thinking.stop()
            self._thinking = None
        if self._markdown is not None:
            self._markdown.finish()
            self._markdown = None

    def _think(self, event: ThinkingDelta) -> None:
        self._read_view.close()
        self._num_thinking += len(event.token_ids)
        if self._terminal.is_quiet or not self._terminal.is_live:
            return
        if self._thinking is None:
            self._thinking = Live(console=self._terminal.err, transient=True, refresh_per_second=4)
            self._thinking.start()
        self._thinking.update(Text(f"thinking: {self._num_thinking:,} tokens", style="dim"))

    def _say(self, text: str) -> None:
        if not text or self._is_silent:
            return
        self._read_view.close()
        self._end_thinking()
        if self._terminal.has_rich_output:
            self._markdown = self._markdown or MarkdownStream(self._terminal.out)
            self._markdown.push(text)
        else:
            self._terminal.write(text)
            self._last_character = text[-1]

    def _end_thinking(self) -> None:
        if self._thinking is not None:
            self._thinking.stop()
            self._thinking = None
        if self._num_thinking:
            self._terminal.tell(f"thought for {self._num_thinking:,} tokens", style="dim")
            self._num_thinking = 0

    def _finish(self, event: Finish) -> None:
        was_thinking = self._num_thinking > 0
        if self._terminal.has_rich_output:
            self._terminal.tell("")
        self._end_thinking()
        has_nothing_said = not self._last_character and event.reason == "cancelled"
        if not (self._is_silent or self._terminal.has_rich_output or has_nothing_said or self._last_character == "\n"):
            self._terminal.write("\n")
        self._last_character = ""
        for line in stats_lines(event, self._terminal.err.width if self._terminal.err.is_terminal else 1000):
            self._terminal.tell(line, style="dim")
        if was_thinking and event.reason == "length":
            self._terminal.tell("no answer: it was still thinking when max_tokens ran out", style="yellow")


class TerminalChatView(AnswerView):
    """The view of a chat: an AnswerView that can also ask for questions."""

    def __init__(self, terminal: Terminal, questions: QuestionInput) -> None:
        super().__init__(terminal)
        self._questions = questions
        self.is_interactive = questions.is_interactive

    def read_question(self) -> str | None:
        """The next line from the user, None at the end. Raises: KeyboardInterrupt when the user leaves with Ctrl-C."""
        self.end_drawing()
        return self._questions.read()

    def tell_error(self, error: SalaLocalError) -> None:
        """Show an error after which the chat goes on."""
        self.end_drawing()
        show_salalocal_error(error, self._terminal.err.file)

    def show_tokens(self, report: TokenReport) -> None:
        """Show the documents with their token counts."""
        self.end_drawing()
        for line in token_lines(report):
            self._terminal.err.print(Text(visible(line)), soft_wrap=True)

    def show_sources(self, sources: AnswerSources) -> None:
        """Show the lines that an answer was read from."""
        self.end_drawing()
        show_sources(self._terminal, sources)

    def show_table(self, rows: Sequence[tuple[str, str]]) -> None:
        """Show names with their explanations."""
        self.end_drawing()
        table = Table.grid(padding=(0, 2))
        for name, explanation in rows:
            table.add_row(Text(visible(name), no_wrap=True), Text(visible(explanation)))
        self._terminal.err.print(table)


def stats_lines(event: Finish, width: int) -> list[str]:
    """The figures of a turn, on one line where they fit and else on two."""
    usage: Usage = event.usage
    context = f"context {usage.context_tokens:,} = {usage.cached_tokens:,} cached + {usage.new_tokens:,} new"
    parts = [f"{usage.answer_tokens:,} tokens", f"{usage.tokens_per_s:,.1f} tok/s"]
    if usage.right_guesses:
        parts.append(f"{usage.right_guesses:,} guessed")
    parts.append(f"peak {size(usage.peak_memory_bytes)}")
    if event.reason in ENDINGS:
        parts.append(ENDINGS[event.reason])
    rest = " · ".join(parts)
    return [f"{context} · {rest}"] if len(context) + len(rest) + 3 <= width else [context, rest]
