"""Long prompts of a given length in tokens: documents in, packs with planted lines out; for needle, ruler and recall.

A haystack is the shipped texts, or the user's files. Where a prompt is to be longer than they are, they come again
under other paths.
"""

import hashlib
import json
import lzma
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, count
from typing import Any

from salalocal.errors import RequestError
from salalocal.prompt.pack import PromptPack
from salalocal.prompt.sources import Document, read_sources
from salalocal.prompt.template import Conversation, Turn, document_text
from salalocal.session.start import Sources, tell_skips
from salalocal.session.texts import CALIBRATION, EVALUATION, shipped_bytes
from salalocal.session.tokens import TextCodec

ANSWER_TOKENS = 128
"""Room that a context of a given length leaves for the answer, in tokens."""

_FRAME_TOKENS = 64
_SLACK_TOKENS = 4  # what the number of a document may add to its tokens


@dataclass(frozen=True)
class Planted:
    """A line to plant. Units: depth is the share of the documents' tokens in front of it, from 0 to 1."""

    depth: float
    line: str


@dataclass(frozen=True, eq=False)
class Stack:
    """Documents that fill a prompt, with their tokens. Packs with other lines planted begin alike up to the line."""

    documents: tuple[Document, ...]
    tokens: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents, with their frames."""
        return sum(self.tokens)

    @property
    def distinct(self) -> list[Document]:
        """The documents that repeat no earlier one, whole or cut."""
        known: dict[str, None] = {}
        kept = []
        for document in self.documents[:-1]:
            if document.text not in known:
                known[document.text] = None
                kept.append(document)
        last = self.documents[-1]
        return kept if any(text.startswith(last.text) for text in known) else [*kept, last]

    def __contains__(self, text: str) -> bool:
        return any(text in document.text for document in self.documents)

    def plant(self, lines: Iterable[Planted]) -> PromptPack:
        """A pack of the documents with lines between theirs, each at the boundary nearest to its depth."""
        ends = list(accumulate(self.tokens))
        wanted: dict[int, list[tuple[float, str]]] = {}
        for planted in lines:
            place = planted.depth * ends[-1]
            index = next((i for i, end in enumerate(ends) if place < end), len(ends) - 1)
            start = ends[index] - self.tokens[index]
            share = min(1.0, (place - start) / self.tokens[index])
            wanted.setdefault(index, []).append((share, planted.line))
        documents = list(self.documents)
        for index, inside in wanted.items():
            documents[index] = _with_lines(documents[index], inside)
        return PromptPack(tuple(documents))


class Haystack:
    """Documents to fill prompts with; `name` and `sha256` say which."""

    def __init__(self, name: str, documents: Sequence[Document], codec: TextCodec) -> None:
        self.name = name
        self.documents = tuple(documents)
        self.sha256 = PromptPack(self.documents).digest
        self._codec = codec
        self._tokens: dict[tuple[str, str], int] = {}

    @classmethod
    def shipped(cls, codec: TextCodec) -> "Haystack":
        """The documents of the shipped texts, those to evaluate on first."""
        records = (json.loads(line) for name in (EVALUATION, CALIBRATION) for line in _shipped_lines(name))
        documents = (made_document(**document) for record in records for document in record["documents"])
        unique = {document.path: document for document in documents}
        return cls("the shipped texts", list(unique.values()), codec)

    @classmethod
    def of_files(cls, sources: Sources, codec: TextCodec, tell: Callable[[str], None]) -> "Haystack":
        """The user's files. Raises: PackError, RequestError."""
        reading = read_sources(sources.paths, sources.limits, sources.stdin)
        tell_skips(reading, tell)
        pack = PromptPack.build(reading, sources.order)
        return cls("1 file" if len(pack) == 1 else f"{len(pack):,} files", pack.documents, codec)

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents, each once."""
        return sum(map(self._count, self.documents))

    def to_json(self) -> dict[str, Any]:
        """What it is, as plain data."""
        return {"haystack": self.name, "haystack_sha256": self.sha256, "haystack_tokens": self.num_tokens}

    def stack(self, num_tokens: int, rng: random.Random) -> Stack:
        """Documents in random order that take at most `num_tokens` tokens, the last one cut at a line.

        Raises: RequestError if that is too few for any text.
        """
        chosen: list[Document] = []
        tokens: list[int] = []
        left = num_tokens
        for number in count(1):
            for document in rng.sample(self.documents, len(self.documents)):
                named = document if number == 1 else replace(document, path=f"round-{number}/{document.path}")
                fitting = self._cut(named, left)
                if fitting is not None:
                    chosen.append(fitting[0])
                    tokens.append(fitting[1])
                    left -= fitting[1]
                if fitting is None or fitting[0] is not named:  # cut: the stack is full
                    if not chosen:
                        raise RequestError(f"{num_tokens:,} tokens are too few for a text", "ask for a longer context")
                    return Stack(tuple(chosen), tuple(tokens))
        raise AssertionError("count() does not end")

    def _count(self, document: Document) -> int:
        key = (document.path, document.text)
        if key not in self._tokens:
            self._tokens[key] = len(self._codec.tokenizer.encode(document_text(1, document))) + _SLACK_TOKENS
        return self._tokens[key]

    def _cut(self, document: Document, num_tokens: int) -> tuple[Document, int] | None:
        """As many of the first lines as fit; None if none does."""
        lines = document.text.splitlines(keepends=True)

        def first(num_lines: int) -> Document:
            return document if num_lines == len(lines) else made_document(document.path, "".join(lines[:num_lines]))

        best = largest(len(lines), lambda n: self._count(first(n)) <= num_tokens)
        return (first(best), self._count(first(best))) if best else None


def largest(high: int, fits: Callable[[int], bool]) -> int:
    """The largest number from 1 to `high` that fits, if all smaller ones do too; 0 if none does."""
    if fits(high):
        return high
    low = 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def made_document(path: str, text: str) -> Document:
    """A document of invented text."""
    data = text.encode()
    return Document(path, text, hashlib.sha256(data).hexdigest(), len(data))


def document_budget(length: int, question: str, codec: TextCodec) -> int:
    """What the documents of a context of `length` tokens may take, beside the question, its frame and the answer."""
    return length - ANSWER_TOKENS - _FRAME_TOKENS - len(codec.tokenizer.encode(question))


def ask_about(pack: PromptPack, question: str) -> Conversation:
    """A first question about documents."""
    return Conversation(None, pack, (Turn(question),))


def _shipped_lines(name: str) -> list[str]:
    return lzma.decompress(shipped_bytes(name)).decode().splitlines()


def _with_lines(document: Document, inside: Sequence[tuple[float, str]]) -> Document:
    """Units: the place of a line is a share of the document's characters."""
    lines = document.text.splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines[-1] += "\n"
    starts = [0, *accumulate(map(len, lines))]
    for share, line in sorted(inside, reverse=True):  # from the end on, so that earlier starts stay true
        place = share * starts[-1]
        index = min(range(len(starts)), key=lambda i: abs(starts[i] - place))
        lines.insert(index, f"{line}\n")
    return replace(document, text="".join(lines))
