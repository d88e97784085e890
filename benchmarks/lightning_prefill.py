"""Lightning prefill on a card: correctness, then time per token, against peers in the same run.

    PYTHONPATH=.:.peers python3 benchmarks/lightning_prefill.py --seconds 100 --out lightning_prefill.json
    PYTHONPATH=.:.peers python3 benchmarks/lightning_prefill.py --seconds 60 --only shipped,peers --out peers.json

A launch that does not agree with float64 is reported and not timed. Times are medians of CUDA graph replays over inputs
larger than the L2 cache. The kernels of the peer are compiled by processes beside this one, from the start.
DISABLE_MMA_V3=1 in the environment measures the path of the other cards; the search runs itself again with it in the
time that is left. lightning_decode.py measures steps of an answer, lightning_drift.py what
the dtype of the state does.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from benchmarks.lightning_cases import (
    BYTES_A_TOKEN,
    CHECKED_TOKENS,
    DEVICE,
    HEADS,
    SCALE,
    check_prefill,
    check_turned,
    copy_gb_per_s,
    draw,
    launches_that_run,
    norm_rope_for,
    note,
    relative_error,
    results,
    started_s,
    timed_us,
)
from salalocal.kernels.lightning import lightning_reference, lightning_slopes
from salalocal.kernels.lightning_prefill import (
    PrefillLaunch,
    Recurrence,
    launch_for,
    lightning_prefill_triton,
    run_prefill,
)

WGMMA_TILES = (  # segment, chunk, values, lag, warps, stages of sums and of outputs
    (512, 64, 64, 0, 4, 3, 2),
    (512, 64, 64, 1, 4, 3, 2),
    (512, 64, 64, 2, 4, 3, 2),
    (256, 64, 64, 0, 4, 3, 2),
    (1024, 64, 64, 0, 4, 3, 2),
    (512, 64, 64, 0, 4, 4, 2),
    (512, 64, 64, 0, 4, 3, 3),
    (512, 64, 64, 0, 4, 1, 1),
    (512, 64, 64, 0, 8, 3, 2),
    (512, 64, 128, 0, 8, 3, 3),
)
MMA_SYNC_TILES = (
    (512, 32, 64, 1, 4, 3, 3),
    (512, 32, 64, 0, 4, 3, 3),
    (512, 32, 64, 1, 4, 4, 4),
    (512, 32, 64, 1, 4, 3, 2),
    (256, 32, 64, 1, 4, 3, 3),
    (512, 32, 64, 1, 8, 3, 3),
)
TOKENS = 8192
PARTS = ("shipped", "search", "long", "peers", "mma-sync")
PEERS = [sys.executable, str(Path(__file__).with_name("lightning_peers.py"))]
PEERS_S = 22.0  # to try all settings of the peer once they are compiled, and to time it
HAS_WGMMA = not os.environ.get("DISABLE_MMA_V3")


def launches() -> list[PrefillLaunch]:
    """What is tried."""
    names = [field.name for field in fields(PrefillLaunch)]
    return [
        PrefillLaunch(**dict(zip(names, tile, strict=True))) for tile in (WGMMA_TILES if HAS_WGMMA else MMA_SYNC_TILES)
    ]


def first_run(launch: PrefillLaunch) -> str:
    """Compile a launch in a process of its own, and run it: programs that wait for each other must come to an end."""
    try:
        for num_tokens in (64, 4096):
            q, k, v, state = draw(num_tokens)
            slopes = lightning_slopes(HEADS).to(DEVICE)
            for norm_rope in (None, norm_rope_for(num_tokens)):
                run_prefill(q, k, v, Recurrence(slopes, SCALE, state, norm_rope), launch)
        torch.cuda.synchronize()
    except Exception as error:  # a launch that a card cannot hold is a result
        return f"{type(error).__name__} {str(error)[:120]}"
    return ""


def prefill_us(launch: PrefillLaunch, inputs: list[Any], *, is_raw: bool = False) -> tuple[float, float]:
    """Microseconds of a call and their spread; raw heads are normed and turned."""
    slopes = lightning_slopes(HEADS).to(DEVICE)
    norm_rope = norm_rope_for(inputs[0][0].shape[1]) if is_raw else None
    return timed_us(
        [lambda x=x: run_prefill(*x[:3], Recurrence(slopes, SCALE, x[3], norm_rope), launch) for x in inputs], 0.05
    )


def search(tried: list[PrefillLaunch], copy: float) -> None:
    """Time every launch that is right, and print the best."""
    check_shipped(launch_for(torch.device(DEVICE)))
    rows = []
    inputs = [draw(TOKENS, seed=i) for i in range(2)]
    for launch in tried:
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
        more_lengths("best", min(rows, key=lambda row: row[0] + row[1])[2], copy)


def check_shipped(launch: PrefillLaunch) -> bool:
    """Whether it is right at every length; notes it."""
    told = check_prefill(launch, CHECKED_TOKENS) or check_turned(launch, (65,))
    note("shipped launch", right=not told, why=told, launch=str(launch))
    return not told


def time_shipped(launch: PrefillLaunch, copy: float) -> None:
    """The launch that ships, if it is right."""
    if check_shipped(launch):
        more_lengths("shipped", launch, copy)


def more_lengths(name: str, launch: PrefillLaunch, copy: float) -> None:
    """A launch at some lengths; the shipped one eagerly."""
    for tokens in (64, 512, 2048, 8192, 65_536):
        inputs = [draw(tokens, seed=i) for i in range(1 if tokens > TOKENS else max(2, 16_384 // tokens))]
        us, _ = prefill_us(launch, inputs)
        raw_us, _ = prefill_us(launch, inputs, is_raw=True)
        ns, raw_ns = us * 1e3 / tokens, raw_us * 1e3 / tokens
        note(f"{name} at T={tokens}", us=us, ns=ns, raw_ns=raw_ns, of_copy=BYTES_A_TOKEN / ns / copy)
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


def measure(parts: set[str], good: list[PrefillLaunch]) -> None:
    """The parts that run in this process, with launches that are compiled."""
    copy = copy_gb_per_s()
    if "shipped" in parts:
        time_shipped(launch_for(torch.device(DEVICE)), copy)
    if "search" in parts:
        search([launch for launch in launches() if launch in good], copy)
    if "long" in parts:
        long_run()


def start_peers() -> list[subprocess.Popen[bytes]]:
    """Compile the kernels of fla in processes side by side; where it is missing they end at once."""
    count = max(1, min(12, (os.cpu_count() or 1) - 2))
    return [
        subprocess.Popen([*PEERS, "--share", f"{index}/{count}"], stderr=subprocess.DEVNULL) for index in range(count)
    ]


def run_peers(compiling: list[subprocess.Popen[bytes]], left_s: Callable[[], float]) -> None:
    """Wait for what compiles, and measure with what time is left."""
    print("--- peers", flush=True)
    for process in compiling:
        process.send_signal(signal.SIGCONT)
    late = 0
    for process in compiling:
        try:
            process.wait(max(0.1, left_s() - PEERS_S))
        except subprocess.TimeoutExpired:
            late += 1
            process.kill()
    if late:
        print(f"fla: {late} of {len(compiling)} processes were still compiling", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "peers.json"
        run_child([*PEERS, "--out", str(out)], left_s())
        note("peers", **(json.loads(out.read_text()) if out.exists() else {"missing": "no time left, or it failed"}))


def run_child(command: list[str], limit_s: float, **environment: str) -> None:
    """Another process, killed at the limit."""
    try:
        subprocess.run(command, env=os.environ | environment, timeout=max(1.0, limit_s), check=False)
    except subprocess.TimeoutExpired:
        print(f"{Path(command[1]).name}: stopped after {limit_s:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", default="", help="JSON file for the results")
    parser.add_argument("--seconds", type=float, default=100, help="for everything; mma-sync takes what is left")
    parser.add_argument("--only", default="search,long,peers,mma-sync", help=f"some of {', '.join(PARTS)}, by commas")
    arguments = parser.parse_args()
    parts = set(arguments.only.split(","))
    if not parts <= set(PARTS):
        parser.error(f"--only: {', '.join(sorted(parts - set(PARTS)))} is not one of {', '.join(PARTS)}")

    def left_s() -> float:
        return float(arguments.seconds) - (time.monotonic() - started_s)

    # While our own kernels compile, fla's may as well; they stand still while we measure.
    compiling = start_peers() if "peers" in parts else []
    try:
        with torch.inference_mode():
            note("device", name=torch.cuda.get_device_name(), torch=torch.__version__, has_wgmma=HAS_WGMMA)
            tried = [launch_for(torch.device(DEVICE)), *(launches() if "search" in parts else [])]
            good = launches_that_run(list(dict.fromkeys(tried)), first_run)
            for process in compiling:
                process.send_signal(signal.SIGSTOP)
            measure(parts, good)
        if "peers" in parts:
            run_peers(compiling, left_s)
    finally:  # what was measured before something went wrong
        for process in compiling:
            process.kill()
        if arguments.out:
            Path(arguments.out).write_text(json.dumps(results, indent=1) + "\n")
    if "mma-sync" in parts and left_s() > 30:
        print("--- DISABLE_MMA_V3=1", flush=True)
        out = ["--out", f"{arguments.out}.mma-sync.json"] if arguments.out else []
        again = [sys.executable, __file__, "--only", "search", *out]
        run_child(again, left_s(), DISABLE_MMA_V3="1")


if __name__ == "__main__":
    main()
