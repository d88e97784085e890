"""Block-sparse attention for training, and the losses that teach it what to select.

In: q [B, H, T, D], k and v [B, G, T, D]. Out: attention of every row, exactly as the runtime computes it (dense rows
before `dense_len`, selected blocks from there on); and, for rows that predict an answer, how well the block scores
follow the attention. For: training/model.py.

Selection loss: attention mass per block (detached) against the normalised block scores. Without it block selection
stays near chance after dense training, since a mean over 32 keys hides one matching key. Pointer loss: one group of a
sparse layer should look at a given token. The last sparse layer looks at the token to be copied, the one before it at
the definition of the asked name, and the first one, from any document row, at the header of its own document.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 512
NEVER = -1e9


@dataclass(frozen=True)
class Geometry:
    """Fields of sparse_config; `local` and `budget` are in blocks."""

    kernel_size: int = 32
    kernel_stride: int = 16
    block_size: int = 64
    init_blocks: int = 1
    window_size: int = 1024
    topk: int = 32

    @property
    def local(self) -> int:
        return self.window_size // self.block_size

    @property
    def budget(self) -> int:
        return self.topk + self.local


@dataclass(frozen=True)
class SupervisedRows:
    """Rows [B, R] under the auxiliary losses: `index` in the sequence, `is_real`, and the key to look at `source`, or
    -1.
    """

    index: Tensor
    is_real: Tensor
    source: Tensor


def pooled(k: Tensor, size: int, stride: int) -> Tensor:
    """Means of complete windows of k [B, G, T, D] -> [B, G, N, D]."""
    return (
        k.float().unfold(2, size, stride).mean(-1) if k.shape[2] >= size else k.new_zeros(*k.shape[:2], 0, k.shape[3])
    )


def block_scores(q: Tensor, k: Tensor, positions: Tensor, geometry: Geometry) -> Tensor:
    """Log of the stage-1 score of every block.

    Shapes: q [B, H, R, D], k [B, G, T, D], positions [B or 1, R] -> [B, G, R, T / block] (NEVER where no key is
    visible).
    """
    groups, length = k.shape[1], k.shape[2]
    heads = q.shape[1] // groups
    size, stride, block = geometry.kernel_size, geometry.kernel_stride, geometry.block_size
    fine, coarse = pooled(k, size, stride), pooled(k, 4 * size, 4 * stride)
    grouped = q.unflatten(1, (groups, heads)).float() * q.shape[-1] ** -0.5
    z = torch.einsum("bghrd,bgnd->bghrn", grouped, fine)
    w = torch.einsum("bghrd,bgnd->bghrn", grouped, coarse)
    end = positions[:, None, None, :, None] + 1
    sees_fine = torch.arange(z.shape[-1], device=q.device) * stride + size <= end
    sees_coarse = torch.arange(w.shape[-1], device=q.device) * 4 * stride + 4 * size <= end
    z = z.masked_fill(~sees_fine, NEVER)
    total = torch.where(sees_coarse.any(-1), w.masked_fill(~sees_coarse, NEVER).logsumexp(-1), z.logsumexp(-1))
    score = (z - total[..., None]).logsumexp(2).clamp(min=NEVER)
    per_block, reach = block // stride, size // stride
    count = (length + block - 1) // block
    right = max(0, count * per_block - score.shape[-1])
    score = F.pad(score, (reach - 1, right), value=NEVER)
    return score.unfold(-1, per_block + reach - 1, per_block).amax(-1)[..., :count]


@torch.no_grad()
def selected_blocks(q: Tensor, k: Tensor, positions: Tensor, geometry: Geometry) -> Tensor:
    """Which blocks each row sees: bool [B, G, R, blocks]."""
    score = block_scores(q, k, positions, geometry)
    blocks = torch.arange(score.shape[-1], device=q.device)
    own = (positions // geometry.block_size)[:, None, :, None]
    is_forced = (blocks < geometry.init_blocks) | (blocks >= own - geometry.local)
    is_future = blocks > own
    score = score.masked_fill(is_forced, -NEVER).masked_fill(is_future, 2 * NEVER)
    # Neighbouring blocks share a pooled key, so equal scores are common: the lower block wins.
    picked = score.sort(dim=-1, descending=True, stable=True).indices[..., : geometry.budget]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, picked, True) & ~is_future


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, dense_len: int, geometry: Geometry) -> Tensor:
    """Attention of all rows: causal before row dense_len - 1, over selected blocks from it on."""
    heads = q.shape[1] // k.shape[1]
    length = q.shape[2]
    wide_k, wide_v = k.repeat_interleave(heads, 1), v.repeat_interleave(heads, 1)
    first = min(length, max(dense_len - 1, 0) // TILE * TILE)
    parts = []
    if first:
        early = (t[:, :, :first] for t in (q, wide_k, wide_v))
        parts.append(F.scaled_dot_product_attention(*early, is_causal=True))
    for start in range(first, length, TILE):
        stop = min(start + TILE, length)
        rows = torch.arange(start, stop, device=q.device)
        tile_q, keys = q[:, :, start:stop], k[:, :, :stop]
        sees = selected_blocks(tile_q, keys, rows[None], geometry) | (rows + 1 < dense_len)[:, None]
        sees = sees.repeat_interleave(geometry.block_size, -1)[..., :stop]
        sees = (sees & (torch.arange(stop, device=q.device) <= rows[:, None])).repeat_interleave(heads, 1)
        parts.append(F.scaled_dot_product_attention(tile_q, wide_k[:, :, :stop], wide_v[:, :, :stop], attn_mask=sees))
    return torch.cat(parts, 2)


def auxiliary_losses(q: Tensor, k: Tensor, rows: SupervisedRows, group: int, geometry: Geometry) -> Tensor:
    """Selection loss of all groups, pointer loss of one, and the mean attention that one gives to the sources: [3]."""
    groups, length, size = k.shape[1], k.shape[2], q.shape[-1]
    heads = q.shape[1] // groups
    picked = q.gather(2, rows.index[:, None, :, None].expand(-1, q.shape[1], -1, size))
    logits = torch.einsum("bghrd,bgtd->bghrt", picked.unflatten(1, (groups, heads)), k).float() * size**-0.5
    is_causal = torch.arange(length, device=q.device) <= rows.index[:, None, None, :, None]
    chance = logits.masked_fill(~is_causal, NEVER).softmax(-1)
    at = rows.source.clamp(min=0)[:, None, :, None].expand(-1, heads, -1, -1)
    pointed = chance[:, group].gather(-1, at)[..., 0].mean(1).clamp(min=1e-6)
    weight = ((rows.source >= 0) & rows.is_real).float()
    total = weight.sum().clamp(min=1.0)
    pointer = -(pointed.log() * weight).sum() / total
    selection = selection_loss(chance.detach(), picked, k, rows, geometry)
    return torch.stack([selection, pointer, (pointed.detach() * weight).sum() / total])


def selection_loss(chance: Tensor, q: Tensor, k: Tensor, rows: SupervisedRows, geometry: Geometry) -> Tensor:
    """Cross entropy of the normalised block scores to the attention mass of the blocks behind the current two."""
    block = geometry.block_size
    padded = F.pad(chance, (0, -chance.shape[-1] % block))
    mass = padded.mean(2).unflatten(-1, (-1, block)).sum(-1)
    score = block_scores(q, k, rows.index, geometry)
    blocks = torch.arange(score.shape[-1], device=q.device)
    own = (rows.index // block)[:, None, :, None]
    is_far = (blocks >= geometry.init_blocks) & (blocks < own - 1)
    log_share = score.masked_fill(~is_far, NEVER).log_softmax(-1)
    each = -(mass * log_share * is_far).sum(-1).mean(1)
    real = rows.is_real.float()
    return (each * real).sum() / real.sum().clamp(min=1.0)
