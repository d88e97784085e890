"""Which way a product with packed int4 weights goes when there are many rows of activations, and the way itself.

    route          reads and does                                                     activations come as
    fused_int8     packed words; unpacked in registers, int8 matrix units             QuantizedRows, int8
    scratch_int8   words once into an int8 scratch, then an int8 GEMM                 QuantizedRows, int8
    fused_bf16     packed words; unpacked in registers, bf16 matrix units             bf16 in split order
    scratch_bf16   words once into a bf16 scratch, then the vendor's GEMM             bf16
    scratch_fp8    words once into an fp8 scratch, then the vendor's GEMM             QuantizedRows, fp8

Both int8 routes give the same bits, so how a prompt is cut into chunks does not show. Filling a scratch costs the same
share of a product whatever its shape, for N * K weights are unfolded and M * N * K multiplied: M alone decides.
Shapes: x [M, K]; y, residual [M, N].
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from salalocal.errors import BackendError
from salalocal.kernels.backend import entry_of_card
from salalocal.kernels.int4.activations_by_row import QuantizedRows, quantize_rows, split_rows
from salalocal.kernels.int4.gemm import INT8_GROUPS, SplitWorkspace, int4_gemm, new_split_workspace
from salalocal.kernels.int4.int8_gemm import Residual, int8_gemm
from salalocal.kernels.int4.scratch import Int4Weight, decode_bf16, decode_fp8, decode_int8, fp8_scales

Math = Literal["bf16", "int8", "fp8"]
Route = Literal["fused_int8", "scratch_int8", "fused_bf16", "scratch_bf16", "scratch_fp8"]

# By the oldest compute capability they hold for: up to so many rows, unpacking in registers is ahead of the scratch.
# From times on an H100 at 16, 64, 256 and 1,024 rows (90), and on its mma.sync path (DISABLE_MMA_V3=1) at 16, 64 and
# 512 (80, 120); a limit of 128 or 256 lies between two of those. The bf16 and fp8 scratch were not timed on the
# mma.sync path: their limits there are those of 90. Math of fp8 starts as bf16.
FUSED_ROWS: dict[int, dict[Math, int]] = {
    80: {"int8": 256, "bf16": 128, "fp8": 128},
    90: {"int8": 1024, "bf16": 128, "fp8": 128},
    120: {"int8": 256, "bf16": 128, "fp8": 128},
}
_OLDEST_FP8 = 89
_SCRATCH = {"scratch_int8": torch.int8, "scratch_bf16": torch.bfloat16, "scratch_fp8": torch.float8_e4m3fn}


class Int4Scratch(NamedTuple):
    """What routes write between their steps; one for each device and stream. Shapes: weights uint8 [bytes]."""

    weights: Tensor
    split: SplitWorkspace


def new_scratch(device: torch.device, num_weights: int, math: Math) -> Int4Scratch:
    """Room for the largest matrix of a model, `num_weights` = N * K, allocated once."""
    num_bytes = num_weights * (2 if math == "bf16" else 1)
    return Int4Scratch(torch.empty(num_bytes, dtype=torch.uint8, device=device), new_split_workspace(device))


def choose(num_rows: int, group_size: int, math: Math, capability: int) -> Route:
    """The way of a kind of arithmetic by `FUSED_ROWS`. Raises: BackendError for fp8 on a card without it."""
    if math == "fp8" and capability < _OLDEST_FP8:
        raise BackendError(f"compute capability {capability} has no fp8 matrix units", "use int8 or bf16 math")
    is_fused = num_rows <= entry_of_card(FUSED_ROWS, capability)[math]
    if math == "int8":
        return "fused_int8" if is_fused and group_size in INT8_GROUPS else "scratch_int8"
    if is_fused:
        return "fused_bf16"
    return "scratch_bf16" if math == "bf16" else "scratch_fp8"


def prepare(x: Tensor, route: Route) -> Tensor | QuantizedRows:
    """Activations as a route takes them, where no producer has made them so already. Shapes: x [M, K]."""
    if route in ("fused_int8", "scratch_int8"):
        return quantize_rows(x)
    if route == "scratch_fp8":
        return quantize_rows(x, torch.float8_e4m3fn)
    return split_rows(x) if route == "fused_bf16" else x


def int4_matmul(
    x: Tensor | QuantizedRows,
    weight: Int4Weight,
    route: Route,
    scratch: Int4Scratch,
    out: Tensor,
    residual: Residual | None = None,
) -> Tensor:
    """x @ W^T into `out`, joined to a residual if there is one; `x` as `prepare` makes it.

    Raises: ValueError for activations of another route, or a scratch that is too small.
    """
    if isinstance(x, QuantizedRows) != (route not in ("fused_bf16", "scratch_bf16")):
        raise ValueError(f"route {route} does not take activations that are {type(x).__name__}")
    if route in ("fused_int8", "fused_bf16"):
        return int4_gemm(x, weight, out, scratch.split, residual)
    weights = _scratch_matrix(scratch, weight, _SCRATCH[route])
    if not isinstance(x, QuantizedRows):
        return _vendor_bf16(x, decode_bf16(weight, weights), out, residual)
    if route == "scratch_int8":
        return int8_gemm(x, decode_int8(weight, weights), weight.row_scales, out, residual)
    return _vendor_fp8(x, decode_fp8(weight, weights), fp8_scales(weight), out, residual)


def _vendor_bf16(x: Tensor, weights: Tensor, out: Tensor, residual: Residual | None) -> Tensor:
    if residual is None:
        return torch.mm(x, weights.t(), out=out)
    return torch.addmm(residual.values, x, weights.t(), beta=1, alpha=residual.factor, out=out)


def _vendor_fp8(x: QuantizedRows, weights: Tensor, scales: Tensor, out: Tensor, residual: Residual | None) -> Tensor:
    y = out if residual is None else torch.empty_like(out)
    scale_a, scale_b = x.scales.unsqueeze(1), scales.unsqueeze(0)
    torch._scaled_mm(
        x.codes, weights.t(), scale_a=scale_a, scale_b=scale_b, out_dtype=out.dtype, use_fast_accum=True, out=y
    )
    return out if residual is None else torch.add(residual.values, y, alpha=residual.factor, out=out)


def _scratch_matrix(scratch: Int4Scratch, weight: Int4Weight, dtype: torch.dtype) -> Tensor:
    num_out, num_in = weight.words.shape[0], weight.words.shape[1] * 8
    num_bytes = num_out * num_in * dtype.itemsize
    if scratch.weights.numel() < num_bytes:
        raise ValueError(
            f"the scratch has {scratch.weights.numel():,} bytes, [{num_out}, {num_in}] needs {num_bytes:,}"
        )
    return scratch.weights[:num_bytes].view(dtype).view(num_out, num_in)
