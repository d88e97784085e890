"""Linear maps that share their input, as few products of stacked weights: rows in, one tensor a map out; for layers.

Neighbouring maps of one format are stacked along their outputs when a model is taken over. The weights stay where they
are counted: the maps of the module tree keep views of the stacked ones.
Shapes: rows [M, K]; outputs [M, N] bf16, columns of one tensor where maps are stacked.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from salalocal.engine.fused.rows import GroupedRows, PlainRows, Rows, swiglu_rows
from salalocal.kernels.backend import compute_capability
from salalocal.kernels.int4.activations_by_group import GroupedActivations, RawActivations, float_activations
from salalocal.kernels.int4.activations_by_row import QuantizedRows, split_rows
from salalocal.kernels.int4.gemv import MAX_TOKENS, PLAIN, SWIGLU, Epilogue, gated_groups, int4_gemv
from salalocal.kernels.int4.int8_gemm import Residual
from salalocal.kernels.int4.route import Route, choose, int4_matmul, int4_swiglu
from salalocal.kernels.int4.scratch import Int4Weight
from salalocal.model.layers import DenseLinear
from salalocal.quant.linear import KernelLinear

_ROW_DTYPES = {
    "fused_int8": torch.int8,
    "scratch_int8": torch.int8,
    "scratch_fp8": torch.float8_e4m3fn,
}


class Product(Protocol):
    """Some stacked maps of one format."""

    @property
    def widths(self) -> tuple[int, ...]:
        """Output features of every map."""
        ...

    def __call__(self, rows: Rows, residual: Residual | None = None) -> Tensor:
        """All outputs [M, sum of widths]; joined to a residual, which may be overwritten, if there is one."""
        ...


@dataclass(frozen=True, eq=False)
class DenseProduct:
    """Plain weights. Shapes: weight [N, K]."""

    weight: Tensor
    widths: tuple[int, ...]

    def __call__(self, rows: Rows, residual: Residual | None = None) -> Tensor:
        y = functional.linear(rows.plain, self.weight)
        return y if residual is None else torch.add(residual.values, y, alpha=residual.factor, out=residual.values)


@dataclass(frozen=True, eq=False)
class PackedProduct:
    """Packed weights, `linear` holding all of them."""

    linear: KernelLinear
    widths: tuple[int, ...]

    @property
    def folded(self) -> Int4Weight:
        """The matrix as products of many rows take it."""
        return self.linear.folded

    def __call__(self, rows: Rows, residual: Residual | None = None) -> Tensor:
        if rows.num_rows <= MAX_TOKENS:
            if residual is None:
                return self.few(rows, PLAIN)
            return self.few(rows, Epilogue("residual", residual.factor, residual.values))
        return self._many(rows, residual)

    def few(self, rows: Rows, epilogue: Epilogue) -> Tensor:
        """Up to 16 rows at memory speed."""
        linear, x = self.linear, rows.few
        if isinstance(x, RawActivations) and linear.math != "int8" and linear.bits != 8:
            x = float_activations(x.values, x.norm)
        return int4_gemv(x, linear, epilogue, torch.bfloat16, linear.workspace.gemv)

    def few_gated(self, rows: Rows) -> GroupedActivations:
        """silu of the first half of the outputs times the second, of up to 16 rows and quantized for the next map."""
        return gated_groups(rows.few, self.linear, self.linear.workspace.gemv)

    def route(self, num_rows: int) -> Route:
        """The way that many rows go."""
        folded = self.folded
        capability = compute_capability(folded.words.device)
        return choose(num_rows, folded.group_size, self.linear.math, capability, folded.bits)

    def many_gated(self, rows: Rows) -> Tensor:
        """silu of the first half of the outputs times the second, by the scratch for int8."""
        words = self.folded.words
        out = torch.empty(rows.num_rows, len(words) // 2, dtype=torch.bfloat16, device=words.device)
        return int4_swiglu(rows.quantized(torch.int8), self.folded, self.linear.workspace.route, out)

    def _many(self, rows: Rows, residual: Residual | None) -> Tensor:
        linear, folded, route = self.linear, self.folded, self.route(rows.num_rows)
        x: Tensor | QuantizedRows
        if route in _ROW_DTYPES:
            x = rows.quantized(_ROW_DTYPES[route])
        else:
            x = split_rows(rows.plain) if route == "fused_bf16" else rows.plain
        if residual is not None:
            return int4_matmul(x, folded, route, linear.workspace.route, residual.values, residual)
        out = torch.empty(rows.num_rows, sum(self.widths), dtype=torch.bfloat16, device=folded.words.device)
        return int4_matmul(x, folded, route, linear.workspace.route, out)


class Projection:
    """Linear maps of the same rows."""

    def __init__(self, maps: Sequence[nn.Module]) -> None:
        """Take over maps that `can_take` accepts; they keep views of what is stacked."""
        self._products = [_stacked(run) for run in _runs(maps)]

    def __call__(self, rows: Rows) -> list[Tensor]:
        """One tensor [M, N] a map, in their order; columns of the same tensor where they are stacked."""
        return [y for product in self._products for y in torch.split(product(rows), list(product.widths), dim=1)]

    def join(self, rows: Rows, residual: Residual) -> Tensor:
        """The only map of this projection, its product added to the residual in place."""
        (product,) = self._products
        return product(rows, residual)

    @property
    def takes_groups(self) -> bool:
        """Whether products of few rows take activations in int8, in the order of 4-bit weights."""
        return all(
            isinstance(product, PackedProduct) and product.linear.math == "int8" and product.linear.bits == 4
            for product in self._products
        )

    def swiglu(self, rows: Rows, consumer: "Projection") -> Rows:
        """silu of the first map times the second, for the next projection."""
        product = self._products[0]
        if isinstance(product, PackedProduct) and len(product.widths) == 2:
            if rows.num_rows <= MAX_TOKENS:
                if self.takes_groups and consumer.takes_groups:
                    return GroupedRows(product.few_gated(rows))
                return PlainRows(product.few(rows, SWIGLU))
            if product.route(rows.num_rows) == "scratch_int8":
                return PlainRows(product.many_gated(rows))
        return swiglu_rows(*self(rows))


def can_take(linear: nn.Module) -> bool:
    """Whether a map has a form here: plain bf16 weights, or packed ones with kernels."""
    if isinstance(linear, DenseLinear):
        return linear.weight.dtype == torch.bfloat16
    return isinstance(linear, KernelLinear)


def _runs(maps: Sequence[nn.Module]) -> list[list[nn.Module]]:
    """Neighbours of one format together."""
    runs: list[list[nn.Module]] = []
    for linear in maps:
        if runs and _format(runs[-1][0]) == _format(linear):
            runs[-1].append(linear)
        else:
            runs.append([linear])
    return runs


def _format(linear: nn.Module) -> tuple[object, ...]:
    if isinstance(linear, KernelLinear):
        return linear.bits, linear.group_size, linear.scales.dtype, linear.math
    return (DenseLinear,)


def _stacked(maps: Sequence[nn.Module]) -> Product:
    first = maps[0]
    if not isinstance(first, KernelLinear):
        weights = [linear.get_parameter("weight") for linear in maps]
        weight = torch.cat([w.data for w in weights]) if len(maps) > 1 else weights[0].data
        widths = tuple(len(w) for w in weights)
        for part, view in zip(weights, torch.split(weight, list(widths)), strict=True):
            part.data = view
        return DenseProduct(weight, widths)
    linears = [linear for linear in maps if isinstance(linear, KernelLinear)]
    widths = tuple(len(linear.words) for linear in linears)
    linear = first if len(linears) == 1 else KernelLinear.stack(linears)
    return PackedProduct(linear, widths)
