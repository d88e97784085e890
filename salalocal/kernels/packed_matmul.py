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

# Measured: with more rows, fp32 matmul over dequantized tiles is faster on a CPU without AVX512; with it the kernel is.
MAX_CPU_INT4_ROWS = 256
_CPU_INT4_GROUPS = (32, 64, 128, 256)
_CPU_INT4_ROWS_OF_OUT = 16


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


def has_cpu_int4(
    words: Tensor, scales: Tensor, bits: int, group_size: int, group_index: Tensor | None, dtype: torch.dtype
) -> bool:
    """Whether torch's own int4 kernel for CPUs multiplies with these weights exactly and is the faster way.

    It is vectorised everywhere for bf16 alone, and takes the scales in that dtype.
    """
    num_out, num_in = scales.shape[0], words.shape[1] * 32 // bits
    return (
        words.device.type == "cpu"
        and bits == 4
        and dtype == scales.dtype == torch.bfloat16
        and group_index is None
        and group_size in _CPU_INT4_GROUPS
        and num_in % group_size == 0
        and num_out % _CPU_INT4_ROWS_OF_OUT == 0
    )


def to_cpu_int4(words: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Weights in the order of torch's int4 kernel for CPUs.

    Shapes: packed uint8 [out, in / 2]; scales and zero offsets [groups, out, 2].
    """
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unpack_codes(words, 4, torch.int32), 1)
    return packed, torch.stack((scales, torch.zeros_like(scales)), dim=-1).transpose(0, 1).contiguous()


def cpu_int4_matmul(x: Tensor, packed: Tensor, scales_and_zeros: Tensor, group_size: int) -> Tensor:
    """x @ W^T by torch's int4 kernel for CPUs, from `to_cpu_int4`. Shapes: x [..., in] bf16 -> [..., out]."""
    rows = x.reshape(-1, x.shape[-1])
    y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, packed, group_size, scales_and_zeros)
    return y.reshape(*x.shape[:-1], y.shape[-1])
