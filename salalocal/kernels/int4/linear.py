"""A linear map with packed weights on a GPU: which kernel multiplies for how many rows; for the quantized linear map.

    rows        4 bits, math bf16     4 bits, math int8               8 bits
    1 to 16     `gemv`, floats        `gemv`, int8 in groups of 128   `gemv`, int8 in groups of 128
    more        `route`, bf16         `route`, int8 a row             `route`, by a scratch

fp8 math is bf16 math up to `FUSED_ROWS` of `route`. Few rows have no other kernel for 8-bit weights than that of
integers: their activations are int8 whatever the math, a relative error of 0.6 % on normal numbers, as much as rounding
the weights to 8 bits costs. Nothing here waits for the card or decides by what is on it: all of it may stand in a CUDA
graph. Shapes: x [..., K] bf16; y [..., N] bf16.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from salalocal.kernels.backend import HAS_TRITON, OLDEST_CAPABILITY, compute_capability
from salalocal.kernels.int4.activations_by_group import ACTIVATION_GROUP, RawActivations, float_activations
from salalocal.kernels.int4.gemv import MAX_TOKENS, PLAIN, Activations, PackedMatrix, Scratch, int4_gemv
from salalocal.kernels.int4.route import Int4Scratch, Math, choose, int4_matmul, new_scratch, prepare
from salalocal.kernels.int4.scratch import GROUP_SIZES, Int4Weight
from salalocal.kernels.int4.vocabulary import likeliest_tokens
from salalocal.kernels.packing import PACKED_BITS


class Workspace(NamedTuple):
    """What the kernels write between their steps, one for each device: the linear maps of a model share it."""

    gemv: Scratch
    route: Int4Scratch


def new_workspace(device: torch.device, num_weights: int, math: Math) -> Workspace:
    """Room for the largest matrix of a model, `num_weights` = N * K."""
    return Workspace(Scratch.make(device), new_scratch(device, num_weights, math))


def why_no_kernel(weight: PackedMatrix, dtype: torch.dtype) -> str:
    """Why the kernels do not take a matrix or activations of this dtype, in words; empty if they do."""
    num_in = weight.words.shape[1] * 32 // weight.bits
    if not HAS_TRITON:
        return "Triton is not installed"
    if compute_capability(weight.words.device) < OLDEST_CAPABILITY:
        return f"the card is older than compute capability {OLDEST_CAPABILITY / 10}"
    if dtype != torch.bfloat16:
        return f"activations are {dtype}, the kernels take bfloat16"
    if weight.group_index is not None:
        return "its features are grouped by act-order"
    if weight.bits not in PACKED_BITS or weight.group_size not in GROUP_SIZES:
        return f"{weight.bits} bits in groups of {weight.group_size}, the kernels take groups of 32, 64 and 128"
    if num_in % ACTIVATION_GROUP:
        return f"{num_in:,} input features are not in groups of {ACTIVATION_GROUP}"
    return ""


def int4_linear(x: Tensor, weight: PackedMatrix, folded: Int4Weight, math: Math, workspace: Workspace) -> Tensor:
    """x @ dequantize(W)^T; `folded` is the same matrix as `route` takes it."""
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) == 0:
        return x.new_empty(*x.shape[:-1], len(weight.words))
    if len(rows) <= MAX_TOKENS:
        y = int4_gemv(_few(rows, weight, math), weight, PLAIN, x.dtype, workspace.gemv)
    else:
        route = choose(len(rows), weight.group_size, math, compute_capability(x.device), weight.bits)
        out = torch.empty(len(rows), len(weight.words), dtype=x.dtype, device=x.device)
        y = int4_matmul(prepare(rows, route), folded, route, workspace.route, out)
    return y.view(*x.shape[:-1], -1)


def int4_likeliest(x: Tensor, weight: PackedMatrix, math: Math, workspace: Workspace, is_damaged: Tensor) -> Tensor:
    """The first of the largest of x @ dequantize(W)^T, as `int4_linear` rounds it, in every row.

    Shapes: x [M, K], 1 to 16 rows; result int64 [M]; is_damaged as `vocabulary` says.
    """
    return likeliest_tokens(_few(x, weight, math), weight, is_damaged, workspace.gemv)


def _few(rows: Tensor, weight: PackedMatrix, math: Math) -> Activations:
    """Up to 16 rows as `gemv` takes them."""
    is_int8 = math == "int8" or weight.bits == 8
    return RawActivations(rows.contiguous()) if is_int8 else float_activations(rows)
