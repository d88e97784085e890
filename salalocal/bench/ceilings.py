"""What the machine gives at best, measured: a device comes in, bytes and FLOP a second go out; for shares of the
roofline.

    share = seconds_at_least(work) / seconds measured
    seconds_at_least = max( linear FLOP / rate of products + attention FLOP / rate of float products,
                            bytes / rate of reading )

Rates are the best of what was tried, and of several runs: reading and copying of more memory than a cache holds, the
vendor's product in the dtype of the activations and in bf16, and on a card the vendor's and our own product of int8.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from salalocal.bench.work import Work
from salalocal.kernels.backend import use_triton
from salalocal.kernels.int4.activations_by_row import quantize_rows
from salalocal.kernels.int4.int8_gemm import int8_gemm
from salalocal.kernels.memory_read import PIECE, read_sums

_CARD_BYTES, _CPU_BYTES = 2**30, 2**27
_CARD_PRODUCT, _CPU_PRODUCT = (8192, 16_384, 4096), (512, 2048, 2048)  # rows, outputs, inputs
_MIN_RUNS, _MAX_RUNS, _ENOUGH_S = 5, 30, 0.3


@dataclass(frozen=True)
class Ceilings:
    """Bytes and FLOP a second. `int8_flops_per_s` is None where whole numbers are not multiplied by matrix units."""

    copy_bytes_per_s: float
    read_bytes_per_s: float
    float_flops_per_s: float
    float_dtype: str
    int8_flops_per_s: float | None = None

    def seconds_at_least(self, work: Work, math: str) -> float:
        """The least time for some work, its linear maps multiplied in `math` (int8, or floats of whatever kind)."""
        is_int8 = math == "int8" and self.int8_flops_per_s is not None
        linear_flops_per_s = self.int8_flops_per_s if is_int8 else self.float_flops_per_s
        assert linear_flops_per_s is not None
        compute_s = work.linear_flops / linear_flops_per_s + work.attention_flops / self.float_flops_per_s
        return max(compute_s, work.num_bytes / self.read_bytes_per_s)

    def is_memory_bound(self, work: Work, math: str) -> bool:
        """Whether reading memory, and not multiplying, takes that least time."""
        return self.seconds_at_least(work, math) == work.num_bytes / self.read_bytes_per_s

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measure for a second or two. Memory needed: some 2 GiB on a card, 300 MB on a CPU, given back.

    `dtype`: what is tried beside bf16.
    """
    is_card = device.type == "cuda"
    read_bytes_per_s, copy_bytes_per_s = _memory_rates(device)
    products = {tried: _float_flops_per_s(device, tried) for tried in {dtype, torch.bfloat16}}
    fastest = max(products, key=lambda tried: products[tried])
    ceilings = Ceilings(
        copy_bytes_per_s=copy_bytes_per_s,
        read_bytes_per_s=read_bytes_per_s,
        float_flops_per_s=products[fastest],
        float_dtype=str(fastest).removeprefix("torch."),
        int8_flops_per_s=_int8_flops_per_s(device) if is_card else None,
    )
    if is_card:
        torch.cuda.empty_cache()
    return ceilings


def _memory_rates(device: torch.device) -> tuple[float, float]:
    """Bytes a second of reading, and of copying, where what is read and what is written both count."""
    num_bytes = _CARD_BYTES if device.type == "cuda" else _CPU_BYTES
    words = torch.ones(num_bytes // 4 // PIECE * PIECE, dtype=torch.int32, device=device)
    target = torch.empty_like(words)
    read_s = _least_s(device, lambda: read_sums(words))
    copy_s = _least_s(device, lambda: target.copy_(words))
    return words.nbytes / read_s, 2 * words.nbytes / copy_s


def _float_flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    num_rows, num_out, num_in = _CARD_PRODUCT if device.type == "cuda" else _CPU_PRODUCT
    x, w = _operand(device, (num_rows, num_in), dtype), _operand(device, (num_out, num_in), dtype)
    return 2.0 * num_rows * num_out * num_in / _least_s(device, lambda: functional.linear(x, w))


def _int8_flops_per_s(device: torch.device) -> float:
    """The faster of the vendor's product and ours, which can be ahead of it."""
    num_rows, num_out, num_in = _CARD_PRODUCT
    x = quantize_rows(_operand(device, (num_rows, num_in), torch.bfloat16))
    w = torch.randint(-127, 128, (num_out, num_in), dtype=torch.int8, device=device)
    scales = torch.ones(num_out, device=device)
    out = torch.empty(num_rows, num_out, dtype=torch.bfloat16, device=device)
    seconds = _least_s(device, lambda: torch._int_mm(x.codes, w.t()))
    if use_triton(w):
        seconds = min(seconds, _least_s(device, lambda: int8_gemm(x, w, scales, out)))
    return 2.0 * num_rows * num_out * num_in / seconds


def _operand(device: torch.device, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Numbers as they come in a model: a card draws more power, and runs slower, than with zeros."""
    return torch.randn(shape, device=device, dtype=dtype)


def _least_s(device: torch.device, call: Callable[[], object]) -> float:
    """Wall time of one call, the shortest of several, each of which is waited for."""
    call()
    times: list[float] = []
    while len(times) < _MIN_RUNS or (sum(times) < _ENOUGH_S and len(times) < _MAX_RUNS):
        wait_for(device)
        started_s = time.perf_counter()
        call()
        wait_for(device)
        times.append(time.perf_counter() - started_s)
    return min(times)


def wait_for(device: torch.device) -> None:
    """Until a device has done all that it was given; a CPU has done so already."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
