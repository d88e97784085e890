"""How large the scores of picked blocks were, after the fact: rows with their picks in, logarithms out; for the engine.

Only what was picked is scored again, so it costs little at any length; pooled keys never change, so it can be asked for
as long as the state lives.
"""

import math

import torch
from torch import Tensor

from salalocal.kernels.block_topk.geometry import BlockGeometry
from salalocal.kernels.block_topk.reference import num_visible
from salalocal.kernels.pooled_keys import num_pooled

_TILE_NUMBERS = 1 << 22  # of gathered keys, or of coarse products, held at once


def pick_weights(
    q: Tensor, k1: Tensor, k2: Tensor, picks: Tensor, first_position: int, geometry: BlockGeometry, scale: float
) -> Tensor:
    """The binary logarithm of P_x, see the package, of every pick that the scores decided; -inf for all others.

    Shapes: q [1, T, Hq, D]; k1 [1, N1, Hkv, D]; k2 [1, N2, Hkv, D]; picks integer [1, T, Hkv, S], -1 for none; result
    fp32 as picks, float64 for float64.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    window = geometry.pooled_per_block + geometry.overlap
    a_row = max(picks.shape[2:].numel() * window * q.shape[3], q.shape[2] * k2.shape[1])
    tile = max(1, _TILE_NUMBERS // a_row)
    parts = [picks[0, :0].to(dtype)]
    for at in range(0, q.shape[1], tile):
        rows, picked = q[0, at : at + tile].to(dtype), picks[0, at : at + tile].long()
        parts.append(_weights(rows, k1[0], k2[0], picked, first_position + at, geometry, scale))
    return torch.cat(parts)[None]


def _weights(
    q: Tensor, k1: Tensor, k2: Tensor, picks: Tensor, first_position: int, geometry: BlockGeometry, scale: float
) -> Tensor:
    """q [T, Hq, D], k1 [N1, Hkv, D], picks [T, Hkv, S] -> [T, Hkv, S]."""
    heads = torch.unflatten(q, 1, (k1.shape[1], -1))  # [T, Hkv, G, D]
    positions = first_position + torch.arange(len(q), device=q.device)
    seen = num_visible(positions, geometry.kernel_size, geometry.kernel_stride)
    seen_coarse = num_visible(positions, geometry.coarse_kernel_size, geometry.coarse_kernel_stride)
    normaliser = _log_normaliser(heads, k2, seen_coarse, scale)
    if num_pooled(first_position + 1, geometry.coarse_kernel_size, geometry.coarse_kernel_stride) == 0:
        normaliser = normaliser.where((seen_coarse > 0)[:, None, None], _log_normaliser(heads, k1, seen, scale))

    first = picks[..., None] * geometry.pooled_per_block - geometry.overlap
    windows = first + torch.arange(geometry.pooled_per_block + geometry.overlap, device=q.device)  # [T, Hkv, S, W]
    is_seen = (windows >= 0) & (windows < seen[:, None, None, None])
    groups = torch.arange(k1.shape[1], device=q.device)[:, None, None]
    keys = k1[windows.clamp(0, max(0, len(k1) - 1)), groups].to(q.dtype)  # [T, Hkv, S, W, D]
    logs = scale * torch.einsum("thgd,thswd->thswg", heads, keys) - normaliser[:, :, None, None]
    scores = logs.logsumexp(4).masked_fill(~is_seen, -math.inf).amax(3) / math.log(2)
    first_local = (positions // geometry.block_size - geometry.local_blocks)[:, None, None]
    return scores.masked_fill((picks < geometry.init_blocks) | (picks >= first_local), -math.inf)


def _log_normaliser(heads: Tensor, pooled: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Log of the sum of exp over the `seen` [T] keys of each row, [T, Hkv, G]."""
    products = scale * torch.einsum("thgd,nhd->thgn", heads, pooled.to(heads.dtype))
    is_hidden = torch.arange(len(pooled), device=seen.device) >= seen[:, None]
    return products.masked_fill(is_hidden[:, None, None], -math.inf).logsumexp(3)
