"""Multiplying with weights that are entries of a codebook: x @ dequantize(W)^T; for the codebook linear map.

    flat[i] = absmax[i // block_size] * codebook[code[i]],   W = flat as [out, in]

Blocks run along the flat matrix, over the ends of rows where a row is no whole number of blocks; the last may be
short. Two codes lie in a byte, the first in its upper half: the order of bitsandbytes, which no other file knows. On a
card its kernels multiply 16-bit rows, from the same bytes, if the codebook is its own and rows hold whole blocks.
Shapes: x [..., in], `in` even; codes uint8 [out * in / 2]; absmax float32 [blocks]; codebook float32 [16]; y [..., out]
in the dtype of x. Source: bitsandbytes, functional.quantize_4bit; QLoRA, arXiv 2305.14314.
"""

import logging
import math
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from salalocal.kernels.backend import use_triton
from salalocal.kernels.packed_matmul import CUDA_TILE_WEIGHTS, TILE_WEIGHTS

_LOG = logging.getLogger(__name__)
BITSANDBYTES_KINDS = ("nf4", "fp4")


def codebook_matmul_definition(x: Tensor, codes: Tensor, absmax: Tensor, codebook: Tensor, block_size: int) -> Tensor:
    """The formula, in float64."""
    flat = codebook.double()[unpack_pairs(codes).long()]
    flat = flat * absmax.double()[torch.arange(len(flat), device=flat.device) // block_size]
    return (x.double() @ flat.view(-1, x.shape[-1]).t()).to(x.dtype)


def codebook_matmul_reference(x: Tensor, codes: Tensor, absmax: Tensor, codebook: Tensor, block_size: int) -> Tensor:
    """Dequantizes some output features at a time and multiplies.

    On a CPU the product is in fp32 also for bf16 and fp16, whose own matmuls are slower and coarser there.
    """
    wide = x.dtype if x.is_cuda else torch.promote_types(x.dtype, torch.float32)
    rows = x.to(wide)
    num_in, pairs = x.shape[-1], pair_table(codebook)
    num_out = 2 * len(codes) // num_in
    y = torch.empty(*x.shape[:-1], num_out, dtype=x.dtype, device=x.device)
    multiple = row_multiple(num_in, block_size)
    tile_weights = CUDA_TILE_WEIGHTS if x.is_cuda else TILE_WEIGHTS
    step = max(1, tile_weights // (num_in * multiple)) * multiple
    for start in range(0, num_out, step):
        tile = slice(start * num_in // 2, (start + step) * num_in // 2)
        blocks = slice(start * num_in // block_size, -(-(start + step) * num_in // block_size))
        weight = dequantize_codes(codes[tile], absmax[blocks], pairs, block_size).to(wide)
        y[..., start : start + step] = functional.linear(rows, weight.view(-1, num_in))
    return y


def codebook_matmul_bitsandbytes(x: Tensor, codes: Tensor, absmax: Tensor, block_size: int, kind: str) -> Tensor:
    """The same by the kernels of bitsandbytes; `kind` names its codebook."""
    shape = [2 * len(codes) // x.shape[-1], x.shape[-1]]
    multiply = torch.ops.bitsandbytes.gemm_4bit.default
    y: Tensor = multiply(x.contiguous(), codes.unsqueeze(1), shape, absmax, block_size, kind)
    return y


def codebook_matmul(
    x: Tensor, codes: Tensor, absmax: Tensor, codebook: Tensor, block_size: int, kind: str = ""
) -> Tensor:
    """What the model calls; `kind` names the codebook if it has a name."""
    if _takes_bitsandbytes(x, block_size, kind) and use_triton(x, codes) and _has_bitsandbytes():
        return codebook_matmul_bitsandbytes(x, codes, absmax, block_size, kind)
    return codebook_matmul_reference(x, codes, absmax, codebook, block_size)


def _takes_bitsandbytes(x: Tensor, block_size: int, kind: str) -> bool:
    is_whole = x.shape[-1] % block_size == 0 and x.numel() > 0
    return kind in BITSANDBYTES_KINDS and is_whole and x.dtype in (torch.bfloat16, torch.float16)


@cache
def _has_bitsandbytes() -> bool:
    """Whether its kernels are there; without them a card dequantizes, which is slow: said once."""
    # On some processors it warns of a missing kernel for CPUs, which is not what is asked of it here.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        _LOG.warning("no GPU kernel for weights from a codebook, which are slow: bitsandbytes: %s", error)
        return False
    return True


def pair_table(codebook: Tensor) -> Tensor:
    """Both entries that a byte stands for, side by side in one word: one look-up for two weights.

    Shapes: codebook float32 [16] -> int64 [256].
    """
    return torch.cartesian_prod(codebook, codebook).view(torch.int64).flatten()


def dequantize_codes(codes: Tensor, absmax: Tensor, pairs: Tensor, block_size: int) -> Tensor:
    """Whole blocks of the flat matrix, of which the last may be short.

    Shapes: codes uint8 [N / 2], absmax [blocks], pairs from `pair_table` -> float32 [N].
    """
    flat = torch.index_select(pairs, 0, codes.int()).view(torch.float32)
    num_whole = len(flat) // block_size
    whole, rest = flat[: num_whole * block_size], flat[num_whole * block_size :]
    whole.view(-1, block_size).mul_(absmax[:num_whole].unsqueeze(-1))
    if len(rest):
        rest.mul_(absmax[num_whole])
    return flat


def row_multiple(in_features: int, block_size: int) -> int:
    """The fewest rows that hold whole blocks only."""
    return block_size // math.gcd(block_size, in_features)


def pack_pairs(codes: Tensor) -> Tensor:
    """Two codes to a byte. Shapes: codes uint8 [N], below 16, N even -> uint8 [N / 2]."""
    return (codes[0::2] << 4) | codes[1::2]


def unpack_pairs(packed: Tensor) -> Tensor:
    """Undo `pack_pairs`. Shapes: uint8 [N / 2] -> uint8 [N]."""
    return torch.stack((packed >> 4, packed & 15), dim=1).flatten()
