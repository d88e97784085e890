"""Rotary position embedding, half rotation over all channels.

    f_i = theta^(-2i/D)        phi = p * f_i        i = 0 .. D/2 - 1
    y_i       = x_i cos(phi) - x_(i+D/2) sin(phi)
    y_(i+D/2) = x_(i+D/2) cos(phi) + x_i sin(phi)

Angles and rotation in fp32, and the product p * f_i too, as in the released modelling code: near position 2^20 its
rounding is worth 0.03 rad, which the decay of the lightning layers makes harmless. float64 stays float64 throughout.
Shapes: x [B, T, H, D], D even; positions [T] int64, absolute. Source: specification, section 7.
"""

import torch
from torch import Tensor


def rotary_definition(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """The formula, channel pair by channel pair."""
    half = x.shape[-1] // 2
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    out = torch.full_like(wide, torch.nan)
    frequencies = _frequencies(x.shape[-1], theta, wide.dtype, x.device)
    for i in range(half):
        phi = (positions.to(wide.dtype) * frequencies[i])[:, None]
        first, second = wide[..., i], wide[..., i + half]
        out[..., i] = first * torch.cos(phi) - second * torch.sin(phi)
        out[..., i + half] = second * torch.cos(phi) + first * torch.sin(phi)
    return out.to(x.dtype)


def rotary_reference(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """All pairs at once: what a CPU runs, by way of its two halves, whose tables all layers share."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return rotated(wide, *rotary_tables(positions, x.shape[-1], theta, wide.dtype)).to(x.dtype)


def rotary_tables(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles. Shapes: positions [T] -> [T, 1, D/2] each, in `dtype`."""
    phi = positions.to(dtype)[:, None, None] * _frequencies(head_dim, theta, dtype, positions.device)
    return torch.cos(phi), torch.sin(phi)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotation by given tables, in their dtype or a wider one. Shapes: x [B, T, H, D]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _frequencies(head_dim: int, theta: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    # The steps of the released code, in its order, so that every frequency is the same fp32 number.
    exponents = torch.arange(0, head_dim, 2, device=device).to(dtype) / head_dim
    return 1.0 / (theta**exponents)
