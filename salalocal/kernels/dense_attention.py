"""Causal softmax attention over a KV cache, for rows below the sparse switch.

In come queries and all keys and values up to the last of them, out come the attended values; for the sparse mixer.

    A_h(p) = softmax over t <= p of ( scale * q_h . K_t ), times V_t
Shapes: q [B, T, Hq, D]; k, v [B, N, Hkv, D], any strides; query i sits at position first_position + i; head h reads KV
head h // (Hq / Hkv).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention

MAX_TILE_SCORES = 1 << 21  # scores held at once; 8 MiB in fp32, small enough to stay in the cache of a desktop CPU
MAX_TILE_ROWS = 64
_FLASH_DIM = 8  # head dimensions that flash attention takes are multiples of it


def dense_attention_definition(q: Tensor, k: Tensor, v: Tensor, scale: float, first_position: int) -> Tensor:
    """Attend with the whole score matrix at once, in float64."""
    group = _heads_per_group(q, k, first_position)
    wide_k, wide_v = (x.double().repeat_interleave(group, dim=2) for x in (k, v))
    scores = torch.einsum("bthd,bnhd->bhtn", q.double(), wide_k) * scale
    positions = first_position + torch.arange(q.shape[1], device=q.device)
    is_future = torch.arange(k.shape[1], device=q.device) > positions[:, None]  # [T, N]
    weights = scores.masked_fill(is_future, -math.inf).softmax(-1)
    return torch.einsum("bhtn,bnhd->bthd", weights, wide_v).to(q.dtype)


def dense_attention_reference(q: Tensor, k: Tensor, v: Tensor, scale: float, first_position: int) -> Tensor:
    """Attend in tiles of query rows, so that memory stays bounded for any number of keys.

    A whole sequence at once (training, first chunk) goes to torch's fused attention; its is_causal has no offset, so
    later chunks take the tiles, which are as fast on a CPU and hold scores and weights in fp32 for any input dtype.

    Shapes: see the module. Result [B, T, Hq, D] in q.dtype.
    Raises: ValueError when the keys end before the last query or the heads do not divide.
    """
    group = _heads_per_group(q, k, first_position)
    batch, num_rows, num_heads, _ = q.shape
    queries, keys, values = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, H, T or N, D]
    if first_position == 0 and num_rows > 1:
        # Heads are repeated rather than left to enable_gqa, for which some devices fall back to a full score matrix.
        keys, values = (x[:, :, :num_rows].repeat_interleave(group, dim=1) for x in (keys, values))
        fused = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scale)
        return fused.transpose(1, 2)

    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    scaled = torch.unflatten(queries.to(wide) * scale, 1, (-1, group))  # [B, Hkv, G, T, D]
    tile = min(MAX_TILE_ROWS, max(1, MAX_TILE_SCORES // (batch * num_heads * (first_position + num_rows))))
    is_future = torch.ones(tile, tile, dtype=torch.bool, device=q.device).triu(1)
    tiles = []
    for start in range(0, num_rows, tile):
        end = min(start + tile, num_rows)
        num_keys = first_position + end
        rows = scaled[:, :, :, start:end].flatten(2, 3)  # [B, Hkv, G * rows, D]
        scores = rows @ keys[:, :, :num_keys].to(wide).transpose(2, 3)
        newest = torch.unflatten(scores, 2, (group, -1))[..., first_position + start :]
        newest.masked_fill_(is_future[: end - start, : end - start], -math.inf)
        attended = scores.softmax(-1) @ values[:, :, :num_keys].to(wide)
        tiles.append(torch.unflatten(attended, 2, (group, -1)))
    out = torch.cat(tiles, 3).flatten(1, 2)  # [B, Hq, T, D]
    return out.transpose(1, 2).to(q.dtype)


def dense_attention_fused(q: Tensor, k: Tensor, v: Tensor, scale: float, first_position: int) -> Tensor:
    """Attend with torch's fused attention at any offset, which a card has for half precisions; see the reference."""
    _heads_per_group(q, k, first_position)
    num_rows, num_keys = q.shape[1], first_position + q.shape[1]
    queries, keys, values = (x.transpose(1, 2) for x in (q, k[:, :num_keys], v[:, :num_keys]))
    if num_rows == num_keys:
        out = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scale, enable_gqa=True)
    elif q.is_cuda and q.shape[-1] % _FLASH_DIM == 0 and _has_flash(queries, keys, values):
        # This operation of torch counts positions from the last key back, as `scaled_dot_product_attention` does not;
        # torch.nn.attention.bias calls it too, but to import that takes over a second.
        out = torch.ops.aten._scaled_dot_product_flash_attention(queries, keys, values, 0.0, True, scale=scale)[0]
    else:
        is_past = torch.ones(num_rows, num_keys, dtype=torch.bool, device=q.device).tril(first_position)
        out = F.scaled_dot_product_attention(queries, keys, values, is_past, scale=scale, enable_gqa=True)
    return out.transpose(1, 2)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, first_position: int) -> Tensor:
    """What the model calls; see `dense_attention_reference`."""
    wants_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and not wants_gradient:
        return dense_attention_fused(q, k, v, scale, first_position)
    return dense_attention_reference(q, k, v, scale, first_position)


def _has_flash(queries: Tensor, keys: Tensor, values: Tensor) -> bool:
    return can_use_flash_attention(SDPAParams(queries, keys, values, None, 0.0, False, True))


def _heads_per_group(q: Tensor, k: Tensor, first_position: int) -> int:
    """Check the shapes and return how many query heads share a KV head."""
    if first_position < 0 or k.shape[1] < first_position + q.shape[1]:
        raise ValueError(
            f"queries {first_position}..{first_position + q.shape[1] - 1} need as many keys, got {k.shape[1]}"
        )
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads do not divide among {k.shape[2]} KV heads")
    return q.shape[2] // k.shape[2]
