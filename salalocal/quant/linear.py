"""The linear map over packed weights: a `PackedWeight` comes in, a module for the model goes out; for the engine."""

import logging
import math
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from salalocal.kernels.backend import use_triton
from salalocal.kernels.cpu_int4_matmul import cpu_int4_matmul, has_cpu_int4, to_cpu_int4
from salalocal.kernels.int4.linear import Workspace, int4_linear, new_workspace, why_no_kernel
from salalocal.kernels.int4.route import Math
from salalocal.kernels.int4.scratch import Int4Weight, int4_weight
from salalocal.kernels.packed_matmul import packed_matmul
from salalocal.model.layers import DenseLinear
from salalocal.quant.codebook import CodebookLinear, CodebookWeight
from salalocal.quant.int4 import PackedWeight
from salalocal.quant.layout import WeightLayout

_LOG = logging.getLogger(__name__)
DEFAULT_MATH: Math = "int8"


class QuantizedLinear(nn.Module):
    """y = x @ dequantize(W)^T, from packed weights as they are stored."""

    def __init__(self, weight: PackedWeight) -> None:
        super().__init__()
        self.words: Tensor
        self.scales: Tensor
        self.group_index: Tensor | None
        self.bits = weight.bits
        self.group_size = weight.group_size
        self.register_buffer("words", weight.words)
        self.register_buffer("scales", weight.scales)
        self.register_buffer("group_index", weight.group_index)

    def forward(self, x: Tensor) -> Tensor:
        return packed_matmul(x, self.words, self.scales, self.bits, self.group_size, self.group_index)


class KernelLinear(QuantizedLinear):
    """The same map by the kernels for GPUs, from the same single copy of the weights.

    `workspace` is shared by the maps of a model, which run one after the other.
    """

    def __init__(self, weight: PackedWeight, math: Math, workspace: Workspace) -> None:
        super().__init__(weight)
        self.math, self.workspace = math, workspace
        self.row_scales: Tensor
        self.inverses: Tensor
        folded = int4_weight(weight.words, weight.scales, weight.group_size, weight.bits)
        self.register_buffer("row_scales", folded.row_scales, persistent=False)
        self.register_buffer("inverses", folded.inverses, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not use_triton(x, self.words):
            return super().forward(x)
        return int4_linear(x, self, self.folded, self.math, self.workspace)

    @classmethod
    def stack(cls, linears: "Sequence[KernelLinear]") -> "KernelLinear":
        """The map to the outputs of all, one after the other; they keep views of its weights instead of their own.

        Raises: ValueError for maps that differ in bits, group size, input features, dtype of scales or math.
        """
        first = linears[0]
        kinds = {(x.bits, x.group_size, x.words.shape[1], x.scales.dtype, x.math) for x in linears}
        if len(kinds) > 1:
            raise ValueError(f"maps of different formats cannot be stacked: {sorted(map(str, kinds))}")
        words, scales = torch.cat([x.words for x in linears]), torch.cat([x.scales for x in linears])
        stacked = cls(PackedWeight(words, scales, first.bits, first.group_size), first.math, first.workspace)
        start = 0
        for linear in linears:
            rows = slice(start, start + len(linear.words))
            for name, buffer in stacked.named_buffers():
                setattr(linear, name, buffer[rows])
            start = rows.stop
        return stacked

    @property
    def folded(self) -> Int4Weight:
        """The matrix as the kernels for many rows take it."""
        return Int4Weight(self.words, self.scales, self.group_size, self.row_scales, self.inverses, self.bits)


class CpuInt4Linear(nn.Module):
    """The same map from weights in the order of torch's int4 kernel for CPUs, the only copy of them."""

    def __init__(self, weight: PackedWeight) -> None:
        super().__init__()
        self.packed: Tensor
        self.scales_and_zeros: Tensor
        packed, scales_and_zeros = to_cpu_int4(weight.words, weight.scales)
        self.register_buffer("packed", packed)
        self.register_buffer("scales_and_zeros", scales_and_zeros)

    def forward(self, x: Tensor) -> Tensor:
        return cpu_int4_matmul(x, self.packed, self.scales_and_zeros)


def make_linear(weight: PackedWeight | CodebookWeight, dtype: torch.dtype) -> nn.Module:
    """The module that multiplies with these weights without the kernels for GPUs, for activations of this dtype."""
    if isinstance(weight, CodebookWeight):
        return CodebookLinear(weight)
    parts = (weight.words, weight.scales, weight.bits, weight.group_size, weight.group_index)
    return CpuInt4Linear(weight) if has_cpu_int4(*parts, dtype) else QuantizedLinear(weight)


class QuantizedLinearFactory:
    """Makes a module with its weights wherever a folder holds a quantized matrix, and a `DenseLinear` without memory
    elsewhere.

    `math` is what many rows are multiplied in on a GPU.
    """

    def __init__(
        self, layout: WeightLayout, device: torch.device, dtype: torch.dtype, math: Math = DEFAULT_MATH
    ) -> None:
        self._layout = layout
        self._device = device
        self._dtype = dtype
        self._math = math
        self._told: set[str] = set()

    def __call__(self, name: str, in_features: int, out_features: int) -> nn.Module:
        if name not in self._layout.matrices:
            return DenseLinear(in_features, out_features, torch.device("meta"), self._dtype)
        weight = self._layout.read(name).to(self._device)
        if self._device.type != "cuda" or isinstance(weight, CodebookWeight):
            return make_linear(weight, self._dtype)
        why = why_no_kernel(weight, self._dtype)
        if why:
            self._tell_once(name, why)
            return make_linear(weight, self._dtype)
        return KernelLinear(weight, self._math, self._workspace)

    @cached_property
    def _workspace(self) -> Workspace:
        largest = max(math.prod(matrix.shape) for matrix in self._layout.matrices.values())
        return new_workspace(self._device, largest, self._math)

    def _tell_once(self, name: str, why: str) -> None:
        """A matrix without a kernel is slow: said at load, once for each reason."""
        if why not in self._told:
            self._told.add(why)
            _LOG.warning("no GPU kernel for %s and matrices like it, which are slow: %s", name, why)


def quantized_bytes(layout: WeightLayout) -> int:
    """At most so many bytes do the quantized matrices take once they are loaded."""
    return sum(matrix.num_bytes for matrix in layout.matrices.values())
