"""The block choice in plain torch: the formula row by row, and the form that a CPU runs; see the package."""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from salalocal.kernels.block_topk.geometry import BlockGeometry
from salalocal.kernels.pooled_keys import num_pooled

MAX_TILE_SCORES = 1 << 18  # scores per head held at once; 2 MiB in float64
MIN_TILE_ROWS = 32  # fewer rows make slow products, so for very many keys the keys are cut as well
TIE_SLACK = 1e-11  # float64 inputs only: their scores are not rounded to fp32, so equal keys differ in the last bits


def block_topk_definition(
    q: Tensor, k1: Tensor, k2: Tensor, first_position: int, num_tokens: int, geometry: BlockGeometry, scale: float
) -> Tensor:
    """Pick row by row, in float64."""
    batch, num_rows, num_heads, _ = q.shape
    group = heads_per_group(q, k1, k2, first_position, num_tokens, geometry)
    picks = torch.full((batch, num_rows, num_heads // group, geometry.budget), -1)
    for b in range(batch):
        for i in range(num_rows):
            for g in range(num_heads // group):
                heads = q[b, i, g * group : (g + 1) * group].double()
                blocks = _pick_row(
                    heads, k1[b, :, g].double(), k2[b, :, g].double(), first_position + i, geometry, scale
                )
                picks[b, i, g, : len(blocks)] = torch.tensor(blocks)
    return picks.to(q.device)


def _pick_row(heads: Tensor, k1: Tensor, k2: Tensor, p: int, geometry: BlockGeometry, scale: float) -> list[int]:
    """Blocks of one row and KV head, ascending; heads [G, D], k1 [N1, D], k2 [N2, D]."""
    own = p // geometry.block_size
    forced = set(range(min(geometry.init_blocks, own + 1))) | set(range(max(0, own - geometry.local_blocks), own + 1))
    scores = torch.zeros(len(k1), dtype=torch.float64, device=k1.device)
    visible = num_pooled(p + 1, geometry.kernel_size, geometry.kernel_stride)
    coarse_visible = num_pooled(p + 1, geometry.coarse_kernel_size, geometry.coarse_kernel_stride)
    if visible:
        z = scale * (heads @ k1[:visible].T)  # [G, visible]
        w = scale * (heads @ k2[:coarse_visible].T) if coarse_visible else z
        scores[:visible] = (z - w.logsumexp(1, keepdim=True)).exp().sum(0)
    pooled = {}
    for x in set(range(own + 1)) - forced:
        first = max(0, geometry.pooled_per_block * x - geometry.overlap)
        pooled[x] = max(scores[first : geometry.pooled_per_block * (x + 1)].tolist(), default=0.0)
    ranking = sorted(pooled, key=lambda x: (-pooled[x], x))
    return sorted(forced | set(ranking[: geometry.budget - len(forced)]))


@torch.no_grad()
def block_topk_reference(
    q: Tensor, k1: Tensor, k2: Tensor, first_position: int, num_tokens: int, geometry: BlockGeometry, scale: float
) -> Tensor:
    """Pick in tiles of rows, comparing the logarithms of the scores in fp32 (float64 for float64).

    Products are float64 until they are rounded for the comparison, and scaled only once summed, which leaves those of
    half-precision keys exact. A matrix product adds in an order that depends on its shape and on the place in it; in
    fp32 that would break ties between equal keys and let the chunk decide near ties. The price is a tenth of the
    layer's time. As logarithms no score overflows and no ranking is lost to underflow.
    Only the blocks that the scores can decide are scored: neither the init nor the local ones, and no block of a row
    whose blocks all fit in the budget. Memory is bounded for any number of keys.

    Shapes: see the module; num_tokens is the length of the sequence whose complete windows k1 and k2 hold.
    Raises: ValueError when shapes do not fit or pooled keys are missing.
    """
    group = heads_per_group(q, k1, k2, first_position, num_tokens, geometry)
    batch, num_rows, num_heads, _ = q.shape
    picks = torch.empty(batch, num_rows, num_heads // group, geometry.budget, dtype=torch.int64, device=q.device)
    num_short = min(max(0, geometry.reach - first_position), num_rows)
    own = (first_position + torch.arange(num_rows, device=q.device)) // geometry.block_size  # [T]
    every = torch.arange(geometry.budget, device=q.device)
    short = every.where(every <= own[:num_short, None], -1)
    picks[:, :num_short] = short[:, None]

    if num_short < num_rows:
        local = own[num_short:, None] - torch.arange(geometry.local_blocks, -1, -1, device=q.device)
        picks[:, num_short:, :, : geometry.init_blocks] = every[: geometry.init_blocks]
        picks[:, num_short:, :, geometry.budget - geometry.local_blocks - 1 :] = local[:, None]
    tile = max(MIN_TILE_ROWS, MAX_TILE_SCORES // (batch * num_heads * max(1, k1.shape[1])))
    free = slice(geometry.init_blocks, geometry.init_blocks + geometry.free_blocks)
    for start in range(num_short, num_rows if geometry.free_blocks else 0, tile):
        end = min(start + tile, num_rows)
        scores = _block_scores(q[:, start:end], k1, k2, first_position + start, geometry, scale)
        picks[:, start:end, :, free] = _largest(scores, geometry.free_blocks) + geometry.init_blocks
    return picks


def _block_scores(
    q: Tensor, k1: Tensor, k2: Tensor, first_position: int, geometry: BlockGeometry, scale: float
) -> Tensor:
    """Log of P_x of the blocks between the init and the local ones, [B, T, Hkv, X]; -inf where a row may not pick.

    A constant per row and KV head is left out, which cannot change a ranking.
    """
    queries = torch.unflatten(q.double(), 2, (k1.shape[2], -1)).permute(0, 2, 3, 1, 4)  # [B, Hkv, G, T, D]
    positions = first_position + torch.arange(q.shape[1], device=q.device)
    seen = _num_visible(positions, geometry.kernel_size, geometry.kernel_stride)
    seen_coarse = _num_visible(positions, geometry.coarse_kernel_size, geometry.coarse_kernel_stride)
    normaliser = _log_normaliser(queries, k2, seen_coarse, scale)
    if num_pooled(first_position + 1, geometry.coarse_kernel_size, geometry.coarse_kernel_stride) == 0:
        normaliser = normaliser.where((seen_coarse > 0)[:, None], _log_normaliser(queries, k1, seen, scale))
    shift = normaliser.amin(2, keepdim=True) - normaliser

    end_block = (first_position + q.shape[1] - 1) // geometry.block_size - geometry.local_blocks
    start = geometry.pooled_per_block * geometry.init_blocks - geometry.overlap
    end = geometry.pooled_per_block * end_block
    first, last = max(start, 0), min(end, k1.shape[1])
    dtype = torch.promote_types(q.dtype, torch.float32)
    products = _dot_in_parts(queries, k1[:, first:last])
    parts = [_log_sum_over_heads(torch.add(shift, x, alpha=scale).to(dtype)) for x in products]
    scores = torch.cat(parts, -1)  # [B, Hkv, T, J]
    is_hidden = torch.arange(first, last, device=q.device) >= seen[:, None]
    scores.masked_fill_(is_hidden | scores.isnan(), -math.inf)

    padded = F.pad(scores, (first - start, end - last), value=-math.inf)
    width = geometry.pooled_per_block + geometry.overlap
    pooled = padded.unfold(-1, width, geometry.pooled_per_block).amax(-1)  # [B, Hkv, T, X]
    blocks = torch.arange(geometry.init_blocks, end_block, device=q.device)
    is_local = blocks >= (positions // geometry.block_size - geometry.local_blocks)[:, None]
    return pooled.masked_fill_(is_local, -math.inf).transpose(1, 2)


def _log_sum_over_heads(logs: Tensor) -> Tensor:
    """Log of the sum of exp over the heads, [B, Hkv, G, T, J] -> [B, Hkv, T, J]; `logs` is used up.

    Heads are added by halves: torch's own sum adds in an order that depends on the place in J, which would break ties.
    """
    peak = logs.amax(2, keepdim=True)
    logs.sub_(peak).exp_()
    size = logs.shape[2]
    while size > 1:
        half = size // 2
        logs[:, :, :half] += logs[:, :, size - half : size]
        size -= half
    return logs[:, :, 0].log_().add_(peak[:, :, 0])


def _log_normaliser(queries: Tensor, pooled: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Log of the sum of exp over the `seen` [T] pooled keys of each row: [B, Hkv, G, T, D] -> [B, Hkv, G, T, 1]."""
    sums = []
    at = 0
    for part in _dot_in_parts(queries, pooled[:, : int(seen[-1])]):
        is_hidden = torch.arange(at, at + part.shape[-1], device=seen.device) >= seen[:, None]
        sums.append(part.mul_(scale).masked_fill_(is_hidden, -math.inf).logsumexp(-1, keepdim=True))
        at += part.shape[-1]
    return torch.cat(sums, -1).logsumexp(-1, keepdim=True)


def _dot_in_parts(queries: Tensor, pooled: Tensor) -> Iterator[Tensor]:
    """Products of queries [B, Hkv, G, T, D] and pooled keys [B, J, Hkv, D]: [B, Hkv, G, T, some of J] at a time."""
    flat = queries.flatten(2, 3)  # [B, Hkv, G * T, D]
    step = max(1, MAX_TILE_SCORES // flat.shape[:3].numel())
    for part in torch.split(pooled, step, 1):
        products = flat @ part.to(queries.dtype).permute(0, 2, 3, 1)
        yield torch.unflatten(products, 2, queries.shape[2:4])


def _num_visible(positions: Tensor, kernel: int, stride: int) -> Tensor:
    """`num_pooled` of every position's own prefix."""
    return ((positions + 1 - kernel) // stride + 1).clamp(min=0)


def _largest(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest scores along the last axis, ascending; ties go to the lower index."""
    slack = TIE_SLACK if scores.dtype == torch.float64 else 0.0
    threshold = scores.topk(count, sorted=False).values.amin(-1, keepdim=True)
    is_above = scores > threshold + slack
    is_tied = (scores >= threshold - slack) & ~is_above
    places = count - is_above.sum(-1, keepdim=True)
    is_picked = is_above | (is_tied & (is_tied.cumsum(-1) <= places))
    return is_picked.nonzero()[:, -1].view(*scores.shape[:-1], count)


def heads_per_group(
    q: Tensor, k1: Tensor, k2: Tensor, first_position: int, num_tokens: int, geometry: BlockGeometry
) -> int:
    """Check the shapes and return how many query heads share a KV head."""
    if q.shape[2] % k1.shape[2] or k1.shape[2] != k2.shape[2]:
        raise ValueError(f"heads of q {tuple(q.shape)}, k1 {tuple(k1.shape)} and k2 {tuple(k2.shape)} do not fit")
    if first_position < 0 or first_position + q.shape[1] > num_tokens:
        raise ValueError(f"queries {first_position}..{first_position + q.shape[1] - 1} in a sequence of {num_tokens}")
    needed = num_pooled(num_tokens, geometry.kernel_size, geometry.kernel_stride)
    coarse_needed = num_pooled(num_tokens, geometry.coarse_kernel_size, geometry.coarse_kernel_stride)
    if k1.shape[1] < needed or k2.shape[1] < coarse_needed:
        raise ValueError(
            f"{num_tokens} tokens have {needed} and {coarse_needed} pooled keys, got {k1.shape[1]} and {k2.shape[1]}"
        )
    return q.shape[2] // k1.shape[2]
