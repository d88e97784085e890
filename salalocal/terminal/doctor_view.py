"""The findings of `doctor` on screen, one after the other as they are made."""

import textwrap
from dataclasses import asdict
from typing import Any

from salalocal.session.doctor import NOTE, OK, PROBLEM, Finding
from salalocal.terminal.console import Terminal, one_line

_MARKS = {OK: "ok", NOTE: "note", PROBLEM: "PROBLEM"}
_MAX_LINE = 300
_INDENT = 8


def write_finding(terminal: Terminal, finding: Finding) -> None:
    """One line on stdout, and one for the fix; a terminal breaks them between words."""
    lines = [f"{_MARKS[finding.status]:<{_INDENT}}{finding.name}: {one_line(finding.text, _MAX_LINE)}"]
    if finding.fix is not None:
        lines.append(f"{'':{_INDENT}}fix: {one_line(finding.fix, _MAX_LINE)}")
    if terminal.out.is_terminal:
        indent = " " * (_INDENT + 2)
        width = max(terminal.out.width, 3 * _INDENT)
        lines = [part for line in lines for part in textwrap.wrap(line, width, subsequent_indent=indent)]
    terminal.write("".join(f"{line}\n" for line in lines))


def doctor_json(findings: list[Finding]) -> dict[str, Any]:
    """All findings as plain data."""
    shown = [{key: value for key, value in asdict(finding).items() if key != "exit_code"} for finding in findings]
    return {"findings": shown, "problems": sum(finding.status == PROBLEM for finding in findings)}
