"""Attention over picked blocks in plain torch: the whole score matrix, and the form that a CPU runs; see the package.

How the reference works. Rows of one query block have their local blocks in common and often most of the others: blocks
that enough of them picked are read once for all, and masked for rows that did not. The (row, block) pairs left over are
sorted by block and cut into tiles of up to 128 rows that share one. Every part keeps its own maximum and sum; a row's
parts are then merged with the usual log-sum-exp weights, so the result is the exact softmax. Exponentials are powers of
two with the logarithm in the scale: torch's exp2 is several times faster on a CPU than its exp.
A few rows alone (decode) gather their blocks directly, which costs fewer calls.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

SHARED_BY = 2  # one in so many rows of a query block makes a block shared
TILE_ROWS = (128, 32, 8, 2, 1)  # each divides the one before
MAX_TILE_SCORES = 1 << 19  # scores worked on together; 2 MiB in fp32
MAX_TILE_VALUES = 1 << 18  # numbers of keys copied for tiles worked on together; 1 MiB in fp32, a core's own cache
MAX_PARTIAL_VALUES = 1 << 23  # unmerged outputs held at once; 32 MiB in fp32, twice while they are joined
MAX_GATHERED_ROWS = 3  # up to here gathering row by row is faster than sorting pairs


class _Parts(NamedTuple):
    """Attention over some of the tokens of each row: weighted values, not divided yet, and what is needed to merge.

    Shapes: outs [P, G, D]; maxima and sums [P, G], of logarithms to base two and of weights.
    """

    outs: Tensor
    maxima: Tensor
    sums: Tensor

    @classmethod
    def joined(cls, parts: "list[_Parts]") -> "_Parts":
        return parts[0] if len(parts) == 1 else cls(*map(torch.cat, zip(*parts, strict=True)))


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
    attend, step = _attend_gathered, max(1, MAX_GATHERED_ROWS)
    if num_rows > MAX_GATHERED_ROWS:
        per_row = blocks.shape[3] * (num_heads // num_groups) * head_dim
        attend, step = _attend_sharing, max(1, MAX_PARTIAL_VALUES // per_row)
        scale *= math.log2(math.e)
    queries = torch.unflatten(q.to(wide) * scale, 2, (num_groups, -1))  # [B, T, Hkv, G, D]
    batches = []
    for b in range(batch):
        groups = []
        for g in range(num_groups):
            parts = []
            for i in range(0, num_rows, step):
                rows = slice(i, i + step)
                cached = (k[b, :, g], v[b, :, g])
                parts.append(attend(queries[b, rows, g], cached, blocks[b, rows, g], first_position + i, block_size))
            groups.append(torch.cat(parts))
        batches.append(torch.stack(groups, 1).flatten(1, 2))  # [T, Hq, D]
    return torch.stack(batches).to(q.dtype)


def _attend_gathered(
    queries: Tensor, cached: tuple[Tensor, Tensor], blocks: Tensor, first_position: int, block_size: int
) -> Tensor:
    """Attend row by row; queries [T, G, D], keys and values [N, D], blocks [T, S]; result [T, G, D]."""
    rows = []
    for i, picks in enumerate(blocks.tolist()):
        end = first_position + i + 1
        apart, run = _last_run(sorted(x for x in picks if 0 <= x * block_size < end))
        tokens = _tokens(torch.tensor(apart, dtype=torch.int64, device=blocks.device), block_size).flatten()
        near = slice(run.start * block_size, min(end, run.stop * block_size))
        keys, values = ((x.index_select(0, tokens).to(queries.dtype), x[near].to(queries.dtype)) for x in cached)
        weights = torch.cat([queries[i] @ x.T for x in keys], -1).softmax(-1)
        rows.append(torch.addmm(weights[:, len(tokens) :] @ values[1], weights[:, : len(tokens)], values[0]))
    return torch.stack(rows)


def _last_run(blocks: list[int]) -> tuple[list[int], range]:
    """Split the run of neighbours that ends in the last block, which lie side by side in memory, from those before."""
    first = len(blocks) - 1
    while first > 0 and blocks[first - 1] == blocks[first] - 1:
        first -= 1
    return blocks[:first], range(blocks[first], blocks[-1] + 1)


def _attend_sharing(
    queries: Tensor, cached: tuple[Tensor, Tensor], blocks: Tensor, first_position: int, block_size: int
) -> Tensor:
    """Attend to shared blocks, query block by query block, then to the rest; same shapes as `_attend_gathered`."""
    num_rows = len(queries)
    starts = [0, *range(block_size - first_position % block_size, num_rows, block_size)]
    shared_parts, rest = [], []
    for start, end in zip(starts, [*starts[1:], num_rows], strict=True):
        shared, places = _shared_blocks(blocks[start:end])
        part = _attend_shared(queries[start:end], cached, shared, places, first_position + start, block_size)
        shared_parts.append(part)
        rest.append(blocks[start:end].masked_fill(places < len(shared), -1))
    joined = _Parts.joined(shared_parts)
    left = torch.cat(rest)
    if not (left >= 0).any():
        return joined.outs / joined.sums[..., None]
    return _merge(joined, *_attend_pairs(queries, cached, left, first_position, block_size))


def _shared_blocks(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks [X] that enough of the rows picked, ascending, and the place among them of every pick, X for others.

    Shapes: blocks [R, S], as the places.
    """
    counts = torch.bincount((blocks + 1).flatten())[1:]  # of -1 there is no count
    shared = (counts * SHARED_BY >= len(blocks)).nonzero()[:, 0]
    places = torch.full((len(counts) + 1,), len(shared), device=blocks.device)
    places[shared + 1] = torch.arange(len(shared), device=blocks.device)
    return shared, places[blocks + 1]


def _attend_shared(
    queries: Tensor, cached: tuple[Tensor, Tensor], shared: Tensor, places: Tensor, first_position: int, block_size: int
) -> _Parts:
    """Attend to the shared blocks, every row to those that it picked; queries [R, G, D], places [R, S]."""
    num_rows, group, _ = queries.shape
    tokens = _tokens(shared, block_size)
    keys, values = (_read(x, tokens).flatten(0, 1).to(queries.dtype) for x in cached)
    bias = queries.new_full((num_rows, len(shared) + 1), -math.inf).scatter_(1, places, 0.0)[:, None, :-1, None]
    num_complete = int((shared < first_position // block_size).sum())
    positions = first_position + torch.arange(num_rows, device=shared.device)
    is_future = (tokens[num_complete:] > positions[:, None, None])[:, None]  # [R, 1, X, block_size]
    step = max(1, MAX_TILE_SCORES // max(1, group * len(keys)))
    parts = []
    for start in range(0, num_rows, step):
        rows = slice(start, start + step)
        products = queries[rows].flatten(0, 1) @ keys.T
        scores = products.view(len(bias[rows]), group, *tokens.shape).add_(bias[rows])
        scores[:, :, num_complete:].masked_fill_(is_future[rows], -math.inf)
        parts.append(_attend_by(scores.flatten(2), values))
    return _Parts.joined(parts)


def _attend_by(scores: Tensor, values: Tensor) -> _Parts:
    """Weigh values by scores, which are used up; scores [R, G, N], values [N, D] or one such matrix a row."""
    if not scores.shape[-1]:
        lowest = scores.new_full(scores.shape[:2], torch.finfo(scores.dtype).min)
        return _Parts(scores @ values, lowest, torch.zeros_like(lowest))
    # A row that sees none of these tokens has no maximum: a finite one keeps its weights at zero instead of NaN.
    maxima = scores.detach().amax(-1, keepdim=True).clamp_(min=torch.finfo(scores.dtype).min)
    weights = scores.sub_(maxima).exp2_()
    return _Parts(weights @ values, maxima[..., 0], weights.sum(-1))


def _attend_pairs(
    queries: Tensor, cached: tuple[Tensor, Tensor], blocks: Tensor, first_position: int, block_size: int
) -> tuple[_Parts, Tensor]:
    """Attend pair by pair, in tiles of rows that share a block; blocks [T, S], -1 for none.

    Returns the parts, and for every row the numbers of its own [T, W], -1 for none.
    """
    num_rows, group, head_dim = queries.shape
    num_picks = blocks.shape[1]
    orders, parts = [], []
    for tile_blocks, pairs in _tiles(blocks, group * block_size, block_size * head_dim):
        rows = pairs // num_picks  # [tiles, R]
        tile_queries = queries.index_select(0, rows.flatten()).view(len(rows), -1, head_dim)  # [tiles, R * G, D]
        tokens = _tokens(tile_blocks, block_size)
        keys, values = (_read(x, tokens).to(queries.dtype) for x in cached)
        scores = torch.bmm(tile_queries, keys.transpose(1, 2))
        if int(tile_blocks[-1]) >= first_position // block_size:
            is_future = tokens[:, None, None, :] > (first_position + rows)[:, :, None, None]
            scores.view(*rows.shape, group, block_size).masked_fill_(is_future, -math.inf)
        orders.append(pairs.flatten())
        parts.append(_Parts(*(x.reshape(-1, group, *x.shape[2:]) for x in _attend_by(scores, values))))
    order = torch.cat(orders)
    is_pair = blocks >= 0
    ranks = is_pair.cumsum(1).flatten()[order] - 1
    slots = torch.full((num_rows, int(is_pair.sum(1).max())), -1, device=order.device)
    slots[order // num_picks, ranks] = torch.arange(len(order), device=order.device)
    return _Parts.joined(parts), slots


def _tiles(blocks: Tensor, scores_per_row: int, values_per_block: int) -> Iterator[tuple[Tensor, Tensor]]:
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
        step = max(1, min(MAX_TILE_SCORES // (num_rows * scores_per_row), MAX_TILE_VALUES // values_per_block))
        for part in torch.split(pairs[is_taken].view(-1, num_rows), step):
            if len(part):
                yield flat[part[:, 0]], part


def _tokens(blocks: Tensor, block_size: int) -> Tensor:
    """Positions of the tokens of blocks. Shapes: [X] -> [X, block_size]."""
    return blocks[:, None] * block_size + torch.arange(block_size, device=blocks.device)


def _read(x: Tensor, tokens: Tensor) -> Tensor:
    """Copy rows of x [N, D]; what lies past N repeats the last row and must be masked."""
    return x.index_select(0, tokens.clamp(max=len(x) - 1).flatten()).view(*tokens.shape, x.shape[-1])


def _merge(shared: _Parts, pairs: _Parts, slots: Tensor) -> Tensor:
    """Join the parts of each row by their log-sum-exp weights, which makes the exact softmax; result [T, G, D].

    Shapes: shared has one part a row; slots [T, W] numbers the pairs of each, -1 for none.
    """
    num_rows, group, head_dim = shared.outs.shape
    index = slots.clamp(min=0)
    maxima = pairs.maxima[index].masked_fill((slots < 0)[..., None], -math.inf)  # [T, W, G]
    top = torch.maximum(shared.maxima, maxima.amax(1))
    weights, shared_weight = (maxima - top[:, None]).exp2(), (shared.maxima - top).exp2()
    total = shared_weight * shared.sums + (weights * pairs.sums[index]).sum(1)
    bags = index[:, None] * group + torch.arange(group, device=index.device)[:, None]  # [T, G, W]
    summed = functional.embedding_bag(
        bags.flatten(0, 1),
        pairs.outs.view(-1, head_dim),
        mode="sum",
        per_sample_weights=weights.transpose(1, 2).flatten(0, 1),
    )
    return (shared_weight[..., None] * shared.outs + summed.view(num_rows, group, head_dim)) / total[..., None]
