"""Findings as lines that a terminal breaks between words, and as JSON."""

import io
import json

from rich.console import Console

from salalocal.session.doctor import NOTE, OK, PROBLEM, Finding
from salalocal.terminal.console import Terminal, make_terminal
from salalocal.terminal.doctor_view import doctor_json, write_finding

GOOD = Finding("memory", OK, "21.0 of 23.5 GiB free")
BAD = Finding("card 0", PROBLEM, "a card with a name \x1b[2J and a reason that is rather long", "do this and that", 6)


def test_a_pipe_gets_a_line_for_each_and_one_for_the_fix() -> None:
    out = io.StringIO()
    for finding in (GOOD, BAD):
        write_finding(make_terminal(out=out), finding)
    assert out.getvalue().splitlines() == [
        "ok      memory: 21.0 of 23.5 GiB free",
        "PROBLEM card 0: a card with a name \\x1b[2J and a reason that is rather long",
        "        fix: do this and that",
    ]


def test_a_narrow_terminal_breaks_between_words() -> None:
    out = Console(file=io.StringIO(), force_terminal=True, width=40, color_system=None)
    write_finding(Terminal(out, make_terminal().err), BAD)
    lines = out.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert all(len(line) <= 40 for line in lines) and lines[1].startswith(" " * 10) and "\x1b" not in "".join(lines)


def test_the_same_as_json() -> None:
    document = json.loads(json.dumps(doctor_json([GOOD, BAD, Finding("x", NOTE, "y")])))
    assert document["problems"] == 1
    assert document["findings"][0] == {"name": "memory", "status": "ok", "text": GOOD.text, "fix": None}
