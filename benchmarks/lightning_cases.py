"""What the lightning benchmarks share: inputs of the released shape, timing, and the checks that come before it."""

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from salalocal.kernels.lightning import lightning_reference, lightning_slopes
from salalocal.kernels.lightning_prefill import PrefillLaunch, Recurrence, run_prefill
from salalocal.kernels.qk_norm_rope import NormRope, qk_norm_rope_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # a CPU for a dry run in the interpreter alone
HEADS, DIM, THETA, EPS = 32, 128, 10_000.0, 1e-6
SCALE = DIM**-0.5
BYTES_A_TOKEN = 4 * HEADS * DIM * 2  # q, k, v, o
CHECKED_TOKENS = (1, 2, 15, 16, 17, 63, 64, 65, 127, 1000, 4097)
MAX_STATE_ERROR = 2e-5
COMPILE_LIMIT_S = 60.0

Launch = TypeVar("Launch")

results: dict[str, Any] = {}
started_s = time.monotonic()


def note(key: str, **figures: Any) -> None:
    """Keep a result and print it at once: a run that is cut off has shown what it had."""
    results[key] = figures
    print(
        f"{key}: " + " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in figures.items()),
        flush=True,
    )


def timed_us(calls: list[Callable[[], Any]], budget_s: float = 0.15) -> tuple[float, float]:
    """Microseconds of one call, all of them in one CUDA graph: median over replays, and spread of the middle half."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times: list[float] = []
    began_s = time.monotonic()
    while len(times) < 7 or (time.monotonic() - began_s < budget_s and len(times) < 50):
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    times = sorted(times[2:])
    return statistics.median(times), times[len(times) * 3 // 4] - times[len(times) // 4]


def copy_gb_per_s() -> float:
    x = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    y = torch.empty_like(x)
    us, _ = timed_us([lambda: y.copy_(x)])
    note("copy of 1 GiB", gb_per_s=2 * x.nbytes / us / 1e3)
    return 2 * x.nbytes / us / 1e3


def launches_that_run(launches: Sequence[Launch], first_run: Callable[[Launch], str]) -> list[Launch]:
    """Those that compile and end, all compiled side by side; `first_run` says what is wrong with one, if anything."""
    began_s = time.monotonic()
    good: list[Launch] = []
    with multiprocessing.get_context("spawn").Pool(min(14, os.cpu_count() or 1)) as pool:
        running = [(launch, pool.apply_async(first_run, (launch,))) for launch in launches]
        for launch, outcome in running:
            try:
                told = outcome.get(max(0.0, COMPILE_LIMIT_S - (time.monotonic() - began_s)))
            except multiprocessing.TimeoutError:
                told = f"no end within {COMPILE_LIMIT_S} s"
            if told:
                note(f"failed {launch}", why=told)
            else:
                good.append(launch)
    note(f"compile {len(launches)}", seconds=time.monotonic() - began_s)
    return good


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def draw(num_tokens: int, heads: int = HEADS, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v [1, T, H, D] bf16 as views of one projection, and a state."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    qkv = torch.empty(1, num_tokens, 3, heads, DIM, device=DEVICE, dtype=torch.bfloat16).normal_(generator=generator)
    state = torch.randn(1, heads, DIM, DIM, device=DEVICE, generator=generator)
    q, k, v = qkv.unbind(2)
    return q, k, v, state


def norm_rope_for(num_tokens: int, first: int = 1_000_000) -> NormRope:
    weight = 1 + torch.arange(DIM, device=DEVICE).remainder(7).bfloat16() / 16
    positions = torch.arange(first, first + num_tokens, device=DEVICE)
    return NormRope(q_weight=weight, k_weight=weight.flip(0), eps=EPS, positions=positions, theta=THETA)


@cache
def expected(num_tokens: int) -> tuple[Tensor, Tensor, float]:
    """Outputs and state in float64 for `draw(T, seed=T)`, and what plain torch errs by, rounded to bf16."""
    return exact_for(*draw(num_tokens, seed=num_tokens))


@cache
def expected_turned(num_tokens: int) -> tuple[Tensor, Tensor, float]:
    """The same for raw heads."""
    q, k, v, state = draw(num_tokens, seed=num_tokens)
    return exact_for(*turned_on_cpu(q, k, norm_rope_for(num_tokens)), v, state)


def exact_for(q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor, float]:
    """See `expected`."""
    slopes = lightning_slopes(HEADS).to(DEVICE)
    wide = (q.double(), k.double(), v.double(), slopes.double())
    o, after = lightning_reference(*wide, SCALE, state.double())
    plain, _ = lightning_reference(q, k, v, slopes, SCALE, state)
    return o, after, relative_error(plain.bfloat16(), o)


def turned_on_cpu(q: Tensor, k: Tensor, norm_rope: NormRope) -> tuple[Tensor, Tensor]:
    """By the CPU, whose power function the kernels take their frequencies from.

    One bit more or less in a frequency is 0.05 rad at position 2^20.
    """
    weights = {name: getattr(norm_rope, name).cpu() for name in ("q_weight", "k_weight", "positions")}
    q, k = qk_norm_rope_reference(q.cpu(), k.cpu(), replace(norm_rope, **weights))
    return q.to(DEVICE), k.to(DEVICE)


def check_prefill(launch: PrefillLaunch, tokens: tuple[int, ...]) -> str:
    """Empty if the launch agrees with float64 at every length, whole and with a boundary within."""
    slopes = lightning_slopes(HEADS).to(DEVICE)
    for num_tokens in tokens:
        q, k, v, state = draw(num_tokens, seed=num_tokens)
        boundaries = [num_tokens // 3] if num_tokens > 2 else []
        o, states = run_prefill(q, k, v, Recurrence(slopes, SCALE, state), launch, boundaries)
        told = verdict((o, states[-1]), expected(num_tokens), MAX_STATE_ERROR)
        if told:
            return f"T={num_tokens}: {told}"
    return ""


def check_turned(launch: PrefillLaunch, tokens: tuple[int, ...]) -> str:
    """The same for raw heads."""
    slopes = lightning_slopes(HEADS).to(DEVICE)
    for num_tokens in tokens:
        q, k, v, state = draw(num_tokens, seed=num_tokens)
        o, states = run_prefill(q, k, v, Recurrence(slopes, SCALE, state, norm_rope_for(num_tokens)), launch)
        # One rotation in some thousand is rounded the other way by the card's own sine.
        told = verdict((o, states[-1]), expected_turned(num_tokens), 1e-3)
        if told:
            return f"turned, T={num_tokens}: {told}"
    return ""


def verdict(found: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor, float], most: float) -> str:
    """Empty if outputs err at most twice as much as plain torch's, and the state at most by `most`."""
    error, state_error = relative_error(found[0], exact[0]), relative_error(found[1], exact[1])
    if error <= 2 * exact[2] + 1e-4 and state_error <= most:  # not when NaN
        return ""
    return f"o {error:.2e}, torch {exact[2]:.2e}, S {state_error:.2e}"
