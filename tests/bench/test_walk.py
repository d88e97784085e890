"""The walk: what is read and timed in which order, what a first token costs, and depths that memory does not hold."""

import itertools
from collections.abc import Iterator, Sequence

import pytest
import torch

from salalocal.bench import walk as walk_module
from salalocal.bench.subject import Drawn, OnTokens, SubjectFacts
from salalocal.bench.walk import BenchProgress, SubjectResult, WalkPlan, walk
from salalocal.bench.work import DenseCost, DenseShape

FACTS = SubjectFacts("fake", "a fake", 1, 1, "fp32", "fp32", "fp32", chunk_size=100)
COST = DenseCost(DenseShape(10, 8, 8, 1, 1, 1, 8), 4)


class Fake:
    """Reads a hundred tokens a second on a clock of its own, and notes what is asked of it."""

    def __init__(self, clock: "Clock", room: int = 10**6) -> None:
        self.facts, self.cost, self.device = FACTS, COST, torch.device("cpu")
        self.clock, self.room = clock, room
        self.calls: list[tuple[str, int]] = []
        self.num_tokens = 0
        self.fails_at: int | None = None
        self.slowness_s: Iterator[float] = iter(())

    def warm_up(self, depths: Sequence[int]) -> None:
        self.calls.append(("warm up", depths[-1]))

    def begin(self, capacity: int) -> None:
        self.calls.append(("begin", capacity))
        if capacity > self.room:
            raise torch.OutOfMemoryError("too much")
        self.num_tokens = 0

    def read(self, num_tokens: int, on_tokens: OnTokens) -> None:
        self.calls.append(("read", num_tokens))
        if self.fails_at is not None and self.num_tokens + num_tokens > self.fails_at:
            raise torch.OutOfMemoryError("too much")
        if self.num_tokens == 0:
            self.clock.now_s += next(self.slowness_s, 0.0)
        for done in range(50, num_tokens + 1, 50):
            self.clock.now_s += 0.5
            on_tokens(done)
        self.clock.now_s += num_tokens % 50 / 100
        self.num_tokens += num_tokens

    def draw(self, num_tokens: int, num_runs: int, is_last: bool) -> Drawn:
        self.calls.append(("draw last" if is_last else "draw", self.num_tokens))
        self.clock.now_s += 100.0
        return Drawn(0.25, 0.5, tuple(0.1 * run * num_tokens for run in range(1, num_runs + 1)))


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(walk_module.time, "perf_counter", lambda: clock.now_s)
    yield clock


def walked(subject: Fake, *depths: int, num_runs: int = 2) -> tuple[SubjectResult, list[BenchProgress]]:
    result, told = SubjectResult(subject.facts, subject.cost), []
    walk(subject, WalkPlan(depths, 16, num_runs), result, told.append)
    return result, told


def test_one_read_goes_through_all_depths(clock: Clock) -> None:
    subject = Fake(clock)
    result, _ = walked(subject, 250, 1000)
    begun = ("begin", 1000 + 2 + 2 * 16)
    assert subject.calls[:3] == [begun, ("warm up", 1000), begun], "kernels are compiled for the sizes of a state"
    reads = [size for call, size in subject.calls if call == "read"]
    assert sum(reads) == 1000
    ends = list(itertools.accumulate(reads))
    assert set(ends) >= {250, 800, 900, 1000} and ends == sorted(ends)
    assert all(end % 100 == 0 or end in (250, 1000) for end in ends)
    assert [call for call in subject.calls if "draw" in call[0]] == [("draw", 250), ("draw last", 1000)]
    assert [depth.num_tokens for depth in result.depths] == [250, 1000] and not result.failures


def test_a_first_token_costs_all_reading_but_no_drawing_before(clock: Clock) -> None:
    result, _ = walked(Fake(clock), 250, 1000)
    assert [depth.read_s for depth in result.depths] == pytest.approx([2.5, 10.0])
    assert [depth.first_token_s for depth in result.depths] == pytest.approx([2.75, 10.25])


def test_whole_chunks_are_timed(clock: Clock) -> None:
    first, second = walked(Fake(clock), 250, 1000)[0].depths
    assert (first.chunk_tokens, first.chunk_end) == (100, 200)
    assert first.chunks_s == pytest.approx((1.0, 1.0))
    assert (second.chunk_tokens, second.chunk_end) == (100, 1000)
    assert second.chunk_s == pytest.approx(1.0)
    assert second.token_s == pytest.approx(0.15)


def test_a_depth_below_one_chunk_is_timed_as_it_is(clock: Clock) -> None:
    depth = walked(Fake(clock), 40)[0].depths[0]
    assert (depth.chunk_tokens, depth.chunk_end, depth.chunks_s) == (40, 40, pytest.approx((0.4, 0.4)))


def test_a_first_depth_of_few_chunks_is_read_for_every_run(clock: Clock) -> None:
    subject = Fake(clock)
    subject.slowness_s = iter([0.3, 0.0, 0.1])
    first, second = walked(subject, 200, 700, num_runs=3)[0].depths
    assert (first.chunk_tokens, first.chunk_end) == (100, 200)
    assert first.chunks_s == pytest.approx((1.0, 1.0, 1.0))
    assert first.read_s == pytest.approx(2.1), "the median run"
    assert second.read_s == pytest.approx(7.1) and second.chunks_s == pytest.approx((1.0, 1.0, 1.0))
    begun = [size for call, size in subject.calls if call == "begin"]
    assert begun == [700 + 2 + 3 * 16] * 4
    assert sum(size for call, size in subject.calls if call == "read") == 3 * 200 + 500


def test_one_run_of_a_short_first_depth_is_one_read(clock: Clock) -> None:
    subject = Fake(clock)
    assert walked(subject, 40, num_runs=1)[0].depths[0].chunks_s == pytest.approx((0.4,))
    assert [size for call, size in subject.calls if call == "read"] == [40]


def test_depths_without_room_are_named_and_the_others_measured(clock: Clock) -> None:
    subject = Fake(clock, room=700)
    result, _ = walked(subject, 300, 600, 900, 1200)
    assert [depth.num_tokens for depth in result.depths] == [300, 600]
    assert [failure.num_tokens for failure in result.failures] == [900, 1200]
    assert all("out of memory" in failure.reason for failure in result.failures)
    assert ("draw last", 600) in subject.calls


def test_memory_that_ends_on_the_way_leaves_what_was_measured(clock: Clock) -> None:
    subject = Fake(clock)
    subject.fails_at = 500
    result, _ = walked(subject, 300, 600, 900)
    assert [depth.num_tokens for depth in result.depths] == [300]
    assert [failure.num_tokens for failure in result.failures] == [600, 900]
    assert "reading to 600 tokens" in result.failures[0].reason


def test_an_interrupt_leaves_what_was_measured(clock: Clock) -> None:
    subject = Fake(clock)
    result = SubjectResult(subject.facts, subject.cost)

    def interrupt(progress: BenchProgress) -> None:
        if progress.num_tokens > 500:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        walk(subject, WalkPlan((300, 900), 16, 2), result, interrupt)
    assert [depth.num_tokens for depth in result.depths] == [300]


def test_progress_counts_up_at_the_rate_of_reading(clock: Clock) -> None:
    _, told = walked(Fake(clock), 250, 1000)
    reading = [progress for progress in told if progress.activity == "reading"]
    assert [progress.num_tokens for progress in reading] == sorted(progress.num_tokens for progress in reading)
    assert all(progress.tokens_per_s == pytest.approx(100.0) for progress in reading)
    assert {progress.activity for progress in told} == {"warming up", "reading", "writing"}
    assert all(progress.total_tokens == 1000 for progress in told)


def test_a_peak_that_is_not_the_subject_s_own_is_not_shown(clock: Clock) -> None:
    subject = Fake(clock)
    result = SubjectResult(subject.facts, subject.cost)
    walk(subject, WalkPlan((100,), 4, 1), result, lambda progress: None, has_own_peak=False)
    assert result.depths[0].peak_memory_bytes is None
