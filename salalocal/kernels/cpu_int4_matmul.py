"""Multiplying with packed 4-bit weights on a CPU by torch's own int4 kernel: x @ dequantize(W)^T; for the quantized
linear map.

The kernel takes weights in an order of its own, which depends on the processor's vector width. A matrix is held in that
order alone, and for many rows, where plain matmul is faster, tiles of it are taken out again. The kernel reads and
writes bf16 and adds up in fp32, as plain matmul does on a processor with bf16 instructions: activations in fp32 are
rounded on the way in and out. On the built-in model that costs a KL divergence of 2e-4, the 4 bits themselves 4e-2.

Shapes: x [..., in]; packed uint8 [out, in / 2] and scales_and_zeros bf16 [groups, out, 2] from `to_cpu_int4`; y
[..., out] in the dtype of x.
"""

import torch
from torch import Tensor
from torch.nn import functional

from salalocal.kernels.packing import unpack_codes

ALL_ROWS = 2**62
TILE_WEIGHTS = 2**18  # dequantized at a time: they stay in a core's cache until they are multiplied with

_AVX2, _AVX512 = "AVX2", "AVX512"
_ACTIVATIONS = (torch.float32, torch.bfloat16)
_GROUP_SIZES = (32, 64, 128, 256)


def max_kernel_rows() -> int:
    """Up to how many rows of x torch's int4 kernel is the fastest way on this processor; 0 where it is not used.

    Measured, see benchmarks/LOG.md: it is vectorised with AVX2 and AVX512 alone; tiles win earlier where matmul is
    faster than the kernel, by bf16 instructions or against the narrower vectors.
    """
    if _vector_width() == _AVX512:
        return 128 if _has_bf16_matmul() else ALL_ROWS
    return 32 if _vector_width() == _AVX2 else 0


def has_cpu_int4(
    words: Tensor, scales: Tensor, bits: int, group_size: int, group_index: Tensor | None, dtype: torch.dtype
) -> bool:
    """Whether torch's int4 kernel multiplies with these weights as they are, and activations of this dtype, faster.

    It takes scales in bf16 and groups along the row; output features by the block in which they are stored.
    """
    num_out, num_in = scales.shape[0], words.shape[1] * 32 // bits
    return (
        max_kernel_rows() > 0
        and words.device.type == "cpu"
        and bits == 4
        and dtype in _ACTIVATIONS
        and scales.dtype == torch.bfloat16
        and group_index is None
        and group_size in _GROUP_SIZES
        and num_in % group_size == 0
        and num_out % _block_rows() == 0
    )


def to_cpu_int4(words: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Weights in the kernel's order. Shapes: words int32 [out, in / 8], scales bf16 [out, groups] -> packed, scales."""
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unpack_codes(words, 4, torch.int32), 1)
    return packed, torch.stack((scales, torch.zeros_like(scales)), dim=-1).transpose(0, 1).contiguous()


def cpu_int4_matmul(x: Tensor, packed: Tensor, scales_and_zeros: Tensor) -> Tensor:
    """x @ W^T: by the kernel for as many rows as it is faster for, else by dequantized tiles."""
    rows = x.reshape(-1, x.shape[-1])
    multiply = _by_kernel if len(rows) <= max_kernel_rows() else _by_tiles
    return multiply(rows, packed, scales_and_zeros).view(*x.shape[:-1], packed.shape[0])


def _by_kernel(rows: Tensor, packed: Tensor, scales_and_zeros: Tensor) -> Tensor:
    group_size = rows.shape[1] // scales_and_zeros.shape[0]
    taken = rows.to(torch.bfloat16).contiguous()
    y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(taken, packed, group_size, scales_and_zeros)
    return y.to(rows.dtype)


def _by_tiles(rows: Tensor, packed: Tensor, scales_and_zeros: Tensor) -> Tensor:
    """The product in bf16 where the processor has instructions for it, else in fp32, which then is faster and finer."""
    num_out, num_in = packed.shape[0], rows.shape[1]
    taken = rows.to(torch.bfloat16 if _has_bf16_matmul() else torch.float32)
    y = torch.empty(len(rows), num_out, dtype=rows.dtype)
    step = max(1, TILE_WEIGHTS // num_in // _block_rows()) * _block_rows()
    for start in range(0, num_out, step):
        tile = slice(start, start + step)
        y[:, tile] = functional.linear(taken, _dequantize(packed[tile], scales_and_zeros[:, tile, 0], taken.dtype))
    return y


def _dequantize(packed: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Some rows of W, out of the kernel's order.

    A block of rows lies column by column: bytes with the first half of the block's rows in their low four bits and the
    second half in their high ones. Shapes: packed [R, in / 2], scales [groups, R], R whole blocks -> [R, in].
    """
    num_rows, num_in = packed.shape[0], 2 * packed.shape[1]
    half = _block_rows() // 2
    octets = packed.reshape(-1, num_in, half).transpose(1, 2)
    codes = torch.empty(octets.shape[0], 2, half, num_in, dtype=dtype)
    codes[:, 0] = octets & 15
    codes[:, 1] = octets >> 4
    weight = codes.sub_(8).view(num_rows, scales.shape[0], -1).mul_(scales.t().to(dtype).unsqueeze(-1))
    return weight.view(num_rows, num_in)


def _vector_width() -> str:
    return torch.backends.cpu.get_cpu_capability()


def _block_rows() -> int:
    return 64 if _vector_width() == _AVX512 else 32


def _has_bf16_matmul() -> bool:
    return torch.cpu._is_avx512_bf16_supported()
