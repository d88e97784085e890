"""Activations on their way into a product: what they are made of goes in, the form that the product wants comes out;
for projections.

A product of few rows takes raw rows and quantizes them itself, a product of many takes int8 rows or plain ones. Norm,
SwiGLU and gate are applied in the kernel that makes that form, so no form is made that nobody asks for.
Shapes: [M, K] bf16 in, row-strided slices too; a row is a token.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Protocol

import torch
from torch import Tensor

from salalocal.kernels.gate import sigmoid_gate
from salalocal.kernels.gated_norm import GatedNorm, gated_norm
from salalocal.kernels.int4.activations_by_group import GroupedActivations, RawActivations
from salalocal.kernels.int4.activations_by_row import (
    QuantizedRows,
    gated_norm_quantize_rows,
    quantize_rows,
    rms_norm_quantize_rows,
    sigmoid_gate_quantize_rows,
    swiglu_quantize,
)
from salalocal.kernels.int4.gemv import Activations
from salalocal.kernels.norm import rms_norm
from salalocal.kernels.swiglu import swiglu


class Rows(Protocol):
    """Activations in any form, made when it is asked for."""

    @property
    def num_rows(self) -> int:
        """M."""
        ...

    @property
    def few(self) -> Activations:
        """For products of few rows."""
        ...

    @property
    def plain(self) -> Tensor:
        """[M, K] bf16."""
        ...

    def quantized(self, dtype: torch.dtype) -> QuantizedRows:
        """int8 or fp8 with a scale a row."""
        ...


class _QuantizedOnce(ABC):
    """Rows that are quantized once for all the products that ask: maps of several formats may share their input."""

    @cached_property
    def _known(self) -> dict[torch.dtype, QuantizedRows]:
        return {}

    def quantized(self, dtype: torch.dtype) -> QuantizedRows:
        if dtype not in self._known:
            self._known[dtype] = self._quantize(dtype)
        return self._known[dtype]

    @abstractmethod
    def _quantize(self, dtype: torch.dtype) -> QuantizedRows: ...


@dataclass(frozen=True, eq=False)
class PlainRows(_QuantizedOnce):
    """Rows as they are."""

    plain: Tensor

    @property
    def num_rows(self) -> int:
        return len(self.plain)

    @property
    def few(self) -> RawActivations:
        return RawActivations(self.plain.contiguous())

    def _quantize(self, dtype: torch.dtype) -> QuantizedRows:
        return quantize_rows(self.plain, dtype)


@dataclass(frozen=True, eq=False)
class NormedRows(_QuantizedOnce):
    """rms_norm(hidden) * weight."""

    hidden: Tensor
    weight: Tensor
    eps: float

    @property
    def num_rows(self) -> int:
        return len(self.hidden)

    @property
    def few(self) -> RawActivations:
        return RawActivations(self.hidden, (self.weight, self.eps))

    @cached_property
    def plain(self) -> Tensor:
        return rms_norm(self.hidden, self.weight, self.eps)

    def _quantize(self, dtype: torch.dtype) -> QuantizedRows:
        return rms_norm_quantize_rows(self.hidden, self.weight, self.eps, dtype)


@dataclass(frozen=True, eq=False)
class MadeRows(_QuantizedOnce):
    """Rows that one kernel makes plain, and another quantized."""

    num_rows: int
    make: Callable[[], Tensor]
    make_quantized: Callable[[torch.dtype], QuantizedRows]

    @property
    def few(self) -> RawActivations:
        return RawActivations(self.plain)

    @cached_property
    def plain(self) -> Tensor:
        return self.make()

    def _quantize(self, dtype: torch.dtype) -> QuantizedRows:
        return self.make_quantized(dtype)


@dataclass(frozen=True, eq=False)
class GroupedRows(_QuantizedOnce):
    """Few rows that the product before has quantized."""

    few: GroupedActivations

    @property
    def num_rows(self) -> int:
        return len(self.few.values)

    @property
    def plain(self) -> Tensor:
        return self.few.floats(torch.float32).bfloat16()

    def _quantize(self, dtype: torch.dtype) -> QuantizedRows:
        return quantize_rows(self.plain, dtype)


def swiglu_rows(gate: Tensor, up: Tensor) -> MadeRows:
    """silu(gate) * up."""
    return MadeRows(len(gate), partial(swiglu, gate, up), partial(swiglu_quantize, gate, up))


def gated_rows(x: Tensor, gate: Tensor) -> MadeRows:
    """x * sigmoid(gate)."""
    return MadeRows(len(x), partial(sigmoid_gate, x, gate), partial(sigmoid_gate_quantize_rows, x, gate))


def gated_norm_rows(x: Tensor, arguments: GatedNorm) -> MadeRows:
    """rms_norm(x) * weight * sigmoid(gate)."""
    return MadeRows(len(x), partial(gated_norm, x, arguments), partial(gated_norm_quantize_rows, x, arguments))
