"""The modules that every layer is built from: linears by way of a factory, RMS norm, MLP; for `sala` and the mixers.

Parameter names are those of the released checkpoint, so that `state_dict()` names a checkpoint's tensors.
"""

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from salalocal.kernels.norm import rms_norm
from salalocal.kernels.swiglu import swiglu

Device = torch.device | str | None


class LinearFactory(Protocol):
    """How a weight format reaches the model: it makes the module for every linear map.

    `name` is the full name of the module in the checkpoint, such as `model.layers.3.self_attn.q_proj`. The module maps
    [..., in_features] to [..., out_features] in the dtype it is given, and its tensors are stored under that name.
    """

    def __call__(self, name: str, in_features: int, out_features: int) -> nn.Module: ...


class DenseLinear(nn.Module):
    """y = x @ weight^T, weight [out, in], no bias; the weight is not initialised, since it is loaded."""

    def __init__(self, in_features: int, out_features: int, device: Device = None, dtype: torch.dtype | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight)


class DenseLinearFactory:
    """Makes every linear a `DenseLinear` on one device, in one dtype."""

    def __init__(self, device: Device, dtype: torch.dtype) -> None:
        self._device = device
        self._dtype = dtype

    def __call__(self, name: str, in_features: int, out_features: int) -> nn.Module:
        return DenseLinear(in_features, out_features, self._device, self._dtype)


class RMSNorm(nn.Module):
    """The RMS norm over the last axis with a weight per channel, which is not initialised."""

    def __init__(self, size: int, eps: float, device: Device = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Mlp(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, name: str, hidden_size: int, intermediate_size: int, linear: LinearFactory) -> None:
        super().__init__()
        self.gate_proj = linear(f"{name}.gate_proj", hidden_size, intermediate_size)
        self.up_proj = linear(f"{name}.up_proj", hidden_size, intermediate_size)
        self.down_proj = linear(f"{name}.down_proj", intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
        return y
