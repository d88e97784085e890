"""Attention over picked blocks in plain torch: the whole score matrix, and the form that a CPU runs; see the package.

How the reference works. Many rows pick the same block, so the (row, block) pairs are sorted by block and cut into tiles
of up to 32 rows that share one block: the block is read once per tile and the products are batched matrix products.
Each pair keeps its own maximum and sum; a row's pairs are then merged with the usual log-sum-exp weights, so the result
is the exact softmax. A few rows alone (decode) gather their blocks directly, which costs fewer calls.
Measured, 512 rows at 16K keys, 8 heads of 64 over 2 KV heads, 48 random blocks of 64, 2 cores, ms per token and layer:
this form 0.09; gather per row 0.38; union of a 64-row tile's blocks with a mask 0.37; dense 0.29; dense local window
plus this form for the rest 0.09 (0.06 against 0.07 at head size 32: not worth a second path).
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

TILE_ROWS = (32, 8, 2, 1)  # each divides the one before
MAX_TILE_SCORES = 1 << 18  # scores of the tiles worked on together; 1 MiB in fp32, the size of a core's own cache
MAX_PARTIAL_VALUES = 1 << 23  # unmerged outputs held at once; 32 MiB in fp32, twice while they are joined
MAX_GATHERED_ROWS = 3  # up to here gathering row by row is faster than sorting pairs


def block_attention_definition(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, first_position: int, block_size: int, scale: float
) -> Tensor:
    """Attend with the whole score matrix and a mask, in float64."""
    group = q.shape[2] // k.shape[2]
    tokens = torch.arange(k.shape[1], device=q.device)
    positions = first_position + torch.arange(q.shape[1], device=q.device)
    is_picked = (blocks[..., None, :] == (tokens // block_size)[:, None]).any(-1)  # [B, T, Hkv, N]
    is_seen = (is_picked & (tokens <= positions[:, None, None])).repeat_interleave(group, dim=2)
    wide_k, wide_v = (x.double().repeat_interleave(group, dim=2) for x in (k, v))
    scores = torch.einsum("bthd,bnhd->bthn", q.double(), wide_k) * scale
    weights = scores.masked_fill(~is_seen, -math.inf).softmax(-1)
    return torch.einsum("bthn,bnhd->bthd", weights, wide_v).to(q.dtype)


def block_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, first_position: int, block_size: int, scale: float
) -> Tensor:
    """Attend over the picked blocks, reading only those; scores, weights and sums are fp32 (float64 for float64).

    Shapes: see the module. Result [B, T, Hq, D] in q.dtype.
    Raises: ValueError when shapes do not fit or the keys end before the last query.
    """
    batch, num_rows, num_heads, head_dim = q.shape
    num_groups = k.shape[2]
    if num_heads % num_groups or blocks.shape[:3] != (batch, num_rows, num_groups):
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and blocks {tuple(blocks.shape)} do not fit together")
    if k.shape[1] < first_position + num_rows:
        raise ValueError(f"{num_rows} queries from position {first_position} on, but only {k.shape[1]} keys")
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    queries = torch.unflatten(q.to(wide) * scale, 2, (num_groups, -1))  # [B, T, Hkv, G, D]
    per_row = blocks.shape[3] * (num_heads // num_groups) * head_dim
    step = MAX_GATHERED_ROWS if num_rows <= MAX_GATHERED_ROWS else max(1, MAX_PARTIAL_VALUES // per_row)
    attend = _attend_gathered if num_rows <= MAX_GATHERED_ROWS else _attend_grouped
    batches = []
    for b in range(batch):
        groups = []
        for g in range(num_groups):
            keys, values = k[b, :, g], v[b, :, g]
            parts = [
                attend(
                    queries[b, i : i + step, g],
                    keys,
                    values,
                    blocks[b, i : i + step, g],
                    first_position + i,
                    block_size,
                )
                for i in range(0, num_rows, step)
            ]
            groups.append(torch.cat(parts))
        batches.append(torch.stack(groups, 1).flatten(1, 2))  # [T, Hq, D]
    return torch.stack(batches).to(q.dtype)


def _attend_gathered(
    queries: Tensor, keys: Tensor, values: Tensor, blocks: Tensor, first_position: int, block_size: int
) -> Tensor:
    """Attend row by row; queries [T, G, D], keys and values [N, D], blocks [T, S]; result [T, G, D]."""
    rows = []
    for i, row_blocks in enumerate(blocks):
        position = first_position + i
        own = position // block_size
        complete = row_blocks[(row_blocks >= 0) & (row_blocks < own)]
        start = own * block_size
        end = position + 1 if bool((row_blocks == own).any()) else start
        picked_keys, picked_values = (
            _read_blocks(x, complete, block_size).flatten(0, 1).to(queries.dtype) for x in (keys, values)
        )
        own_keys, own_values = (x[start:end].to(queries.dtype) for x in (keys, values))
        weights = torch.cat([queries[i] @ picked_keys.T, queries[i] @ own_keys.T], -1).softmax(-1)
        picked_weights, own_weights = torch.split(weights, [len(picked_keys), end - start], -1)
        rows.append(picked_weights @ picked_values + own_weights @ own_values)
    return torch.stack(rows)


def _attend_grouped(
    queries: Tensor, keys: Tensor, values: Tensor, blocks: Tensor, first_position: int, block_size: int
) -> Tensor:
    """Attend tile by tile of rows that share a block, then merge; same shapes as `_attend_gathered`."""
    num_rows, group, head_dim = queries.shape
    num_picks = blocks.shape[1]
    orders, outs, maxima, sums = [], [], [], []
    for tile_blocks, pairs in _tiles(blocks, group * block_size):
        rows = pairs // num_picks  # [tiles, R]
        tile_queries = queries.index_select(0, rows.flatten()).view(len(rows), -1, head_dim)  # [tiles, R * G, D]
        is_complete = int(tile_blocks[-1]) < first_position // block_size
        read = _read_blocks if is_complete else _read_last_blocks
        scores = torch.bmm(tile_queries, read(keys, tile_blocks, block_size).to(queries.dtype).transpose(1, 2))
        if not is_complete:
            tokens = tile_blocks[:, None] * block_size + torch.arange(block_size, device=keys.device)
            is_future = tokens[:, None, None, :] > (first_position + rows)[:, :, None, None]
            scores.view(len(rows), -1, group, block_size).masked_fill_(is_future, -math.inf)
        # A block wholly ahead of its row has no maximum: a finite one keeps its weight at zero instead of NaN.
        maximum = scores.detach().amax(-1, keepdim=True).clamp_(min=torch.finfo(scores.dtype).min)
        scores.sub_(maximum).exp_()
        orders.append(pairs.flatten())
        outs.append(
            torch.bmm(scores, read(values, tile_blocks, block_size).to(queries.dtype)).view(-1, group * head_dim)
        )
        maxima.append(maximum.view(-1, group))
        sums.append(scores.sum(-1).view(-1, group))
    order = torch.cat(orders)
    slots = torch.full((num_rows * num_picks,), -1, device=order.device)
    slots[order] = torch.arange(len(order), device=order.device)
    return _merge(slots.view(num_rows, num_picks), torch.cat(outs), torch.cat(maxima), torch.cat(sums))


def _tiles(blocks: Tensor, scores_per_row: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut the (row, pick) pairs into tiles that share a block.

    Yields the blocks [tiles], ascending, and the flat pairs [tiles, R]; R varies from one yield to the next.
    """
    flat = blocks.flatten()
    pairs = flat.argsort(stable=True)
    pairs = pairs[int((flat < 0).sum()) :]
    pair_blocks = flat[pairs]
    counts = torch.bincount(pair_blocks)
    rank = torch.arange(len(pairs), device=pairs.device) - (counts.cumsum(0) - counts)[pair_blocks]
    is_left = torch.ones_like(rank, dtype=torch.bool)
    for num_rows in TILE_ROWS:
        is_taken = is_left & (rank < (counts // num_rows * num_rows)[pair_blocks])
        is_left &= ~is_taken
        step = max(1, MAX_TILE_SCORES // (num_rows * scores_per_row))
        for part in torch.split(pairs[is_taken].view(-1, num_rows), step):
            if len(part):
                yield flat[part[:, 0]], part


def _read_blocks(x: Tensor, blocks: Tensor, block_size: int) -> Tensor:
    """Copy complete blocks out of x [N, D] -> [len(blocks), block_size, D]."""
    complete = x[: x.shape[0] // block_size * block_size]
    return torch.unflatten(complete, 0, (-1, block_size)).index_select(0, blocks)


def _read_last_blocks(x: Tensor, blocks: Tensor, block_size: int) -> Tensor:
    """Like `_read_blocks` for blocks that may end past N; what is missing repeats the last row and must be masked."""
    tokens = blocks[:, None] * block_size + torch.arange(block_size, device=blocks.device)
    return x.index_select(0, tokens.clamp(max=x.shape[0] - 1).flatten()).view(len(blocks), block_size, -1)


def _merge(slots: Tensor, outs: Tensor, maxima: Tensor, sums: Tensor) -> Tensor:
    """Join the parts of each row by their log-sum-exp weights, which makes the exact softmax; result [T, G, D].

    Shapes: slots [T, S] names a row's parts, -1 for none; outs [P, G * D]; maxima and sums [P, G].
    """
    num_picks, group = slots.shape[1], maxima.shape[1]
    merged = []
    for part in torch.split(slots, max(1, MAX_TILE_SCORES // (num_picks * outs.shape[1]))):
        index = part.clamp(min=0).flatten()
        peak = maxima.index_select(0, index).view(len(part), num_picks, group)
        peak = peak.masked_fill((part < 0)[..., None], -math.inf)
        weights = (peak - peak.amax(1, keepdim=True)).exp()  # [rows, S, G]
        total = (weights * sums.index_select(0, index).view_as(weights)).sum(1, keepdim=True)
        parts = outs.index_select(0, index).view(len(part), num_picks, group, -1)
        merged.append(torch.einsum("tsg,tsgd->tgd", weights / total, parts))
    return torch.cat(merged)
