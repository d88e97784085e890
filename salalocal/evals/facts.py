"""What files say, as questions with answers that can be checked: documents in, `Fact`s out; for recall and ruler.

A fact is the one value that one line gives to one name: constants, settings, signatures, base classes, docstrings, and
how a line of prose goes on. A name that is set or defined twice anywhere in the documents is left out, so that every
question has one answer.
"""

import posixpath
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from salalocal.evals.scoring import Mark, mark_all, mark_value
from salalocal.prompt.sources import Document

QUESTIONS = {
    "constant": "What is the value of {name}?",
    "setting": "What is the value of {name}?",
    "signature": "What is the signature of {name}?",
    "base class": "What is the base class of {name}?",
    "docstring": "What does the docstring of {name} say?",
    "line": "Quote the line that begins with: {name}",
}
_MAX_LINE = 160
_OPENING_WORDS, _MIN_WORDS = 5, 9

_NAME = r"[A-Za-z_]\w{2,60}"
_LITERAL = r"""(?:-?\d[\d_.]*|"[^"\\]{1,80}"|'[^'\\]{1,80}'|True|False|true|false)"""
_CONSTANT = re.compile(
    rf"(?:(?:export|pub|static|final|const|let|var|val) )*({_NAME})(?:: ?[\w\[\]., |]+)?"
    rf" ?:?= ?({_LITERAL})[;,]?(?:\s+(?:#|//).*)?"
)
_MACRO = re.compile(rf"#define ({_NAME}) +({_LITERAL})(?:\s+//.*)?")
_SETTING = re.compile(r"([A-Za-z][\w.-]{2,60}) ?[:=] ?([^\s{\[|>&*].{0,80}?)")
_JSON_SETTING = re.compile(r'"([A-Za-z][\w.-]{2,60})": ?([^\s{\[].{0,80}?),?')
_SIGNATURE = re.compile(rf"(?:(?:export|pub|async) )*(?:def|fn|func|function) ({_NAME})(\(.*\)[^{{]*?) ?[:{{]?")
_BASE = re.compile(rf"class ({_NAME})\((.+)\):")
_DEFINITION = re.compile(rf"(?:async )?(?:def|class) ({_NAME})\b.*:")
_DOCSTRING = re.compile(r'[ru]?"""(.{8,}?)"""')

_COMMENT = re.compile(r"\s+(?:#|;|//)\s.*")
_SET = re.compile(r"(?:#define )?([A-Za-z_][\w.-]{2,60})[\"']?(?:: ?[\w\[\]., |]+)? ?(?::=|=(?!=)|:)")
_DEFINED = re.compile(rf"\b(?:def|class|fn|func|function) ({_NAME})")

_CODE = {".py", ".pyi", ".js", ".ts", ".go", ".rs", ".c", ".h", ".cc", ".cpp", ".hpp", ".java", ".kt", ".cs", ".swift"}
_SETTINGS = {".toml", ".ini", ".cfg", ".yaml", ".yml", ".env", ".properties", ".conf"}
_PROSE = {".md", ".rst", ".txt", ".adoc", ""}


@dataclass(frozen=True)
class Fact:
    """One name and its one value. `kind` words the question; `line` counts from 0 in the document at `path`."""

    kind: str
    name: str
    value: str
    path: str
    line: int

    @property
    def question(self) -> str:
        """The question that the value answers."""
        return QUESTIONS[self.kind].format(name=self.name)

    def mark(self, answer: str) -> Mark:
        """Whether an answer gives the value."""
        if self.kind in ("constant", "setting"):
            return mark_value(answer, self.name, self.value)
        return mark_all(answer, (self.value,))


def facts_in(documents: Sequence[Document]) -> list[Fact]:
    """All facts of documents whose name is set, defined or begun once in all of them, in order."""
    once = _Once(documents)
    return [fact for document in documents for fact in _facts_of(document) if once.has(fact)]


class _Once:
    """Counts how often names are set and defined, and how lines begin, whatever the files are."""

    def __init__(self, documents: Sequence[Document]) -> None:
        self._set: Counter[str] = Counter()
        self._defined: Counter[str] = Counter()
        self._begun: Counter[str] = Counter()
        for document in documents:
            self._set.update(match[1].casefold() for match in _SET.finditer(document.text))
            self._defined.update(match[1].casefold() for match in _DEFINED.finditer(document.text))
            self._begun.update(_opening(line.split()).casefold() for line in document.text.splitlines())

    def has(self, fact: Fact) -> bool:
        name = fact.name.casefold()
        if fact.kind == "line":
            return self._begun[name] == 1
        if fact.kind in ("constant", "setting"):
            return self._set[name] <= 1 and not self._defined[name]
        return self._defined[name] == 1


def _facts_of(document: Document) -> Iterator[Fact]:
    suffix = posixpath.splitext(document.path)[1].lower()
    lines = [line.strip() for line in document.text.splitlines()]
    for number, line in enumerate(lines):
        if not 4 <= len(line) <= _MAX_LINE:
            continue
        for kind, name, value in _readings(suffix, lines, number):
            yield Fact(kind, name, value.strip(), document.path, number)


def _readings(suffix: str, lines: Sequence[str], number: int) -> Iterator[tuple[str, str, str]]:
    """What one line says, as kind, name and value."""
    line = lines[number]
    if suffix in _CODE:
        for kind, pattern in (
            ("constant", _CONSTANT),
            ("constant", _MACRO),
            ("signature", _SIGNATURE),
            ("base class", _BASE),
        ):
            if match := pattern.fullmatch(line):
                yield kind, match[1], match[2]
        following = lines[number + 1] if number + 1 < len(lines) else ""
        if (match := _DEFINITION.fullmatch(line)) and (said := _DOCSTRING.fullmatch(following)):
            yield "docstring", match[1], said[1]
    elif suffix in _SETTINGS or suffix == ".json":
        pattern = _JSON_SETTING if suffix == ".json" else _SETTING
        if match := pattern.fullmatch(_COMMENT.sub("", line)):
            yield "setting", match[1], match[2]
    elif suffix in _PROSE:
        words = line.split()
        if len(words) >= _MIN_WORDS and line[0].isupper():
            yield "line", _opening(words), " ".join(words[_OPENING_WORDS:])


def _opening(words: Sequence[str]) -> str:
    return " ".join(words[:_OPENING_WORDS])
