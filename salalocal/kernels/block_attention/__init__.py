"""Attention over picked key blocks: softmax over the visible tokens of the blocks that a row chose.

In come queries, the KV cache and the choice of `block_topk`, out come the attended values; for the sparse mixer.

    A_h(p) = softmax over { t : t <= p, t // block_size in blocks[p, g(h)] } of ( scale * q_h . K_t ), times V_t
Shapes: q [B, T, Hq, D]; k, v [B, N, Hkv, D], any strides; blocks int64 [B, T, Hkv, S], distinct, -1 where a row has
fewer; query i sits at position first_position + i; head h reads KV head h // (Hq / Hkv).
Every row must have a visible token. Source: MiniCPM-SALA specification 9.6.

On a card the kernels take bf16 and fp16, from head size and block size 16 on; the rest is the reference's. In fp32 they
would need more shared memory than cards have. A cache in host memory, page-locked, is read there by a few rows, and for
many rows what they picked is brought to the card, see `host`.
"""

import torch
from torch import Tensor

from salalocal.errors import BackendError
from salalocal.kernels.backend import use_triton
from salalocal.kernels.block_attention.decode import MAX_ROWS, block_attention_decode
from salalocal.kernels.block_attention.host import host_block_attention, is_on_host
from salalocal.kernels.block_attention.prefill import block_attention_triton
from salalocal.kernels.block_attention.reference import block_attention_definition, block_attention_reference
from salalocal.kernels.head_tiles import FINEST_SIDE, fits_shared_memory
from salalocal.kernels.kv_cache import KeyValues

__all__ = [
    "KeyValues",
    "block_attention",
    "block_attention_decode",
    "block_attention_definition",
    "block_attention_reference",
    "block_attention_triton",
]


def block_attention(
    q: Tensor, cached: KeyValues, blocks: Tensor, first_position: int, block_size: int, scale: float
) -> Tensor:
    """What the model calls; see `block_attention_reference`. Raises: BackendError for a cache that it cannot read."""
    keys, values = cached.keys, cached.values
    wants_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, keys, values))
    is_known = fits_shared_memory(q) and min(q.shape[-1], block_size) >= FINEST_SIDE
    if wants_gradient or not (is_known and use_triton(q, blocks)):
        if is_on_host(cached, q):
            raise BackendError("a cache in host memory is read by kernels alone", "leave out --kv-place host")
        wide = cached.widened(q.dtype)
        return block_attention_reference(q, wide.keys, wide.values, blocks, first_position, block_size, scale)
    if q.shape[0] == 1 and q.shape[1] <= MAX_ROWS:
        position = torch.full((1,), first_position, device=q.device)
        return block_attention_decode(q, cached, blocks, position, block_size, scale)
    if is_on_host(cached, q):

        def attend(rows: Tensor, copies: KeyValues, picks: Tensor, first: int) -> Tensor:
            return block_attention_triton(rows, copies, picks, first, block_size, scale)

        return host_block_attention(q, cached, blocks, first_position, block_size, attend)
    return block_attention_triton(q, cached, blocks, first_position, block_size, scale)
