"""Facts: what lines of each kind of file say, and that a name with two values is never asked for."""

import pytest
import tiny_model

from salalocal.evals.facts import Fact, facts_in
from salalocal.prompt.sources import Document

PYTHON = '''
MAX_RETRIES = 5
TIMEOUT: float = 2.5  # seconds
name = "beacon"
total = compute(5)
if name == "beacon": pass

class Tower(Building):
    """Keeps the lamps of one coast."""
    height = 40

async def raise_lamp(self, *, speed: int = 3) -> None:
    """Raise the lamp by hand."""
    return 7
'''


def said(*documents: Document) -> set[tuple[str, str, str]]:
    return {(fact.kind, fact.name, fact.value) for fact in facts_in(documents)}


def test_python() -> None:
    assert said(tiny_model.document("a.py", PYTHON)) == {
        ("constant", "MAX_RETRIES", "5"),
        ("constant", "TIMEOUT", "2.5"),
        ("constant", "name", '"beacon"'),
        ("constant", "height", "40"),
        ("base class", "Tower", "Building"),
        ("docstring", "Tower", "Keeps the lamps of one coast."),
        ("signature", "raise_lamp", "(self, *, speed: int = 3) -> None"),
        ("docstring", "raise_lamp", "Raise the lamp by hand."),
    }


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("a.toml", "[server]\nport = 8080\nhost = 'x'\nlist = [\n",
         {("setting", "port", "8080"), ("setting", "host", "'x'")}),
        ("a.yaml", "depth: 3\nnested:\n  colour: red # warm\n",
         {("setting", "depth", "3"), ("setting", "colour", "red")}),
        ("a.json", '{\n "lamp-count": 12,\n "inner": {\n}}\n', {("setting", "lamp-count", "12")}),
        ("a.h", "#define LIMIT 64\nint x;\n", {("constant", "LIMIT", "64")}),
        ("a.rs", "pub const DEPTH: usize = 7;\nfn walk(a: u8) -> u8 {\n",
         {("constant", "DEPTH", "7"), ("signature", "walk", "(a: u8) -> u8")}),
        ("a.js", "export const speed = 12;\nreturn \"x\"\n", {("constant", "speed", "12")}),
        ("a.md", "# Title of this page\nThe tower keeps a list of every lamp it has seen today.\n",
         {("line", "The tower keeps a list", "of every lamp it has seen today.")}),
        ("a.bin", "port = 8080\n", set()),
    ],
)  # fmt: skip
def test_other_files(path: str, text: str, expected: set[tuple[str, str, str]]) -> None:
    assert said(tiny_model.document(path, text)) == expected


@pytest.mark.parametrize(
    "again",
    [
        "MAX_RETRIES = 6\n",
        "MAX_RETRIES = compute()\n",
        "max_retries: 4\n",
        '{"MAX_RETRIES": 4}\n',
        "MAX_RETRIES := 3\n",
    ],
)
def test_a_name_that_is_set_again_anywhere_is_left_out(again: str) -> None:
    first = tiny_model.document("a.py", "MAX_RETRIES = 5\nOTHER = 6\n")
    assert said(first, tiny_model.document("notes.txt", again)) == {("constant", "OTHER", "6")}


def test_what_is_defined_or_begun_twice_is_left_out() -> None:
    code = "class Tower(Building):\n    pass\ndef lamp(a):\n    pass\n"
    prose = "The tower keeps a list of every lamp it has seen.\n"
    assert len(said(tiny_model.document("a.py", code), tiny_model.document("a.md", prose))) == 3
    twice = [tiny_model.document(f"{n}.{end}", text) for n in "ab" for end, text in (("py", code), ("md", prose))]
    assert said(*twice) == set()


def test_a_fact_marks_answers() -> None:
    constant = Fact("constant", "MAX_RETRIES", "5", "a.py", 0)
    assert constant.question == "What is the value of MAX_RETRIES?"
    assert constant.mark("MAX_RETRIES = 5").is_right and not constant.mark("MAX_RETRIES = 50").is_right
    signature = Fact("signature", "lamp", "(a, b=2)", "a.py", 0)
    assert signature.mark("def lamp(a, b=2):").is_right and not signature.mark("def lamp(a):").is_right
