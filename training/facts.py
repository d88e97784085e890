"""What can be asked about the lines of a real file.

In: a path and its lines. Out: `Fact`s: a key, the line that answers, the answer text. For: training/archive.py.
Only facts that one line shows are taken: this is what the embedded model is trained to look up.
"""

import re
from dataclasses import dataclass

MAX_ANSWER_CHARACTERS = 90
LITERAL = r"""(?:-?\d[\d_.eE+\-x]*|"[^"]*"|'[^']*'|True|False|None|\[[^\[\]]*\]|\([^()]*\)|[\d_]+ ?\* ?[\d_* ]+)"""
ASSIGN = re.compile(rf"^([A-Za-z_]\w{{2,}})(?:: [\w\[\], .|]+)? = {LITERAL}(?:  #.*)?$")
DEF = re.compile(r"^(?:async )?def (\w{3,})\((.*)\)(?: -> [^:]+)?:$")
CLASS = re.compile(r"^class (\w{3,})(?:\((.*)\))?:$")
IMPORT = re.compile(r"^from ([\w.]{4,}) import ([^()\\]+)$")
DEFAULT = re.compile(rf"(\w+)(?:: [\w\[\]. |]+)?\s?=\s?({LITERAL})")
DOCSTRING = re.compile(r'^r?"""(.+?)"""$')
CONFIG_LINE = {
    ".toml": re.compile(r"^([\w-]{3,}) = (\S.*)$"),
    ".cfg": re.compile(r"^([\w.-]{3,}) ?= ?(\S.*)$"),
    ".ini": re.compile(r"^([\w.-]{3,}) ?= ?(\S.*)$"),
    ".yaml": re.compile(r"^([\w-]{3,}): ([^\s|>&*].*)$"),
    ".yml": re.compile(r"^([\w-]{3,}): ([^\s|>&*].*)$"),
    ".json": re.compile(r'^"([\w-]{3,})": ([^\s{\[].*)$'),
}


@dataclass(frozen=True)
class Fact:
    """`kind` and `key` name the question, `line` is the line that answers it, `detail` a second name."""

    kind: str
    key: str
    answer: str
    line: int
    detail: str = ""


def facts_of(path: str, lines: list[str]) -> list[Fact]:
    """All facts of a file, in order."""
    suffix = path[path.rfind(".") :] if "." in path else ""
    if suffix in CONFIG_LINE:
        return config_facts(lines, CONFIG_LINE[suffix], suffix == ".json")
    return python_facts(lines) if suffix == ".py" else []


def config_facts(lines: list[str], pattern: re.Pattern[str], is_json: bool) -> list[Fact]:
    """Keys of a configuration file."""
    facts = []
    for number, line in enumerate(lines):
        text = line.strip()
        match = pattern.match(text)
        if match and len(text) <= MAX_ANSWER_CHARACTERS:
            facts.append(Fact("key", match[1], text.rstrip(",") if is_json else text, number))
    return facts


def python_facts(lines: list[str]) -> list[Fact]:
    """Constants, definitions, classes, imports, defaults, returns and docstrings."""
    facts = []
    for number, line in enumerate(lines):
        text = line.strip()
        if len(text) > MAX_ANSWER_CHARACTERS:
            continue
        if match := ASSIGN.match(text):
            facts.append(Fact("value", match[1], text, number))
        elif match := DEF.match(text):
            facts.extend(definition_facts(match, text, lines, number))
        elif match := CLASS.match(text):
            facts.append(Fact("class", match[1], text, number))
            facts.append(Fact("where", match[1], "", number))
            facts.extend(docstring_fact(match[1], lines, number))
        elif match := IMPORT.match(text):
            facts.append(Fact("import", match[1], text, number))
    return facts


def definition_facts(match: re.Match[str], text: str, lines: list[str], number: int) -> list[Fact]:
    """What one def line and the line after it say."""
    name = match[1]
    facts = [Fact("def", name, text, number), Fact("where", name, "", number)]
    for default in DEFAULT.finditer(match[2]):
        facts.append(Fact("default", name, default[0], number, default[1]))
    facts.extend(docstring_fact(name, lines, number))
    after = lines[number + 1].strip() if number + 1 < len(lines) else ""
    if after.startswith("return ") and len(after) <= 60:
        facts.append(Fact("return", name, after, number + 1))
    return facts


def docstring_fact(name: str, lines: list[str], number: int) -> list[Fact]:
    """The one-line docstring under a def or class line, if it has one."""
    after = lines[number + 1].strip() if number + 1 < len(lines) else ""
    match = DOCSTRING.match(after)
    if match is None or len(after) > MAX_ANSWER_CHARACTERS:
        return []
    return [Fact("doc", name, match[1].strip(), number + 1)]
