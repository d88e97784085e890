"""What an answer was read from: picked blocks of keys come in, files and lines come out; for the session.

A block that every question picks says nothing about one of them, so the picks of an answer are held against those of
neutral questions about the same documents, head by head. A row spreads a weight of 1 over the blocks that its scores
picked, as the scores have it. With p_x, the mean weight of block x over the answer's rows, q_x, that over the n neutral
questions whose rows might have picked it, and F blocks to pick from,

    score_x = sum over layers and heads of  p_x log(p_x / q'_x)  where p_x > q'_x,      q'_x = (n q_x + 1/F) / (n + 1)

which is the Kullback-Leibler divergence of the answer from any question, cut into blocks. The first blocks and the last
ones in front of a row are always read: they are not counted, and lines in them cannot be named.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, islice

import torch
from torch import Tensor

from salalocal.engine.picks import AnswerPicks, Picks
from salalocal.kernels.block_topk import BlockGeometry
from salalocal.prompt.pack import PromptPack
from salalocal.prompt.template import Segment
from salalocal.prompt.tokenizer import Tokenizer

NEUTRAL_QUESTIONS = (
    "What is this about?",
    "What is in these files?",
    "Summarize the documents.",
    "Is there anything else?",
)
"""What answers are held against; asked one by one behind the documents, each costs a chunk of a few tokens a read. Four
were enough: of 18 needles in 8,400 tokens the built-in model's was ranked first 18 times, 6 times without any."""

NEUTRAL_TOKENS = 64
"""Room that a neutral question is given, with its frame; the few that are longer go without."""

FRAME_LINES = 3
"""Lines of the prompt in front of a document's text, see `prompt.template`."""


@dataclass(frozen=True)
class Source:
    """Lines of a document, counted from 1, both included; `share`: of the score of all documents, from 0 to 1."""

    path: str
    first_line: int
    last_line: int
    share: float


@dataclass(frozen=True)
class AnswerSources:
    """The lines whose blocks an answer picked more than any question does, those that it picked most first.

    `num_tokens` were drawn, the first `num_dense` of them from all there is, `num_known` from picks that are known. The
    first `num_first` tokens and `num_last` in front of each row are read always.
    """

    sources: tuple[Source, ...]
    num_tokens: int
    num_dense: int
    num_known: int
    num_first: int
    num_last: int


def block_scores(answer: Picks, usual: Picks, geometry: BlockGeometry) -> Tensor:
    """How much more the blocks were picked for an answer than for neutral questions. Shapes: float64 [blocks]."""
    num_blocks = int(answer.positions.max()) // geometry.block_size + 1
    p, num_rows = _weights(answer, geometry, num_blocks)
    p /= num_rows.clamp(min=1)
    q, num_questions = _weights(usual, geometry, num_blocks)
    q = (q + 1 / (num_rows > 0).sum().clamp(min=1)) / (num_questions + 1)
    return torch.where(p > q, p * torch.log(p / q), 0.0).sum((0, 1))


def _weights(picks: Picks, geometry: BlockGeometry, num_blocks: int) -> tuple[Tensor, Tensor]:
    """The weights of the rows by block, added up [L, H, blocks], and how many rows might have picked it [blocks]."""
    _, num_layers, num_heads, _ = picks.blocks.shape
    first_local = (picks.positions // geometry.block_size - geometry.local_blocks)[:, None]
    blocks, logs = picks.blocks.long(), picks.weights.double()
    is_free = (blocks >= geometry.init_blocks) & (blocks < first_local[..., None, None].clamp(max=num_blocks))
    logs = logs.where(is_free, -torch.inf)
    weights = torch.exp2(logs - logs.amax(3, keepdim=True).clamp(min=torch.finfo(torch.float32).min))
    weights /= weights.sum(3, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    total = torch.zeros(num_layers, num_heads, num_blocks, dtype=torch.float64)
    by_head = (
        torch.movedim(part, 0, 2).reshape(num_layers, num_heads, -1) for part in (blocks.where(is_free, 0), weights)
    )
    total.scatter_add_(2, *by_head)
    block = torch.arange(num_blocks)
    num_rows = ((block >= geometry.init_blocks) & (block < first_local)).sum(0)
    return total, num_rows.double()


def find_sources(
    answer: AnswerPicks, usual: Picks, geometry: BlockGeometry, places: "DocumentPlaces", limit: int
) -> AnswerSources:
    """The lines of at most `limit` blocks with the largest scores; those of touching blocks become one source."""
    scored: list[tuple[float, Part]] = []
    if len(answer.picks):
        scores = block_scores(answer.picks, usual, geometry)
        for block in scores.nonzero()[:, 0].tolist():
            parts = places.parts(block, geometry.block_size)
            scored += [(float(scores[block]) * part.num_tokens / geometry.block_size, part) for part in parts]
    total = sum(score for score, _ in scored)
    ranked = sorted(scored, key=lambda pair: (-pair[0], pair[1].first_token))
    with_lines = (pair for pair in ranked if places.lines([pair[1]]) is not None)
    sources = [places.source(run, score / total) for score, run in _runs(list(islice(with_lines, limit)))]
    return AnswerSources(
        sources=tuple(sorted(sources, key=lambda source: -source.share)),
        num_tokens=answer.num_tokens,
        num_dense=answer.num_dense,
        num_known=len(answer.picks),
        num_first=geometry.init_blocks * geometry.block_size,
        num_last=geometry.local_blocks * geometry.block_size,
    )


@dataclass(frozen=True)
class Part:
    """The tokens of one document in a block. Units: tokens, counted from the start of the prompt; the end excluded."""

    document: int
    first_token: int
    end_token: int

    @property
    def num_tokens(self) -> int:
        """How many they are."""
        return self.end_token - self.first_token


def _runs(scored: Sequence[tuple[float, Part]]) -> list[tuple[float, list[Part]]]:
    """Parts that touch, joined."""
    runs: list[tuple[float, list[Part]]] = []
    for score, part in sorted(scored, key=lambda pair: pair[1].first_token):
        last = runs[-1][1][-1] if runs else None
        if last is not None and last.document == part.document and last.end_token == part.first_token:
            runs[-1] = (runs[-1][0] + score, [*runs[-1][1], part])
        else:
            runs.append((score, [part]))
    return runs


def ids_behind_documents(segments: Sequence[Segment]) -> list[int]:
    """The ids of a prompt behind its last document."""
    end = max((i for i, segment in enumerate(segments, 1) if segment.kind == "document"), default=0)
    return [token for segment in segments[end:] for token in segment.ids]


class DocumentPlaces:
    """Which tokens of a prompt stand for which lines of its documents."""

    def __init__(self, segments: Sequence[Segment], pack: PromptPack, tokenizer: Tokenizer) -> None:
        ends = list(accumulate(len(segment.ids) for segment in segments))
        documents = [i for i, segment in enumerate(segments) if segment.kind == "document"]
        self._segments = [segments[i] for i in documents]
        self._ends = [ends[i] for i in documents]
        self._starts = [ends[i] - len(segments[i].ids) for i in documents]
        self._pack, self._tokenizer = pack, tokenizer
        self._known: dict[int, list[int]] = {}

    def parts(self, block: int, block_size: int) -> list[Part]:
        """The documents that have tokens in a block."""
        first, end = block * block_size, (block + 1) * block_size
        parts = []
        for number in range(bisect.bisect_right(self._ends, first), len(self._starts)):
            if self._starts[number] >= end:
                break
            parts.append(Part(number, max(first, self._starts[number]), min(end, self._ends[number])))
        return parts

    def source(self, run: Sequence[Part], share: float) -> Source:
        """The lines of parts that touch, each of which has some."""
        lines = self.lines(run)
        assert lines is not None
        return Source(self._pack.documents[run[0].document].path, *lines, share)

    def lines(self, run: Sequence[Part]) -> tuple[int, int] | None:
        """The first and the last line of parts that touch; None if they are the frame around the text."""
        number = run[0].document
        text, start = self._pack.documents[number].text, self._starts[number]
        begin, end = run[0].first_token - start, run[-1].end_token - start
        newlines = self._newlines(number)
        inside = b"".join(self._tokenizer.piece_bytes(i) for i in self._segments[number].ids[begin:end])
        num_leading = len(inside) - len(inside.lstrip(b"\n"))
        num_trailing = len(inside) - len(inside.rstrip(b"\n"))
        first = newlines[begin] + num_leading + 1 - FRAME_LINES
        last = newlines[end] - num_trailing + 1 - FRAME_LINES
        first, last = max(first, 1), min(last, text.count("\n") + (not text.endswith("\n")))
        return (first, last) if first <= last else None

    def _newlines(self, number: int) -> list[int]:
        """How many line ends stand before each token of a document's segment, and behind the last."""
        if number not in self._known:
            counts = (self._tokenizer.piece_bytes(i).count(b"\n") for i in self._segments[number].ids)
            self._known[number] = list(accumulate(counts, initial=0))
        return self._known[number]
