"""RMS norm over all heads' outputs and the output gate in one step, for the lightning layer.

    y = ( round( x / sqrt(mean(x^2) + eps) ) * weight ) * round(sigmoid(gate))        round: to the dtype of x

Shapes: x, gate [..., C] of one dtype; weight [C]. Source: specification, section 6: norm over all channels, then gate.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from salalocal.kernels.backend import HAS_INLINE_ASM, tl, triton
from salalocal.kernels.gate import sigmoid, sigmoid_gate_definition, sigmoid_gate_reference
from salalocal.kernels.norm import rms_norm_definition, rms_norm_reference
from salalocal.kernels.rows import are_for_kernel, check_width, rows_of

NUM_WARPS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedNorm:
    """What norm and gate need beside x. Shapes: weight [C]; gate as x."""

    weight: Tensor
    gate: Tensor
    eps: float


def gated_norm_definition(x: Tensor, gated_norm: GatedNorm) -> Tensor:
    """The formula: norm, then gate."""
    return sigmoid_gate_definition(rms_norm_definition(x, gated_norm.weight, gated_norm.eps), gated_norm.gate)


def gated_norm_reference(x: Tensor, gated_norm: GatedNorm) -> Tensor:
    """The same in large operations: what a CPU runs."""
    return sigmoid_gate_reference(rms_norm_reference(x, gated_norm.weight, gated_norm.eps), gated_norm.gate)


@triton.jit
def _gated_norm_kernel(
    x_ptr,
    gate_ptr,
    weight_ptr,
    y_ptr,
    x_stride,
    gate_stride,
    EPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    FAST: tl.constexpr,
):
    """One row per program; WIDTH: the channels, padded."""
    row = tl.program_id(0).to(tl.int64)
    channels = tl.arange(0, WIDTH)
    is_there = channels < CHANNELS
    dtype = y_ptr.dtype.element_ty
    x = tl.load(x_ptr + row * x_stride + channels, mask=is_there, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + channels, mask=is_there, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + channels, mask=is_there, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x, 0) / CHANNELS + EPS)
    x = ((x * inverse).to(dtype).to(tl.float32) * weight).to(dtype).to(tl.float32)
    opening = sigmoid(gate, FAST).to(dtype).to(tl.float32)
    tl.store(y_ptr + row * CHANNELS + channels, (x * opening).to(dtype), mask=is_there)


def gated_norm_triton(x: Tensor, gated_norm: GatedNorm) -> Tensor:
    """Launch the kernel; rows may lie apart, channels are adjacent. Raises: ValueError, BackendError."""
    gate, weight = gated_norm.gate, gated_norm.weight
    channels = x.shape[-1]
    if gate.shape != x.shape or weight.shape != (channels,) or not {gate.dtype, weight.dtype} <= {x.dtype}:
        shapes = f"gate {tuple(gate.shape)} {gate.dtype}, weight {tuple(weight.shape)} {weight.dtype}"
        raise ValueError(f"gated norm: x {tuple(x.shape)} {x.dtype}, {shapes}")
    width, rows, gate_rows = check_width(x), rows_of(x), rows_of(gate)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if len(rows):
        _gated_norm_kernel[(len(rows),)](
            rows,
            gate_rows,
            weight,
            y,
            rows.stride(0),
            gate_rows.stride(0),
            EPS=gated_norm.eps,
            CHANNELS=channels,
            WIDTH=width,
            FAST=HAS_INLINE_ASM,
            num_warps=NUM_WARPS,
        )
    return y


def gated_norm(x: Tensor, arguments: GatedNorm) -> Tensor:
    """What the model calls; gradients and float64 take the reference."""
    if are_for_kernel(x, arguments.gate, arguments.weight):
        return gated_norm_triton(x, arguments)
    return gated_norm_reference(x, arguments)
