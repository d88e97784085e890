"""What the lightning benchmarks share: inputs of the released shape, timing, and the checks that come before it."""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from salalocal.kernels.gated_norm import GatedNorm, gated_norm_reference, gated_norm_triton
from salalocal.kernels.lightning import lightning_reference, lightning_slopes
from salalocal.kernels.lightning_decode import (
    DecodeLaunch,
    Heads,
    gated_step_triton,
    lightning_commit_triton,
    lightning_decays,
    lightning_step_triton,
    lightning_verify_triton,
)
from salalocal.kernels.lightning_prefill import PrefillLaunch, Recurrence, run_prefill
from salalocal.kernels.qk_norm_rope import NormRope, qk_norm_rope_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # a CPU for a dry run in the interpreter alone
HEADS, DIM, THETA, EPS = 32, 128, 10_000.0, 1e-6
SCALE = DIM**-0.5
BYTES_A_TOKEN = 4 * HEADS * DIM * 2  # q, k, v, o
CHECKED_TOKENS = (1, 2, 15, 16, 17, 63, 64, 65, 127, 1000, 4097)
MAX_STATE_ERROR = 2e-5

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


def decode_calls(launch: DecodeLaunch, num_states: int) -> dict[str, list[Callable[[], Any]]]:
    """Calls of each decode form, every one with a state of its own."""
    q, k, v, _ = draw(16)
    decays = lightning_decays(lightning_slopes(HEADS)).to(DEVICE)
    states = [torch.randn(1, HEADS, DIM, DIM, device=DEVICE) for _ in range(num_states)]
    gate = torch.randn(1, 1, HEADS * DIM, device=DEVICE, dtype=torch.bfloat16)
    gated = GatedNorm(weight=torch.ones(HEADS * DIM, device=DEVICE, dtype=torch.bfloat16), gate=gate, eps=EPS)
    counters, count = (
        torch.zeros(1, dtype=torch.int32, device=DEVICE),
        torch.full((1,), 3, dtype=torch.int32, device=DEVICE),
    )

    def heads(tokens: int) -> Heads:
        return Heads(q[:, :tokens], k[:, :tokens], v[:, :tokens], decays, SCALE, norm_rope_for(tokens))

    one, four, sixteen = heads(1), heads(4), heads(16)

    def two_launches(state: Tensor) -> Tensor:
        return gated_norm_triton(lightning_step_triton(one, state, launch).view(1, 1, -1), gated)

    forms: dict[str, Callable[[Tensor], Any]] = {
        "step": lambda state: lightning_step_triton(one, state, launch),
        "step, then gated norm": two_launches,
        "gated step": lambda state: gated_step_triton(one, state, gated, counters, launch),
        "verify 4": lambda state: lightning_verify_triton(four, state, launch),
        "verify 16": lambda state: lightning_verify_triton(sixteen, state, launch),
        "commit 3 of 4": lambda state: lightning_commit_triton(four, state, count, launch),
    }
    for form in forms.values():
        form(states[0])
    return {name: [lambda s=s, form=form: form(s) for s in states] for name, form in forms.items()}


def check_decode() -> str:
    """Empty if one gated step and a verified, committed draft agree with float64."""
    q, k, v, state = draw(16, seed=5)
    slopes = lightning_slopes(HEADS)
    decays, norm_rope = lightning_decays(slopes).to(DEVICE), norm_rope_for(16)
    heads = Heads(q, k, v, decays, SCALE, norm_rope)
    turned = turned_on_cpu(q, k, norm_rope)
    wide = (turned[0].double(), turned[1].double(), v.double())
    exact = lightning_reference(*wide, slopes.double().to(DEVICE), SCALE, state.double())
    o, committed = lightning_verify_triton(heads, state), state.clone()
    lightning_commit_triton(heads, committed, torch.tensor([16], dtype=torch.int32, device=DEVICE))
    errors = relative_error(o, exact[0]), relative_error(committed, exact[1])
    if errors[0] > 4e-3 or errors[1] > 1e-3:
        return f"verify and commit: o {errors[0]:.2e}, state {errors[1]:.2e}"
    stepped = state.clone()
    weight = torch.rand(HEADS * DIM, device=DEVICE).bfloat16()
    counters = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    for i in range(16):
        gated = GatedNorm(weight=weight, gate=torch.randn(1, 1, HEADS * DIM, device=DEVICE).bfloat16(), eps=EPS)
        piece = slice(i, i + 1)
        one = Heads(
            q[:, piece],
            k[:, piece],
            v[:, piece],
            decays,
            SCALE,
            replace(norm_rope, positions=norm_rope.positions[piece]),
        )
        y = gated_step_triton(one, stepped, gated, counters)
        expected = gated_norm_reference(o[:, piece].flatten(2), gated)
        if relative_error(y, expected) > 1e-3 or int(counters):
            return f"gated step {i}: {relative_error(y, expected):.2e}, counter {int(counters)}"
    return "" if torch.equal(stepped, committed) else "16 steps and a commit of 16 leave different bits"
