"""Multiplying with packed integer weights: x @ dequantize(W)^T; for the quantized linear map.

    W[o, i] = scales[o, g(i)] * (codes[o, i] - 2**(bits - 1)),   g(i) = i // group_size or group_index[i]

Shapes: x [..., in]; words int32 [out, in * bits / 32], see `kernels.packing`; scales [out, groups]; group_index int32
[in] or None; y [..., out] in the dtype of x. Source: the GPTQ format; specification of MiniCPM-SALA, section 14.
"""

import torch
from torch import Tensor
from torch.nn import functional

from salalocal.kernels.packing import unpack_codes

# Weights that are dequantized at a time: few enough to stay in a processor's cache until they are multiplied with, and
# on a GPU enough to keep it busy.
TILE_WEIGHTS = 2**18
CUDA_TILE_WEIGHTS = 2**24


def packed_matmul_definition(
    x: Tensor, words: Tensor, scales: Tensor, bits: int, group_size: int, group_index: Tensor | None = None
) -> Tensor:
    """The formula, in float64."""
    codes = unpack_codes(words, bits).double()
    groups = torch.arange(codes.shape[1], device=words.device) // group_size if group_index is None else group_index
    weight = scales.double()[:, groups.long()] * (codes - float(2 ** (bits - 1)))
    return (x.double() @ weight.t()).to(x.dtype)


def packed_matmul_reference(
    x: Tensor, words: Tensor, scales: Tensor, bits: int, group_size: int, group_index: Tensor | None = None
) -> Tensor:
    """Dequantizes some output features at a time and multiplies.

    On a CPU the product is in fp32 also for bf16 and fp16, whose own matmuls are slower and coarser there.
    """
    wide = x.dtype if x.is_cuda else torch.promote_types(x.dtype, torch.float32)
    rows = x.to(wide)
    num_out, num_in = words.shape[0], x.shape[-1]
    y = torch.empty(*x.shape[:-1], num_out, dtype=x.dtype, device=x.device)
    step = max(1, (CUDA_TILE_WEIGHTS if x.is_cuda else TILE_WEIGHTS) // max(1, num_in))
    for start in range(0, num_out, step):
        tile = slice(start, start + step)
        weight = dequantize_rows(words[tile], scales[tile], bits, group_size, group_index, wide)
        y[..., tile] = functional.linear(rows, weight)
    return y


def packed_matmul(
    x: Tensor, words: Tensor, scales: Tensor, bits: int, group_size: int, group_index: Tensor | None = None
) -> Tensor:
    """What the model calls."""
    return packed_matmul_reference(x, words, scales, bits, group_size, group_index)


def dequantize_rows(
    words: Tensor, scales: Tensor, bits: int, group_size: int, group_index: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Some rows of W. Shapes: words [R, in * bits / 32], scales [R, groups] -> [R, in] in `dtype`."""
    wide = torch.promote_types(dtype, torch.float32)
    weight = unpack_codes(words, bits, wide).sub_(2 ** (bits - 1))
    num_in = weight.shape[1]
    if group_index is None and num_in % group_size == 0:
        weight.view(len(weight), -1, group_size).mul_(scales.to(wide).unsqueeze(-1))
    else:
        groups = torch.arange(num_in, device=words.device) // group_size if group_index is None else group_index.long()
        weight.mul_(scales.to(wide)[:, groups])
    return weight.to(dtype)
