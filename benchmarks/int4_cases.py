"""The linear maps of the 9B with random int4 weights, for benchmarks of products with them.

`DRY` (--dry on the command line) stands for a run without a card: tiny shapes, the reference in place of the kernels.
"""

import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from salalocal.kernels.int4.scratch import Int4Weight, decode_bf16, int4_weight

DRY = "--dry" in sys.argv
DEVICE = torch.device("cpu" if DRY else "cuda")
COLD_BYTES = 1 if DRY else 160 << 20  # three times an H100's L2 cache
GROUP_SIZE = 128
SHAPES = {  # out, in
    "gate_up": (32_768, 4_096),
    "down": (4_096, 16_384),
    "qkv": (12_288, 4_096),
    "qkvz": (16_384, 4_096),
    "sparse_qkv": (4_608, 4_096),
    "o": (4_096, 4_096),
}
if DRY:
    SHAPES = {name: (num_out // 32, num_in // 32) for name, (num_out, num_in) in SHAPES.items()}
# How often a token passes each: 24 Lightning layers with q, k, v and z in one, 8 sparse ones with z apart (as o).
TIMES_IN_MODEL = {"gate_up": 32, "down": 32, "qkvz": 24, "sparse_qkv": 8, "o": 32 + 8}


def random_weight(num_out: int, num_in: int, seed: int) -> Int4Weight:
    """Codes roughly normal and scales within a factor of two, as trained weights have them."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    scales = torch.rand(num_out, num_in // GROUP_SIZE, device=DEVICE, generator=generator) * 0.006 + 0.006
    words = torch.zeros(num_out, num_in // 8, dtype=torch.int32, device=DEVICE)
    for place in range(8):
        codes = torch.randn(num_out, num_in // 8, device=DEVICE, generator=generator).mul_(2.7).round_().clamp_(-8, 7)
        words |= (codes.to(torch.int32) + 8) << (4 * place)
    return int4_weight(words, scales.bfloat16(), GROUP_SIZE)


def copies_of(weight: Int4Weight) -> list[Int4Weight]:
    """So many copies that the L2 cache cannot hold them."""
    count = max(1, math.ceil(COLD_BYTES / (weight.words.numel() * 4)))
    return [weight, *(weight._replace(words=weight.words.clone()) for _ in range(count - 1))]


def part_of(weight: Int4Weight, rows: Tensor) -> Int4Weight:
    """Some output channels."""
    return Int4Weight(
        weight.words[rows], weight.scales[rows], weight.group_size, weight.row_scales[rows], weight.inverses[rows]
    )


def dense_of(weight: Int4Weight) -> Tensor:
    """The weights in bf16."""
    shape = (weight.words.shape[0], weight.words.shape[1] * 8)
    return decode_bf16(weight, torch.empty(shape, dtype=torch.bfloat16, device=DEVICE))


def relative_error(value: Tensor, exact: Tensor) -> float:
    return float((value.double() - exact.double()).norm() / exact.double().norm())


def attempt(what: str, call: Callable[[], object]) -> bool:
    """Run something that a missing package or a kernel's limit may stop; say so, and whether it ran."""
    try:
        call()
    except Exception as error:  # a peer may fail in any way, and the rest is measured all the same
        print(f"{what}: {type(error).__name__} {str(error)[:140]}", flush=True)
        return False
    return True


def in_processes(script: str, seconds: float, more: Sequence[str] = (), mma_sync_part: float = 0.0) -> None:
    """Run a script with `--share INDEX COUNT` so many times as there are cores, to fill Triton's cache on disk: a
    compiler holds one core. Some processes compile for the mma.sync path. What is not done in time is left."""
    began, count = time.monotonic(), min(15, os.cpu_count() or 1)
    num_mma_sync = round(count * mma_sync_part)
    shares = [(index, count - num_mma_sync, {}) for index in range(count - num_mma_sync)]
    shares += [(index, num_mma_sync, {"DISABLE_MMA_V3": "1"}) for index in range(num_mma_sync)]
    pool = [
        subprocess.Popen([sys.executable, script, "--share", str(index), str(of), *more], env=os.environ | changes)
        for index, of, changes in shares
    ]
    for process in pool:
        try:
            process.wait(timeout=max(1.0, seconds - (time.monotonic() - began)))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    print(f"compiled in {time.monotonic() - began:.0f} s by {count} processes", flush=True)
