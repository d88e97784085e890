"""Perplexity of a text, read as one context or through a sliding window; for `eval ppl`.

    perplexity = exp(mean -log p(x_t | what is read in front of it)),  over all tokens but the first of each reading

Full context: each text is read once, from its start, as far as `--ctx` allows, and what it costs is counted by position
as well, since a model that makes use of a long context has a lower perplexity deep in it. Sliding: windows of `--ctx`
tokens that move by `--stride`, each read from a start token of its own, and of each only the last `stride` tokens count
(the first window counts whole): every token is then predicted from at least `ctx - stride` tokens.
Bits per byte compare models with different vocabularies: the bits of all counted tokens over the bytes they stand for.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from salalocal.engine.engine import Engine
from salalocal.errors import RequestError
from salalocal.evals.asking import Subject
from salalocal.evals.questionnaire import Place, Watch, opened
from salalocal.evals.study import OnTokens, Record, Task
from salalocal.prompt.tokenizer import Tokenizer
from salalocal.session.memory import naming_memory_errors
from salalocal.session.runtime import Runtime
from salalocal.session.start import Sources
from salalocal.session.texts import EVALUATION, MIN_SEQUENCE_TOKENS, TokenText, digest, file_text, shipped_text
from salalocal.settings import Settings

FIRST_BUCKET = 1024
"""Positions below it are one bucket; each further bucket ends at twice the position."""


@dataclass(frozen=True)
class PerplexityRequest:
    """How the text is read. Units: context and stride in tokens, None for no sliding; max_tokens counted in all."""

    context: int
    stride: int | None = None
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.context < MIN_SEQUENCE_TOKENS:
            raise RequestError(f"--ctx {self.context} is too short to evaluate on", f"--ctx {MIN_SEQUENCE_TOKENS}")
        if self.stride is not None and not 1 <= self.stride < self.context:
            raise RequestError(
                f"--stride {self.stride} should be below the context of {self.context:,} tokens",
                f"--stride {self.context // 2}",
            )


@dataclass(frozen=True)
class Window:
    """Ids to read from an empty state; those from `first_counted` on are counted, at position `start` + their index."""

    key: str
    ids: tuple[int, ...]
    first_counted: int


@dataclass(frozen=True)
class Loss:
    """What tokens cost. Units: nats in all; counted tokens, and the bytes of text they stand for."""

    nats: float = 0.0
    num_tokens: int = 0
    num_bytes: int = 0

    def __add__(self, other: "Loss") -> "Loss":
        return Loss(self.nats + other.nats, self.num_tokens + other.num_tokens, self.num_bytes + other.num_bytes)

    def to_json(self) -> dict[str, Any]:
        """Perplexity, nats a token, bits a byte, and what was counted."""
        mean = self.nats / self.num_tokens
        return {
            "perplexity": round(math.exp(min(mean, 700.0)), 5),
            "nats_per_token": round(mean, 6),
            "bits_per_byte": round(self.nats / math.log(2) / max(1, self.num_bytes), 6),
            "tokens": self.num_tokens,
            "bytes": self.num_bytes,
        }


def windows(text: TokenText, request: PerplexityRequest) -> list[Window]:
    """What is read, in order. Raises: RequestError if there is nothing to predict."""
    made = [window for number, ids in enumerate(text.texts) for window in _windows(number, ids, request)]
    left = request.max_tokens if request.max_tokens is not None else sum(map(len, text.texts))
    kept = []
    for window in made:
        if left <= 0:
            break
        counted = min(left, len(window.ids) - window.first_counted)
        kept.append(Window(window.key, window.ids[: window.first_counted + counted], window.first_counted))
        left -= counted
    if not kept:
        raise RequestError(f"{text.name}: there is no token to predict", "give a longer text")
    return kept


def _windows(number: int, ids: Sequence[int], request: PerplexityRequest) -> Iterator[Window]:
    """Windows of one text; each begins with the start token, which is the first one of the text."""
    step = request.context - 1 if request.stride is None else request.stride
    rest, room = tuple(ids[1:]), request.context - 1
    counted_to = 0
    for end in range(min(room, len(rest)), len(rest) + step, step):
        start = max(0, min(end, len(rest)) - room) if request.stride is not None else counted_to
        piece = (ids[0], *rest[start:end])
        first = 1 + counted_to - start
        if len(piece) > first:
            yield Window(f"{number}/{start}", piece, first)
        counted_to = min(end, len(rest))


def perplexity_tasks(made: Sequence[Window], runtime: Runtime) -> list[Task]:
    """Every window as a task of a study; a record has the loss by bucket of position."""
    lengths = _PieceLengths(runtime.tokenizer)
    return [
        Task(
            key=window.key,
            label=f"text {int(window.key.partition('/')[0]) + 1}",
            cost_tokens=len(window.ids),
            run=partial(_read, runtime.engine, window, lengths),
        )
        for window in made
    ]


def bucket_end(position: int) -> int:
    """The position at which the bucket of a position ends."""
    return max(FIRST_BUCKET, 1 << position.bit_length())


def losses(records: Sequence[Record]) -> tuple[Loss, dict[int, Loss]]:
    """The loss of all records, and by where the bucket of the position ends, in order."""
    by_end: dict[int, Loss] = {}
    for record in records:
        for end, nats, num_tokens, num_bytes in record["losses"]:
            by_end[end] = by_end.get(end, Loss()) + Loss(nats, num_tokens, num_bytes)
    ordered = dict(sorted(by_end.items()))
    return sum(ordered.values(), Loss()), ordered


class _PieceLengths:
    """How many bytes of text a token stands for."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, int] = {}

    def of(self, token: int) -> int:
        if token not in self._known:
            self._known[token] = len(self._tokenizer.piece_bytes(token))
        return self._known[token]


def _read(engine: Engine, window: Window, lengths: _PieceLengths, on_tokens: OnTokens) -> Record:
    by_end: dict[int, Loss] = {}
    position = 0
    with naming_memory_errors("computing logits"):
        for logits in engine.iter_logits(list(window.ids)):
            for index, nats in _costs(logits, window, position):
                loss = Loss(nats, 1, lengths.of(window.ids[index]))
                by_end[bucket_end(index)] = by_end.get(bucket_end(index), Loss()) + loss
            position += logits.shape[0]
            on_tokens(logits.shape[0])
    return {
        "losses": [[end, loss.nats, loss.num_tokens, loss.num_bytes] for end, loss in by_end.items()],
        "context_tokens": len(window.ids),
    }


def _costs(logits: Tensor, window: Window, position: int) -> Iterator[tuple[int, float]]:
    """Which counted tokens the rows from `position` on predict, and -log p of each. Shapes: logits [R, vocab]."""
    first = max(position, window.first_counted - 1)
    end = min(position + logits.shape[0], len(window.ids) - 1)
    if first >= end:
        return
    with torch.inference_mode():
        rows = logits[first - position : end - position].float()
        following = torch.tensor(window.ids[first + 1 : end + 1], device=rows.device)
        nats = (rows.logsumexp(-1) - rows.gather(1, following[:, None])[:, 0]).double().tolist()
    yield from zip(range(first + 1, end + 1), nats, strict=True)


@dataclass(frozen=True)
class PerplexityReport:
    """What came out: the study's identity, the records' folder, the loss in all and by the end of its bucket."""

    identity: Record
    folder: Path
    num_windows: int
    total: Loss
    by_end: dict[int, Loss]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            **self.identity,
            "results": str(self.folder),
            "windows": self.num_windows,
            "total": self.total.to_json(),
            "by_position": [{"up_to": end} | loss.to_json() for end, loss in self.by_end.items()],
        }


def measure_perplexity(
    settings: Settings, request: PerplexityRequest, sources: Sources, place: Place, watch: Watch
) -> PerplexityReport:
    """Read a text, the shipped one if no sources are named, and report its perplexity. Raises: as `measure_needles`."""
    subject = Subject.find(settings, watch.tell)
    if sources.paths:
        text = file_text(sources, subject.codec, watch.tell)
    else:
        text = shipped_text(EVALUATION, subject.codec)
    made = windows(text, request)
    counted = sum(len(window.ids) - window.first_counted for window in made)
    watch.tell(f"text: {text.name}, {counted:,} of {text.num_tokens:,} tokens counted")
    decided = {**asdict(request), "text": text.name, "text_sha256": digest(window.ids for window in made)}
    with opened(subject, "ppl", decided, place, watch) as study:
        if any(window.key not in study.records for window in made):
            runtime = subject.open(max(len(window.ids) for window in made))
            study.run(perplexity_tasks(made, runtime), watch.on_progress)
        total, by_end = losses([study.records[window.key] for window in made])
    return PerplexityReport(study.identity, study.folder, len(made), total, by_end)
