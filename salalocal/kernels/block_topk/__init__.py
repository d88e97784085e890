"""Choice of key blocks: every query row picks the blocks of keys that it will attend to (InfLLM-V2, stage 1).

In come queries and pooled keys, out come block numbers for `block_attention`; for the sparse mixer.

Per row at position p and KV head g, with b = p // block_size, r = kernel_size / kernel_stride and
m = block_size / kernel_stride:
    z_hj = scale * q_h . k1_j          w_hj = scale * q_h . k2_j          only windows that end at or before p
    L_h = log sum_j exp(w_hj)          from z where the row sees no k2 yet
    score_j = sum over the heads h of g of exp(z_hj - L_h), 0 for windows out of sight
    P_x = max of score_j over j in [m * x - (r - 1), m * x + m - 1]
    picked = init blocks, blocks b - local_blocks .. b, then the largest P_x, ties to the lower x; `budget` in all
Shapes: q [B, T, Hq, D]; k1 [B, N1, Hkv, D]; k2 [B, N2, Hkv, D], any strides; result int64 [B, T, Hkv, budget],
ascending, -1 behind the last. Source: arXiv 2509.24663; MiniCPM-SALA specification 9.2 to 9.5.

On a card the kernels take bf16 and fp16, from head size 16 on; the rest is the reference's. In fp32 they would need
more shared memory than cards have.
"""

import torch
from torch import Tensor

from salalocal.kernels.backend import use_triton
from salalocal.kernels.block_topk.decode import MAX_ROWS, PickRecord, block_topk_decode, num_picks
from salalocal.kernels.block_topk.geometry import BlockGeometry
from salalocal.kernels.block_topk.pick_weights import pick_weights
from salalocal.kernels.block_topk.prefill import block_topk_triton
from salalocal.kernels.block_topk.reference import block_topk_definition, block_topk_reference
from salalocal.kernels.head_tiles import FINEST_SIDE, fits_shared_memory

__all__ = [
    "BlockGeometry",
    "PickRecord",
    "block_topk",
    "block_topk_decode",
    "block_topk_definition",
    "block_topk_reference",
    "block_topk_triton",
    "num_picks",
    "pick_weights",
]


def block_topk(
    q: Tensor, k1: Tensor, k2: Tensor, first_position: int, num_tokens: int, geometry: BlockGeometry, scale: float
) -> Tensor:
    """What the model calls; see `block_topk_reference`."""
    is_known = fits_shared_memory(q) and q.shape[-1] >= FINEST_SIDE
    if not (is_known and use_triton(q, k1, k2)):
        return block_topk_reference(q, k1, k2, first_position, num_tokens, geometry, scale)
    if q.shape[0] == 1 and q.shape[1] <= MAX_ROWS:
        position = torch.full((1,), first_position, device=q.device)
        return block_topk_decode(q, k1, k2, position, geometry, scale)
    return block_topk_triton(q, k1, k2, first_position, num_tokens, geometry, scale)
