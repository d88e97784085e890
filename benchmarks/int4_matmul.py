"""Products with int4 weights on the layers of the 9B, 1 to 8,192 rows: ours beside its peers, in one table.

    PYTHONPATH=.:.peers python3 benchmarks/int4_matmul.py --seconds 150 --out int4_matmul.json
    PYTHONPATH=. python3 benchmarks/int4_matmul.py --dry --out /tmp/dry.json       # without a card: this script

Ours is what a linear map of the model runs, quantizing the activations and decoding a scratch included: `int8` and
`bf16` are its two kinds of arithmetic; `int8 ready` takes activations that their producer has quantized. Each is
checked against float64 first, and not timed if wrong. Times are medians of CUDA graphs over copies of the weights
larger than the L2 cache. Shares are of the time that the measured ceilings would take: bytes over the read rate, or
FLOP over the rate of the vendor's GEMM of the same width. A second process takes the mma.sync path of RTX cards, from
which the RTX 5090 is projected.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from benchmarks.budget_report import Report
from benchmarks.int4_cases import (
    COLD_BYTES,
    DEVICE,
    DRY,
    GROUP_SIZE,
    SHAPES,
    TIMES_IN_MODEL,
    attempt,
    copies_of,
    dense_of,
    in_processes,
    part_of,
    random_weight,
    relative_error,
)
from benchmarks.int4_peers import PEERS
from benchmarks.timing import ColdTimer, Timing
from salalocal.kernels import backend
from salalocal.kernels.int4.activations_by_row import quantize_rows, rms_norm_quantize_rows, split_rows, swiglu_quantize
from salalocal.kernels.int4.gemv import MAX_TOKENS
from salalocal.kernels.int4.linear import Workspace, int4_linear, new_workspace
from salalocal.kernels.int4.route import Math, choose, int4_matmul, prepare
from salalocal.kernels.int4.scratch import Int4Weight, decode_bf16, decode_int8
from salalocal.quant.int4 import PackedWeight

ROWS = (1, 17) if DRY else (1, 2, 4, 8, 16, 64, 256, 1_024, 4_096, 8_192)
MMA_SYNC_ROWS = (17,) if DRY else (16, 256, 1_024, 8_192)
# What comes first, so that a short time leaves it: ours and the peers here, then the rest.
FIRST_SHAPES, FIRST_ROWS = ("gate_up", "down"), ROWS if DRY else (1, 8, 64, 256, 1_024, 8_192)
READY_ROWS = 17 if DRY else 1_024  # from here on also with activations that their producer has quantized
HAS_MMA_V3 = os.environ.get("DISABLE_MMA_V3") != "1"
OURS = ("int8", "bf16", "int8 ready")
LARGEST_ERROR = {"int8": 0.015, "int8 ready": 0.015, "bf16": 0.006}  # quantizing normal activations is 0.7-1.2 %
PEER_ROWS = {"tinygemm": ROWS[:7]}  # for few rows; the others are timed everywhere
PEER_SECONDS = 12.0  # for one peer on one shape, its own tuning included
COMPILE_SHARE, MMA_SYNC_SECONDS = 0.25, 22.0
MMA_SYNC_PART = 0.3  # of the processes that compile, where there is time for that path
RTX_5090 = {"read_gbs": 1_792.0, "bf16": 209.5, "int8": 838.0}  # published peaks, TFLOP/s of the dense units
CELL_SECONDS = 3.0  # kept back for what follows a cell


@dataclass(frozen=True)
class Ceilings:
    """What the card does at best, measured in this run. Units: GB/s, TFLOP/s by width of the operands."""

    read_gbs: float
    copy_gbs: float
    rates: dict[str, float]

    def floor_us(self, shape: str, num_rows: int, width: str) -> float:
        """The time at the ceilings."""
        num_out, num_in = SHAPES[shape]
        weight_bytes = num_out * num_in // 2 + num_out * num_in // GROUP_SIZE * 2
        moved = weight_bytes + 2 * num_rows * (num_in + num_out)
        return max(moved / self.read_gbs * 1e-3, 2e-6 * num_rows * num_out * num_in / self.rates[width])


class Clock:
    """Graph times on a card, one call by the wall in a dry run."""

    def __init__(self) -> None:
        self._timer = None if DRY else ColdTimer()

    def time(self, calls: list[Callable[[], object]]) -> Timing:
        if self._timer is not None:
            return self._timer.time_graph(calls, runs=5)
        began = time.perf_counter()
        calls[0]()
        microseconds = (time.perf_counter() - began) * 1e6
        return Timing(microseconds, microseconds, microseconds, 1)


def measure_ceilings(clock: Clock, report: Report) -> Ceilings:
    """The read and copy rate of memory, and the vendor's GEMM on large squares, 16 and 8 bits wide."""
    size, side = (2**10, 256) if DRY else (2**28, 8_192)
    source, target = torch.ones(2, size, device=DEVICE)
    copy_gbs = 8e-3 * size / clock.time([lambda: target.copy_(source)]).median_us
    read_gbs = max(4e-3 * size / clock.time([source.amax]).median_us, copy_gbs)
    a = torch.randn(side, side, device=DEVICE).bfloat16()
    codes, wide, ones = quantize_rows(a).codes, a.to(torch.float8_e4m3fn), torch.ones(side, 1, device=DEVICE)
    scales = {"scale_a": ones, "scale_b": ones.t(), "out_dtype": torch.bfloat16, "use_fast_accum": True}
    products: dict[str, list[Callable[[], object]]] = {
        "bf16": [lambda: a @ a.t()],
        "int8": [lambda: torch._int_mm(codes, codes.t()), lambda: torch._scaled_mm(wide, wide.t(), **scales)],
    }
    rates: dict[str, float] = {}

    def measure(width: str, product: Callable[[], object]) -> None:
        rates[width] = max(rates.get(width, 0.0), 2e-6 * side**3 / clock.time([product]).median_us)

    for width, ways in products.items():
        for way in ways:
            attempt(f"ceiling {width}", lambda width=width, way=way: measure(width, way))
    report.add("ceilings", read_gbs=read_gbs, copy_gbs=copy_gbs, **{f"tflops_{key}": one for key, one in rates.items()})
    return Ceilings(read_gbs, copy_gbs, rates)


def take_settings_of_rtx() -> None:
    """On the mma.sync path, launch what an RTX 5090 would be given, whose multiprocessors have less shared memory."""
    for name, module in list(sys.modules.items()):
        if name.startswith("salalocal.") and hasattr(module, "compute_capability"):
            module.compute_capability = lambda device: 120  # type: ignore[attr-defined]


def packed(weight: Int4Weight) -> PackedWeight:
    return PackedWeight(weight.words, weight.scales, 4, weight.group_size)


def call_of(kind: str, x: Tensor, weight: Int4Weight, workspace: Workspace) -> Callable[[], Tensor] | None:
    """One product of ours; None where there is no such form."""
    if kind != "int8 ready":
        math_kind: Math = "int8" if kind == "int8" else "bf16"
        return lambda: int4_linear(x, packed(weight), weight, math_kind, workspace)
    if len(x) < READY_ROWS:
        return None
    route = choose(len(x), weight.group_size, "int8", backend.compute_capability(DEVICE))
    codes = prepare(x, route)
    out = torch.full((len(x), len(weight.words)), math.nan, dtype=torch.bfloat16, device=DEVICE)
    return lambda: int4_matmul(codes, weight, route, workspace.route, out)


def measure_ours(
    clock: Clock, report: Report, ceilings: Ceilings, shape: str, copies: list[Int4Weight], workspace: Workspace,
    num_rows: int,
) -> None:  # fmt: skip
    """One cell of the table for each kind of ours: checked, then timed."""
    num_out, num_in = SHAPES[shape]
    x = torch.randn(num_rows, num_in, device=DEVICE).bfloat16()
    some = torch.randperm(num_out, device=DEVICE)[:256]
    exact = x.double() @ dense_of(part_of(copies[0], some)).double().t()
    for kind in OURS:
        calls = [call_of(kind, x, one, workspace) for one in copies]
        ready = [one for one in calls if one is not None]
        if not ready:
            continue

        def measure(kind: str = kind, ready: list[Callable[[], Tensor]] = ready) -> None:
            error = relative_error(ready[0]()[:, some], exact)
            if not error < LARGEST_ERROR[kind]:
                print(f"WRONG {kind} {shape} {num_rows}: relative error {error:.4f}", flush=True)
                report.add("wrong", what=kind, shape=shape, rows=num_rows, error=error)
                return
            record(report, ceilings, kind, shape, num_rows, clock.time(list(ready)), error=error)

        attempt(f"{kind} {shape} {num_rows}", measure)


def record(
    report: Report, ceilings: Ceilings, what: str, shape: str, num_rows: int, timing: Timing, **more: Any
) -> None:
    num_out, num_in = SHAPES[shape]
    microseconds = timing.median_us
    report.rows.append({
        "section": "cell", "what": what, "shape": shape, "rows": num_rows, "us": microseconds,
        "spread": (timing.max_us - timing.min_us) / microseconds,
        "tflops": 2e-6 * num_rows * num_out * num_in / microseconds,
        "weight_gbs": num_out * num_in * (0.5 + 2 / GROUP_SIZE) / microseconds * 1e-3,
        "share": ceilings.floor_us(shape, num_rows, "bf16" if what == "bf16" else "int8") / microseconds,
        "mma_sync": not HAS_MMA_V3, **more,
    })  # fmt: skip


def gemlite_int8_peer(num_out: int, num_in: int, cold_bytes: int) -> list[Callable[[Tensor], object]]:
    """gemlite with int8 activations, which has one scale for a whole row of weights."""
    from gemlite import helper

    make = helper.A8W4_HQQ_INT_dynamic(device="cuda:0", dtype=torch.bfloat16, fp8=torch.int8, post_scale=True)
    codes = torch.randint(0, 16, (num_out, num_in), dtype=torch.uint8, device="cuda")
    scales = torch.rand(num_out, 1, device="cuda").bfloat16()
    zeros = torch.full_like(scales, 8)
    count = max(2, math.ceil(cold_bytes / (num_out * num_in // 2)))
    return [make.from_weights(codes.clone(), scales.clone(), zeros.clone()) for _ in range(count)]


ALL_PEERS: dict[str, Callable[..., list[Callable[[Tensor], object]]]] = {**PEERS, "gemlite A8W4": gemlite_int8_peer}


def measure_peer(
    clock: Clock, report: Report, ceilings: Ceilings, name: str, shape: str, rows: tuple[int, ...]
) -> None:
    """One peer on a shape at the numbers of rows that it is for, within its time."""
    until = time.monotonic() + min(PEER_SECONDS, report.left() - CELL_SECONDS)

    def measure() -> None:
        functions = ALL_PEERS[name](*SHAPES[shape], COLD_BYTES)
        for num_rows in (one for one in PEER_ROWS.get(name, ROWS) if one in rows):
            if time.monotonic() > until:
                print(f"{name} {shape}: no time for {num_rows} rows and more", flush=True)
                return
            x = torch.randn(num_rows, SHAPES[shape][1], device=DEVICE).bfloat16()
            timing = clock.time([lambda one=one, x=x: one(x) for one in functions])
            record(report, ceilings, name, shape, num_rows, timing)

    if report.left() < CELL_SECONDS:
        print(f"no time for {name} {shape}", flush=True)
        return
    attempt(f"{name} {shape}", measure)
    if not DRY:
        torch.cuda.empty_cache()


def measure_parts(clock: Clock, report: Report, ceilings: Ceilings, workspace: Workspace) -> None:
    """What makes activations ready and what decodes a scratch, by itself; rates of what they must move."""
    hidden, middle = SHAPES["o"][0], SHAPES["down"][1]
    for num_rows in (17,) if DRY else (64, 1_024, 8_192):
        x = torch.randn(num_rows, hidden, device=DEVICE).bfloat16()
        both = torch.randn(num_rows, 2 * middle, device=DEVICE).bfloat16()
        gain = torch.ones(hidden, device=DEVICE).bfloat16()
        gate, up = both[:, :middle], both[:, middle:]
        calls: dict[str, tuple[Callable[[], object], int]] = {
            f"quantize_rows {hidden}": (lambda x=x: quantize_rows(x), 3 * hidden),
            f"rms_norm_quantize {hidden}": (lambda x=x, gain=gain: rms_norm_quantize_rows(x, gain, 1e-6), 3 * hidden),
            f"split_rows {hidden}": (lambda x=x: split_rows(x), 4 * hidden),
            f"quantize_rows {middle}": (lambda gate=gate: quantize_rows(gate), 3 * middle),
            f"swiglu_quantize {middle}": (lambda gate=gate, up=up: swiglu_quantize(gate, up), 5 * middle),
        }
        for name, (call, moved) in calls.items():
            timing = clock.time([call])
            rate = moved * num_rows / timing.median_us * 1e-3
            report.add("part", what=name, rows=num_rows, us=timing.median_us, gbs=rate, share=rate / ceilings.copy_gbs)
    weight = random_weight(*SHAPES["gate_up"], 5)
    num_weights = weight.words.numel() * 8
    for name, dtype, decode in (("int8", torch.int8, decode_int8), ("bf16", torch.bfloat16, decode_bf16)):
        target = workspace.route.weights[: num_weights * dtype.itemsize].view(dtype).view(SHAPES["gate_up"])
        timing = clock.time([lambda decode=decode, target=target: decode(weight, target)])
        rate = num_weights * (0.5 + dtype.itemsize) / timing.median_us * 1e-3
        report.add("part", what=f"decode_{name}", us=timing.median_us, gbs=rate, share=rate / ceilings.copy_gbs)


def print_table(rows: list[dict[str, Any]], is_mma_sync: bool) -> None:
    """Microseconds and the share of the ceilings' time, in percent; one line a shape and number of rows."""
    cells = {(one["what"], one["shape"], one["rows"]): one
             for one in rows if one["section"] == "cell" and one["mma_sync"] == is_mma_sync}  # fmt: skip
    names = [name for name in (*OURS, *ALL_PEERS) if any(key[0] == name for key in cells)]
    print(f"\n{'mma.sync path: ' if is_mma_sync else ''}us, GB/s of weights (to 16 rows) or TFLOP/s, % of the ceilings")
    print(f"{'':17}" + "".join(f"{name:>22}" for name in names))
    for shape in SHAPES:
        for num_rows in sorted({key[2] for key in cells}):
            found = [cells.get((name, shape, num_rows)) for name in names]
            if any(found):
                rate = "weight_gbs" if num_rows <= MAX_TOKENS else "tflops"
                texts = [f"{one['us']:.1f} {one[rate]:.0f} {one['share']:.0%}" if one else "-" for one in found]
                print(f"{shape:11}{num_rows:6}" + "".join(f"{text:>22}" for text in texts))


def print_projection(rows: list[dict[str, Any]], ceilings: Ceilings) -> None:
    """An RTX 5090 from the mma.sync path: its own peaks, at the shares of the ceilings reached here. A projection."""
    cells = {(one["what"], one["shape"], one["rows"]): one["us"]
             for one in rows if one["section"] == "cell" and one["mma_sync"]}  # fmt: skip
    print(
        "\nRTX 5090, a projection: time = floor on its peaks / share, share = floor on the H100's ceilings / time here"
    )
    print(f"its peaks: {RTX_5090}; ceilings here: read {ceilings.read_gbs:.0f} GB/s, "
          + ", ".join(f"{width} {rate:.0f} TFLOP/s" for width, rate in ceilings.rates.items()))  # fmt: skip
    card = Ceilings(RTX_5090["read_gbs"], RTX_5090["read_gbs"], {key: RTX_5090[key] for key in ("bf16", "int8")})
    for kind in ("int8", "bf16"):
        for num_rows in MMA_SYNC_ROWS:
            if not all((kind, shape, num_rows) in cells for shape in TIMES_IN_MODEL):
                continue
            total = here = 0.0
            for shape, times in TIMES_IN_MODEL.items():
                microseconds = cells[kind, shape, num_rows]
                share = ceilings.floor_us(shape, num_rows, kind) / microseconds
                total += times * card.floor_us(shape, num_rows, kind) / share
                here += times * microseconds
            print(
                f"{kind} math, {num_rows} rows: all linear maps of a pass {total * 1e-3:.2f} ms "
                f"({num_rows / total * 1e6:,.0f} tokens/s); the H100's mma.sync path {here * 1e-3:.2f} ms"
            )


def stages() -> list[tuple[tuple[str, ...], tuple[int, ...]]]:
    """Shapes and numbers of rows by importance, each pair once."""
    if not HAS_MMA_V3:
        return [(tuple(SHAPES), MMA_SYNC_ROWS)]
    others = tuple(shape for shape in SHAPES if shape not in FIRST_SHAPES)
    more = tuple(num_rows for num_rows in ROWS if num_rows not in FIRST_ROWS)
    return [(FIRST_SHAPES, FIRST_ROWS), (others, FIRST_ROWS), (tuple(SHAPES), more)]


def compile_share(index: int, count: int) -> None:
    """Run a share of all products of ours once, so that their kernels are compiled."""
    jobs = [(kind, shape, num_rows) for shapes, rows in stages()
            for num_rows in rows for shape in shapes for kind in OURS[:2]]  # fmt: skip
    for kind, shape, num_rows in jobs[index::count]:
        weight = random_weight(*SHAPES[shape], 1)
        workspace = new_workspace(DEVICE, weight.words.numel() * 8, "bf16")
        call = call_of(kind, torch.ones(num_rows, SHAPES[shape][1], device=DEVICE).bfloat16(), weight, workspace)
        if call is not None:
            attempt(f"compiling {kind} {shape} {num_rows}", call)


def measure_stage(
    clock: Clock, report: Report, ceilings: Ceilings, workspace: Workspace, shapes: tuple[str, ...],
    rows: tuple[int, ...],
) -> None:  # fmt: skip
    """Ours on some shapes at some numbers of rows."""
    for shape in shapes:
        copies = copies_of(random_weight(*SHAPES[shape], 11))
        for num_rows in rows:
            if report.left() < CELL_SECONDS:
                print(f"no time for {shape} {num_rows}", flush=True)
                continue
            measure_ours(clock, report, ceilings, shape, copies, workspace, num_rows)
        report.save()


def other_path(arguments: argparse.Namespace, seconds: float) -> list[dict[str, Any]]:
    """Ours in a process without wgmma."""
    out = Path(f"{arguments.out}.mma_sync")
    command = [sys.executable, __file__, "--seconds", str(seconds), "--out", str(out), *(["--dry"] if DRY else [])]
    subprocess.run(command, env=os.environ | {"DISABLE_MMA_V3": "1"}, check=False)
    return list(json.loads(out.read_text())["rows"]) if out.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--seconds", type=float, default=150, help="time for everything; what does not fit is left out and said"
    )
    parser.add_argument("--out", type=Path, default=Path("int4_matmul.json"))
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--dry", action="store_true", help="without a card, tiny shapes")
    parser.add_argument("--share", nargs=2, type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not HAS_MMA_V3:
        take_settings_of_rtx()
    if arguments.share:
        compile_share(*arguments.share)
        return
    report = Report(arguments.out, arguments.seconds, DEVICE)
    torch.manual_seed(7)
    print(f"{report.meta}, triton {triton.__version__}", flush=True)
    if not DRY and HAS_MMA_V3:
        has_time = arguments.seconds > 5 * MMA_SYNC_SECONDS
        in_processes(__file__, report.left() * COMPILE_SHARE, (), MMA_SYNC_PART if has_time else 0.0)
    clock = Clock()
    ceilings = measure_ceilings(clock, report)
    workspace = new_workspace(DEVICE, math.prod(SHAPES["gate_up"]), "bf16")
    for shapes, rows in stages():
        measure_stage(clock, report, ceilings, workspace, shapes, rows)
        if HAS_MMA_V3 and not arguments.no_peers:
            for name in ALL_PEERS:  # those that tune themselves come last, and may run out of time
                for shape in shapes:
                    measure_peer(clock, report, ceilings, name, shape, rows)
                report.save()
        print_table(report.rows, not HAS_MMA_V3)
    if HAS_MMA_V3 and report.left() > MMA_SYNC_SECONDS:
        found = other_path(arguments, MMA_SYNC_SECONDS)
        report.rows += [one for one in found if one["section"] in ("cell", "wrong")]
        print_projection(report.rows, ceilings)
    if HAS_MMA_V3 and report.left() > 2 * CELL_SECONDS:
        measure_parts(clock, report, ceilings, workspace)
    report.save()


if __name__ == "__main__":
    main()
