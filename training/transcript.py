"""A prompt and the questions behind it as one sequence of ids, with what the losses need to know about each id.

In: documents as a prompt, turns. Out: a `Sample`. For: training/archive.py.

Positions and rows: an id as a target has a mark, the position it is copied from (`sources`) and one that the way there
leads over (`hops`); they stand at the id's own position, so the row that predicts it is the one before. What a row
itself should know stands at the row: the end of its document's header (`headers`) and the number of a document
(`addresses`): of its own one for rows of documents, of the one that is asked about for rows that predict an answer.
"""

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from tokenizers import Tokenizer

from training.positions import line_sources, path_sources, repeated

IGNORE, TEXT, ANSWER = 0, 1, 2
MAX_ANSWER_TOKENS = 40
LINE_REACH = 60
PAD = 2


class Titled(Protocol):
    """A document: all that is asked of it here is its path."""

    @property
    def path(self) -> str: ...


@dataclass
class Turn:
    """A question with its answer and the document lines (document, line) the answer is copied from; `key` is the name
    that is asked for.

    `pointers`, where a maker knows them exactly: per id of the answer the position it is copied from, and the one that
    the way there leads over.
    """

    kind: str
    question: str
    answer: str
    document: int = -1
    line: int = -1
    key: str = ""
    pointers: tuple[list[int], list[int]] | None = None


@dataclass
class Sample:
    """A conversation as ids, with the arrays that the module describes; -1 is none. The questions begin at
    `boundary`.
    """

    ids: np.ndarray
    marks: np.ndarray
    sources: np.ndarray
    hops: np.ndarray
    headers: np.ndarray
    addresses: np.ndarray
    boundary: int
    turns: list[Turn] = field(default_factory=list)


@dataclass(frozen=True)
class Prompt:
    """Ids up to the first question; where every line and every path of its documents stands; the first one's number."""

    documents: list[Titled]
    ids: list[int]
    line_at: list[list[int]]
    path_at: list[int]
    first: int = 1


class Transcript:
    """Takes turns as long as there is room."""

    def __init__(self, prompt: Prompt, tokenizer: Tokenizer, length: int):
        self.prompt, self.tokenizer, self.length = prompt, tokenizer, length
        self.ids = list(prompt.ids)
        self.boundary = len(self.ids)
        self.marks = [TEXT] * self.boundary
        self.im_start, self.im_end = (tokenizer.token_to_id(f"<|im_{end}|>") for end in ("start", "end"))
        self.newline = self.encode("\n")
        self.lead = [self.im_start, *self.encode("user\n")]
        self.assistant = [self.im_end, *self.newline, self.im_start, *self.encode("assistant\n")]
        shape = length + 1
        self.sources, self.hops, self.headers = (np.full(shape, -1, np.int32) for _ in range(3))
        self.addresses = np.full(shape, -1, np.int16)
        self.turns: list[Turn] = []
        paths = [document.path for document in prompt.documents]
        self.is_named_once = [paths.count(path) == 1 for path in paths]
        for number, places in enumerate(prompt.line_at):
            self.headers[places[0] : places[-1] + 1] = self.header_end(number)
            self.addresses[prompt.path_at[number] : places[-1] + 1] = prompt.first + number

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def header_end(self, document: int) -> int:
        """Where the line with the path ends: its last id before the newline."""
        return self.prompt.ids.index(self.newline[0], self.prompt.path_at[document]) - 1

    def add(self, turn: Turn) -> None:
        """Appends a turn and marks what the loss needs; leaves it out where it is too long."""
        question = self.tokenizer.encode(turn.question, add_special_tokens=False)
        answer = self.tokenizer.encode(turn.answer, add_special_tokens=False)
        lead = [*self.newline, *self.lead] if self.turns else []
        is_long = turn.pointers is None and len(answer.ids) > MAX_ANSWER_TOKENS
        if is_long or len(self.ids) + len(lead) + len(question.ids) + len(answer.ids) + 12 > self.length + 1:
            return
        asked_at = len(self.ids) + len(lead)
        self.ids += [*lead, *question.ids, *self.assistant]
        self.marks += [IGNORE] * (len(self.ids) - len(self.marks))
        start = len(self.ids)
        stop = start + len(answer.ids)
        self.ids += [*answer.ids, self.im_end]
        self.marks += [ANSWER] * (len(answer.ids) + 1)
        if turn.pointers is not None:
            self.sources[start:stop], self.hops[start:stop] = turn.pointers
        else:
            self.sources[start:stop] = self.found_in_documents(turn, answer.ids, start)
            said_at, asked = turn.answer.find(turn.key), turn.question.find(turn.key)
            if turn.key and min(said_at, asked) >= 0:
                for i, j in repeated(answer, said_at, question, asked, len(turn.key)).items():
                    if self.sources[start + i] < 0:
                        self.sources[start + i] = asked_at + j
        self.address(turn, asked_at, question.offsets, start, stop)
        self.turns.append(turn)

    def found_in_documents(self, turn: Turn, answer: list[int], start: int) -> list[int]:
        """Sources of an answer's ids in the documents; a question for a file leads over the line that it asks for."""
        if turn.document < 0:
            return [-1] * len(answer)
        at = self.prompt.line_at[turn.document][turn.line]
        end = min(at + LINE_REACH, self.boundary)
        if turn.kind != "where":
            return line_sources(answer, self.ids, at, end, turn.kind == "doc")
        hop = max(line_sources(self.encode(turn.key), self.ids, at, end))
        self.hops[start : start + len(answer) + 1] = hop
        path = self.encode(self.prompt.documents[turn.document].path)
        return path_sources(answer, path, self.ids, self.prompt.path_at[turn.document])

    def address(self, turn: Turn, asked_at: int, offsets: list[tuple[int, int]], start: int, stop: int) -> None:
        """The rows of an answer know which document they are about, if the question asks for it or names it; the end
        of a path in the question leads over the end of that path in its header.
        """
        if turn.document < 0 or not self.is_named_once[turn.document]:
            return
        path = self.prompt.documents[turn.document].path
        named = turn.question.find(path)
        if turn.kind == "where" or named >= 0:
            self.addresses[start - 1 : stop - 1] = self.prompt.first + turn.document
        if named >= 0:
            ends = [end for _, end in offsets]
            if named + len(path) in ends:
                row = asked_at + ends.index(named + len(path))
                self.hops[row + 1] = self.header_end(turn.document)
                self.addresses[row] = self.prompt.first + turn.document

    def sample(self) -> Sample:
        """The sequence, padded to its length."""
        pad = self.length + 1 - len(self.ids)
        ids = np.array(self.ids + [PAD] * pad, np.int32)
        marks = np.array(self.marks + [IGNORE] * pad, np.int8)
        arrays = (self.sources, self.hops, self.headers, self.addresses)
        return Sample(ids, marks, *arrays, self.boundary, self.turns)
