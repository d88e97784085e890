"""How much of the time a card works while it reads and while it writes, and with which kernels: the 9B shape on a card.

    PYTHONPATH=. python3 benchmarks/busy.py --seconds 45 --out busy.json
    PYTHONPATH=. python3 benchmarks/busy.py --dry --out /tmp/busy.json    # a tiny shape on a CPU: this script alone

    busy = length of the union of all kernels' intervals / time from the first kernel's start to the last one's end

Random int4 weights, int8 math, chunks of 8,192. At each depth three chunks are read and 64 tokens drawn twice: by the
clock, and then under torch.profiler, which asks CUPTI for every kernel. CUPTI names the kernels of a replayed CUDA
graph one by one, as it does those launched one by one; a look at them costs a little time between kernels. So `busy` is
what was seen, at the worst, and `kernels_of_wall` holds the kernels' time against the clock without a profiler.
`launches` are kernels; copies and fills count apart. Units: milliseconds and microseconds as named.
"""

import argparse
import itertools
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.synthetic_checkpoint import small_config
from salalocal.bench.ceilings import wait_for
from salalocal.bench.random_weights import random_engine, random_layout
from salalocal.engine.engine import Engine, EngineConfig
from salalocal.engine.load import Placement
from salalocal.engine.sampling_params import SamplingParams
from salalocal.model.config import SalaConfig
from salalocal.model.state import ModelState

DEPTHS, CHUNK_SIZE = (65_536, 262_144), 8192
DRY_DEPTHS, DRY_CHUNK_SIZE = (256, 512), 32
NUM_CHUNKS, NUM_TOKENS = 3, 64
ANSWER_ROOM = 8 + 2 * NUM_TOKENS
NUM_SHOWN = 10
COPIES = ("Memcpy", "Memset")
SECONDS_A_TOKEN = 1 / 40_000  # of reading on an H100, to know what fits into the time


@dataclass(frozen=True)
class Interval:
    """Something that the device did. Units: microseconds on the profiler's clock."""

    name: str
    start_us: float
    end_us: float


def busy_us(intervals: Iterable[Interval]) -> float:
    """The time in which at least one of them runs."""
    total = 0.0
    until = float("-inf")
    for one in sorted(intervals, key=lambda one: one.start_us):
        total += max(0.0, one.end_us - max(one.start_us, until))
        until = max(until, one.end_us)
    return total


def heaviest(intervals: Sequence[Interval], num_units: int) -> list[dict[str, Any]]:
    """By name: milliseconds and launches of one unit, and the share of all kernel time; the heaviest first."""
    totals_us: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    for one in intervals:
        totals_us[one.name] += one.end_us - one.start_us
        counts[one.name] += 1
    total = sum(totals_us.values()) or 1.0
    return [
        {"name": name, "ms": us / 1e3 / num_units, "launches": counts[name] / num_units, "share": us / total}
        for name, us in sorted(totals_us.items(), key=lambda item: -item[1])
    ]


def longest_waits(intervals: Sequence[Interval], num_units: int) -> list[dict[str, Any]]:
    """Time without any kernel, summed by the kernel that ended a wait; the longest first. Microseconds of one unit."""
    waits: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    until = None
    for one in sorted(intervals, key=lambda one: one.start_us):
        if until is not None and one.start_us > until:
            waits[one.name] += one.start_us - until
            counts[one.name] += 1
        until = one.end_us if until is None else max(until, one.end_us)
    ranked = sorted(waits.items(), key=lambda item: -item[1])
    return [{"before": name, "us": us / num_units, "waits": counts[name] / num_units} for name, us in ranked]


def summary(intervals: Sequence[Interval], num_units: int, wall_ms: float) -> dict[str, Any]:
    """What a trace of `num_units` chunks or tokens says. `wall_ms`: of one unit, without a profiler."""
    kernels = [one for one in intervals if not one.name.startswith(COPIES)]
    if not kernels:
        return {"error": "the profiler saw no kernel"}
    span_us = max(one.end_us for one in kernels) - min(one.start_us for one in kernels)
    kernels_us = busy_us(kernels)
    return {
        "units": num_units,
        "busy": kernels_us / span_us,
        "kernels_of_wall": kernels_us / 1e3 / num_units / wall_ms,
        "wall_ms": wall_ms,
        "kernel_ms": kernels_us / 1e3 / num_units,
        "profiled_ms": span_us / 1e3 / num_units,
        "launches": len(kernels) / num_units,
        "copies": (len(intervals) - len(kernels)) / num_units,
        "heaviest": heaviest(kernels, num_units)[:NUM_SHOWN],
        "waits": longest_waits(kernels, num_units)[:NUM_SHOWN],
    }


def traced(device: torch.device, work: Callable[[], object]) -> list[Interval]:
    """What the device did; on a CPU, which runs no kernels, operations stand for them."""
    is_card = device.type == "cuda"
    wait_for(device)
    with profile(activities=[ProfilerActivity.CUDA if is_card else ProfilerActivity.CPU]) as trace:
        work()
        wait_for(device)
    return [
        Interval(event.name, event.time_range.start, event.time_range.end)
        for event in trace.events() or []
        if event.device_type.name == ("CUDA" if is_card else "CPU")
    ]


def clocked_ms(device: torch.device, work: Callable[[], object]) -> float:
    wait_for(device)
    started_s = time.perf_counter()
    work()
    wait_for(device)
    return (time.perf_counter() - started_s) * 1e3


class Reader:
    """A state that grows with random tokens."""

    def __init__(self, engine: Engine, capacity: int) -> None:
        self.engine, self.state = engine, engine.new_state(capacity)
        self.logits: Tensor | None = None
        self._generator = torch.Generator().manual_seed(0)

    def read_to(self, end: int) -> None:
        vocab_size = self.engine.model.config.vocab_size
        ids = torch.randint(0, vocab_size, (end - self.state.num_tokens,), generator=self._generator)
        self.logits = self.engine.prefill(ids, self.state)

    def answer(self, state: ModelState) -> Callable[[], None]:
        """An answer that has its graph already; each call draws `NUM_TOKENS` more."""
        assert self.logits is not None
        # More than are drawn: the last step of all is not run ahead, and one would be missing.
        params = SamplingParams(max_tokens=ANSWER_ROOM, is_loop_guarded=False)
        tokens = self.engine.generate(state, self.logits, params)
        for _ in range(3):  # from the logits; the first step, as it is; the second, which is captured
            next(tokens)

        def draw() -> None:
            for _ in range(NUM_TOKENS):
                next(tokens)

        return draw


def measure_depth(reader: Reader, depth: int, chunk_size: int) -> dict[str, Any]:
    """Reads to the depth, its last chunks measured, and draws from there."""
    device, stretch = reader.engine.device, NUM_CHUNKS * chunk_size
    reader.read_to(depth - 2 * stretch)
    read_ms = clocked_ms(device, lambda: reader.read_to(depth - stretch)) / NUM_CHUNKS
    read = summary(traced(device, lambda: reader.read_to(depth)), NUM_CHUNKS, read_ms)
    draw = reader.answer(reader.state.fork())
    write_ms = clocked_ms(device, draw) / NUM_TOKENS
    write = summary(traced(device, draw), NUM_TOKENS, write_ms)
    return {"chunk": read, "token": write}


def show(depth: int, what: str, found: dict[str, Any]) -> None:
    if "error" in found:
        print(f"{depth:,} tokens, {what}: {found['error']}", flush=True)
        return
    shares = f"busy {found['busy']:.1%}, kernels {found['kernels_of_wall']:.1%} of the clock"
    times = f"{found['wall_ms']:.3f} ms ({found['profiled_ms']:.3f} profiled), kernels {found['kernel_ms']:.3f} ms"
    print(f"{depth:,} tokens, a {what}: {shares}; {times}; {found['launches']:.1f} launches", flush=True)
    for row in found["heaviest"]:
        print(f"  {row['ms']:9.3f} ms {row['share']:6.1%} {row['launches']:7.1f} x {row['name'][:80]}", flush=True)
    for row in found["waits"][:3]:
        print(f"  {row['us']:9.1f} us of waiting, {row['waits']:.1f} times, before {row['before'][:70]}", flush=True)


def open_engine(device: torch.device, is_dry: bool) -> Engine:
    config = small_config(2) if is_dry else SalaConfig.released()
    layout = random_layout(config, device)
    return random_engine(config, layout, device, Placement("int8"), EngineConfig(chunk_of(is_dry)))


def chunk_of(is_dry: bool) -> int:
    return DRY_CHUNK_SIZE if is_dry else CHUNK_SIZE


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every depth that time is left for."""
    until_s = time.monotonic() + arguments.seconds
    device = torch.device("cpu" if arguments.dry else "cuda")
    chunk_size = chunk_of(arguments.dry)
    depths = DRY_DEPTHS if arguments.dry else arguments.depths
    engine = open_engine(device, arguments.dry)
    warm = Reader(engine, 3 * chunk_size + ANSWER_ROOM)
    warm.read_to(3 * chunk_size)
    draw = warm.answer(warm.state)
    traced(device, draw)  # the first use of CUPTI takes a while
    del warm, draw
    reader = Reader(engine, depths[-1] + ANSWER_ROOM)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    found: dict[str, Any] = {"device": name, "torch": torch.__version__, "chunk_size": chunk_size, "depths": {}}
    print(f"{name}, {until_s - time.monotonic():.0f} s left", flush=True)
    for before, depth in itertools.pairwise((0, *depths)):
        if until_s - time.monotonic() < (depth - before) * SECONDS_A_TOKEN + 3:
            print(f"no time left for {depth:,} tokens", flush=True)
            break
        measured = measure_depth(reader, depth, chunk_size)
        found["depths"][depth] = measured
        for what, one in measured.items():
            show(depth, what, one)
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the results")
    parser.add_argument("--seconds", type=float, default=45, help="what does not fit is left out and said")
    parser.add_argument(
        "--depths", type=lambda text: tuple(int(word) for word in text.split(",")), default=DEPTHS, help="by commas"
    )
    parser.add_argument("--dry", action="store_true", help="a tiny shape on the CPU: checks this script")
    found = measure(parser.parse_args())
    whole = [one for depth in found["depths"].values() for one in depth.values()]
    raise SystemExit(1 if not whole or any("error" in one for one in whole) else 0)


if __name__ == "__main__":
    main()
