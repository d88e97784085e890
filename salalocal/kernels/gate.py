"""The output gate of both mixers.

    y = x * round(sigmoid(gate))        round: to the dtype of gate

Shapes: x, gate [...] of one dtype. Source: specification, sections 5 and 6 (the released modelling code).
"""

import torch
from torch import Tensor

from salalocal.kernels.backend import HAS_INLINE_ASM, tl, triton
from salalocal.kernels.rows import are_for_kernel, num_warps_for, rows_of

BLOCK_CHANNELS = 2048  # of a row that one program takes


def sigmoid_gate_definition(x: Tensor, gate: Tensor) -> Tensor:
    """The formula, operation by operation, the exponential in fp32 (float64 stays float64)."""
    wide = gate.to(torch.promote_types(gate.dtype, torch.float32))
    return x * (1 / (1 + torch.exp(-wide))).to(gate.dtype)


def sigmoid_gate_reference(x: Tensor, gate: Tensor) -> Tensor:
    """The same with torch's own sigmoid: what a CPU runs."""
    return x * torch.sigmoid(gate)


@triton.jit
def sigmoid(x, HAS_ASM: tl.constexpr):
    """1 / (1 + exp(-x)) in fp32. The assembly spares the handling of denormal numbers: a third of all instructions."""
    if HAS_ASM:
        return tl.inline_asm_elementwise(
            """{
            .reg .f32 power;
            mul.f32 power, $1, 0fBFB8AA3B;
            ex2.approx.ftz.f32 power, power;
            add.f32 power, power, 0f3F800000;
            rcp.approx.ftz.f32 $0, power;
            }""",
            "=f,f",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _sigmoid_gate_kernel(
    x_ptr,
    gate_ptr,
    y_ptr,
    x_stride,
    gate_stride,
    num_channels,
    BLOCK: tl.constexpr,
    FAST: tl.constexpr,
):
    """BLOCK channels of one row per program; y is contiguous."""
    row = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_there = channels < num_channels
    dtype = y_ptr.dtype.element_ty
    x = tl.load(x_ptr + row * x_stride + channels, mask=is_there, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + channels, mask=is_there, other=0.0).to(tl.float32)
    opening = sigmoid(gate, FAST).to(dtype).to(tl.float32)
    tl.store(y_ptr + row * num_channels + channels, (x * opening).to(dtype), mask=is_there)


def sigmoid_gate_triton(x: Tensor, gate: Tensor) -> Tensor:
    """Launch the kernel; rows may lie apart, the result is contiguous.

    Raises: ValueError for different shapes or dtypes; BackendError for channels that lie apart.
    """
    if x.shape != gate.shape or x.dtype != gate.dtype:
        raise ValueError(f"sigmoid gate: x {tuple(x.shape)} {x.dtype}, gate {tuple(gate.shape)} {gate.dtype}")
    rows, gates = rows_of(x), rows_of(gate)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = min(BLOCK_CHANNELS, triton.next_power_of_2(x.shape[-1]))
    if y.numel():
        _sigmoid_gate_kernel[(len(rows), triton.cdiv(x.shape[-1], block))](
            rows,
            gates,
            y,
            rows.stride(0),
            gates.stride(0),
            x.shape[-1],
            BLOCK=block,
            FAST=HAS_INLINE_ASM,
            num_warps=num_warps_for(block),
        )
    return y


def sigmoid_gate(x: Tensor, gate: Tensor) -> Tensor:
    """What the model calls; gradients and float64 take the reference."""
    if are_for_kernel(x, gate):
        return sigmoid_gate_triton(x, gate)
    return sigmoid_gate_reference(x, gate)
