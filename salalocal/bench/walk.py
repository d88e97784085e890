"""One state that grows through all depths: a subject comes in, seconds at each depth go out; for `run`.

At each depth the last chunks before it are timed one by one, tokens are drawn from a fork, and the read goes on. So a
first token costs what was read so far, all chunks together, and the first draw; and a depth of a million tokens, with
all depths before it, is read once. A first depth of fewer chunks than runs is read from the start for every run.
"""

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime

from salalocal.bench.memory import peak_bytes
from salalocal.bench.subject import WARM_UP_TOKENS, Drawn, Subject, SubjectFacts
from salalocal.bench.work import Cost
from salalocal.engine.prefill import chunk_ends
from salalocal.errors import MemoryBudgetError
from salalocal.session.memory import naming_memory_errors


@dataclass(frozen=True)
class WalkPlan:
    """Where to stop and what to draw there: `num_runs` times `gen_tokens` tokens. Units: depths in tokens."""

    depths: tuple[int, ...]
    gen_tokens: int
    num_runs: int

    @property
    def drawn_tokens(self) -> int:
        """Tokens that a draw adds to a state, at most, that of a warm-up too."""
        return max(WARM_UP_TOKENS, 2 + self.gen_tokens * self.num_runs)


@dataclass(frozen=True)
class DepthResult:
    """What was measured at one depth.

    Units: seconds; `read_s` is all reading up to here, `chunks_s` the last chunks of `chunk_tokens` tokens each, up to
    `chunk_end`, and the runs of `drawn` draw `gen_tokens` tokens each.
    peak_memory_bytes: so far in this walk; None if not known.
    """

    num_tokens: int
    read_s: float
    chunk_tokens: int
    chunk_end: int
    chunks_s: tuple[float, ...]
    drawn: Drawn
    gen_tokens: int
    peak_memory_bytes: int | None
    tested_at: str

    @property
    def first_token_s(self) -> float:
        """From nothing read to the first token of an answer."""
        return self.read_s + self.drawn.first_s

    @property
    def chunk_s(self) -> float:
        """One of the last chunks: their median."""
        return statistics.median(self.chunks_s)

    @property
    def token_s(self) -> float:
        """One token drawn: the median run's mean."""
        return statistics.median(self.drawn.runs_s) / self.gen_tokens


@dataclass(frozen=True)
class Failure:
    """A depth that was not reached, and why."""

    num_tokens: int
    reason: str


@dataclass
class SubjectResult:
    """A subject's walk; it fills while the walk goes on, so that an interrupted one leaves what it has."""

    facts: SubjectFacts
    cost: Cost
    depths: list[DepthResult] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)


@dataclass(frozen=True)
class BenchProgress:
    """Where a walk is. Units: tokens and seconds; `tokens_per_s` is the mean rate of reading so far."""

    subject: str
    activity: str
    num_tokens: int
    total_tokens: int
    tokens_per_s: float


OnProgress = Callable[[BenchProgress], None]


def walk(
    subject: Subject, plan: WalkPlan, result: SubjectResult, on_progress: OnProgress, has_own_peak: bool = True
) -> None:
    """Fill the result depth by depth; a depth that memory does not hold, and all beyond it, become failures.

    `has_own_peak` says whether the peak of memory was forgotten before, and is the subject's own.
    """
    meter = _Meter(subject.facts.name, plan.depths[-1], on_progress)
    meter.tell("warming up", 0)
    depths = list(plan.depths)
    lost = _begin(subject, depths, plan.drawn_tokens)
    try:
        with naming_memory_errors("warming up"):
            if depths:
                subject.warm_up(depths)
    except MemoryBudgetError as error:
        result.failures += [Failure(depth, error.message) for depth in depths] + lost
        return
    position, read_s = 0, 0.0
    for number, depth in enumerate(depths):
        try:
            with naming_memory_errors(f"reading to {depth:,} tokens"):
                if number == 0:
                    timed, seconds = _read_first(subject, depth, depths[-1] + plan.drawn_tokens, plan.num_runs, meter)
                else:
                    timed, seconds = _read(subject, position, depth, plan.num_runs, meter)
            meter.tell("writing", depth)
            with naming_memory_errors(f"writing at {depth:,} tokens"):
                drawn = subject.draw(plan.gen_tokens, plan.num_runs, number == len(depths) - 1)
        except MemoryBudgetError as error:
            result.failures += [Failure(lost_depth, error.message) for lost_depth in depths[number:]]
            break
        position, read_s = depth, read_s + seconds
        peak = peak_bytes(subject.device) if has_own_peak else None
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        result.depths.append(
            DepthResult(
                num_tokens=depth,
                read_s=read_s,
                chunk_tokens=timed.size,
                chunk_end=timed.end,
                chunks_s=timed.seconds,
                drawn=drawn,
                gen_tokens=plan.gen_tokens,
                peak_memory_bytes=peak,
                tested_at=now,
            )
        )
    result.failures += lost


def _begin(subject: Subject, depths: list[int], drawn_tokens: int) -> list[Failure]:
    """A state for the deepest of the depths that memory has room for; the others are taken off the list."""
    lost: list[Failure] = []
    while depths:
        try:
            with naming_memory_errors(f"making room for {depths[-1]:,} tokens"):
                subject.begin(depths[-1] + drawn_tokens)
            break
        except MemoryBudgetError as error:
            lost.insert(0, Failure(depths.pop(), error.message))
    return lost


@dataclass(frozen=True)
class _TimedChunks:
    """Chunks that were timed alone: tokens of each, where the last one ended, seconds of each."""

    size: int
    end: int
    seconds: tuple[float, ...]


def _read_first(
    subject: Subject, depth: int, capacity: int, num_runs: int, meter: "_Meter"
) -> tuple[_TimedChunks, float]:
    """Read an empty state to a depth. Where that is fewer chunks than runs, once for every run, each on an empty state
    again: the last whole chunk of each is timed, and all seconds are those of the median run."""
    if num_runs == 1 or depth // subject.facts.chunk_size >= num_runs:
        subject.begin(capacity)
        return _read(subject, 0, depth, num_runs, meter)
    readings = []
    for _ in range(num_runs):
        subject.begin(capacity)
        meter.restart()
        readings.append(_read(subject, 0, depth, 1, meter))
    timed = [timed for timed, _ in readings]
    seconds = tuple(one.seconds[0] for one in timed)
    return _TimedChunks(timed[0].size, timed[0].end, seconds), statistics.median(seconds for _, seconds in readings)


def _read(subject: Subject, position: int, depth: int, num_singles: int, meter: "_Meter") -> tuple[_TimedChunks, float]:
    """Read to a depth -> the chunks that were timed alone; all seconds.

    Whole chunks are timed; one that a depth cuts short only where there is no other.
    """
    ends = [position, *chunk_ends(position, depth - position, subject.facts.chunk_size)]
    singles = ends[-num_singles - 2 :] if len(ends) > num_singles + 2 else ends
    total_s = _timed_read(subject, position, singles[0], meter)
    pieces = [(end - start, end, _timed_read(subject, start, end, meter)) for start, end in itertools.pairwise(singles)]
    total_s += sum(seconds for _, _, seconds in pieces)
    size = max(num_tokens for num_tokens, _, _ in pieces)
    whole = [(end, seconds) for num_tokens, end, seconds in pieces if num_tokens == size][-num_singles:]
    return _TimedChunks(size, whole[-1][0], tuple(seconds for _, seconds in whole)), total_s


def _timed_read(subject: Subject, start: int, end: int, meter: "_Meter") -> float:
    if start == end:
        return 0.0
    started_s = time.perf_counter()
    subject.read(end - start, lambda done: meter.tell("reading", start + done, time.perf_counter() - started_s))
    seconds = time.perf_counter() - started_s
    meter.add(seconds)
    return seconds


class _Meter:
    """Turns what a walk does into progress; the rate is that of reading alone."""

    def __init__(self, subject: str, total_tokens: int, on_progress: OnProgress) -> None:
        self._subject, self._total_tokens, self._on_progress = subject, total_tokens, on_progress
        self._read_s = 0.0

    def tell(self, activity: str, num_tokens: int, running_s: float = 0.0) -> None:
        """`running_s`: seconds of reading that are not added yet."""
        seconds = self._read_s + running_s
        rate = num_tokens / seconds if seconds else 0.0
        self._on_progress(BenchProgress(self._subject, activity, num_tokens, self._total_tokens, rate))

    def restart(self) -> None:
        """Reading begins again at the first token."""
        self._read_s = 0.0

    def add(self, seconds: float) -> None:
        """A read is done."""
        self._read_s += seconds
