"""RMS norm over the last axis.

    y = round( x / sqrt(mean(x^2) + eps) ) * weight        round: to the dtype of x

The mean and the division are taken in fp32 (float64 stays float64); the rounding stands before the weight.
Shapes: x [..., C]; weight [C], of the dtype of x. Source: specification, section 4 (the released modelling code).
"""

import torch
from torch import Tensor


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


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """What the model calls."""
    return rms_norm_reference(x, weight, eps)
