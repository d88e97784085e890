"""Attention over picked key blocks: softmax over the visible tokens of the blocks that a row chose.

In come queries, the KV cache and the choice of `block_topk`, out come the attended values; for the sparse mixer.

    A_h(p) = softmax over { t : t <= p, t // block_size in blocks[p, g(h)] } of ( scale * q_h . K_t ), times V_t
Shapes: q [B, T, Hq, D]; k, v [B, N, Hkv, D], any strides; blocks int64 [B, T, Hkv, S], distinct, -1 where a row has
fewer; query i sits at position first_position + i; head h reads KV head h // (Hq / Hkv).
Every row must have a visible token. Source: MiniCPM-SALA specification 9.6.
"""

import torch
from torch import Tensor

from salalocal.kernels.backend import use_triton
from salalocal.kernels.block_attention.decode import MAX_ROWS, block_attention_decode
from salalocal.kernels.block_attention.prefill import block_attention_triton
from salalocal.kernels.block_attention.reference import block_attention_definition, block_attention_reference

__all__ = [
    "block_attention",
    "block_attention_decode",
    "block_attention_definition",
    "block_attention_reference",
    "block_attention_triton",
]


def block_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, first_position: int, block_size: int, scale: float
) -> Tensor:
    """What the model calls; see `block_attention_reference`."""
    if not use_triton(q, k, v, blocks):
        return block_attention_reference(q, k, v, blocks, first_position, block_size, scale)
    if q.shape[0] == 1 and q.shape[1] <= MAX_ROWS:
        position = torch.full((1,), first_position, device=q.device)
        return block_attention_decode(q, k, v, blocks, position, block_size, scale)
    return block_attention_triton(q, k, v, blocks, first_position, block_size, scale)
