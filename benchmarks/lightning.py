"""Lightning attention on a card: correctness, then time per token and per step, against peers in the same run.

    PYTHONPATH=.:.peers python3 benchmarks/lightning.py --seconds 100 --out lightning.json

A launch that does not agree with float64 is reported and not timed. Times are medians of CUDA graph replays over inputs
larger than the L2 cache. DISABLE_MMA_V3=1 in the environment measures the path of the other cards; the prefill part
runs itself again with it in the time that is left. lightning_drift.py measures what the dtype of the state does.
"""

import argparse
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.lightning_cases import (
    BYTES_A_TOKEN,
    CHECKED_TOKENS,
    DEVICE,
    DIM,
    EPS,
    HEADS,
    SCALE,
    check_decode,
    check_prefill,
    check_turned,
    decode_calls,
    draw,
    norm_rope_for,
    note,
    relative_error,
    results,
    started_s,
    timed_us,
)
from salalocal.kernels.gated_norm import GatedNorm, gated_norm_reference, gated_norm_triton
from salalocal.kernels.lightning import lightning_reference, lightning_slopes
from salalocal.kernels.lightning_decode import LAUNCH, DecodeLaunch, Heads, gated_step_triton, lightning_decays
from salalocal.kernels.lightning_prefill import (
    PrefillLaunch,
    Recurrence,
    launch_for,
    lightning_prefill_triton,
    run_prefill,
)
from salalocal.kernels.qk_norm_rope import qk_norm_rope_reference, qk_norm_rope_triton

PREFILL_TILES = (  # chunk, values, warps, registers
    (128, 64, 8, 128),
    (128, 32, 8, 128),
    (128, 64, 8, 255),
    (128, 32, 8, 255),
    (64, 64, 4, 168),
    (64, 64, 4, 128),
    (64, 32, 4, 168),
    (64, 32, 4, 128),
    (64, 64, 8, 128),
    (64, 64, 8, 80),
    (64, 32, 8, 80),
    (64, 128, 8, 128),
)
MMA_SYNC_TILES = ((64, 64, 8, 255), (64, 64, 8, 128), (64, 32, 8, 128), (64, 64, 4, 255), (32, 64, 4, 128))
DECODE_TILES = tuple(DecodeLaunch(values=v, num_warps=w) for v in (8, 16, 32) for w in (1, 2, 4))
NUM_STATES = 48  # 2 MiB each: a token's 24 layers twice over, past the L2 cache
COMPILE_LIMIT_S = 60.0
TOKENS = 8192
HAS_WGMMA = not os.environ.get("DISABLE_MMA_V3")
Job = PrefillLaunch | DecodeLaunch


def prefill_launches() -> list[PrefillLaunch]:
    """What is tried."""
    tiles = PREFILL_TILES if HAS_WGMMA else MMA_SYNC_TILES
    return [PrefillLaunch(chunk=c, values=v, num_warps=w, max_registers=r) for c, v, w, r in tiles]


def first_run(job: Job) -> str:
    """Compile a launch in a process of its own, and run it: programs that wait for each other must come to an end."""
    try:
        if isinstance(job, DecodeLaunch):
            decode_calls(job, 1)
        else:
            for num_tokens in (64, 4096):
                q, k, v, state = draw(num_tokens)
                slopes = lightning_slopes(HEADS).to(DEVICE)
                for norm_rope in (None, norm_rope_for(num_tokens)):
                    run_prefill(q, k, v, Recurrence(slopes, SCALE, state, norm_rope), job)
        torch.cuda.synchronize()
    except Exception as error:  # a launch that a card cannot hold is a result
        return f"{type(error).__name__} {str(error)[:120]}"
    return ""


def first_runs(jobs: list[Job]) -> list[Job]:
    """The jobs that compile and end, all compiled side by side."""
    began_s = time.monotonic()
    good: list[Job] = []
    with multiprocessing.get_context("spawn").Pool(min(14, os.cpu_count() or 1)) as pool:
        running = [(job, pool.apply_async(first_run, (job,))) for job in jobs]
        for job, outcome in running:
            try:
                told = outcome.get(max(0.0, COMPILE_LIMIT_S - (time.monotonic() - began_s)))
            except multiprocessing.TimeoutError:
                told = f"no end within {COMPILE_LIMIT_S} s"
            if told:
                note(f"failed {job}", why=told)
            else:
                good.append(job)
    note(f"compile {len(jobs)}", seconds=time.monotonic() - began_s)
    return good


def copy_gb_per_s() -> float:
    x = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    y = torch.empty_like(x)
    us, _ = timed_us([lambda: y.copy_(x)])
    note("copy of 1 GiB", gb_per_s=2 * x.nbytes / us / 1e3)
    return 2 * x.nbytes / us / 1e3


def prefill_us(launch: PrefillLaunch, inputs: list[Any], *, is_raw: bool = False) -> tuple[float, float]:
    """Microseconds of a call and their spread; raw heads are normed and turned."""
    slopes = lightning_slopes(HEADS).to(DEVICE)
    norm_rope = norm_rope_for(inputs[0][0].shape[1]) if is_raw else None
    return timed_us(
        [lambda x=x: run_prefill(*x[:3], Recurrence(slopes, SCALE, x[3], norm_rope), launch) for x in inputs], 0.05
    )


def search_prefill(launches: list[PrefillLaunch], copy: float) -> None:
    """Time every launch that is right, and print the best."""
    shipped = launch_for(torch.device(DEVICE))
    told = check_prefill(shipped, CHECKED_TOKENS) or check_turned(shipped, (65,))
    note("shipped launch", right=not told, why=told, launch=str(shipped))
    rows = []
    inputs = [draw(TOKENS, seed=i) for i in range(2)]
    for launch in launches:
        told = check_prefill(launch, (65, 1000, 4097)) or check_turned(launch, (1000,))
        if told:
            note(f"wrong {launch}", why=told)
            continue
        us, spread = prefill_us(launch, inputs)
        raw_us, _ = prefill_us(launch, inputs, is_raw=True)
        rows.append((us, raw_us, launch))
        ns = us * 1e3 / TOKENS
        figures = {"ns": ns, "raw_ns": raw_us * 1e3 / TOKENS, "of_copy": BYTES_A_TOKEN / ns / copy}
        note(f"prefill {launch}", **figures, spread_ns=spread * 1e3 / TOKENS)
    for key, name in enumerate(("plain", "raw")):
        for row in sorted(rows, key=lambda row: row[key])[:2]:
            print(f"best {name}: {row[key] * 1e3 / TOKENS:.2f} ns a token: {row[2]}", flush=True)
    if rows:
        more_lengths(min(rows, key=lambda row: row[0] + row[1])[2], copy)


def more_lengths(launch: PrefillLaunch, copy: float) -> None:
    """The best launch at other lengths; the shipped one eagerly."""
    for tokens in (64, 512, 2048, 8192, 65_536):
        inputs = [draw(tokens, seed=i) for i in range(1 if tokens > TOKENS else max(2, 16_384 // tokens))]
        us, _ = prefill_us(launch, inputs)
        raw_us, _ = prefill_us(launch, inputs, is_raw=True)
        ns, raw_ns = us * 1e3 / tokens, raw_us * 1e3 / tokens
        note(f"best at T={tokens}", us=us, ns=ns, raw_ns=raw_ns, of_copy=BYTES_A_TOKEN / ns / copy)
    q, k, v, state = draw(TOKENS)
    for name, turn in (("plain", None), ("raw", norm_rope_for(TOKENS))):
        recurrence = Recurrence(lightning_slopes(HEADS).to(DEVICE), SCALE, state, turn)
        lightning_prefill_triton(q, k, v, recurrence)
        torch.cuda.synchronize()
        began_s = time.perf_counter()
        for _ in range(10):
            lightning_prefill_triton(q, k, v, recurrence)
        enqueued_s = time.perf_counter() - began_s
        torch.cuda.synchronize()
        note(f"eager, {name}, T={TOKENS}", us=(time.perf_counter() - began_s) / 10e-6, host_us=enqueued_s / 10e-6)


def search_decode(launches: list[DecodeLaunch], copy: float) -> None:
    told = check_decode()
    note("decode check", right=not told, why=told)
    if told:
        return
    best: dict[str, tuple[float, DecodeLaunch]] = {}
    for launch in launches:
        figures = {}
        for name, calls in decode_calls(launch, NUM_STATES).items():
            figures[name] = timed_us(calls, 0.02)[0]
            best[name] = min(best.get(name, (1e9, launch)), (figures[name], launch), key=lambda pair: pair[0])
        note(f"decode values {launch.values} x{launch.num_warps}", **figures)
    bytes_a_step = 2 * HEADS * DIM * DIM * 4
    for name, (us, launch) in best.items():
        note(f"best {name}", us=us, of_copy=bytes_a_step / us / 1e3 / copy, launch=str(launch))


def small_kernels(copy: float) -> None:
    """q/k norm + RoPE and gated norm by themselves: ours and torch."""
    q, k, v, _ = draw(TOKENS)
    norm_rope = norm_rope_for(TOKENS)
    x = v.flatten(2)
    gated = GatedNorm(weight=torch.rand(HEADS * DIM, device=DEVICE).bfloat16(), gate=q.flatten(2), eps=EPS)
    forms: dict[str, tuple[int, Callable[[], Any]]] = {
        "q/k norm + RoPE, ours": (4, lambda: qk_norm_rope_triton(q, k, norm_rope)),
        "q/k norm + RoPE, torch": (4, lambda: qk_norm_rope_reference(q, k, norm_rope)),
        "gated norm, ours": (3, lambda: gated_norm_triton(x, gated)),
        "gated norm, torch": (3, lambda: gated_norm_reference(x, gated)),
    }
    for name, (num_tensors, call) in forms.items():
        us, spread = timed_us([call], 0.05)
        of_copy = num_tensors * TOKENS * HEADS * DIM * 2 / us / 1e3 / copy
        note(name, ns=us * 1e3 / TOKENS, spread_us=spread, of_copy=of_copy)


def mixer_calls(tokens: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """One layer's mixer without its projections: by the references, and by the kernels."""
    q, k, v, state = draw(tokens)
    slopes, norm_rope = lightning_slopes(HEADS).to(DEVICE), norm_rope_for(tokens)
    decays, counters = lightning_decays(slopes), torch.zeros(1, dtype=torch.int32, device=DEVICE)
    gated = GatedNorm(weight=torch.rand(HEADS * DIM, device=DEVICE).bfloat16(), gate=v.flatten(2), eps=EPS)

    def before() -> Tensor:
        o, _ = lightning_reference(*qk_norm_rope_reference(q, k, norm_rope), v, slopes, SCALE, state)
        return gated_norm_reference(o.flatten(2).bfloat16(), gated)

    def after() -> Tensor:
        if tokens == 1:
            return gated_step_triton(Heads(q, k, v, decays, SCALE, norm_rope), state, gated, counters)
        o, _ = lightning_prefill_triton(q, k, v, Recurrence(slopes, SCALE, state, norm_rope))
        return gated_norm_triton(o.flatten(2), gated)

    return before, after


def count_launches() -> None:
    """Kernels of one layer's mixer, before and after."""
    for tokens in (1, TOKENS):
        counts = []
        for call in mixer_calls(tokens):
            call()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                call()
                torch.cuda.synchronize()
            on_card = [e for e in profile.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
            counts.append(sum(event.count for event in on_card))
        note(f"launches of a layer's mixer, T={tokens}", reference=counts[0], kernels=counts[1])


def long_run(tokens: int = 1 << 20, heads: int = 2) -> None:
    """A million tokens in one call against float64: the fastest and the slowest head."""
    q, k, v, state = draw(tokens, heads)
    slopes = lightning_slopes(HEADS)[[0, HEADS - 1]].to(DEVICE)
    o, states = run_prefill(q, k, v, Recurrence(slopes, SCALE, state), launch_for(q.device))
    exact_state, worst = state.double(), 0.0
    for start in range(0, tokens, 1 << 16):
        piece = slice(start, start + (1 << 16))
        wide = (x[:, piece].double() for x in (q, k, v))
        exact, exact_state = lightning_reference(*wide, slopes.double(), SCALE, exact_state)
        worst = max(worst, relative_error(o[:, piece], exact))
    note("1M tokens against float64", worst_output_error=worst, state_error=relative_error(states[-1], exact_state))


def run_child(name: str, limit_s: float, *arguments: str, **environment: str) -> None:
    """Another script beside this one, killed at the limit."""
    command = [sys.executable, str(Path(__file__).with_name(name)), *arguments]
    try:
        subprocess.run(command, env=os.environ | environment, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired:
        print(f"{name}: stopped after {limit_s:.0f} s", flush=True)


def measure(arguments: argparse.Namespace, warming: subprocess.Popen[bytes] | None) -> None:
    note("device", name=torch.cuda.get_device_name(), torch=torch.__version__, has_wgmma=HAS_WGMMA)
    jobs: list[Job] = [*prefill_launches(), *([] if arguments.prefill_only else DECODE_TILES)]
    good = first_runs(jobs)
    if warming is not None:
        warming.send_signal(signal.SIGSTOP)
    copy = copy_gb_per_s()
    search_prefill([job for job in good if isinstance(job, PrefillLaunch)], copy)
    if arguments.prefill_only:
        return
    search_decode([LAUNCH, *(job for job in good if isinstance(job, DecodeLaunch) and job != LAUNCH)], copy)
    for part in (count_launches, long_run):
        part()
    small_kernels(copy)


def left_s(arguments: argparse.Namespace) -> float:
    return arguments.seconds - (time.monotonic() - started_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", default="", help="JSON file for the results")
    parser.add_argument(
        "--seconds", type=float, default=100, help="for everything; peers and mma.sync take what is left"
    )
    parser.add_argument("--prefill-only", action="store_true")
    arguments = parser.parse_args()
    # While our own kernels compile, fla may as well; it stands still while we measure.
    peers = Path(__file__).with_name("lightning_peers.py")
    warming = None if arguments.prefill_only else subprocess.Popen([sys.executable, str(peers), "--warm"])
    with torch.inference_mode():
        measure(arguments, warming)
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(results, indent=1) + "\n")
    if warming is None:
        return
    print("--- peers", flush=True)
    warming.send_signal(signal.SIGCONT)
    try:
        warming.wait(max(1.0, left_s(arguments) - 25))
        run_child("lightning_peers.py", max(10.0, left_s(arguments)))
    except subprocess.TimeoutExpired:
        warming.kill()
        print("fla: still compiling, not measured", flush=True)
    if left_s(arguments) > 30:
        print("--- DISABLE_MMA_V3=1", flush=True)
        out = ["--out", f"{arguments.out}.mma-sync.json"] if arguments.out else []
        run_child("lightning.py", left_s(arguments), "--prefill-only", *out, DISABLE_MMA_V3="1")


if __name__ == "__main__":
    main()
