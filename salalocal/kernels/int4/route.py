"""Which way a product with packed weights goes when there are many rows of activations, and the way itself.

    route          reads and does                                                     activations come as
    fused_int8     packed words; unpacked in registers, int8 matrix units             QuantizedRows, int8
    scratch_int8   words once into an int8 scratch, then an int8 GEMM                 QuantizedRows, int8
    fused_bf16     packed words; unpacked in registers, bf16 matrix units             bf16 in split order
    scratch_bf16   words once into a bf16 scratch, then the vendor's GEMM             bf16
    scratch_fp8    words once into an fp8 scratch, then the vendor's GEMM             QuantizedRows, fp8

Both int8 routes give the same bits, so how a prompt is cut into chunks does not show. Filling a scratch costs the same
share of a product whatever its shape, for N * K weights are unfolded and M * N * K multiplied: M alone decides. 8-bit
weights have the scratch routes alone. A matrix larger than the scratch is taken some output features at a time.
Shapes: x [M, K]; y, residual [M, N], rows may lie apart.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from salalocal.errors import BackendError
from salalocal.kernels.backend import entry_of_card
from salalocal.kernels.int4.activations_by_row import QuantizedRows, quantize_rows, split_rows
from salalocal.kernels.int4.gemm import INT8_GROUPS, SplitWorkspace, int4_gemm, new_split_workspace
from salalocal.kernels.int4.int8_gemm import Residual, int8_gemm, int8_swiglu
from salalocal.kernels.int4.scratch import Int4Weight, decode_bf16, decode_fp8, decode_int8, fp8_scales

Math = Literal["bf16", "int8", "fp8"]
Route = Literal["fused_int8", "scratch_int8", "fused_bf16", "scratch_bf16", "scratch_fp8"]

# By the oldest compute capability they hold for: up to so many rows, unpacking in registers is ahead of the scratch.
# From times on an H100 at 16, 64, 256, 512 and 1,024 rows (90), and on its mma.sync path (DISABLE_MMA_V3=1) at 16, 64
# and 512 (80, 120); a limit of 128 or 256 lies between two of those. The bf16 and fp8 scratch were not timed on the
# mma.sync path: their limits there are guesses. Math of fp8 starts as bf16.
FUSED_ROWS: dict[int, dict[Math, int]] = {
    80: {"int8": 256, "bf16": 128, "fp8": 128},
    90: {"int8": 1024, "bf16": 512, "fp8": 256},
    120: {"int8": 256, "bf16": 128, "fp8": 128},
}
_OLDEST_FP8 = 89
MAX_SCRATCH_BYTES = 2**28  # gate_up of the 9B in bf16
_COLUMN_STEP = 256  # output features that a scratch is filled with, or a multiple: whole tiles of every GEMM
_SCRATCH = {"scratch_int8": torch.int8, "scratch_bf16": torch.bfloat16, "scratch_fp8": torch.float8_e4m3fn}


class Int4Scratch(NamedTuple):
    """What routes write between their steps; one for each device and stream. Shapes: weights uint8 [bytes]."""

    weights: Tensor
    split: SplitWorkspace


def new_scratch(device: torch.device, num_weights: int, math: Math) -> Int4Scratch:
    """Room for the largest matrix of a model, `num_weights` = N * K, allocated once; no more than is of use."""
    num_bytes = min(num_weights * (2 if math == "bf16" else 1), MAX_SCRATCH_BYTES)
    return Int4Scratch(torch.empty(num_bytes, dtype=torch.uint8, device=device), new_split_workspace(device))


def choose(num_rows: int, group_size: int, math: Math, capability: int, bits: int = 4) -> Route:
    """The way of a kind of arithmetic by `FUSED_ROWS`, for weights of 4 or 8 bits.

    Raises: BackendError for fp8 on a card without it.
    """
    if math == "fp8" and capability < _OLDEST_FP8:
        raise BackendError(f"compute capability {capability} has no fp8 matrix units", "use int8 or bf16 math")
    is_fused = bits == 4 and num_rows <= entry_of_card(FUSED_ROWS, capability)[math]
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

    Raises: ValueError for activations of another route, or a scratch that is too small for a few rows of weights.
    """
    if isinstance(x, QuantizedRows) != (route not in ("fused_bf16", "scratch_bf16")):
        raise ValueError(f"route {route} does not take activations that are {type(x).__name__}")
    if route in ("fused_int8", "fused_bf16"):
        return int4_gemm(x, weight, out, scratch.split, residual)
    step = _columns_at_once(scratch, weight, _SCRATCH[route])
    if step >= weight.shape[0]:
        return _by_scratch(x, weight, route, scratch, out, residual)
    for start in range(0, weight.shape[0], step):
        columns = slice(start, start + step)
        part = None if residual is None else residual._replace(values=residual.values[:, columns])
        _by_scratch(x, weight.part(columns), route, scratch, out[:, columns], part)
    return out


def int4_swiglu(x: QuantizedRows, weight: Int4Weight, scratch: Int4Scratch, out: Tensor) -> Tensor:
    """silu(x @ gate^T) * (x @ up^T) into `out`, by `scratch_int8`, without writing the products; W is gate, then up.

    The bits are those of the product and `kernels.swiglu`. Shapes: weight [2 N, K], out [M, N], rows may lie apart.
    Raises: ValueError for a scratch that is too small for a few rows of weights.
    """
    num_outputs, num_in = weight.shape[0] // 2, weight.shape[1]
    step = max(1, _columns_at_once(scratch, weight, torch.int8) // 2)
    for start in range(0, num_outputs, step):
        gate = slice(start, min(start + step, num_outputs))
        up = slice(gate.start + num_outputs, gate.stop + num_outputs)
        count = 2 * (gate.stop - gate.start)
        pairs = scratch.weights[: count * num_in].view(torch.int8).view(count, num_in)
        decode_int8(weight.part(gate), pairs[0::2])
        decode_int8(weight.part(up), pairs[1::2])
        is_whole = count == weight.shape[0]
        scales = weight.row_scales if is_whole else torch.cat((weight.row_scales[gate], weight.row_scales[up]))
        int8_swiglu(x, pairs, scales, out[:, gate])
    return out


def _by_scratch(
    x: Tensor | QuantizedRows,
    weight: Int4Weight,
    route: Route,
    scratch: Int4Scratch,
    out: Tensor,
    residual: Residual | None,
) -> Tensor:
    num_out, num_in = weight.shape
    dtype = _SCRATCH[route]
    weights = scratch.weights[: num_out * num_in * dtype.itemsize].view(dtype).view(num_out, num_in)
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
    is_plain = residual is None and out.is_contiguous()
    y = out if is_plain else torch.empty(out.shape, dtype=out.dtype, device=out.device)
    scale_a, scale_b = x.scales.unsqueeze(1), scales.unsqueeze(0)
    torch._scaled_mm(
        x.codes, weights.t(), scale_a=scale_a, scale_b=scale_b, out_dtype=out.dtype, use_fast_accum=True, out=y
    )
    if residual is not None:
        return torch.add(residual.values, y, alpha=residual.factor, out=out)
    return out if is_plain else out.copy_(y)


def _columns_at_once(scratch: Int4Scratch, weight: Int4Weight, dtype: torch.dtype) -> int:
    """How many output features the scratch holds: all, or whole tiles of them."""
    num_out, num_in = weight.shape
    row_bytes, num_bytes = num_in * dtype.itemsize, scratch.weights.numel()
    if num_out * row_bytes <= num_bytes:
        return num_out
    step = num_bytes // row_bytes // _COLUMN_STEP * _COLUMN_STEP
    if step == 0:
        raise ValueError(f"the scratch has {num_bytes:,} bytes, {_COLUMN_STEP} rows of {num_in:,} weights do not fit")
    return step
