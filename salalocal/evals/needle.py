"""Needles over a grid of lengths and depths: can the model find a line wherever it stands; for `eval needle`.

One question a needle: a line with an invented name and value is planted at a depth of a haystack, and the model is
asked for the value. Depth is the share of the documents' tokens in front of the line. With several keys, further lines
of the same form with other names stand at random depths; to name one of their values as well is wrong.

The depths of a haystack are walked from the deepest up, so what stands in front of a needle is read once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from random import Random

from salalocal.errors import RequestError
from salalocal.evals import invention
from salalocal.evals.asking import Case, Question, Subject
from salalocal.evals.haystack import Haystack, Planted, Stack, ask_about, document_budget
from salalocal.evals.questionnaire import Place, Questionnaire, Report, Watch, answer_all, open_haystack
from salalocal.evals.scoring import mark_all
from salalocal.session.plan import short_tokens
from salalocal.session.start import Sources
from salalocal.session.tokens import TextCodec
from salalocal.settings import Settings

MIN_LENGTH = 512
MAX_KEYS = 1000


@dataclass(frozen=True)
class Form:
    """How a needle and its question are worded, with {name} and {value}."""

    line: str
    question: str


FORMS = {
    "constant": Form("{name} = {value}", "What is the value of {name}?"),
    "sentence": Form(
        "The special magic number for {name} is {value}.",
        "What is the special magic number for {name} mentioned in the documents?",
    ),
}


@dataclass(frozen=True)
class NeedleRequest:
    """The grid. Units: lengths in tokens of the whole context; depths counts the places from 0 to 100 %."""

    lengths: tuple[int, ...]
    depths: int = 11
    samples: int = 2
    keys: int = 1
    form: str = "constant"
    seed: int = 0

    def __post_init__(self) -> None:
        check_lengths(self.lengths)
        if self.form not in FORMS:
            raise RequestError(f"no needle is called {self.form[:40]!r}", f"use one of {', '.join(FORMS)}")
        for flag, value, high in (("depths", self.depths, 101), ("samples", self.samples, 10_000)):
            check_count(flag, value, high)
        check_count("keys", self.keys, MAX_KEYS)

    @property
    def shares(self) -> list[float]:
        """The depths, from 0 to 1; a single one is the middle."""
        return [i / (self.depths - 1) for i in range(self.depths)] if self.depths > 1 else [0.5]


def check_lengths(lengths: Sequence[int], shortest: int = MIN_LENGTH) -> None:
    """Raises: RequestError for none, or for a context in which nothing fits."""
    if not lengths:
        raise RequestError("no context length given", "--ctx 4k,16k")
    for length in lengths:
        if length < shortest:
            raise RequestError(f"--ctx {length} is too short for this evaluation", f"--ctx {shortest}")


def check_count(flag: str, value: int, high: int) -> None:
    """Raises: RequestError that names the flag."""
    if not 1 <= value <= high:
        raise RequestError(f"--{flag} {value} should be from 1 to {high:,}", f"--{flag} 1")


def needle_cases(request: NeedleRequest, haystack: Haystack, codec: TextCodec) -> Iterator[Case]:
    """The questions of a grid, cheapest lengths first. Keys and labels: length, depth in percent, sample."""
    for length in request.lengths:
        for sample in range(request.samples):
            grounds = _Grounds(request, haystack, codec, (length, sample))
            deepest = max(request.shares)
            for share in reversed(request.shares):
                percent = round(100 * share, 1)
                yield Case(
                    key=f"{length}/{percent:g}/{sample}",
                    label=f"{short_tokens(length)} at {percent:g} %",
                    labels={"length": length, "depth": percent, "sample": sample},
                    cost_tokens=length if share == deepest else max(512, round((1 - share) * length)),
                    make=partial(grounds.question, share),
                )


class _Grounds:
    """One haystack of the grid with its distractors, made when its first question is asked."""

    def __init__(self, request: NeedleRequest, haystack: Haystack, codec: TextCodec, cell: tuple[int, int]) -> None:
        self._request = request
        self._haystack = haystack
        self._codec = codec
        self._cell = cell
        self._form = FORMS[request.form]

    def question(self, share: float) -> Question:
        """The question whose needle stands at this depth."""
        rng = self._rng()
        name_of = invention.constant_name if self._request.form == "constant" else invention.spoken_name
        stack = self._stack(rng, name_of(rng))
        others = self._pairs(rng, stack, self._request.keys - 1, ())
        placed = [Planted(rng.random(), self._form.line.format(name=name, value=value)) for name, value in others]
        ((name, value),) = self._pairs(self._rng(share), stack, 1, others)
        pack = stack.plant([*placed, Planted(share, self._form.line.format(name=name, value=value))])
        wrong = [other for _, other in others]
        asked = ask_about(pack, self._form.question.format(name=name))
        return Question(asked, (value,), partial(mark_all, expected=(value,), wrong=wrong))

    def _rng(self, *more: object) -> Random:
        return invention.seeded("needle", self._request.seed, *self._cell, *more)

    def _stack(self, rng: Random, name: str) -> Stack:
        length, _ = self._cell
        line = self._form.line.format(name=name, value=invention.number(rng)) + "\n"
        line_tokens = len(self._codec.tokenizer.encode(line)) + 8  # other names may take a few tokens more
        budget = document_budget(length, self._form.question.format(name=name), self._codec)
        return self._haystack.stack(max(1, budget - self._request.keys * line_tokens), rng)

    def _pairs(self, rng: Random, stack: Stack, count: int, taken: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
        """Names and values that are nowhere in the haystack nor taken."""
        name_of = invention.constant_name if self._request.form == "constant" else invention.spoken_name
        used = {text for pair in taken for text in pair}

        def is_known(text: str) -> bool:
            return text in used or text in stack

        names = invention.distinct(partial(name_of, rng), count, is_known)
        return list(zip(names, invention.distinct(partial(invention.number, rng), count, is_known), strict=True))


def measure_needles(settings: Settings, request: NeedleRequest, sources: Sources, place: Place, watch: Watch) -> Report:
    """Ask a model about every needle of a grid.

    Raises: RequestError, HubError, CheckpointError, PackError, MemoryBudgetError, BackendError, NumericError,
    StateError, BusyError.
    """
    subject = Subject.find(settings, watch.tell)
    haystack = open_haystack(subject, sources, watch.tell)
    decided = {**asdict(request), **haystack.to_json()}
    cases = list(needle_cases(request, haystack, subject.codec))
    asked = Questionnaire("needle", ("length", "depth"), decided, cases, max(request.lengths))
    return answer_all(subject, asked, place, watch)
