"""Picked blocks of tokens side by side: rows and block numbers in, copies of those blocks out; for a cache in host
memory, whose blocks are brought to the card once for many rows that read them.

    out[m * block_size + i, h] = rows[blocks[h, m] * block_size + i, h]      0 where blocks[h, m] < 0 or behind the end
Shapes: rows [N, H, D] of any kind, the last axis dense; blocks int64 [H, M] on the device of the result, which is
[M * block_size, H, D], of every head the rows dense. On a card the rows may lie in page-locked host memory.
"""

import torch
from torch import Tensor

from salalocal.errors import BackendError
from salalocal.kernels.backend import tl, triton, use_triton

NUM_WARPS = 4


def gather_blocks_definition(rows: Tensor, blocks: Tensor, block_size: int) -> Tensor:
    """The formula, token by token."""
    _check(rows, blocks)
    num_tokens, heads, dim = rows.shape
    out = rows.new_zeros(blocks.shape[1] * block_size, heads, dim)
    for head, picked in enumerate(blocks.tolist()):
        for place, block in enumerate(picked):
            for i in range(block_size):
                if 0 <= block * block_size + i < num_tokens:
                    out[place * block_size + i, head] = rows[block * block_size + i, head]
    return out


def gather_blocks_reference(rows: Tensor, blocks: Tensor, block_size: int) -> Tensor:
    """The same in a few operations, where rows and blocks are on one device."""
    _check(rows, blocks)
    tokens = (blocks[..., None] * block_size + torch.arange(block_size, device=blocks.device)).flatten(1)  # [H, M * bs]
    is_there = (tokens >= 0) & (tokens < len(rows))
    found = rows.transpose(0, 1)[torch.arange(len(tokens), device=tokens.device)[:, None], tokens * is_there]
    return torch.where(is_there[..., None], found, torch.zeros_like(found)).transpose(0, 1)


@triton.jit
def _gather_blocks_kernel(
    rows_ptr, blocks_ptr, out_ptr, num_tokens, stride_rn, stride_rh, stride_b,
    BLOCK: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """One program: one place of one head. Out [H, M * BLOCK, DIM], dense."""
    place, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    block = tl.load(blocks_ptr + head * stride_b + place)
    tokens = block * BLOCK + tl.arange(0, BLOCK)
    dims = tl.arange(0, DIM)
    is_there = ((tokens >= 0) & (tokens < num_tokens))[:, None]
    at = head * stride_rh + tokens[:, None] * stride_rn + dims[None, :]
    found = tl.load(rows_ptr + at, mask=is_there, other=0)
    out_at = (head * tl.num_programs(0) + place) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + out_at[:, None] * DIM + dims[None, :], found)


def gather_blocks_triton(rows: Tensor, blocks: Tensor, block_size: int) -> Tensor:
    """Launch the kernel. Raises: ValueError as the reference; BackendError for rows that a card cannot read."""
    _check(rows, blocks)
    num_tokens, heads, dim = rows.shape
    if dim & (dim - 1) or block_size & (block_size - 1):
        raise BackendError(f"gathering blocks: rows of {dim} in blocks of {block_size}, powers of two are needed")
    if blocks.is_cuda and not (rows.is_cuda or rows.is_pinned()):
        raise BackendError("a card cannot read a cache in pageable memory", "make it with page_locked_empty")
    out = torch.empty((heads, blocks.shape[1] * block_size, dim), dtype=rows.dtype, device=blocks.device)
    if blocks.numel():
        _gather_blocks_kernel[(blocks.shape[1], heads)](
            rows, blocks, out, num_tokens, rows.stride(0), rows.stride(1), blocks.stride(0),
            BLOCK=block_size, DIM=dim, num_warps=NUM_WARPS,
        )  # fmt: skip
    return out.transpose(0, 1)


def gather_blocks(rows: Tensor, blocks: Tensor, block_size: int) -> Tensor:
    """What a cache calls; see `gather_blocks_reference`."""
    gather = gather_blocks_triton if use_triton(blocks) else gather_blocks_reference
    return gather(rows, blocks, block_size)


def _check(rows: Tensor, blocks: Tensor) -> None:
    """Raises ValueError for shapes that do not fit."""
    if rows.ndim != 3 or blocks.ndim != 2 or len(blocks) != rows.shape[1] or blocks.dtype != torch.int64:
        raise ValueError(f"rows {tuple(rows.shape)} and blocks {tuple(blocks.shape)} {blocks.dtype} do not fit")
    if rows.stride(2) != 1 or blocks.stride(1) != 1:
        raise ValueError("the last axes of rows and blocks must be dense")
