"""Reading memory once and keeping next to nothing of it: words in, one sum a piece out; for measuring bandwidth.

    sums[p] = sum of words[p * PIECE : (p + 1) * PIECE], modulo 2**32

Shapes: words int32 [N], N in whole pieces -> sums int32 [N / PIECE].
"""

import torch
from torch import Tensor

from salalocal.kernels.backend import tl, triton, use_triton

PIECE = 16_384  # 64 KiB for one program
_STEP = 4096
_WARPS = 8


def read_sums_definition(words: Tensor) -> Tensor:
    """The sums in int64, the lower half of which is kept."""
    wide = words.view(-1, PIECE).sum(1, dtype=torch.int64)
    return wide.view(torch.int32)[::2].clone()


def read_sums_reference(words: Tensor) -> Tensor:
    """The same in int32, which wraps; as fast as a CPU reads."""
    return words.view(-1, PIECE).sum(1, dtype=torch.int32)


@triton.jit
def _read_sums_kernel(words, sums, PIECE: tl.constexpr, STEP: tl.constexpr):
    piece = tl.program_id(0).to(tl.int64)
    place = words + piece * PIECE + tl.arange(0, STEP)
    total = tl.zeros([STEP], tl.int64)
    for start in tl.static_range(0, PIECE, STEP):
        total += tl.load(place + start)
    tl.store(sums + piece, tl.sum(total, 0).to(tl.int32))


def read_sums_triton(words: Tensor) -> Tensor:
    """One program a piece, all of its loads in flight at once."""
    sums = torch.empty(_num_pieces(words), dtype=torch.int32, device=words.device)
    _read_sums_kernel[(len(sums),)](words, sums, PIECE=PIECE, STEP=_STEP, num_warps=_WARPS)
    return sums


def read_sums(words: Tensor) -> Tensor:
    """What a measurement calls. Raises: ValueError for words that are not whole pieces of int32."""
    _num_pieces(words)
    return read_sums_triton(words) if use_triton(words) else read_sums_reference(words)


def _num_pieces(words: Tensor) -> int:
    if words.dtype != torch.int32 or words.ndim != 1 or words.numel() % PIECE or not words.is_contiguous():
        raise ValueError(f"words are {words.dtype} {tuple(words.shape)}, needed are int32 in whole pieces of {PIECE:,}")
    return words.numel() // PIECE
