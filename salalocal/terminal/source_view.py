"""What an answer was read from: sources in, a table on stderr; for /sources.

At a terminal a table, in a pipe one line a source, `SHARE %  PATH:FIRST-LAST`.
"""

from rich.table import Table
from rich.text import Text

from salalocal.prompt.visible import visible_name
from salalocal.session.attribution import AnswerSources, Source
from salalocal.terminal.console import Terminal


def show_sources(terminal: Terminal, found: AnswerSources) -> None:
    """Show the lines that were picked most, and what that is worth."""
    if found.sources and terminal.err.is_terminal:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="")
        table.add_column("share", justify="right")
        table.add_column("file", overflow="fold")
        table.add_column("lines", justify="right")
        for source in found.sources:
            table.add_row(_share(source), Text(visible_name(source.path)), _lines(source))
        terminal.err.print(table)
    else:
        for source in found.sources:
            line = f"{_share(source)}  {visible_name(source.path)}:{_lines(source)}"
            terminal.err.print(Text(line), soft_wrap=True)
    for line in _remarks(found):
        terminal.err.print(Text(line, style="dim"), soft_wrap=not terminal.err.is_terminal)


def _share(source: Source) -> str:
    return f"{100 * source.share:.1f} %"


def _lines(source: Source) -> str:
    if source.first_line == source.last_line:
        return str(source.first_line)
    return f"{source.first_line}-{source.last_line}"


def _remarks(found: AnswerSources) -> list[str]:
    remarks = []
    num_lost = found.num_tokens - found.num_dense - found.num_known
    if found.num_known:
        remarks.append(
            "share: of what was picked more for this answer than for any question; the first "
            f"{found.num_first:,} tokens and the last {found.num_last:,} are read always and not ranked"
        )
    if found.num_known and not found.sources:
        remarks.append("no lines stand out: the answer picked what any question picks")
    if found.num_dense:
        whole = found.num_dense == found.num_tokens
        who = "the answer was" if whole else f"{found.num_dense:,} of {found.num_tokens:,} tokens were"
        remarks.append(f"{who} written from everything: a context this short is read whole")
    if num_lost:
        remarks.append(f"not known for {num_lost:,} of {found.num_tokens:,} tokens")
    return remarks
