"""Activations on their way into a product: what they are made of goes in, the form that the product wants comes out;
for projections.

A product of few rows takes raw rows and quantizes them itself, a product of many takes int8 rows or plain ones. Norm,
SwiGLU and gate are applied in the kernel that makes that form, so no form is made that nobody asks for.
Shapes: [M, K] bf16 in, row-strided slices too; a row is a token.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from salalocal.kernels.gate import sigmoid_gate
from salalocal.kernels.gated_norm import GatedNorm, gated_norm
from salalocal.kernels.int4.activations_by_group import RawActivations
from salalocal.kernels.int4.activations_by_row import (
    QuantizedRows,
    gated_norm_quantize_rows,
    quantize_rows,
    rms_norm_quantize_rows,
    sigmoid_gate_quantize_rows,
    swiglu_quantize,
)
from salalocal.kernels.norm import rms_norm
from salalocal.kernels.swiglu import swiglu


class Rows(Protocol):
    """Activations in any form, made when it is asked for."""

    @property
    def num_rows(self) -> int:
        """M."""
        ...

    @property
    def raw(self) -> RawActivations:
        """For products of few rows."""
        ...

    @property
    def plain(self) -> Tensor:
        """[M, K] bf16."""
        ...

    def quantized(self, dtype: torch.dtype) -> QuantizedRows:
        """int8 or fp8 with a scale a row."""
        ...


@dataclass(frozen=True, eq=False)
class PlainRows:
    """Rows as they are."""

    plain: Tensor

    @property
    def num_rows(self) -> int:
        return len(self.plain)

    @property
    def raw(self) -> RawActivations:
        return RawActivations(self.plain.contiguous())

    def quantized(self, dtype: torch.dtype) -> QuantizedRows:
        return quantize_rows(self.plain, dtype)


@dataclass(frozen=True, eq=False)
class NormedRows:
    """rms_norm(hidden) * weight."""

    hidden: Tensor
    weight: Tensor
    eps: float

    @property
    def num_rows(self) -> int:
        return len(self.hidden)

    @property
    def raw(self) -> RawActivations:
        return RawActivations(self.hidden, (self.weight, self.eps))

    @cached_property
    def plain(self) -> Tensor:
        return rms_norm(self.hidden, self.weight, self.eps)

    def quantized(self, dtype: torch.dtype) -> QuantizedRows:
        return rms_norm_quantize_rows(self.hidden, self.weight, self.eps, dtype)


@dataclass(frozen=True, eq=False)
class SwigluRows:
    """silu(gate) * up."""

    gate: Tensor
    up: Tensor

    @property
    def num_rows(self) -> int:
        return len(self.gate)

    @property
    def raw(self) -> RawActivations:
        return RawActivations(self.plain)

    @cached_property
    def plain(self) -> Tensor:
        return swiglu(self.gate, self.up)

    def quantized(self, dtype: torch.dtype) -> QuantizedRows:
        return swiglu_quantize(self.gate, self.up, dtype)


@dataclass(frozen=True, eq=False)
class GatedRows:
    """x * sigmoid(gate)."""

    x: Tensor
    gate: Tensor

    @property
    def num_rows(self) -> int:
        return len(self.x)

    @property
    def raw(self) -> RawActivations:
        return RawActivations(self.plain)

    @cached_property
    def plain(self) -> Tensor:
        return sigmoid_gate(self.x, self.gate)

    def quantized(self, dtype: torch.dtype) -> QuantizedRows:
        return sigmoid_gate_quantize_rows(self.x, self.gate, dtype)


@dataclass(frozen=True, eq=False)
class GatedNormRows:
    """rms_norm(x) * weight * sigmoid(gate)."""

    x: Tensor
    gated_norm: GatedNorm

    @property
    def num_rows(self) -> int:
        return len(self.x)

    @property
    def raw(self) -> RawActivations:
        return RawActivations(self.plain)

    @cached_property
    def plain(self) -> Tensor:
        return gated_norm(self.x, self.gated_norm)

    def quantized(self, dtype: torch.dtype) -> QuantizedRows:
        return gated_norm_quantize_rows(self.x, self.gated_norm, dtype)
