"""Archives with questions: the training and evaluation samples.

In: a `Corpus`, a word list, a length in tokens. Out: `Sample`: the ids of a whole conversation in the runtime's prompt
form, with, per token, what the loss should do and where in the documents the token can be copied from. For:
training/batches.py and training/evaluate.py.
"""

import random
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from training import wording
from training.corpus import Corpus, SourceFile
from training.facts import Fact
from training.invent import Inventor
from training.transcript import Prompt, Sample, Transcript, Turn

ASSIGNED = re.compile(r"\s*([A-Za-z_]\w*)(?:: [^=]+)? = ")
DECLARED = re.compile(r"\s*(?:async def|def|class) (\w+)")
IMPORTED = re.compile(r"\s*from ([\w.]+) import")
NAMED_BY_DEFINITION = ("def", "class", "default", "return", "doc", "where")
TOKENS_PER_TURN = 46
KIND_WEIGHTS = {
    "value": 5.0,
    "key": 3.0,
    "def": 1.6,
    "class": 1.2,
    "import": 1.0,
    "default": 1.2,
    "return": 1.0,
    "doc": 1.0,
    "where": 1.8,
    "begins": 0.8,
    "fact": 2.0,
}


@dataclass
class Document:
    """A file of the archive: text lines and their ids, changed together."""

    path: str
    lines: list[str]
    ids: list[np.ndarray]
    facts: list[Fact]

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.ids))


def unique_paths(documents: Iterable[Document]) -> list[Document]:
    """The documents without a second one of the same path."""
    return list({document.path: document for document in documents}.values())


class ArchiveMaker:
    """Makes samples from one generator; same seed, same samples."""

    def __init__(self, corpus: Corpus, words: list[str], rng: random.Random, pieces: list[str] | None = None):
        self.corpus = corpus
        self.rng = rng
        self.inventor = Inventor(rng, words, pieces or [])
        self.tokenizer = corpus.tokenizer
        self.im_start = self.tokenizer.token_to_id("<|im_start|>")
        self.im_end = self.tokenizer.token_to_id("<|im_end|>")
        self.user = [self.im_start, *self.encode("user\n")]
        self.assistant = [self.im_end, *self.encode("\n"), self.im_start, *self.encode("assistant\n")]
        self.newline = self.encode("\n")

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    # -- documents ---------------------------------------------------------------------------------------------

    def documents(self, budget: int) -> list[Document]:
        """Files of one package, and often invented files, that together stay within `budget` tokens."""
        documents: list[Document] = []
        left = budget
        names = self.rng.choices(self.corpus.names, list(self.corpus.weights), k=2)
        package = self.corpus.packages[names[0]]
        invented = self.rng.random() < 0.7
        while left > 60 and len(documents) < 80:
            if invented and self.rng.random() < 0.3:
                document = self.invented_file(min(left, self.rng.randint(40, 500)))
            else:
                size = min(left, int(60 * (50 ** self.rng.random())) if left < 6000 else self.rng.randint(300, 4000))
                document = self.real_file(self.rng.choice(package), size)
            if document is None:
                left -= 8
                continue
            documents.append(document)
            left -= document.num_tokens + 40 + len(self.encode(document.path))
        self.rng.shuffle(documents)
        return documents

    def real_file(self, file: SourceFile, size: int) -> Document | None:
        """A whole file, or a run of its lines if it is larger than `size` tokens."""
        first, last = 0, len(file.lines)
        starts = file.starts
        if starts[-1] > size:
            first = self.rng.randrange(max(1, int(np.searchsorted(starts, starts[-1] - size // 2))))
            if self.rng.random() < 0.4:
                first = 0
            last = int(np.searchsorted(starts, starts[first] + size, side="right")) - 1
        if last - first < 3:
            return None
        ids = [file.ids[starts[i] : starts[i + 1]] for i in range(first, last)]
        facts = [Fact(f.kind, f.key, f.answer, f.line - first, f.detail) for f in file.facts if first <= f.line < last]
        return Document(file.path, file.lines[first:last], ids, facts)

    def invented_file(self, size: int) -> Document:
        """A small configuration file."""
        suffix = self.rng.choice([".py", ".py", ".py", ".toml", ".yaml", ".json", ".ini", ".env", ".md"])
        if suffix == ".md":
            lines = [f"# {self.inventor.word().capitalize()}\n\n"]
            for _ in range(max(1, size // 28)):
                lines.append(self.inventor.fact_sentence()[1] + "\n")
            path = self.inventor.path(self.rng.choice(["README.md", "NOTES.md", f"{self.inventor.word()}.md"]))
        else:
            lines = self.inventor.config_lines(suffix, max(2, size // 14))
            stem = self.rng.choice(["config", "settings", "constants", "app", "defaults", self.inventor.word()])
            path = self.inventor.path(".env" if suffix == ".env" else stem + suffix)
        facts = []
        for number, line in enumerate(lines):
            facts.extend(self.invented_facts(suffix, line.strip(), number))
        return Document(path, lines, [np.array(self.encode(line), dtype=np.uint16) for line in lines], facts)

    @staticmethod
    def invented_facts(suffix: str, text: str, number: int) -> list[Fact]:
        """The fact of one invented line, if it holds one."""
        if suffix == ".md":
            topic, found, _ = text.removeprefix("The ").partition(" is ")
            return [Fact("fact", topic, text, number)] if found else []
        separator = {".json": ": ", ".yaml": ": ", ".env": "="}.get(suffix, " = ")
        key, found, _ = text.partition(separator)
        if not found or text.startswith("#"):
            return []
        answer = text.rstrip(",") if suffix == ".json" else text
        return [Fact("value" if suffix == ".py" else "key", key.strip('"'), answer, number)]

    def plant(self, document: Document) -> None:
        """Inserts one invented line, or a small function, into a file."""
        at = self.rng.randrange(len(document.lines) + 1)
        following = document.lines[at] if at < len(document.lines) else ""
        indent = following[: len(following) - len(following.lstrip(" \n"))].replace("\n", "")[:12]
        draw = self.rng.random()
        inventor = self.inventor
        if draw < 0.45:
            style = self.rng.choice(["upper", "upper", "snake"])
            text = f"{inventor.name(style)} = {inventor.literal()}"
            rows, facts = [text], [("value", text.partition(" = ")[0], text, 0, "")]
        elif draw < 0.65:
            topic, text = inventor.fact_sentence()
            mark = "# " if self.rng.random() < 0.7 and not document.path.endswith((".md", ".rst")) else ""
            rows, facts = [mark + text], [("fact", topic, text, 0, "")]
        elif draw < 0.72:
            begin = f"{inventor.word()} {inventor.word()} {inventor.word()}"
            text = f"{begin} {inventor.word()} {inventor.word()} {inventor.number()}"
            rows, facts = ["# " + text], [("begins", begin, text, 0, "")]
        else:
            rows, facts = self.invented_function()
        self.insert(document, at, [indent + row for row in rows], facts)

    def insert(self, document: Document, at: int, rows: list[str], facts: list[tuple[str, str, str, int, str]]) -> None:
        """Puts rows in front of line `at` of a file, unless it would end an open line; facts count rows from there."""
        lines = [row + "\n" for row in rows]
        if at > 0 and not document.lines[at - 1].endswith("\n"):
            return
        document.lines[at:at] = lines
        document.ids[at:at] = [np.array(self.encode(line), dtype=np.uint16) for line in lines]
        moved = [Fact(f.kind, f.key, f.answer, f.line + len(lines) * (f.line >= at), f.detail) for f in document.facts]
        document.facts = moved + [Fact(kind, key, answer, at + row, detail) for kind, key, answer, row, detail in facts]

    def invented_function(self) -> tuple[list[str], list[tuple[str, str, str, int, str]]]:
        """A function with defaults, perhaps a docstring, and a literal return; or a class line."""
        inventor, rng = self.inventor, self.rng
        if rng.random() < 0.25:
            name = inventor.name("pascal")
            text = f"class {name}({inventor.name('pascal')}):"
            return [text, "    pass"], [("class", name, text, 0, ""), ("where", name, "", 0, "")]
        name = inventor.name("snake")
        parameters = [inventor.word() for _ in range(rng.randint(0, 2))]
        defaults = [f"{inventor.name('snake')}={inventor.literal()}" for _ in range(rng.randint(0, 2))]
        text = f"def {name}({', '.join(parameters + defaults)}):"
        rows = [text]
        facts = [("def", name, text, 0, ""), ("where", name, "", 0, "")]
        facts += [("default", name, default, 0, default.partition("=")[0]) for default in defaults]
        if rng.random() < 0.4:
            doc = " ".join(inventor.word() for _ in range(rng.randint(3, 7))).capitalize() + "."
            rows.append(f'    """{doc}"""')
            facts.append(("doc", name, doc, 1, ""))
        returned = f"return {inventor.literal() if rng.random() < 0.7 else inventor.name('snake')}"
        facts.append(("return", name, returned, len(rows), ""))
        return [*rows, "    " + returned], facts

    def twin(self, documents: list[Document]) -> None:
        """Gives two files a constant of the same name with different values."""
        if len(documents) < 2:
            return
        name = self.inventor.name("upper")
        for document in self.rng.sample(documents, 2):
            text = f"{name} = {self.inventor.literal()}"
            document.lines.append(text + "\n")
            if len(document.ids) and not document.lines[-2].endswith("\n"):
                document.lines.pop()
                continue
            document.ids.append(np.array(self.encode(text + "\n"), dtype=np.uint16))
            document.facts.append(Fact("twin", name, text, len(document.lines) - 1))

    # -- questions ---------------------------------------------------------------------------------------------

    def candidates(self, documents: list[Document]) -> dict[str, list[tuple[int, Fact]]]:
        """Facts by kind whose key names one line of the archive only."""
        defined = Counter((f.kind, f.key, f.detail) for d in documents for f in d.facts)
        named = Counter(f.key for d in documents for f in d.facts if f.kind in ("value", "key", "twin"))
        paths = Counter(d.path for d in documents)
        lines = [line for d in documents for line in d.lines]
        assigned = Counter(m[1] for m in map(ASSIGNED.match, lines) if m)
        declared = Counter(m[1] for m in map(DECLARED.match, lines) if m)
        imported = Counter(m[1] for m in map(IMPORTED.match, lines) if m)
        found: dict[str, list[tuple[int, Fact]]] = {}
        for index, document in enumerate(documents):
            for fact in document.facts:
                is_shared = defined[fact.kind, fact.key, fact.detail] > 1
                if fact.kind in ("value", "key"):
                    is_shared |= named[fact.key] > 1 or assigned[fact.key] > 1
                elif fact.kind in NAMED_BY_DEFINITION:
                    is_shared |= declared[fact.key] > 1
                elif fact.kind == "import":
                    is_shared |= imported[fact.key] > 1
                if fact.kind == "twin":
                    is_shared = paths[document.path] > 1 or defined["twin", fact.key, ""] != 2
                if not is_shared and fact.answer != fact.key:
                    found.setdefault(fact.kind, []).append((index, fact))
        return found

    def turn(self, documents: list[Document], found: dict[str, list[tuple[int, Fact]]], kind: str) -> Turn:
        """One question of a kind for which there is a candidate."""
        index, fact = self.rng.choice(found[kind])
        document = documents[index]
        path = document.path
        if kind == "where":
            answer = wording.WHERE.format(k=fact.key, f=path)
            return Turn(
                kind, self.rng.choice(wording.QUESTIONS[kind]).format(k=fact.key), answer, index, fact.line, fact.key
            )
        if kind == "twin":
            question = self.rng.choice(wording.IN_FILE["value"]).format(k=fact.key, f=path)
            return Turn(kind, question, fact.answer, index, fact.line, fact.key)
        key = self.spelled(fact.key)
        if kind in wording.IN_FILE and self.rng.random() < 0.4:
            file = path if self.rng.random() < 0.5 else path.rpartition("/")[2]
            question = self.rng.choice(wording.IN_FILE[kind]).format(k=key, f=file)
        else:
            question = self.rng.choice(wording.QUESTIONS[kind]).format(k=key, d=fact.detail)
        return Turn(kind, question, fact.answer, index, fact.line, fact.key)

    def spelled(self, key: str) -> str:
        """The key as users write it: at times in backticks or quotes."""
        draw = self.rng.random()
        return f"`{key}`" if draw < 0.06 else f'"{key}"' if draw < 0.1 else key

    def missing(self, documents: list[Document], found: dict[str, list[tuple[int, Fact]]]) -> Turn:
        """A question about a name that is not there; half the time it looks like one that is."""
        rng, inventor = self.rng, self.inventor
        kind = rng.choices(["value", "def", "where", "class", "fact", "default"], [5, 1, 2, 1, 1, 0.5])[0]
        style = {"value": rng.choice(["upper", "snake"]), "class": "pascal"}.get(kind, "snake")
        key = inventor.fact_sentence()[0] if kind == "fact" else inventor.name(style)
        if kind == "value" and found.get("value") and rng.random() < 0.5:
            near = rng.choice(found["value"])[1].key.split("_")
            near[rng.randrange(len(near))] = inventor.word().upper() if near[0].isupper() else inventor.word()
            key = "_".join(near)
        if any(key in line for document in documents for line in document.lines):
            key = inventor.name("upper") + "_" + inventor.word().upper()
        question = rng.choice(wording.QUESTIONS[kind]).format(k=key, d=inventor.word())
        if kind in wording.IN_FILE and documents and rng.random() < 0.3:
            question = rng.choice(wording.IN_FILE[kind]).format(k=key, f=rng.choice(documents).path)
        name = f"The {key}" if kind == "fact" else key
        return Turn("missing", question, wording.NOT_FOUND.format(k=name), key=key)

    def chat(self) -> Turn:
        """Small talk and requests that are refused."""
        questions, answer = self.rng.choice(wording.CHAT)
        return Turn("chat", self.rng.choice(questions), answer)

    def turns(self, documents: list[Document], count: int) -> list[Turn]:
        """`count` questions about the archive."""
        found = self.candidates(documents)
        kinds = [k for k in KIND_WEIGHTS if found.get(k)]
        weights = [KIND_WEIGHTS[k] for k in kinds]
        turns: list[Turn] = []
        asked: set[tuple[str, str]] = set()
        for _ in range(2 * count):
            draw = self.rng.random()
            if draw < 0.02:
                turn = self.chat()
            elif draw < 0.16 or not kinds:
                turn = self.missing(documents, found)
            elif draw < 0.19 and found.get("twin"):
                turn = self.turn(documents, found, "twin")
            else:
                turn = self.turn(documents, found, self.rng.choices(kinds, weights)[0])
            if (turn.kind, turn.answer) not in asked:
                asked.add((turn.kind, turn.answer))
                turns.append(turn)
            if len(turns) == count:
                break
        return turns

    # -- sequences ---------------------------------------------------------------------------------------------

    def archive(self, budget: int, num_plants: int) -> list[Document]:
        """Documents with invented lines in them, within `budget` tokens."""
        documents = self.documents(budget - 24 * num_plants)
        open_files = [d for d in documents if d.path.endswith((".py", ".md", ".rst", ".toml", ".cfg"))]
        for _ in range(num_plants if open_files else 0):
            self.plant(self.rng.choice(open_files))
        if self.rng.random() < 0.3:
            self.twin(open_files)
        return documents

    def prompt(
        self, documents: list[Document], system: str = "", first: int = 1
    ) -> tuple[list[int], list[list[int]], list[int]]:
        """Ids up to the first question, the position of every line, and where each path stands."""
        ids = [1]
        if system:
            ids += [self.im_start, *self.encode("system\n" + system), self.im_end, *self.newline]
        ids += self.user
        if not documents:
            return ids, [], []
        ids += self.encode("<documents>\n")
        line_at: list[list[int]] = []
        path_at: list[int] = []
        for number, document in enumerate(documents, start=first):
            ids += self.encode(f'<document index="{number}">\n')
            path_at.append(len(ids))
            ids += self.encode(f"<source>{document.path}</source>\n<document_content>\n")
            places = []
            for line in document.ids:
                places.append(len(ids))
                ids += line.tolist()
            line_at.append(places)
            ends_open = bool(document.lines) and not document.lines[-1].endswith("\n")
            ids += self.encode(
                "\n</document_content>\n</document>\n" if ends_open else "</document_content>\n</document>\n"
            )
        return ids + self.encode("</documents>\n\n"), line_at, path_at

    def sample(self, length: int) -> Sample:
        """A conversation of at most `length` + 1 tokens over one archive."""
        count = max(2, min(24, length // 170))
        has_files = self.rng.random() > 0.02 or length > 600
        budget = length - TOKENS_PER_TURN * count - 30
        documents = self.archive(budget, self.rng.randint(min(count, 6) // 2, max(1, count))) if has_files else []
        while documents and sum(d.num_tokens + 34 for d in documents) > length - 60:
            documents.pop()
        system = self.rng.choice(wording.SYSTEM_TEXTS) if self.rng.random() < 0.06 else ""
        ids, line_at, path_at = self.prompt(documents, system)
        while documents and len(ids) > length - 60:
            documents.pop()
            ids, line_at, path_at = self.prompt(documents, system)
        turns = self.turns(documents, count + 4) if documents else [self.chat() for _ in range(length // 40)]
        return self.conversation(documents, ids, line_at, path_at, turns, length)

    def conversation(
        self,
        documents: list[Document],
        ids: list[int],
        line_at: list[list[int]],
        path_at: list[int],
        turns: list[Turn],
        length: int,
        first: int = 1,
    ) -> Sample:
        """Appends as many turns as fit and marks what the loss needs; `first` is the first document's number."""
        transcript = Transcript(Prompt(list(documents), ids, line_at, path_at, first), self.tokenizer, length)
        for turn in turns:
            transcript.add(turn)
        return transcript.sample()


class SampleMaker:
    """Makes other samples out of an archive maker's parts, and draws from its generator."""

    def __init__(self, archives: ArchiveMaker):
        self.archives = archives
        self.rng = archives.rng
        self.inventor = archives.inventor
