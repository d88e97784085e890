"""The output gate of both mixers.

    y = x * round(sigmoid(gate))        round: to the dtype of gate

`kernels.swiglu` shares the kernel.
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
def _gated_rows_kernel(
    first_ptr,
    second_ptr,
    y_ptr,
    first_stride,
    second_stride,
    num_channels,
    IS_SWIGLU: tl.constexpr,
    BLOCK: tl.constexpr,
    FAST: tl.constexpr,
):
    """BLOCK channels of one row per program: first * sigmoid(second), or silu(first) * second; y is contiguous."""
    row = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_there = channels < num_channels
    dtype = y_ptr.dtype.element_ty
    first = tl.load(first_ptr + row * first_stride + channels, mask=is_there, other=0.0).to(tl.float32)
    second = tl.load(second_ptr + row * second_stride + channels, mask=is_there, other=0.0).to(tl.float32)
    if IS_SWIGLU:
        y = (first * sigmoid(first, FAST)).to(dtype).to(tl.float32) * second
    else:
        y = first * sigmoid(second, FAST).to(dtype).to(tl.float32)
    tl.store(y_ptr + row * num_channels + channels, y.to(dtype), mask=is_there)


def gated_rows_triton(first: Tensor, second: Tensor, is_swiglu: bool) -> Tensor:
    """Launch the kernel for `sigmoid_gate_triton` or `kernels.swiglu`; rows may lie apart, the result is contiguous.

    Raises: ValueError for different shapes or dtypes; BackendError for channels that lie apart.
    """
    if first.shape != second.shape or first.dtype != second.dtype:
        names = "SwiGLU: gate {}, up {}" if is_swiglu else "sigmoid gate: x {}, gate {}"
        raise ValueError(names.format(*(f"{tuple(x.shape)} {x.dtype}" for x in (first, second))))
    rows, others = rows_of(first), rows_of(second)
    y = torch.empty(first.shape, dtype=first.dtype, device=first.device)
    num_channels = first.shape[-1]
    block = min(BLOCK_CHANNELS, triton.next_power_of_2(num_channels))
    if y.numel():
        _gated_rows_kernel[(len(rows), triton.cdiv(num_channels, block))](
            rows,
            others,
            y,
            rows.stride(0),
            others.stride(0),
            num_channels,
            IS_SWIGLU=is_swiglu,
            BLOCK=block,
            FAST=HAS_INLINE_ASM,
            num_warps=num_warps_for(block),
        )
    return y


def sigmoid_gate_triton(x: Tensor, gate: Tensor) -> Tensor:
    """As `gated_rows_triton`."""
    return gated_rows_triton(x, gate, is_swiglu=False)


def sigmoid_gate(x: Tensor, gate: Tensor) -> Tensor:
    """What the model calls; gradients and float64 take the reference."""
    if are_for_kernel(x, gate):
        return sigmoid_gate_triton(x, gate)
    return sigmoid_gate_reference(x, gate)
