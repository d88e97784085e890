"""The lightning layer in a step of an answer, on a card: correctness, then microseconds of a step, against peers.

    PYTHONPATH=.:.peers python3 benchmarks/lightning_decode.py --seconds 60 --out lightning_decode.json

A launch that does not agree with float64 is reported and not timed. Times are medians of CUDA graph replays over 48
states, past the L2 cache, each with pending tokens of its own; the heads are as warm as a projection leaves them.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.lightning_cases import (
    DEVICE,
    DIM,
    EPS,
    HEADS,
    SCALE,
    copy_gb_per_s,
    draw,
    launches_that_run,
    norm_rope_for,
    note,
    relative_error,
    results,
    started_s,
    timed_us,
    turned_on_cpu,
)
from salalocal.kernels.gated_norm import GatedNorm, gated_norm_reference
from salalocal.kernels.lightning import lightning_reference, lightning_slopes
from salalocal.kernels.lightning_decode import (
    LAUNCH,
    MAX_STEPS,
    DecodeLaunch,
    Heads,
    PendingTokens,
    commit_pending_triton,
    lightning_decays,
    speculative_step_triton,
)
from salalocal.kernels.qk_norm_rope import NormRope, qk_norm_rope_reference

FIRST = 1_000_000  # position
LAUNCHES = tuple(DecodeLaunch(values=v, num_warps=w) for v in (8, 16, 32) for w in (1, 2, 4))
NUM_STATES = 48  # 2 MiB each: a token's 24 layers twice over
BYTES_A_STEP = 2 * HEADS * DIM * DIM * 4


@dataclass(frozen=True)
class Steps:
    """Tokens as slices of one stacked projection, and all that steps over them take but the state."""

    rows: Tensor
    decays: Tensor
    weight: Tensor
    norm_rope: NormRope
    pending: PendingTokens
    counters: Tensor

    @classmethod
    def begin(cls, num_tokens: int, accepted: int, seed: int = 0) -> "Steps":
        """`accepted` tokens are pending, in both halves."""
        generator = torch.Generator(DEVICE).manual_seed(seed)
        width = HEADS * DIM
        rows = torch.randn(num_tokens, 4 * width, device=DEVICE, generator=generator).bfloat16()
        weight = (0.5 + torch.rand(width, device=DEVICE, generator=generator)).bfloat16()
        kept = torch.randn(2, 2, MAX_STEPS, HEADS, DIM, device=DEVICE, generator=generator).bfloat16()
        count, parity = (torch.full((1,), n, dtype=torch.int32, device=DEVICE) for n in (accepted, 0))
        counters = torch.zeros(MAX_STEPS, dtype=torch.int32, device=DEVICE)
        decays = lightning_decays(lightning_slopes(HEADS)).to(DEVICE)
        return cls(
            rows, decays, weight, norm_rope_for(1, FIRST), PendingTokens(kept[0], kept[1], count, parity), counters
        )

    def inputs(self, rows: Tensor) -> tuple[Heads, GatedNorm]:
        q, k, v, z = rows.chunk(4, dim=1)
        q, k, v = (x.unflatten(1, (HEADS, DIM))[None] for x in (q, k, v))
        heads = Heads(q, k, v, self.decays, SCALE, self.norm_rope)
        return heads, GatedNorm(weight=self.weight, gate=z, eps=EPS)

    def step(self, state: Tensor, launch: DecodeLaunch) -> Tensor:
        """Over all rows; nothing is counted or turned, so that the same call can be timed again."""
        heads, gated_norm = self.inputs(self.rows)
        return speculative_step_triton(heads, state, self.pending, gated_norm, self.counters, launch)

    def run(self, state: Tensor, start: int, num_tokens: int, launch: DecodeLaunch) -> Tensor:
        """A step over some rows as a caller makes it, all of them kept."""
        self.norm_rope.positions.fill_(FIRST + start)
        heads, gated_norm = self.inputs(self.rows[start : start + num_tokens])
        y = speculative_step_triton(heads, state, self.pending, gated_norm, self.counters, launch)
        self.pending.count.fill_(num_tokens)
        self.pending.parity.bitwise_xor_(1)
        return y


def decode_calls(launch: DecodeLaunch, num_states: int) -> dict[str, list[Callable[[], Any]]]:
    """Calls of each decode form, every one with a state and pending tokens of its own."""
    states = [torch.randn(1, HEADS, DIM, DIM, device=DEVICE) for _ in range(num_states)]
    calls: dict[str, list[Callable[[], Any]]] = {"commit 3": []}
    for num_tokens, accepted in ((1, 0), (1, 1), (4, 3), (8, 8), (16, 16)):
        steps = Steps.begin(num_tokens, accepted)
        own = [replace(steps, pending=Steps.begin(1, accepted).pending) for _ in states]
        calls[f"step of {num_tokens} after {accepted}"] = [
            lambda state=state, one=one: one.step(state, launch) for state, one in zip(states, own, strict=True)
        ]
    for state in states:
        one = Steps.begin(1, 3)
        calls["commit 3"].append(lambda s=state, one=one: commit_pending_triton(s, one.pending, one.decays, launch))
    for of_form in calls.values():
        of_form[0]()
    return calls


def check_decode(launch: DecodeLaunch) -> str:
    """Empty if steps agree with float64, and steps of one token with steps of many, bit for bit."""
    steps, apart = (Steps.begin(MAX_STEPS, 0, seed=5) for _ in range(2))
    state = draw(1, seed=5)[3]
    together_state, apart_state = state.clone(), state.clone()
    heads, gated_norm = steps.inputs(steps.rows)
    turned = turned_on_cpu(heads.q, heads.k, norm_rope_for(MAX_STEPS, FIRST))
    wide = (turned[0].double(), turned[1].double(), heads.v.double())
    o, exact_state = lightning_reference(*wide, lightning_slopes(HEADS).double().to(DEVICE), SCALE, state.double())
    wide_norm = GatedNorm(weight=gated_norm.weight.double(), gate=gated_norm.gate[None].double(), eps=EPS)
    exact = gated_norm_reference(o.flatten(2), wide_norm)
    y = steps.run(together_state, 0, MAX_STEPS, launch)
    single = torch.cat([apart.run(apart_state, i, 1, launch) for i in range(MAX_STEPS)], dim=1)
    for its, its_state in ((steps, together_state), (apart, apart_state)):
        commit_pending_triton(its_state, its.pending, its.decays, launch)
    errors = relative_error(y, exact), relative_error(together_state, exact_state)
    if not (errors[0] <= 8e-3 and errors[1] <= 1e-3) or steps.counters.any():
        return f"step of 16: y {errors[0]:.2e}, state {errors[1]:.2e}, counter {int(steps.counters[0])}"
    is_same = torch.equal(y, single) and torch.equal(together_state, apart_state)
    return "" if is_same else "16 steps of one token and one of 16 leave different bits"


def first_run(launch: DecodeLaunch) -> str:
    """Compile every form of a launch, in a process of its own, and run it."""
    try:
        decode_calls(launch, 1)
        torch.cuda.synchronize()
    except Exception as error:  # a launch that a card cannot hold is a result
        return f"{type(error).__name__} {str(error)[:120]}"
    return ""


def measure_peers() -> None:
    """One token by torch, with norm, rotation and gate; by fla the recurrence alone, where it is installed."""
    steps = Steps.begin(1, 1)
    heads, gated_norm = steps.inputs(steps.rows)
    slopes = lightning_slopes(HEADS).to(DEVICE)
    states = [draw(1, seed=i)[3] for i in range(NUM_STATES)]

    def by_torch(state: Tensor) -> Tensor:
        q, k = qk_norm_rope_reference(heads.q, heads.k, heads.norm_rope)
        o, after = lightning_reference(q, k, heads.v, slopes, SCALE, state)
        state.copy_(after)
        return gated_norm_reference(o.flatten(2).bfloat16()[0], gated_norm)

    us, _ = timed_us([lambda s=s: by_torch(s) for s in states])
    note("torch, step of 1", us=us)
    try:
        from fla.ops.simple_gla import fused_recurrent_simple_gla
    except ImportError as error:
        note("fla", missing=str(error)[:100])
        return
    one = [x.contiguous() for x in (heads.q, heads.k, heads.v)]
    given = {"g_gamma": -slopes, "scale": SCALE, "output_final_state": True}
    us, _ = timed_us([lambda s=s: fused_recurrent_simple_gla(*one, initial_state=s, **given) for s in states])
    note("fla fused_recurrent, step of 1", us=us)


def measure(seconds: float) -> None:
    note("device", name=torch.cuda.get_device_name(), torch=torch.__version__)
    good = launches_that_run([LAUNCH, *(launch for launch in LAUNCHES if launch != LAUNCH)], first_run)
    copy = copy_gb_per_s()
    best: dict[str, tuple[float, DecodeLaunch]] = {}
    for launch in good:
        told = check_decode(launch)
        if told:
            note(f"wrong {launch}", why=told)
            continue
        if time.monotonic() - started_s > seconds - 10:
            note(f"not measured {launch}", why="time is up")
            continue
        figures: dict[str, float] = {}
        for name, calls in decode_calls(launch, NUM_STATES).items():
            us, spread = timed_us(calls, 0.02)
            figures |= {name: us, f"{name}, spread": spread}
            best[name] = min(best.get(name, (1e9, launch)), (us, launch), key=lambda pair: pair[0])
        note(f"{launch.values} values x{launch.num_warps} warps" + ", shipped" * (launch == LAUNCH), **figures)
    for name, (us, launch) in best.items():
        note(f"best {name}", us=us, of_copy=BYTES_A_STEP / us / 1e3 / copy, launch=str(launch))
    measure_peers()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", default="", help="JSON file for the results")
    parser.add_argument(
        "--seconds", type=float, default=60, help="time for everything; what does not fit is left out and said"
    )
    arguments = parser.parse_args()
    try:
        with torch.inference_mode():
            measure(arguments.seconds)
    finally:  # what was measured before something went wrong
        if arguments.out:
            Path(arguments.out).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
