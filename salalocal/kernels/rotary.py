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
    frequencies = _frequencies(wide, theta)
    for i in range(half):
        phi = (positions.to(wide.dtype) * frequencies[i])[:, None]
        first, second = wide[..., i], wide[..., i + half]
        out[..., i] = first * torch.cos(phi) - second * torch.sin(phi)
        out[..., i + half] = second * torch.cos(phi) + first * torch.sin(phi)
    return out.to(x.dtype)


def rotary_reference(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """All pairs at once: what a CPU runs."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    phi = positions.to(wide.dtype)[:, None, None] * _frequencies(wide, theta)  # [T, 1, D/2]
    cos, sin = torch.cos(phi), torch.sin(phi)
    first, second = wide.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def rotary(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """What the model calls."""
    return rotary_reference(x, positions, theta)


def _frequencies(x: Tensor, theta: float) -> Tensor:
    # The steps of the released code, in its order, so that every frequency is the same fp32 number.
    exponents = torch.arange(0, x.shape[-1], 2, device=x.device).to(x.dtype) / x.shape[-1]
    return 1.0 / (theta**exponents)
