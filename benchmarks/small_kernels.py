"""The small kernels on a card: ours, torch, and torch.compile in one run, as microseconds and shares of copying.

    PYTHONPATH=. python3 benchmarks/small_kernels.py --seconds 90 --out small_kernels.json
    PYTHONPATH=. python3 benchmarks/small_kernels.py --seconds 60 --only rows --out rows.json

torch.compile works in processes side by side first, whose results this one finds in Inductor's cache. A kernel that
does not agree with its reference is reported and not timed. Rows are slices of a stacked projection, as in the model.
8,192 rows do not fit into the L2 cache; one row is as warm as a projection leaves it.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.lightning_cases import DEVICE, EPS, copy_gb_per_s, note, results, started_s, timed_us
from salalocal.kernels.embedding import embed, embed_reference
from salalocal.kernels.gate import sigmoid_gate, sigmoid_gate_reference
from salalocal.kernels.gated_norm import GatedNorm, gated_norm, gated_norm_reference
from salalocal.kernels.int4.activations_by_row import (
    QuantizedRows,
    from_split_order,
    gated_norm_quantize_rows,
    quantize_rows_reference,
    rms_norm_quantize_rows,
    sigmoid_gate_quantize_rows,
    swiglu_quantize,
)
from salalocal.kernels.norm import rms_norm, rms_norm_reference
from salalocal.kernels.sampling import draw_tokens, greedy_tokens, new_sampling_tensors, sample_tokens
from salalocal.kernels.swiglu import swiglu, swiglu_reference

HIDDEN, WIDE, VOCABULARY = 4096, 16_384, 73_448
TOP_K = 50
ROWS, NUM_CASES = (8192, 1), 8
PARTS = ("sampling", "embedding", "rows")
MEASURING_S = 30.0  # of rows, once everything is compiled
Call = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """One kernel, the torch form of the same, and the bytes that have to move."""

    name: str
    ours: Call
    torch_form: Call
    num_bytes: int


def cases(num_rows: int, weight: Tensor) -> list[Case]:
    """Every kernel over rows."""
    qkvz = torch.randn(num_rows, 4 * HIDDEN, device=DEVICE).bfloat16()
    x, gate = qkvz[:, :HIDDEN], qkvz[:, 3 * HIDDEN :]
    gate_up = torch.randn(num_rows, 2 * WIDE, device=DEVICE).bfloat16()
    wide_gate, up = gate_up[:, :WIDE], gate_up[:, WIDE:]
    gated = GatedNorm(weight=weight, gate=gate, eps=EPS)
    narrow, wide = num_rows * HIDDEN, num_rows * WIDE

    def then_quantized(form: Callable[[], Tensor]) -> Call:
        return lambda: quantize_rows_reference(form())

    def norm_form() -> Tensor:
        return rms_norm_reference(x, weight, EPS)

    def gate_form() -> Tensor:
        return sigmoid_gate_reference(x, gate)

    def gated_form() -> Tensor:
        return gated_norm_reference(x, gated)

    def swiglu_form() -> Tensor:
        return swiglu_reference(wide_gate, up)

    return [
        Case("norm", lambda: rms_norm(x, weight, EPS), norm_form, 4 * narrow),
        Case("norm, int8", lambda: rms_norm_quantize_rows(x, weight, EPS), then_quantized(norm_form), 3 * narrow),
        Case("gate", lambda: sigmoid_gate(x, gate), gate_form, 6 * narrow),
        Case("gate, int8", lambda: sigmoid_gate_quantize_rows(x, gate), then_quantized(gate_form), 5 * narrow),
        Case("norm, gate", lambda: gated_norm(x, gated), gated_form, 6 * narrow),
        Case("norm, gate, int8", lambda: gated_norm_quantize_rows(x, gated), then_quantized(gated_form), 5 * narrow),
        Case("swiglu", lambda: swiglu(wide_gate, up), swiglu_form, 6 * wide),
        Case("swiglu, int8", lambda: swiglu_quantize(wide_gate, up), then_quantized(swiglu_form), 5 * wide),
    ]


def as_floats(made: Tensor | QuantizedRows) -> Tensor:
    """Values, whatever they are stored as."""
    if isinstance(made, QuantizedRows):
        return from_split_order(made.codes).float() * made.scales.unsqueeze(-1)
    return made.float()


def relative_error(case: Case) -> float:
    ours, theirs = as_floats(case.ours()), as_floats(case.torch_form())
    return float((ours - theirs).norm() / theirs.norm())


def new_weight() -> Tensor:
    return (0.5 + torch.rand(HIDDEN, device=DEVICE)).bfloat16()


def compiled(case: Case) -> Call:
    """By torch.compile, for these shapes alone: neither the form of other rows nor of other cases."""
    torch._dynamo.reset()
    return torch.compile(case.torch_form, dynamic=False)


def compile_share(index: int, count: int) -> None:
    """Every count-th case of all, called once."""
    for number, (num_rows, place) in enumerate((rows, place) for rows in ROWS for place in range(NUM_CASES)):
        if number % count == index:
            compiled(cases(num_rows, new_weight())[place])()
    torch.cuda.synchronize()


def compile_all(limit_s: float) -> None:
    """Fill Inductor's cache by all cores; what is not done in time is compiled where it is measured."""
    began_s = time.monotonic()
    count = max(1, min(len(ROWS) * NUM_CASES, (os.cpu_count() or 1) - 2))
    alone = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
    pool = [subprocess.Popen([sys.executable, __file__, "--share", f"{i}/{count}"], env=alone) for i in range(count)]
    codes: list[int | str] = []
    for process in pool:
        try:
            codes.append(process.wait(max(0.1, limit_s - (time.monotonic() - began_s))))
        except subprocess.TimeoutExpired:
            process.kill()
            codes.append("late")
    note("torch.compile by all cores", seconds=time.monotonic() - began_s, exit_codes=codes)


def measure_rows(num_rows: int, copy: float, left_s: Callable[[], float]) -> None:
    """Ours and torch for every case, then torch.compile while time is left."""
    right = []
    for case in cases(num_rows, new_weight()):
        error = relative_error(case)
        if not error < 5e-3:  # single roundings, also to int8, not more
            note(f"wrong: {case.name}, {num_rows} rows", error=error)
            continue
        right.append(case)
        us, spread = timed_us([case.ours] * 4, 0.05)
        torch_us, _ = timed_us([case.torch_form] * 4, 0.05)
        of_copy = case.num_bytes / us / 1e3 / copy
        note(f"{case.name}, {num_rows} rows", us=us, spread_us=spread, of_copy=of_copy, torch_us=torch_us)
    for case in right:
        if left_s() < 4:
            print(f"no time left for torch.compile: {case.name}, {num_rows} rows, and what follows", flush=True)
            return
        began_s = time.monotonic()
        us, spread = timed_us([compiled(case)] * 4, 0.05)
        figures = {"us": us, "spread_us": spread, "compile_s": time.monotonic() - began_s}
        note(f"{case.name}, {num_rows} rows, torch.compile", **figures)


def measure_embedding(copy: float) -> None:
    """Rows from the card's memory and from the host's."""
    on_host = torch.randn(VOCABULARY, HIDDEN).bfloat16().pin_memory()
    tables = {"card": on_host.to(DEVICE), "host": on_host}
    for num_tokens in (1, 16, 8192):
        # Every call other rows: nothing is found in the L2 cache.
        ids = [torch.randint(VOCABULARY, (num_tokens,), device=DEVICE) for _ in range(2 if num_tokens > 16 else 64)]
        for place, table in tables.items():
            if not torch.equal(embed(table, ids[0], 12.0), embed_reference(tables["card"], ids[0], 12.0)):
                note(f"wrong: embedding on the {place}, {num_tokens} tokens")
                continue
            us, spread = timed_us([lambda one=one, table=table: embed(table, one, 12.0) for one in ids], 0.1)
            gb_per_s = num_tokens * HIDDEN * 2 / us / 1e3
            note(f"embedding on the {place}, {num_tokens} tokens", us=us, spread_us=spread, read_gb_per_s=gb_per_s)
    note("copy", gb_per_s=copy)


def measure_sampling(num_rows: int) -> None:
    """Greedy and filtered choices, in a graph."""
    logits = 3 * torch.randn(num_rows, VOCABULARY, device=DEVICE)
    sampling = new_sampling_tensors(torch.device(DEVICE), 64, num_rows)
    sampling.uniforms.uniform_()
    if greedy_tokens(logits, sampling).tolist() != logits.argmax(1).tolist():
        note(f"wrong: greedy, {num_rows} rows")
    greedy_us, _ = timed_us([lambda: greedy_tokens(logits, sampling)] * 8, 0.05)
    argmax_us, _ = timed_us([lambda: logits.argmax(1)] * 8, 0.05)
    sampling.temperature.fill_(0.8)
    sampling.top_p.fill_(0.95)
    drawn_us, _ = timed_us([lambda: draw_tokens(logits, sampling)] * 8, 0.05)
    sampled_us, _ = timed_us([lambda: sample_tokens(logits, sampling)] * 8, 0.05)
    sampling.top_k.fill_(TOP_K)
    if not torch.equal(sample_tokens(logits, sampling), sample_tokens(logits, sampling, most=TOP_K)):
        note(f"wrong: the {TOP_K} likeliest, {num_rows} rows")
    sorted_us, _ = timed_us([lambda: sample_tokens(logits, sampling)] * 8, 0.05)
    cut_us, _ = timed_us([lambda: sample_tokens(logits, sampling, most=TOP_K)] * 8, 0.05)
    figures = {"greedy_us": greedy_us, "argmax_us": argmax_us, "drawn_us": drawn_us, "sampled_us": sampled_us}
    figures |= {"top_k_sorted_us": sorted_us, "top_k_us": cut_us}
    note(f"sampling, {num_rows} rows", **figures)


def measure(seconds: float, parts: set[str]) -> None:
    """The parts, which get what time is left."""
    note("device", name=torch.cuda.get_device_name(), torch=torch.__version__)
    if "rows" in parts:
        compile_all(seconds - MEASURING_S)
    copy = copy_gb_per_s()
    if "sampling" in parts:
        for num_rows in (1, 4, 16):
            measure_sampling(num_rows)
    if "embedding" in parts:
        measure_embedding(copy)
    if "rows" in parts:
        for num_rows, share in zip(ROWS, (0.8, 1.0), strict=True):
            limit_s = share * seconds
            measure_rows(num_rows, copy, lambda limit_s=limit_s: limit_s - (time.monotonic() - started_s))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", default="", help="JSON file for the results")
    parser.add_argument(
        "--seconds", type=float, default=90, help="time for everything; what does not fit is left out and said"
    )
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}, by commas")
    parser.add_argument("--share", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    parts = set(arguments.only.split(","))
    if not parts <= set(PARTS):
        parser.error(f"--only: {', '.join(sorted(parts - set(PARTS)))} is not one of {', '.join(PARTS)}")
    if arguments.share:
        with torch.inference_mode():
            compile_share(*map(int, arguments.share.split("/")))
        return
    try:
        with torch.inference_mode():
            measure(arguments.seconds, parts)
    finally:  # what was measured before something went wrong
        if arguments.out:
            Path(arguments.out).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
