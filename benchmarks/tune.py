"""Finds launch settings of the GEMMs with int4 weights on a card, checked and timed; prints the tables to commit.

    PYTHONPATH=. python3 benchmarks/tune.py --seconds 200 --out tune.json                          # everything
    PYTHONPATH=. python3 benchmarks/tune.py --only bf16,quantize --rows 64,256 --seconds 40 --out t.json  # part
    PYTHONPATH=. DISABLE_MMA_V3=1 python3 benchmarks/tune.py --seconds 200 --out tune.json         # RTX instructions
    PYTHONPATH=. python3 benchmarks/tune.py --dry --out /tmp/dry.json                              # without a card

For each kind of GEMM, number of rows and class of weights (wide, deep, small; see `kernels.int4.gemm_launch`) every
setting is compiled in a pool of processes, checked against float64 on 256 output channels, and timed in a CUDA graph
over copies of the weights larger than the L2 cache. A wrong setting is named, and not timed.
"""

import argparse
import math
import os
import statistics
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.budget_report import Report
from benchmarks.int4_cases import (
    DEVICE,
    DRY,
    SHAPES,
    attempt,
    copies_of,
    in_processes,
    part_of,
    random_weight,
    relative_error,
)
from benchmarks.int4_matmul import Clock
from salalocal.kernels.int4 import activations_by_row
from salalocal.kernels.int4.activations_by_row import quantize_rows, rms_norm_quantize_rows, swiglu_quantize
from salalocal.kernels.int4.gemm import int4_gemm, int4_gemm_definition, int4_gemm_triton
from salalocal.kernels.int4.gemm_launch import GemmLaunch as L
from salalocal.kernels.int4.int8_gemm import int8_gemm, int8_gemm_triton, int8_swiglu, int8_swiglu_triton
from salalocal.kernels.int4.route import Int4Scratch, int4_matmul, int4_swiglu, new_scratch, prepare
from salalocal.kernels.int4.scratch import Int4Weight, decode_int8
from salalocal.kernels.swiglu import swiglu_definition

CLASSES = {"gate_up": "wide", "down": "deep", "o": "small"}
HAS_MMA_V3 = os.environ.get("DISABLE_MMA_V3") != "1"
LARGEST_ERROR = 4e-3  # one rounding to bf16 is 1.7e-3
# Settings to choose from: for M up to 16, up to 64, beyond; LARGE for the int8 GEMM from a scratch.
SMALL = [
    L(16, 64, num_warps=4, num_stages=4, programs=2),
    L(16, 64, num_warps=4, num_stages=4, programs=4),
    L(16, 128, num_warps=4, num_stages=4, programs=2),
    L(16, 128, num_warps=4, num_stages=4, programs=3),
    L(16, 128, num_warps=4, num_stages=6, programs=2, has_tma=True),
    L(16, 64, 256, 4, 3, programs=4),
    L(16, 128, 256, 8, 3, programs=2),
    L(16, 128, 256, 8, 3, programs=3),
]
MIDDLE = [
    L(64, 64, num_warps=4, num_stages=4, programs=2),
    L(64, 64, num_warps=4, num_stages=4, programs=4),
    L(64, 128, num_warps=4, num_stages=4, programs=2),
    L(64, 128, num_warps=8, num_stages=4, programs=2),
    L(64, 128, num_warps=4, num_stages=4, programs=2, has_tma=True),
    L(64, 128, num_warps=8, num_stages=5, programs=2, has_tma=True),
    L(64, 64, 256, 4, 3, programs=3),
    L(64, 128, 256, 8, 3, programs=2),
    L(64, 128, 256, 8, 3, programs=2, has_tma=True),
]
WIDE = [
    L(128, 64, num_warps=4, num_stages=4, programs=2),
    L(128, 128, num_warps=4, num_stages=4),
    L(128, 128, num_warps=8, num_stages=3, has_tma=True),
    L(128, 128, num_warps=8, num_stages=4, programs=2, has_tma=True),
    L(128, 128, num_warps=8, num_stages=4, programs=2),
    L(256, 64, num_warps=4, num_stages=3, programs=2, has_tma=True),
    L(256, 128, num_warps=8, num_stages=3, has_tma=True),
    L(256, 128, num_warps=8, num_stages=4, has_tma=True),
    L(128, 128, 256, 8, 2, has_tma=True),
    L(128, 128, 256, 8, 2),
]
# bf16: a weight is unpacked once for so many rows.
TALL = [
    L(128, 128, num_warps=8, num_stages=3, has_tma=True),
    L(128, 128, num_warps=8, num_stages=4, has_tma=True),
    L(256, 128, num_warps=8, num_stages=3, has_tma=True),
    L(256, 128, num_warps=8, num_stages=2, has_tma=True),
    L(256, 64, num_warps=8, num_stages=3, has_tma=True),
    L(256, 64, num_warps=4, num_stages=3, has_tma=True),
    L(256, 64, num_warps=8, num_stages=3, has_tma=True, programs=2),
]
LARGE = [
    *(L(128, 128, 128, 4, 3, has_tma=True, span=span) for span in (8, 16)),
    L(128, 256, 128, 8, 4, has_tma=True),
    *(L(256, 128, 128, 8, 4, has_tma=True, span=span) for span in (4, 8, 16)),
    L(256, 128, 256, 8, 2, has_tma=True),
    *(L(256, 128, 128, 8, stages, has_tma=True, walks=True) for stages in (3, 4)),
    L(256, 128, 128, 8, 4, has_tma=True, walks=True, span=16),
    L(128, 256, 128, 8, 4, has_tma=True, walks=True),
    L(128, 128, 128, 4, 3, has_tma=True, walks=True, programs=2),
    L(128, 128, 128, 8, 4, has_tma=True, walks=True),
]
# Within the 99 KiB of RTX cards, of which those of 48 KiB leave room for a second program there.
LARGE_MMA_SYNC = [
    L(128, 128, 128, 4, 3),
    L(128, 128, 64, 4, 3),
    L(128, 128, 64, 4, 4),
    L(128, 128, 128, 8, 3),
    L(128, 256, 64, 8, 3),
    L(256, 128, 64, 8, 3),
    L(128, 128, 128, 4, 3, has_tma=True),
    L(128, 128, 64, 4, 3, has_tma=True),
    L(128, 256, 64, 8, 3, has_tma=True),
    L(128, 128, 64, 4, 3, has_tma=True, walks=True, programs=2),
]
if not HAS_MMA_V3:
    LARGE = LARGE_MMA_SYNC
Classes = dict[int, list[L]]
KINDS: dict[str, Classes] = {
    "int8": {16: SMALL, 64: MIDDLE, 128: MIDDLE + WIDE, 256: MIDDLE + WIDE, 512: WIDE, 1_024: WIDE},
    "bf16": {16: SMALL, 64: MIDDLE, 128: MIDDLE[:6] + TALL, 256: MIDDLE[:3] + TALL, 512: TALL},
    "scratch": {2_048: LARGE, 8_192: LARGE},
    "swiglu": {2_048: LARGE, 8_192: LARGE},
}
if DRY:
    KINDS = {kind: {17: [L(16, 32, num_stages=2), L(32, 32, num_stages=2, has_tma=True)]} for kind in KINDS}
BY_SCRATCH = ("scratch", "swiglu")
ROUNDS = 1 if DRY else 3  # settings take turns, since the card's clock falls under load


def selected(arguments: argparse.Namespace) -> dict[str, Classes]:
    """The kinds and numbers of rows that were asked for; without wgmma, no int4 settings with the copy engine."""
    only = [one for one in arguments.only.split(",") if one in KINDS] if arguments.only else list(KINDS)
    rows = {int(one) for one in arguments.rows.split(",")} if arguments.rows else None
    return {
        kind: {
            num_rows: [one for one in launches if HAS_MMA_V3 or kind in BY_SCRATCH or not one.has_tma]
            for num_rows, launches in KINDS[kind].items()
            if rows is None or num_rows in rows
        }
        for kind in only
    }


def call_of(kind: str, x: Tensor, weight: Int4Weight, scratch: Int4Scratch, launch: L) -> Callable[[], Tensor]:
    """One GEMM with given settings; activations and scratch are made before."""
    num_out, num_in = weight.shape
    out = torch.full((len(x), num_out), math.nan, dtype=torch.bfloat16, device=DEVICE)
    if kind in BY_SCRATCH:
        codes = quantize_rows(x)
        w8 = scratch.weights[: num_out * num_in].view(torch.int8).view(num_out, num_in)
        if kind == "scratch":
            decode_int8(weight, w8)
            if DRY:
                return lambda: int8_gemm(codes, w8, weight.row_scales, out)
            return lambda: int8_gemm_triton(codes, w8, weight.row_scales, out, None, launch)
        half = num_out // 2
        decode_int8(weight.part(slice(0, half)), w8[0::2])
        decode_int8(weight.part(slice(half, num_out)), w8[1::2])
        if DRY:
            return lambda: int8_swiglu(codes, w8, weight.row_scales, out[:, :half])
        return lambda: int8_swiglu_triton(codes, w8, weight.row_scales, out[:, :half], launch)
    prepared = prepare(x, "fused_int8" if kind == "int8" else "fused_bf16")
    if DRY:
        return lambda: int4_gemm(prepared, weight, out, scratch.split)
    return lambda: int4_gemm_triton(prepared, weight, out, scratch.split, None, launch)


def compile_share(searches: dict[str, Classes], index: int, count: int) -> None:
    """Compile a share of all settings into Triton's cache on disk: few tiles are split, many are not."""
    few, many = random_weight(512, 4_096, 1), random_weight(16_384, 2_048, 1)
    scratch = new_scratch(DEVICE, 16_384 * 2_048, "bf16")
    jobs = sorted({(kind, str(one)): (kind, one) for kind, classes in searches.items()
                   for launches in classes.values() for one in launches}.items())  # fmt: skip
    for _, (kind, launch) in jobs[index::count]:
        for weight, num_rows in ((few, launch.rows), (many, 8 * launch.rows)):
            if kind not in BY_SCRATCH or weight is many:
                x = torch.randn(num_rows, weight.shape[1], device=DEVICE).bfloat16()
                attempt(f"compiling {kind} {launch}", call_of(kind, x, weight, scratch, launch))


def exact_of(kind: str, x: Tensor, weight: Int4Weight, some: Tensor) -> Tensor:
    """What some outputs should be, in float64."""
    if kind == "swiglu":
        gate = int4_gemm_definition(prepare(x, "fused_int8"), part_of(weight, some)).bfloat16()
        up = int4_gemm_definition(prepare(x, "fused_int8"), part_of(weight, some + weight.shape[0] // 2)).bfloat16()
        return swiglu_definition(gate, up)
    return int4_gemm_definition(prepare(x, "fused_bf16" if kind == "bf16" else "fused_int8"), part_of(weight, some))


def tune_class(
    clock: Clock, report: Report, kind: str, num_rows: int, shape: str, launches: list[L], scratch: Int4Scratch
) -> L | None:
    """Time every setting on one shape; the fastest that is right."""
    weight = random_weight(*SHAPES[shape], 3)
    copies = copies_of(weight) if kind not in BY_SCRATCH and num_rows <= 512 else [weight]
    x = torch.randn(num_rows, SHAPES[shape][1], device=DEVICE).bfloat16()
    some = torch.randperm(SHAPES[shape][0] // (2 if kind == "swiglu" else 1), device=DEVICE)[:256]
    exact = exact_of(kind, x, weight, some)
    times: dict[str, list[float]] = {}

    def measure(launch: L) -> None:
        if str(launch) not in times:
            error = relative_error(call_of(kind, x, weight, scratch, launch)()[:, some], exact)
            if not error < LARGEST_ERROR:
                print(f"WRONG {kind} {shape} {num_rows} {launch}: relative error {error:.4f}", flush=True)
                raise ValueError("wrong")
        timing = clock.time([call_of(kind, x, one, scratch, launch) for one in copies])
        times.setdefault(str(launch), []).append(timing.median_us)

    usable = launches
    for _ in range(ROUNDS):
        if report.left() > 0:
            usable = [one for one in usable if attempt(f"{kind} {shape} {num_rows} {one}", partial(measure, one))]
    timed = [one for one in usable if str(one) in times]
    found = sorted(((statistics.median(times[str(one)]), one) for one in timed), key=lambda pair: pair[0])
    for microseconds, one in found:
        report.rows.append({"section": "tune", "kind": kind, "shape": shape, "rows": num_rows, "us": microseconds,
                            "all_us": times[str(one)], "launch": asdict(one), "mma_sync": not HAS_MMA_V3})  # fmt: skip
    if not found:
        return None
    rate = 2e-6 * num_rows * math.prod(SHAPES[shape]) / found[0][0]
    print(f"{kind} {num_rows} {CLASSES[shape]}: {found[0][0]:.1f} us {rate:.0f} TFLOP/s", flush=True)
    for microseconds, launch in found[:5]:
        print(f"    {microseconds / found[0][0]:.3f} {written(launch)}", flush=True)
    return found[0][1]


def tune_pieces(clock: Clock, report: Report, num_rows: int) -> None:
    """The first half of an MLP, unpacking and quantizing included: products written or gated on the way, and a scratch
    for all of the matrix or for pieces that the L2 cache may hold."""
    num_out, num_in = SHAPES["gate_up"]
    weight = random_weight(num_out, num_in, 3)
    x = quantize_rows(torch.randn(num_rows, num_in, device=DEVICE).bfloat16())
    both = torch.empty(num_rows, num_out, dtype=torch.bfloat16, device=DEVICE)

    def written(scratch: Int4Scratch) -> object:
        return swiglu_quantize(*int4_matmul(x, weight, "scratch_int8", scratch, both).chunk(2, dim=1))

    def gated(scratch: Int4Scratch) -> object:
        return quantize_rows(int4_swiglu(x, weight, scratch, both[:, : num_out // 2]))

    calls = {}
    for mebibytes in (24, 32, 64, 128):
        scratch = new_scratch(DEVICE, min(mebibytes << 20, num_out * num_in), "int8")
        calls |= {f"{one.__name__}, {mebibytes} MiB": partial(one, scratch) for one in (written, gated)}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            attempt(name, lambda name=name, call=call: times[name].append(clock.time([call]).median_us))
    for name, found in times.items():
        if found:
            report.add("pieces", what=name, rows=num_rows, us=statistics.median(found), spread=max(found) - min(found))


def tune_quantizers(clock: Clock, report: Report) -> None:
    """Time the makers of int8 rows with other numbers of warps a row. Units: GB/s of what they must move."""
    hidden, middle = SHAPES["o"][0], SHAPES["down"][1]
    chosen = activations_by_row._num_warps
    for num_rows in (17,) if DRY else (64, 8_192):
        both = torch.randn(num_rows, 2 * middle, device=DEVICE).bfloat16()
        x, gate, up, gain = both[:, :hidden].contiguous(), both[:, :middle], both[:, middle:], both[0, :hidden]
        calls: dict[str, tuple[Callable[[], object], int]] = {
            f"quantize_rows {hidden}": (lambda x=x: quantize_rows(x), 3 * hidden),
            f"rms_norm_quantize {hidden}": (lambda x=x, gain=gain: rms_norm_quantize_rows(x, gain, 1e-6), 3 * hidden),
            f"quantize_rows {middle}": (lambda gate=gate: quantize_rows(gate), 3 * middle),
            f"swiglu_quantize {middle}": (lambda gate=gate, up=up: swiglu_quantize(gate, up), 5 * middle),
        }
        for num_warps in (2, 4, 8, 16):
            activations_by_row._num_warps = lambda block, num_warps=num_warps: num_warps
            for name, (call, moved) in calls.items():
                microseconds = clock.time([call]).median_us
                rate = moved * num_rows / microseconds * 1e-3
                report.add("quantize", what=name, rows=num_rows, num_warps=num_warps, us=microseconds, gbs=rate)
    activations_by_row._num_warps = chosen


def written(launch: L) -> str:
    """A setting as it stands in a table."""
    values = {name: getattr(launch, name) for name in ("has_tma", "programs", "span", "walks")}
    plain = L(launch.rows, launch.columns)
    more = "".join(f", {name}={value}" for name, value in values.items() if value != getattr(plain, name))
    shape = f"{launch.rows}, {launch.columns}, {launch.depth}, {launch.num_warps}, {launch.num_stages}"
    return f"GemmLaunch({shape}{more})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--seconds", type=float, default=200, help="time for everything; what does not fit is left out and said"
    )
    parser.add_argument("--out", type=Path, default=Path("tune.json"))
    parser.add_argument("--only", help=f"of {','.join(KINDS)},pieces,quantize")
    parser.add_argument("--rows", help="such as 64,256")
    parser.add_argument("--dry", action="store_true", help="without a card, tiny shapes")
    parser.add_argument("--share", nargs=2, type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    searches = selected(arguments)
    if arguments.share:
        compile_share(searches, *arguments.share)
        return
    report = Report(arguments.out, arguments.seconds, DEVICE)
    torch.manual_seed(7)
    print(report.meta, flush=True)
    clock = Clock()
    if not DRY:
        chosen = [*(["--only", arguments.only] if arguments.only else []),
                  *(["--rows", arguments.rows] if arguments.rows else [])]  # fmt: skip
        in_processes(__file__, report.left() / 2, chosen)
    if not arguments.only or "quantize" in arguments.only:
        tune_quantizers(clock, report)
    if not arguments.only or "pieces" in arguments.only:
        for num_rows in (17,) if DRY else (2_048, 8_192):
            tune_pieces(clock, report, num_rows)
    scratch = new_scratch(DEVICE, math.prod(SHAPES["gate_up"]), "bf16")
    for kind, classes in searches.items():
        for num_rows, launches in classes.items():
            best = {CLASSES[shape]: tune_class(clock, report, kind, num_rows, shape, launches, scratch)
                    for shape in CLASSES if kind != "swiglu" or shape == "gate_up"}  # fmt: skip
            settings = ", ".join(f"{name}={written(one)}" for name, one in best.items() if one is not None)
            print(f"{kind}: ({num_rows}, PerShape({settings}))", flush=True)
            report.save()
    if report.left() <= 0:
        print("the time ran out: not everything was tried", flush=True)


if __name__ == "__main__":
    main()
