"""Rows of the embedding table, scaled; the table may stay in the host's memory.

    y[t] = round(scale * table[ids[t]])        round: to the dtype of the table

A table in page-locked host memory is read by the card through its mapped address, one row a token: 8 KiB over the bus
where 0.6 GB of the card's memory would be taken. Ids live on the card, so a decode step needs no host.
Shapes: table [V, K], ids int64 [T] -> [T, K] on the device of the ids. An id outside the table gives a row of NaN on a
card, where nothing can be raised, and an IndexError elsewhere. Source: specification, section 4 (scale_emb).
"""

import torch
from torch import Tensor

from salalocal.errors import BackendError
from salalocal.kernels.backend import tl, triton, use_triton
from salalocal.kernels.rows import needs_gradient

BLOCK_CHANNELS = 1024  # of a row that one program takes: a row of 4,096 is on its way from 4 multiprocessors at once
NUM_WARPS = 4


def embed_definition(table: Tensor, ids: Tensor, scale: float) -> Tensor:
    """The formula, token by token."""
    wide = torch.promote_types(table.dtype, torch.float32)
    return torch.stack([(table[int(token)].to(wide) * scale).to(table.dtype) for token in ids])


def embed_reference(table: Tensor, ids: Tensor, scale: float) -> Tensor:
    """The same at once, gathered where the table is: what a CPU runs."""
    return (table[ids.to(table.device)] * scale).to(ids.device)


@triton.jit
def _embed_kernel(
    table_ptr,
    ids_ptr,
    y_ptr,
    table_stride,
    num_entries,
    num_channels,
    scale,
    BLOCK: tl.constexpr,
):
    """BLOCK channels of one token per program; y is contiguous."""
    token = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    entry = tl.load(ids_ptr + token)
    is_entry = (entry >= 0) & (entry < num_entries)
    is_there = channels < num_channels
    x = tl.load(table_ptr + entry * table_stride + channels, mask=is_there & is_entry, other=float("nan"))
    y = x.to(tl.float32) * scale
    tl.store(y_ptr + token * num_channels + channels, y.to(y_ptr.dtype.element_ty), mask=is_there)


def embed_triton(table: Tensor, ids: Tensor, scale: float) -> Tensor:
    """Launch the kernel. Raises: ValueError for wrong shapes; BackendError for a table that a card cannot read."""
    if table.ndim != 2 or table.stride(1) != 1 or ids.ndim != 1 or ids.dtype != torch.int64 or ids.stride(0) != 1:
        given = f"table {tuple(table.shape)} with strides {table.stride()}, ids {tuple(ids.shape)} {ids.dtype}"
        raise ValueError(f"embedding: {given}; needed are rows of adjacent channels and int64 [T]")
    if ids.is_cuda and not (table.is_cuda or table.is_pinned()):
        raise BackendError("a card cannot read an embedding table in pageable memory", "pin it: table.pin_memory()")
    num_channels = table.shape[1]
    y = torch.empty((len(ids), num_channels), dtype=table.dtype, device=ids.device)
    block = min(BLOCK_CHANNELS, triton.next_power_of_2(num_channels))
    if len(ids):
        _embed_kernel[(len(ids), triton.cdiv(num_channels, block))](
            table,
            ids,
            y,
            table.stride(0),
            len(table),
            num_channels,
            scale,
            BLOCK=block,
            num_warps=NUM_WARPS,
        )
    return y


def embed(table: Tensor, ids: Tensor, scale: float) -> Tensor:
    """What an engine calls; gradients and float64 take the reference. Raises: as `embed_triton`."""
    is_narrow = table.dtype in (torch.bfloat16, torch.float16, torch.float32)
    if use_triton(ids) and is_narrow and not needs_gradient(table):
        return embed_triton(table, ids, scale)
    return embed_reference(table, ids, scale)
