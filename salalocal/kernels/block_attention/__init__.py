"""Attention over picked key blocks: softmax over the visible tokens of the blocks that a row chose.

In come queries, the KV cache and the choice of `block_topk`, out come the attended values; for the sparse mixer.

    A_h(p) = softmax over { t : t <= p, t // block_size in blocks[p, g(h)] } of ( scale * q_h . K_t ), times V_t
Shapes: q [B, T, Hq, D]; k, v [B, N, Hkv, D], any strides; blocks int64 [B, T, Hkv, S], distinct, -1 where a row has
fewer; query i sits at position first_position + i; head h reads KV head h // (Hq / Hkv).
Every row must have a visible token. Source: MiniCPM-SALA specification 9.6.

On a card the kernels take bf16 and fp16, from head size and block size 16 on; the rest is the reference's. In fp32 they
would need more shared memory than cards have.
"""

import torch
from torch import Tensor

from salalocal.kernels.backend import use_triton
from salalocal.kernels.block_attention.decode import MAX_ROWS, block_attention_decode
from salalocal.kernels.block_attention.prefill import FINEST_SIZE, block_attention_triton
from salalocal.kernels.block_attention.reference import block_attention_definition, block_attention_reference
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
    """What the model calls; see `block_attention_reference`."""
    keys, values = cached.keys, cached.values
    wants_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, keys, values))
    is_known = q.dtype in (torch.bfloat16, torch.float16) and min(q.shape[-1], block_size) >= FINEST_SIZE
    if wants_gradient or not (is_known and use_triton(q, keys, values, blocks)):
        wide = cached.widened(q.dtype)
        return block_attention_reference(q, wide.keys, wide.values, blocks, first_position, block_size, scale)
    if q.shape[0] == 1 and q.shape[1] <= MAX_ROWS:
        position = torch.full((1,), first_position, device=q.device)
        return block_attention_decode(q, cached, blocks, position, block_size, scale)
    return block_attention_triton(q, cached, blocks, first_position, block_size, scale)
