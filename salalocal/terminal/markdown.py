"""Streamed Markdown that loses nothing: pieces of an answer go in, drawn blocks come out, for chat_view.

Models quote code, so the reading of Markdown is the careful one: `__init__`, `<div>`, `&amp;`, backslashes and line
breaks with their indentation stay as they are; headings, lists, tables, `*emphasis*` and code are drawn.
"""

import re
from typing import ClassVar

from markdown_it import MarkdownIt
from markdown_it.rules_inline import StateInline
from rich.console import Console, ConsoleOptions, JustifyMethod, RenderResult
from rich.live import Live
from rich.markdown import Heading, Markdown, MarkdownElement
from rich.segment import Segment

from salalocal.prompt.visible import visible

_REFRESHES_PER_S = 8
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")


def _keep_line_break(state: StateInline, silent: bool) -> bool:
    """A line break stays a line break, and the next line keeps its indentation."""
    if state.src[state.pos] != "\n":
        return False
    if not silent:
        state.push("hardbreak", "br", 0)
    state.pos += 1
    return True


def _keep_underscores(state: StateInline, silent: bool) -> bool:
    """Underscores belong to names, not to emphasis."""
    end = state.pos
    while end < state.posMax and state.src[end] == "_":
        end += 1
    if end == state.pos:
        return False
    if not silent:
        state.pending += state.src[state.pos : end]
    state.pos = end
    return True


def _make_parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False}).enable("strikethrough").enable("table")
    parser.disable(["html_inline", "html_block", "entity", "escape", "reference", "lheading", "autolink", "code", "hr"])
    parser.inline.ruler.at("newline", _keep_line_break)
    parser.inline.ruler.before("emphasis", "underscores", _keep_underscores)
    return parser


class _PlainHeading(Heading):
    """A heading at the left edge, whatever its level."""

    LEVEL_ALIGN: ClassVar[dict[str, JustifyMethod]] = {}


class AnswerMarkdown(Markdown):
    """Markdown drawn without losing a character that code may need. `markup` must already be visible text."""

    elements: ClassVar[dict[str, type[MarkdownElement]]] = {**Markdown.elements, "heading_open": _PlainHeading}

    def __init__(self, markup: str) -> None:
        super().__init__("", code_theme="ansi_dark", hyperlinks=False)
        self.markup = markup
        self.parsed = _make_parser().parse(markup)


class _Tail:
    """The last lines of a renderable, so that a long block can be redrawn while it grows."""

    def __init__(self, markup: str) -> None:
        self._markup = markup

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(AnswerMarkdown(self._markup), options, pad=False)
        for line in lines[-max(1, options.size.height - 4) :]:
            yield from line
            yield Segment.line()


def first_block(text: str) -> int:
    """How much of a growing Markdown text its first finished block takes: up to a blank line outside a code fence."""
    position, fence = 0, ""
    for line in text.splitlines(keepends=True):
        position += len(line)
        mark = _FENCE.match(line)
        if fence:
            if mark and mark[1].startswith(fence) and line.strip() == mark[1] and line.endswith("\n"):
                fence = ""
        elif mark:
            fence = mark[1]
        elif not line.strip() and line.endswith("\n"):
            return position
    return 0


class MarkdownStream:
    """Draws an answer while it comes: finished blocks stay, the block that still grows is redrawn in place."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._pending = ""
        self._has_printed = False
        self._live: Live | None = None

    def push(self, text: str) -> None:
        """Take the next piece of the answer."""
        self._pending += visible(text)
        while end := first_block(self._pending):
            block, self._pending = self._pending[:end], self._pending[end:]
            self._print(block)
        if self._live is None:
            self._live = Live(
                console=self._console, transient=True, refresh_per_second=_REFRESHES_PER_S, vertical_overflow="crop"
            )
            self._live.start()
        self._live.update(_Tail(self._pending))

    def finish(self) -> None:
        """Draw what is left; safe to call twice."""
        self._print(self._pending)
        self._pending = ""

    def _print(self, block: str) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        if block.strip():
            if self._has_printed:
                self._console.print()
            self._console.print(AnswerMarkdown(block))
            self._has_printed = True
