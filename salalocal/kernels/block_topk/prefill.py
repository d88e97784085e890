"""The block choice for many rows on a GPU: scores and choice in one kernel, no score matrix is kept; see the package.

A program takes a few neighbouring rows with all heads of a KV head. It walks k2 for the normaliser of every head, then
k1: products, log of the sum over the heads, maximum per block. Segment by segment, the blocks that can still be among a
row's largest are appended to a short list, which is cut back to the largest ones when it fills. Programs stay and take
rows until none are left, so memory depends on the card alone: neither on the number of rows nor on that of keys.
Scores are sums of exponentials in fp32; where one of those kept leaves its range, the tile is walked again with their
logarithms, so no score overflows and no ranking is lost to underflow.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from salalocal.errors import BackendError
from salalocal.kernels.backend import HAS_INLINE_ASM, compute_capability, entry_of_card, num_multiprocessors, tl, triton
from salalocal.kernels.block_topk.geometry import BlockGeometry
from salalocal.kernels.block_topk.reference import heads_per_group
from salalocal.kernels.block_topk.scoring import LOWEST, is_among_largest, log_sum_over_heads, sum_over_heads

LOG2_E = 1.4426950408889634
SMALLEST_SUM = tl.constexpr(2.0**-100)  # heads that vanish below fp32 are then below its rounding
_FINEST_DIM = 16  # what tl.dot takes at least


@dataclass(frozen=True)
class PrefillLaunch:
    """Tile sizes. `tile_rows`: query rows times heads; `tile_keys`: k1 or k2 at a time; `segment_tiles`: tiles whose
    blocks enter the lists together; `programs_per_core`: that stay on a multiprocessor."""

    tile_rows: int
    tile_keys: int
    segment_tiles: int
    num_warps: int
    num_stages: int
    programs_per_core: int = 2
    max_registers: int | None = None  # per thread; what the rare cutting of the lists spills for it costs little


# By compute capability; the one at or below the card's is taken.
LAUNCH = {
    80: PrefillLaunch(tile_rows=128, tile_keys=64, segment_tiles=16, num_warps=8, num_stages=3),
    86: PrefillLaunch(tile_rows=128, tile_keys=64, segment_tiles=16, num_warps=8, num_stages=2),
    90: PrefillLaunch(tile_rows=128, tile_keys=128, segment_tiles=8, num_warps=8, num_stages=2, max_registers=128),
    120: PrefillLaunch(tile_rows=128, tile_keys=64, segment_tiles=16, num_warps=8, num_stages=2),
}


@triton.jit
def _cut_lists(scores_ptr, blocks_ptr, counts, ROWS: tl.constexpr, CAPACITY: tl.constexpr, FREE: tl.constexpr):
    """Keep the FREE largest of every row's list in the order they came, ties to the earlier; the least one kept."""
    columns = tl.arange(0, CAPACITY)[None, :]
    at = tl.arange(0, ROWS)[:, None] * CAPACITY + columns
    is_there = columns < counts[:, None]
    tl.debug_barrier()  # what other threads appended must be seen
    scores = tl.load(scores_ptr + at, mask=is_there, other=0.0)
    kept = is_among_largest(scores, is_there, FREE, ROWS).to(tl.int32)
    to = tl.arange(0, ROWS)[:, None] * CAPACITY + tl.cumsum(kept, 1) - 1
    blocks = tl.load(blocks_ptr + at, mask=kept > 0, other=0)
    tl.debug_barrier()
    tl.store(scores_ptr + to, scores, mask=kept > 0)
    tl.store(blocks_ptr + to, blocks, mask=kept > 0)
    tl.debug_barrier()
    counts = tl.sum(kept, 1)
    least = tl.min(tl.where(kept > 0, scores, float("inf")), 1)
    return tl.where(counts < FREE, float("-inf"), least), counts


@triton.jit
def _append_segment(
    starts_ptr, ends_ptr, scores_ptr, blocks_ptr, first_block, first_free, end_free, least, counts,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """Append a segment's blocks that beat `least` to the lists; the counts.

    starts [ROWS, BLOCKS]: the best window that starts in a block; ends [ROWS, BLOCKS + 1]: the last such window of the
    block in front, which reaches into the block.
    """
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCKS)[None, :]
    block = first_block + column
    can_enter = (block >= first_free) & (block < end_free[:, None])
    tl.debug_barrier()  # what other threads scored must be seen
    start = tl.load(starts_ptr + row * BLOCKS + column, mask=can_enter, other=0.0)
    end = tl.load(ends_ptr + row * (BLOCKS + 1) + column, mask=can_enter, other=0.0)
    last = tl.load(ends_ptr + tl.arange(0, ROWS) * (BLOCKS + 1) + BLOCKS)
    pooled = tl.maximum(start, end)
    can_enter &= pooled > least[:, None]
    entering = can_enter.to(tl.int32)
    at = row * CAPACITY + counts[:, None] + tl.cumsum(entering, 1) - 1
    tl.store(scores_ptr + at, pooled, mask=can_enter)
    tl.store(blocks_ptr + at, tl.broadcast_to(block, [ROWS, BLOCKS]), mask=can_enter)
    tl.debug_barrier()  # all have read before the next segment is scored
    tl.store(ends_ptr + tl.arange(0, ROWS) * (BLOCKS + 1), last)
    return counts + tl.sum(entering, 1)


@triton.jit
def _log_normaliser(
    q, k2_ptr, stride_k2, seen, log2_scale, num_full, num_keys,
    TILE: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Binary log of the sum of exp over the `seen` [TILE] coarse keys of each row and head; num_full are whole tiles
    that all of them see."""
    peak = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    keys = tl.arange(0, KEYS)
    dims = tl.arange(0, DIM)
    for start in tl.range(0, num_full, KEYS, num_stages=STAGES):
        k2 = tl.load(k2_ptr + (start + keys)[:, None] * stride_k2 + dims[None, :])
        w = tl.dot(q, tl.trans(k2), input_precision=PRECISION) * log2_scale
        new_peak = tl.maximum(peak, tl.max(w, 1))
        total = total * tl.exp2(peak - new_peak) + tl.sum(tl.exp2(w - new_peak[:, None]), 1)
        peak = new_peak
    for start in tl.range(num_full, num_keys, KEYS, num_stages=1):
        columns = start + keys
        k2 = tl.load(k2_ptr + columns[:, None] * stride_k2 + dims[None, :], mask=columns[:, None] < num_keys, other=0.0)
        w = tl.dot(q, tl.trans(k2), input_precision=PRECISION) * log2_scale
        w = tl.where(columns[None, :] < seen[:, None], w, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(w, 1))
        total = total * tl.exp2(peak - new_peak) + tl.sum(tl.exp2(w - new_peak[:, None]), 1)
        peak = new_peak
    return peak + tl.log2(total)


@triton.jit
def _walk_keys(
    q, k1_ptr, stride_k1n, num_keys, normaliser, log2_scale, scores_ptr, blocks_ptr, first_free, end_free,
    ROWS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, KEYS: tl.constexpr, SEGMENT: tl.constexpr,
    CAPACITY: tl.constexpr, PER_BLOCK: tl.constexpr, FREE: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, HAS_ASM: tl.constexpr, IS_LOG: tl.constexpr,
):  # fmt: skip
    """Leave the FREE largest of every row's blocks in the lists; the least score kept. q [DIM, ROWS * HEADS].

    IS_LOG compares logarithms, else plain sums: a quarter fewer instructions, and exact where no sum leaves fp32.
    """
    BLOCKS: tl.constexpr = KEYS // PER_BLOCK
    SEGMENT_BLOCKS: tl.constexpr = SEGMENT * BLOCKS
    starts_ptr = scores_ptr + ROWS * CAPACITY
    ends_ptr = starts_ptr + ROWS * SEGMENT_BLOCKS
    lanes = tl.arange(0, ROWS)
    dims = tl.arange(0, DIM)
    counts = tl.zeros([ROWS], tl.int32)
    least = tl.full([ROWS], float("-inf"), tl.float32)
    tl.store(ends_ptr + lanes * (SEGMENT_BLOCKS + 1), tl.full([ROWS], LOWEST, tl.float32))
    for segment in tl.range(0, num_keys, SEGMENT * KEYS, num_stages=1):
        end = tl.minimum(segment + SEGMENT * KEYS, num_keys)
        for start in tl.range(segment, end, KEYS, num_stages=STAGES):
            keys = start + tl.arange(0, KEYS)
            keys_at = keys[:, None] * stride_k1n + dims[None, :]
            k1 = tl.load(k1_ptr + keys_at, mask=keys[:, None] < num_keys, other=0.0)
            z = tl.dot(k1, q, input_precision=PRECISION) * log2_scale - normaliser[None, :]
            if IS_LOG:
                score = log_sum_over_heads(z, KEYS, ROWS, HEADS, HAS_ASM)  # [KEYS, ROWS]
            else:
                score = sum_over_heads(z, KEYS, ROWS, HEADS)
            block = (start - segment) // PER_BLOCK + tl.arange(0, BLOCKS)
            starts = tl.max(tl.reshape(score, [BLOCKS, PER_BLOCK, ROWS]), 1)
            tl.store(starts_ptr + lanes[None, :] * SEGMENT_BLOCKS + block[:, None], starts)
            key = keys - segment
            ends_at = lanes[None, :] * (SEGMENT_BLOCKS + 1) + (key // PER_BLOCK)[:, None] + 1
            tl.store(ends_ptr + ends_at, score, mask=(key % PER_BLOCK == PER_BLOCK - 1)[:, None])
        counts = _append_segment(
            starts_ptr, ends_ptr, scores_ptr, blocks_ptr, segment // PER_BLOCK, first_free, end_free, least, counts,
            ROWS, SEGMENT_BLOCKS, CAPACITY,
        )  # fmt: skip
        if tl.max(counts) > CAPACITY - SEGMENT_BLOCKS:
            least, counts = _cut_lists(scores_ptr, blocks_ptr, counts, ROWS, CAPACITY, FREE)
    least, counts = _cut_lists(scores_ptr, blocks_ptr, counts, ROWS, CAPACITY, FREE)
    return least


@triton.jit
def _block_topk_prefill_kernel(
    q_ptr, k1_ptr, k2_ptr, picks_ptr, floats_ptr, blocks_ptr, first_position, num_rows, num_groups, num_tiles,
    log2_scale, stride_qb, stride_qt, stride_qh, stride_k1b, stride_k1n, stride_k1h, stride_k2b, stride_k2n,
    stride_k2h, stride_pb, stride_pt, stride_pg,
    ROWS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, KEYS: tl.constexpr, SEGMENT: tl.constexpr,
    CAPACITY: tl.constexpr, COARSE_SIZE: tl.constexpr, COARSE_STRIDE: tl.constexpr, PER_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr, FREE: tl.constexpr, BUDGET: tl.constexpr,
    BUDGET_TILE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, HAS_ASM: tl.constexpr,
):  # fmt: skip
    """A program takes every so many'th tile of ROWS query rows of one KV head.

    Of its own it has blocks [ROWS, CAPACITY] and floats: lists [ROWS, CAPACITY], starts [ROWS, B], ends [ROWS, B + 1].
    """
    TILE: tl.constexpr = ROWS * HEADS
    SEGMENT_BLOCKS: tl.constexpr = SEGMENT * KEYS // PER_BLOCK
    program = tl.program_id(0)
    scores_ptr = floats_ptr + program * (ROWS * (CAPACITY + 2 * SEGMENT_BLOCKS + 1))
    blocks_ptr += program * (ROWS * CAPACITY)
    tiles_per_group = tl.cdiv(num_rows, ROWS)
    dims = tl.arange(0, DIM)
    lanes = tl.arange(0, ROWS)
    for tile in tl.range(program, num_tiles, tl.num_programs(0), num_stages=1):
        batch, group = tile // tiles_per_group // num_groups, tile // tiles_per_group % num_groups
        first_row = tile % tiles_per_group * ROWS
        tile_rows = first_row + tl.arange(0, TILE) // HEADS
        heads = group * HEADS + tl.arange(0, TILE) % HEADS
        q_at = batch * stride_qb + tile_rows * stride_qt + heads * stride_qh
        q = tl.load(q_ptr + q_at[:, None] + dims[None, :], mask=tile_rows[:, None] < num_rows, other=0.0)
        first = first_position + first_row
        last = tl.minimum(first_position + num_rows, first + ROWS) - 1
        seen = (first_position + tile_rows + 1 - COARSE_SIZE) // COARSE_STRIDE + 1
        num_full = ((first + 1 - COARSE_SIZE) // COARSE_STRIDE + 1) // KEYS * KEYS
        num_coarse = (last + 1 - COARSE_SIZE) // COARSE_STRIDE + 1
        normaliser = _log_normaliser(
            q, k2_ptr + batch * stride_k2b + group * stride_k2h, stride_k2n, seen, log2_scale, num_full, num_coarse,
            TILE, KEYS, DIM, PRECISION, STAGES,
        )  # fmt: skip

        own = (first_position + first_row + lanes) // BLOCK
        num_keys = (last // BLOCK - LOCAL) * PER_BLOCK
        keys_ptr = k1_ptr + batch * stride_k1b + group * stride_k1h
        turned = tl.trans(q)
        least = _walk_keys(
            turned, keys_ptr, stride_k1n, num_keys, normaliser, log2_scale, scores_ptr, blocks_ptr, INIT, own - LOCAL,
            ROWS, HEADS, DIM, KEYS, SEGMENT, CAPACITY, PER_BLOCK, FREE, PRECISION, STAGES, HAS_ASM, False,
        )  # fmt: skip
        kept = tl.arange(0, BUDGET_TILE)[None, :]
        largest = tl.max(tl.load(scores_ptr + lanes[:, None] * CAPACITY + kept, mask=kept < FREE, other=0.0), 1)
        is_out_of_range = (first_row + lanes < num_rows) & ((least < SMALLEST_SUM) | (largest == float("inf")))
        if tl.max(is_out_of_range.to(tl.int32)) > 0:
            tl.debug_barrier()  # all have read the list
            least = _walk_keys(
                turned, keys_ptr, stride_k1n, num_keys, normaliser, log2_scale, scores_ptr, blocks_ptr, INIT,
                own - LOCAL, ROWS, HEADS, DIM, KEYS, SEGMENT, CAPACITY, PER_BLOCK, FREE, PRECISION, STAGES, HAS_ASM,
                True,
            )  # fmt: skip

        columns = tl.arange(0, BUDGET_TILE)[None, :]
        is_free = (columns >= INIT) & (columns < INIT + FREE)
        free = tl.load(blocks_ptr + lanes[:, None] * CAPACITY + columns - INIT, mask=is_free, other=0)
        local = own[:, None] - LOCAL + columns - INIT - FREE
        picks = tl.where(columns < INIT, columns, tl.where(is_free, free, local))
        rows = first_row + lanes[:, None]
        picks_at = batch * stride_pb + rows * stride_pt + group * stride_pg + columns
        tl.store(picks_ptr + picks_at, picks.to(tl.int64), mask=(rows < num_rows) & (columns < BUDGET))
        tl.debug_barrier()  # all have read their lists before the next tile's are begun


def block_topk_triton(
    q: Tensor, k1: Tensor, k2: Tensor, first_position: int, num_tokens: int, geometry: BlockGeometry, scale: float
) -> Tensor:
    """See `block_topk_reference`; keys and queries in bf16, fp16 or fp32 with the last axis dense.

    Raises: ValueError as the reference; BackendError for a geometry or dtype that the kernel does not know.
    """
    heads = heads_per_group(q, k1, k2, first_position, num_tokens, geometry)
    check_supported(q, k1, k2, heads, geometry)
    batch, num_rows, num_heads, _ = q.shape
    num_groups = num_heads // heads
    picks = torch.empty(batch, num_rows, num_groups, geometry.budget, dtype=torch.int64, device=q.device)
    num_short = min(max(0, geometry.reach - first_position), num_rows)
    if num_short:
        own = (first_position + torch.arange(num_short, device=q.device)) // geometry.block_size
        every = torch.arange(geometry.budget, device=q.device)
        picks[:, :num_short] = every.where(every <= own[:, None], -1)[:, None]
    if num_short < num_rows:
        _launch(q[:, num_short:], k1, k2, picks[:, num_short:], first_position + num_short, geometry, scale)
    return picks


def _launch(
    q: Tensor, k1: Tensor, k2: Tensor, picks: Tensor, first_position: int, geometry: BlockGeometry, scale: float
) -> None:
    batch, num_rows, num_heads, dim = q.shape
    num_groups = picks.shape[2]
    heads = num_heads // num_groups
    launch = entry_of_card(LAUNCH, compute_capability(q.device))
    constants = prefill_constants(launch, geometry, heads, dim, q.dtype)
    rows = constants["ROWS"]
    num_tiles = -(-num_rows // rows) * batch * num_groups
    programs = min(num_tiles, num_multiprocessors(q.device) * launch.programs_per_core)
    capacity = constants["CAPACITY"]
    segment_blocks = constants["SEGMENT"] * constants["KEYS"] // constants["PER_BLOCK"]
    floats = torch.empty(programs, rows * (capacity + 2 * segment_blocks + 1), dtype=torch.float32, device=q.device)
    blocks = torch.empty(programs, rows * capacity, dtype=torch.int32, device=q.device)
    _block_topk_prefill_kernel[(programs,)](
        q, k1, k2, picks, floats, blocks, first_position, num_rows, num_groups, num_tiles, scale * LOG2_E,
        *q.stride()[:3], *k1.stride()[:3], *k2.stride()[:3], *picks.stride()[:3],
        **constants, num_warps=launch.num_warps, num_stages=launch.num_stages, maxnreg=launch.max_registers,
    )  # fmt: skip


def prefill_constants(
    launch: PrefillLaunch, geometry: BlockGeometry, heads: int, dim: int, dtype: torch.dtype
) -> dict[str, Any]:
    """The compile-time arguments of the kernel."""
    keys = max(launch.tile_keys, geometry.pooled_per_block)
    segment_blocks = launch.segment_tiles * keys // geometry.pooled_per_block
    return {
        "ROWS": max(1, launch.tile_rows // heads),
        "HEADS": heads,
        "DIM": dim,
        "KEYS": keys,
        "SEGMENT": launch.segment_tiles,
        "CAPACITY": 2 * triton.next_power_of_2(max(segment_blocks, geometry.free_blocks)),
        "COARSE_SIZE": geometry.coarse_kernel_size,
        "COARSE_STRIDE": geometry.coarse_kernel_stride,
        "PER_BLOCK": geometry.pooled_per_block,
        "BLOCK": geometry.block_size,
        "INIT": geometry.init_blocks,
        "LOCAL": geometry.local_blocks,
        "FREE": geometry.free_blocks,
        "BUDGET": geometry.budget,
        "BUDGET_TILE": triton.next_power_of_2(geometry.budget),
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        "STAGES": launch.num_stages,
        "HAS_ASM": HAS_INLINE_ASM,
    }


def check_supported(q: Tensor, k1: Tensor, k2: Tensor, heads: int, geometry: BlockGeometry) -> None:
    """Raises BackendError for what no kernel of the block choice knows."""
    dim = q.shape[-1]
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32) or not q.dtype == k1.dtype == k2.dtype:
        raise BackendError(f"block choice of {q.dtype}, {k1.dtype}, {k2.dtype}: one of bf16, fp16, fp32 is needed")
    if any(x.stride(-1) != 1 for x in (q, k1, k2)):
        raise BackendError("block choice: the last axis of q, k1 and k2 must be dense")
    sizes = {"heads per KV head": heads, "head size": dim, "pooled keys per block": geometry.pooled_per_block}
    for name, size in sizes.items():
        if size & (size - 1) or size > 256:
            raise BackendError(f"block choice: {name} is {size}, a power of two up to 256 is needed")
    if dim < _FINEST_DIM or geometry.overlap != 1 or min(geometry.local_blocks, geometry.free_blocks) < 1:
        raise BackendError(f"block choice: head size {dim} with {geometry} is not supported")
    if geometry.reach < geometry.coarse_kernel_size:
        raise BackendError(f"block choice: rows beyond {geometry.reach} tokens may see no coarse key: {geometry}")
