"""The linear map over packed weights: a `PackedWeight` comes in, a module for the model goes out; for the engine."""

import torch
from torch import Tensor, nn

from salalocal.kernels.packed_matmul import (
    MAX_CPU_INT4_ROWS,
    cpu_int4_matmul,
    has_cpu_int4,
    packed_matmul,
    to_cpu_int4,
)
from salalocal.model.layers import DenseLinear
from salalocal.quant.int4 import PackedWeight
from salalocal.quant.layout import WeightLayout


class QuantizedLinear(nn.Module):
    """y = x @ dequantize(W)^T, computed for activations of one dtype.

    Where torch has an int4 kernel for the CPU that is exact and faster, few rows go through it; the weights are held
    a second time then, in its order.
    """

    def __init__(self, weight: PackedWeight, dtype: torch.dtype) -> None:
        super().__init__()
        self.words: Tensor
        self.scales: Tensor
        self.group_index: Tensor | None
        self.cpu_int4: Tensor | None
        self.cpu_int4_scales: Tensor | None
        self.bits = weight.bits
        self.group_size = weight.group_size
        self.register_buffer("words", weight.words)
        self.register_buffer("scales", weight.scales)
        self.register_buffer("group_index", weight.group_index)
        packed = to_cpu_int4(weight.words, weight.scales) if has_cpu_int4(*_parts(weight), dtype) else (None, None)
        self.register_buffer("cpu_int4", packed[0], persistent=False)
        self.register_buffer("cpu_int4_scales", packed[1], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        packed, scales = self.cpu_int4, self.cpu_int4_scales
        if packed is not None and scales is not None and x.numel() // x.shape[-1] <= MAX_CPU_INT4_ROWS:
            return cpu_int4_matmul(x, packed, scales, self.group_size)
        return packed_matmul(x, self.words, self.scales, self.bits, self.group_size, self.group_index)


class QuantizedLinearFactory:
    """Makes a `QuantizedLinear` with its weights wherever a folder holds a quantized matrix, and a `DenseLinear`
    without memory elsewhere."""

    def __init__(self, layout: WeightLayout, device: torch.device, dtype: torch.dtype) -> None:
        self._layout = layout
        self._device = device
        self._dtype = dtype

    def __call__(self, name: str, in_features: int, out_features: int) -> nn.Module:
        if name not in self._layout.matrices:
            return DenseLinear(in_features, out_features, torch.device("meta"), self._dtype)
        return QuantizedLinear(self._layout.read(name).to(self._device), self._dtype)


def quantized_bytes(layout: WeightLayout, device: torch.device, dtype: torch.dtype) -> int:
    """At most so many bytes do the quantized matrices take, loaded for activations of this dtype."""
    copies = 2 if device.type == "cpu" and dtype == torch.bfloat16 else 1
    return sum(copies * matrix.num_bytes for matrix in layout.matrices.values())


def _parts(weight: PackedWeight) -> tuple[Tensor, Tensor, int, int, Tensor | None]:
    return weight.words, weight.scales, weight.bits, weight.group_size, weight.group_index
