"""The gated activation of the MLP.

    y = round(silu(gate)) * up        silu(a) = a * sigmoid(a); round: to the dtype of gate

Shapes: gate, up [...] of one dtype. Source: specification, section 4 (the released modelling code).
"""

import torch
from torch import Tensor
from torch.nn import functional

from salalocal.kernels.backend import HAS_INLINE_ASM, tl, triton
from salalocal.kernels.gate import BLOCK_CHANNELS, sigmoid
from salalocal.kernels.rows import are_for_kernel, num_warps_for, rows_of


def swiglu_definition(gate: Tensor, up: Tensor) -> Tensor:
    """The formula, operation by operation, the exponential in fp32 (float64 stays float64)."""
    wide = gate.to(torch.promote_types(gate.dtype, torch.float32))
    return (wide / (1 + torch.exp(-wide))).to(gate.dtype) * up


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The same with torch's fused silu: what a CPU runs."""
    return functional.silu(gate).mul_(up)


@triton.jit
def _swiglu_kernel(
    gate_ptr,
    up_ptr,
    y_ptr,
    gate_stride,
    up_stride,
    num_channels,
    BLOCK: tl.constexpr,
    FAST: tl.constexpr,
):
    """BLOCK channels of one row per program; y is contiguous."""
    row = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_there = channels < num_channels
    dtype = y_ptr.dtype.element_ty
    gate = tl.load(gate_ptr + row * gate_stride + channels, mask=is_there, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + channels, mask=is_there, other=0.0).to(tl.float32)
    silu = (gate * sigmoid(gate, FAST)).to(dtype).to(tl.float32)
    tl.store(y_ptr + row * num_channels + channels, (silu * up).to(dtype), mask=is_there)


def swiglu_triton(gate: Tensor, up: Tensor) -> Tensor:
    """Launch the kernel; rows may lie apart, as the halves of one product do; the result is contiguous.

    Raises: ValueError for different shapes or dtypes; BackendError for channels that lie apart.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"SwiGLU: gate {tuple(gate.shape)} {gate.dtype}, up {tuple(up.shape)} {up.dtype}")
    gates, ups = rows_of(gate), rows_of(up)
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    block = min(BLOCK_CHANNELS, triton.next_power_of_2(gate.shape[-1]))
    if y.numel():
        _swiglu_kernel[(len(gates), triton.cdiv(gate.shape[-1], block))](
            gates,
            ups,
            y,
            gates.stride(0),
            ups.stride(0),
            gate.shape[-1],
            BLOCK=block,
            FAST=HAS_INLINE_ASM,
            num_warps=num_warps_for(block),
        )
    return y


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """What the model calls; gradients and float64 take the reference."""
    if are_for_kernel(gate, up):
        return swiglu_triton(gate, up)
    return swiglu_reference(gate, up)
