"""Ways to compute that the runtime has no switch for, laid over its modules while a context is open; for
benchmarks/quality.py and training/evaluate.py.

    int8     products of packed weights as a card makes them with int8 math: up to 16 rows with activations in int8 by
             groups of 128, more rows with activations in int8 by row and weights folded to int8 by output channel
    state    lightning states rounded to bf16 after every call: after a chunk that is read, after a token that is drawn
    dense    sparse layers read every block
    silent   sparse layers say nothing

The first is for a CPU, where integer math has no path of its own; activations are rounded from fp32, not from bf16. All
of them need the modules: on a card SALALOCAL_KERNELS=reference, and `int8` is there without being emulated.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from salalocal.kernels.int4.activations_by_group import ACTIVATION_GROUP, quantize_groups_reference
from salalocal.kernels.int4.activations_by_row import from_split_order, quantize_rows_reference
from salalocal.kernels.int4.gemv import MAX_TOKENS
from salalocal.kernels.int4.scratch import decode_int8_reference, int4_weight
from salalocal.kernels.packed_matmul import dequantize_rows
from salalocal.model.mixers.lightning import LightningState
from salalocal.model.mixers.sparse import SparseMixer, SparseState
from salalocal.model.state import StateSpec
from salalocal.quant import linear
from salalocal.quant.codebook import CodebookWeight
from salalocal.quant.int4 import PackedWeight

Emulation = Literal["int8", "state", "dense", "silent"]


class Int8Linear(nn.Module):
    """y = x @ W^T with the roundings of int8 math; fp32 holds every sum of up to 1,040 products of codes exactly."""

    def __init__(self, weight: PackedWeight) -> None:
        super().__init__()
        folded = int4_weight(weight.words, weight.scales, weight.group_size, weight.bits)
        self._codes = from_split_order(decode_int8_reference(folded)).float()
        self._row_scales = folded.row_scales
        packed = (weight.words, weight.scales, weight.bits, weight.group_size)
        self._weight = dequantize_rows(*packed, None, torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) > MAX_TOKENS:
            codes, scales = quantize_rows_reference(rows)
            sums = functional.linear(from_split_order(codes).float(), self._codes)
            y = sums * scales[:, None] * self._row_scales
        else:
            grouped = quantize_groups_reference(rows, is_split=False)
            if grouped.scales is None:
                raise ValueError("activations in groups have scales")
            scales = grouped.scales.repeat_interleave(ACTIVATION_GROUP, dim=1)
            y = functional.linear(grouped.values.float() * scales, self._weight)
        return y.to(x.dtype).view(*x.shape[:-1], -1)


@contextmanager
def emulated(kind: Emulation | None) -> Iterator[None]:
    """Compute that way while open; None for as always. Models have to be opened inside."""
    if kind is None:
        yield
        return
    owner, name, changed = _CHANGES[kind]()
    original = getattr(owner, name)
    setattr(owner, name, changed)
    try:
        yield
    finally:
        setattr(owner, name, original)


_Change = tuple[Any, str, Callable[..., Any]]


def _int8() -> _Change:
    original = linear.make_linear

    def make(weight: PackedWeight | CodebookWeight, dtype: torch.dtype) -> nn.Module:
        if isinstance(weight, PackedWeight) and weight.group_index is None:
            return Int8Linear(weight)
        return original(weight, dtype)

    return linear, "make_linear", make


def _state() -> _Change:
    original = LightningState.advance

    def advance(self: LightningState, matrix: Tensor, num_tokens: int) -> None:
        original(self, matrix.bfloat16().to(matrix.dtype), num_tokens)

    return LightningState, "advance", advance


def _dense() -> _Change:
    original = SparseMixer.new_state

    def new_state(self: SparseMixer, spec: StateSpec) -> SparseState:
        return original(self, replace(spec, sparse_from=sys.maxsize))

    return SparseMixer, "new_state", new_state


def _silent() -> _Change:
    original = SparseMixer.forward

    def forward(self: SparseMixer, x: Tensor, state: SparseState) -> Tensor:
        return torch.zeros_like(original(self, x, state))

    return SparseMixer, "forward", forward


_CHANGES: dict[Emulation, Callable[[], _Change]] = {"int8": _int8, "state": _state, "dense": _dense, "silent": _silent}
