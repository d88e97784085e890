"""The bit order of packed integer weights: codes in, words of 32 bits out, and back; for the weight formats and the
matmul. No other file knows it.

A word holds 32 / bits codes that lie next to each other on the packed axis, the first in the lowest bits. GPTQ packs
so along the input axis (`qweight`) and the output axis (`qzeros`), compressed-tensors along the input axis.
"""

import torch
from torch import Tensor

WORD_BITS = 32
PACKED_BITS = (4, 8)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack along the last axis. Shapes: codes uint8 [..., N], below 2**bits -> int32 [..., N * bits / 32].

    Raises: ValueError for bits other than 4 and 8, another dtype, or an N that does not fill whole words.
    """
    _check_bits(bits)
    if codes.dtype != torch.uint8 or codes.shape[-1] % (WORD_BITS // bits):
        raise ValueError(f"codes are {codes.dtype} {tuple(codes.shape)}, needed is uint8, whole words of {bits} bits")
    octets = codes if bits == 8 else codes[..., 0::2] | (codes[..., 1::2] << 4)
    return octets.contiguous().view(torch.int32)


def unpack_codes(words: Tensor, bits: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Undo `pack_codes`. Shapes: words int32 [..., W] -> [..., W * 32 / bits] in `dtype`.

    Raises: ValueError for bits other than 4 and 8, or words of another dtype.
    """
    _check_bits(bits)
    if words.dtype != torch.int32:
        raise ValueError(f"words are {words.dtype}, needed is int32")
    octets = words.contiguous().view(torch.uint8)
    if bits == 8:
        return octets.to(dtype, copy=True)
    codes = torch.empty(*octets.shape, 2, dtype=dtype, device=words.device)
    codes[..., 0] = octets & 15
    codes[..., 1] = octets >> 4
    return codes.flatten(-2)


def _check_bits(bits: int) -> None:
    if bits not in PACKED_BITS:
        raise ValueError(f"{bits} bits, packed are {' and '.join(map(str, PACKED_BITS))}")
