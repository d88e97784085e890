"""The block choice in plain torch: the formula row by row, and the form that a CPU runs; see the package.

How the reference works. `_draft` scores in fp32, which is fast, and bounds how far rounding may have moved a score.
Rows whose last picked and first rejected block lie further apart than that have their choice. The others (1 to 6 in a
hundred on text), and calls that `_draft` does not know, are scored by `_block_scores` in float64. So every row picks
what the exact scores say, and no chunk, tile or thread has a say in it.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from salalocal.kernels.block_topk.geometry import BlockGeometry
from salalocal.kernels.pooled_keys import num_pooled

MAX_DRAFT_SCORES = 1 << 18  # fp32 scores held at once, of all heads; 1 MiB, the size of a core's own cache
MAX_TILE_SCORES = 1 << 18  # scores per head held at once; 2 MiB in float64
MIN_TILE_ROWS = 32  # fewer rows make slow products, so for very many keys the keys are cut as well
LOG2_E = math.log2(math.e)
UNIT = 2.0**-24  # largest relative error of one rounding in fp32
LOG_SLACK = 2e-5  # bounds what rounding does to a score's logarithm, to base two, beside that of its products
LEAST_SCORE = 2.0**-100  # below, fp32 loses digits
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
    """Pick by the logarithms of the scores, rounded to fp32 (float64 for float64), ties to the lower block.

    Products are float64 until they are rounded for the comparison, and scaled only once summed, which leaves those of
    half-precision keys exact. A matrix product adds in an order that depends on its shape and on the place in it; in
    fp32 that would break ties between equal keys and let the chunk decide near ties.
    As logarithms no score overflows and no ranking is lost to underflow.
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
    if num_short == num_rows or not geometry.free_blocks:
        return picks
    free = picks[..., geometry.init_blocks : geometry.init_blocks + geometry.free_blocks]
    unsure = torch.arange(num_short, num_rows, device=q.device)
    if _has_draft(q.dtype, first_position + num_short, geometry):
        unsure = _draft(q, k1, k2, first_position, num_short, geometry, scale, free)
    tile = max(MIN_TILE_ROWS, MAX_TILE_SCORES // (batch * num_heads * max(1, k1.shape[1])))
    for rows in unsure.split(tile) if len(unsure) else ():
        scores = _block_scores(q[:, rows], k1, k2, first_position + rows, geometry, scale)
        free[:, rows] = _largest(scores, geometry.free_blocks) + geometry.init_blocks
    return picks


def _has_draft(dtype: torch.dtype, position: int, geometry: BlockGeometry) -> bool:
    """Whether rows from `position` on see a coarse key and all windows of the blocks that they may pick."""
    sees_windows = geometry.window_size >= geometry.kernel_size - geometry.kernel_stride
    sees_coarse = num_pooled(position + 1, geometry.coarse_kernel_size, geometry.coarse_kernel_stride) > 0
    return dtype != torch.float64 and sees_windows and sees_coarse


def _draft(
    q: Tensor,
    k1: Tensor,
    k2: Tensor,
    first_position: int,
    first_row: int,
    geometry: BlockGeometry,
    scale: float,
    picks: Tensor,
) -> Tensor:
    """Pick for the rows from `first_row` on in fp32, into `picks` [B, T, Hkv, free blocks]; returns the unsure rows.

    Keys have much in common, which no ranking feels: products with their distances from a centre are small, and so is
    what rounding does to them. A sum of D products is off by less than D * UNIT times both lengths; the scores that
    `_block_scores` compares have not been centred and are off by their own rounding.
    """
    batch, num_rows, num_heads, _ = q.shape
    own = (first_position + num_rows - 1) // geometry.block_size
    num_blocks = own - geometry.local_blocks
    centre = k2.mean(1, keepdim=True, dtype=torch.float32)
    fine, coarse = k1[:, : num_blocks * geometry.pooled_per_block] - centre, k2 - centre
    length = fine.norm(dim=-1).amax(1) + coarse.norm(dim=-1).amax(1)  # [B, Hkv]
    weight = (q.shape[-1] + 12) * length + 2 * (length + centre.norm(dim=-1)[:, 0])
    fine, coarse = fine.permute(0, 2, 3, 1), coarse.permute(0, 2, 3, 1)
    queries = torch.unflatten(q.float() * (scale * LOG2_E), 2, (k1.shape[2], -1)).permute(0, 2, 3, 1, 4)
    unsure = []
    tile = max(1, MAX_DRAFT_SCORES // (batch * num_heads * max(1, num_blocks)))
    for start in range(first_row, num_rows, tile):
        rows = slice(start, min(start + tile, num_rows))
        positions = first_position + torch.arange(rows.start, rows.stop, device=q.device)
        row_queries = queries[:, :, :, rows]
        error = UNIT * row_queries.norm(dim=-1).amax(2) * weight[..., None] + LOG_SLACK
        scores = _draft_scores(row_queries, fine, coarse, positions, geometry)
        chosen, is_sure = _largest_of_draft(*scores, error, geometry.free_blocks)
        picks[:, rows] = (chosen + geometry.init_blocks).transpose(1, 2)
        unsure.append(start + (~is_sure).any(0).any(0).nonzero()[:, 0])
    return torch.cat(unsure)


def _largest_of_draft(own: Tensor, pooled: Tensor, error: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of drafted scores, and whether the exact ones choose the same: [..., count] and [...].

    `error` bounds that of their logarithms. Neighbours often tie, by a window that both have: where no window of its
    own lifts the later one, the earlier has all that it has, so it goes first whatever was rounded.
    Shapes: own and pooled [..., X], pooled with a score of 0 behind the last; error [...].
    """
    top = pooled.topk(count + 2)
    before, last_in, first_out, after = F.pad(top.values, (1, 0), value=math.inf)[..., -4:].unbind(-1)
    earlier, later = top.indices[..., -3:-1].aminmax(dim=-1)
    certain = (-2 * error).exp2()
    is_apart = first_out < last_in * certain
    is_lifted = own.gather(-1, later[..., None])[..., 0] >= last_in * certain
    is_pair_alone = (first_out < before * certain) & (after < last_in * certain)
    is_sure = is_apart | ((later == earlier + 1) & ~is_lifted & is_pair_alone)
    is_sure &= (last_in > LEAST_SCORE) & top.values[..., 0].isfinite()
    chosen = top.indices[..., :count]
    chosen[..., -1] = chosen[..., -1].where(is_apart, earlier)
    return chosen.sort(-1).values, is_sure


def _draft_scores(
    queries: Tensor, fine: Tensor, coarse: Tensor, positions: Tensor, geometry: BlockGeometry
) -> tuple[Tensor, Tensor]:
    """The same as P_x of the windows that start in a block alone, and P_x itself, in fp32, [B, Hkv, T, X + 1].

    They are those of the blocks between the init and the local ones; 0 where a row may not pick, and in the last place.
    Windows that start at the same place of every block are scored together, so that a block's score is the larger of
    whole rows of them. Shapes: queries [B, Hkv, G, T, D], scaled to logarithms of base two; pooled keys [B, Hkv, D, J].
    """
    flat = queries.flatten(2, 3)
    normaliser = _draft_normaliser(flat, coarse, positions, geometry)
    per_block = geometry.pooled_per_block
    row_blocks = positions // geometry.block_size
    num_blocks = int(row_blocks[-1]) - geometry.local_blocks
    own, pooled = queries.new_zeros(2, *fine.shape[:2], len(positions), num_blocks + 1)
    for place in range(per_block):
        logs = flat @ fine[..., place : num_blocks * per_block : per_block]
        scores = torch.unflatten(logs.sub_(normaliser).exp2_(), 2, queries.shape[2:4]).sum(2)
        for later in range(min(num_blocks, 1 + (geometry.overlap + place) // per_block)):
            reached = (pooled if later else own)[..., later:num_blocks]
            torch.maximum(reached, scores[..., : num_blocks - later], out=reached)
    torch.maximum(own, pooled, out=pooled)
    first_local = int(row_blocks[0]) - geometry.local_blocks  # of the first row; later rows have later ones
    blocks = torch.arange(first_local, num_blocks, device=positions.device)
    is_local = blocks >= (row_blocks - geometry.local_blocks)[:, None]
    pooled[..., first_local:num_blocks].masked_fill_(is_local, 0.0)
    return own[..., geometry.init_blocks :], pooled[..., geometry.init_blocks :]


def _draft_normaliser(flat: Tensor, coarse: Tensor, positions: Tensor, geometry: BlockGeometry) -> Tensor:
    """Logarithm of the sum of powers over the coarse keys that each row sees, [B, Hkv, G * T, 1]."""
    seen = num_visible(positions, geometry.coarse_kernel_size, geometry.coarse_kernel_stride)
    least = int(seen[0])
    logs = flat @ coarse[..., : int(seen[-1])]
    is_hidden = torch.arange(least, logs.shape[-1], device=seen.device) >= seen[:, None]
    torch.unflatten(logs, 2, (-1, len(seen)))[..., least:].masked_fill_(is_hidden, -math.inf)
    peak = logs.amax(-1, keepdim=True)
    return logs.sub_(peak).exp2_().sum(-1, keepdim=True).log2_().add_(peak)


def _block_scores(
    q: Tensor, k1: Tensor, k2: Tensor, positions: Tensor, geometry: BlockGeometry, scale: float
) -> Tensor:
    """Log of P_x of the blocks between the init and the local ones, [B, T, Hkv, X]; -inf where a row may not pick.

    Rows stand at `positions` [T], ascending. A constant per row and KV head is left out, which cannot change a ranking.
    """
    queries = torch.unflatten(q.double(), 2, (k1.shape[2], -1)).permute(0, 2, 3, 1, 4)  # [B, Hkv, G, T, D]
    seen = num_visible(positions, geometry.kernel_size, geometry.kernel_stride)
    seen_coarse = num_visible(positions, geometry.coarse_kernel_size, geometry.coarse_kernel_stride)
    normaliser = _log_normaliser(queries, k2, seen_coarse, scale)
    if not seen_coarse[0]:
        normaliser = normaliser.where((seen_coarse > 0)[:, None], _log_normaliser(queries, k1, seen, scale))
    shift = normaliser.amin(2, keepdim=True) - normaliser

    end_block = int(positions[-1]) // geometry.block_size - geometry.local_blocks
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


def num_visible(positions: Tensor, kernel: int, stride: int) -> Tensor:
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
