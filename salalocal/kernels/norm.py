"""RMS norm over the last axis.

    y = round( x / sqrt(mean(x^2) + eps) ) * weight        round: to the dtype of x

The mean and the division are taken in fp32 (float64 stays float64); the rounding stands before the weight.
Shapes: x [..., C]; weight [C], of the dtype of x. Source: specification, section 4 (the released modelling code).
"""

import torch
from torch import Tensor

from salalocal.kernels.backend import tl, triton
from salalocal.kernels.rows import are_for_kernel, check_width, num_warps_for, rows_of


def rms_norm_definition(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The formula, operation by operation."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean_square = wide.pow(2).mean(dim=-1, keepdim=True)
    return (wide * torch.rsqrt(mean_square + eps)).to(x.dtype) * weight


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The same without a tensor of squares, and with one large tensor less: what a CPU runs."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    scale = torch.rsqrt(length * length / x.shape[-1] + eps)
    return (wide * scale).to(x.dtype).mul_(weight)


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm_kernel(
    x_ptr,
    weight_ptr,
    y_ptr,
    x_stride,
    num_rows,
    EPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """ROWS rows per program; WIDTH: the channels, padded; y is contiguous."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    channels = tl.arange(0, WIDTH)[None, :]
    is_there = (rows < num_rows) & (channels < CHANNELS)
    dtype = y_ptr.dtype.element_ty
    x = tl.load(x_ptr + rows * x_stride + channels, mask=is_there, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + channels, mask=channels < CHANNELS, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 1) / CHANNELS + EPS)
    normed = (x * scale[:, None]).to(dtype).to(tl.float32)
    tl.store(y_ptr + rows * CHANNELS + channels, (normed * weight).to(dtype), mask=is_there)


_VALUES_A_PROGRAM = 2048  # short rows, such as heads, share a program


def rms_norm_triton(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Launch the kernel; rows may lie apart, the result is contiguous.

    Raises: ValueError for a weight of another shape or dtype; BackendError for rows that the kernel has no form for.
    """
    channels = x.shape[-1]
    if weight.shape != (channels,) or weight.dtype != x.dtype:
        raise ValueError(f"RMS norm: x {tuple(x.shape)} {x.dtype}, weight {tuple(weight.shape)} {weight.dtype}")
    width, rows = check_width(x), rows_of(x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows_a_program = max(1, _VALUES_A_PROGRAM // width)
    if len(rows):
        _rms_norm_kernel[(triton.cdiv(len(rows), rows_a_program),)](
            rows,
            weight.contiguous(),
            y,
            rows.stride(0),
            len(rows),
            EPS=eps,
            CHANNELS=channels,
            WIDTH=width,
            ROWS=rows_a_program,
            num_warps=num_warps_for(rows_a_program * width),
        )
    return y


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """What the model calls; gradients and float64 take the reference."""
    if are_for_kernel(x, weight):
        return rms_norm_triton(x, weight, eps)
    return rms_norm_reference(x, weight, eps)
