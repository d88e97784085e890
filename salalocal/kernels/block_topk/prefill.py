"""The block choice for many rows on a GPU: scores and choice in one kernel, no score matrix is kept; see the package.

A program takes a few neighbouring rows with all heads of a KV head. It walks k2 for the normaliser of every head, then
k1: products, log of the sum over the heads, maximum per block. Segment by segment, the blocks that can still be among a
row's largest are appended to a short list, which is cut back to the largest ones when it fills. Programs stay and take
rows until none are left, so memory depends on the card alone: neither on the number of rows nor on that of keys.
Scores are sums of exponentials in fp32; where one of those kept leaves its range, the tile is walked again with their
logarithms, so no score overflows and no ranking is lost to underflow.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from salalocal.errors import BackendError
from salalocal.kernels.backend import HAS_INLINE_ASM, compute_capability, entry_of_card, num_multiprocessors, tl, triton
from salalocal.kernels.block_topk.geometry import BlockGeometry
from salalocal.kernels.block_topk.reference import heads_per_group
from salalocal.kernels.block_topk.scoring import (
    LOWEST,
    largest_of_lists,
    log_sum_over_heads,
    row_and_head,
    sum_over_heads,
)
from salalocal.kernels.head_tiles import FINEST_SIDE, LOG2_E, check_head_tiles

SMALLEST_SUM = tl.constexpr(2.0**-100)  # heads that vanish below fp32 are then below its rounding
_MOST_ROWS = 8  # whose lists are cut at once: they pass through shared memory


@dataclass(frozen=True)
class PrefillLaunch:
    """Tile sizes. `tile_rows`: query rows times heads; `tile_keys`: k1 or k2 at a time; `segment_tiles`: tiles whose
    blocks enter the lists together; `list_blocks`: room of a list; `programs_per_core`: that stay on a multiprocessor;
    `high`: windows of a block that lie in different halves of a tile, 2 where a warp has rows of both; `has_tma`: keys
    are read by the copy engine; `max_registers`: of a thread."""

    tile_rows: int
    tile_keys: int
    segment_tiles: int
    num_warps: int
    num_stages: int
    list_blocks: int = 256
    programs_per_core: int = 2
    high: int = 1
    has_tma: bool = False
    max_registers: int | None = None


# By compute capability; the one at or below the card's is taken.
LAUNCH = {
    80: PrefillLaunch(tile_rows=128, tile_keys=64, segment_tiles=8, num_warps=8, num_stages=3),
    86: PrefillLaunch(tile_rows=128, tile_keys=64, segment_tiles=8, num_warps=8, num_stages=2),
    90: PrefillLaunch(
        128, 64, segment_tiles=8, num_warps=4, num_stages=2, programs_per_core=3, has_tma=True, max_registers=168
    ),
    120: PrefillLaunch(tile_rows=128, tile_keys=64, segment_tiles=8, num_warps=8, num_stages=2),
}


@triton.jit
def _cut_lists(floats_ptr, ints_ptr, ROWS: tl.constexpr, CAPACITY: tl.constexpr, FREE: tl.constexpr):
    """Keep the FREE largest of every row's list in the order they came, ties to the earlier; the least one kept."""
    HALF: tl.constexpr = CAPACITY // 2
    row = tl.arange(0, ROWS)
    column = tl.arange(0, HALF)[None, :]
    front_at = ROWS + (row * CAPACITY)[:, None] + column
    tl.debug_barrier()  # what other threads appended must be seen
    counts = tl.load(ints_ptr + row)[:, None]
    has_front, has_back = column < counts, column + HALF < counts
    front = tl.load(floats_ptr + front_at, mask=has_front, other=0.0)
    back = tl.load(floats_ptr + front_at + HALF, mask=has_back, other=0.0)
    keeps_front, to_front, keeps_back, to_back, kept, least = largest_of_lists(
        front, back, has_front, has_back, FREE, ROWS
    )
    front_blocks = tl.load(ints_ptr + front_at, mask=keeps_front, other=0)
    back_blocks = tl.load(ints_ptr + front_at + HALF, mask=keeps_back, other=0)
    tl.debug_barrier()
    lists = ROWS + (row * CAPACITY)[:, None]
    tl.store(floats_ptr + lists + to_front, front, mask=keeps_front)
    tl.store(floats_ptr + lists + to_back, back, mask=keeps_back)
    tl.store(ints_ptr + lists + to_front, front_blocks, mask=keeps_front)
    tl.store(ints_ptr + lists + to_back, back_blocks, mask=keeps_back)
    tl.store(ints_ptr + row, kept)
    tl.store(floats_ptr + row, least)
    tl.debug_barrier()


@triton.jit
def _append_segment(
    floats_ptr, ints_ptr, starts_ptr, ends_ptr, first_block, first_free, end_free,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """Append a segment's blocks that beat the least of a full list; the length of the longest list.

    starts [BLOCKS, ROWS]: the best window that starts in a block; ends [BLOCKS + 1, ROWS]: the last such window of the
    block in front, which reaches into the block. Lengths and least scores pass through memory: carried in registers,
    the layout that suits the lists would be forced upon everything here.
    """
    column, row = tl.arange(0, BLOCKS)[:, None], tl.arange(0, ROWS)[None, :]
    lanes = tl.arange(0, ROWS)
    can_enter = (column >= first_free - first_block) & (column < (end_free - first_block)[None, :])
    tl.debug_barrier()  # what other threads scored must be seen
    start = tl.load(starts_ptr + column * ROWS + row)
    end = tl.load(ends_ptr + column * ROWS + row)
    last = tl.load(ends_ptr + BLOCKS * ROWS + lanes)
    pooled = tl.maximum(tl.maximum(start, end), LOWEST)  # of a number and none, the number
    can_enter &= pooled > tl.load(floats_ptr + lanes)[None, :]
    # Two rows are counted in one integer.
    PAIR: tl.constexpr = min(2, ROWS)
    pairs = tl.reshape(can_enter.to(tl.int32) << (row % PAIR * 16), [BLOCKS, ROWS // PAIR, PAIR])
    ranks = tl.broadcast_to(tl.cumsum(tl.sum(pairs, 2), 0)[:, :, None], [BLOCKS, ROWS // PAIR, PAIR])
    ranks = (tl.reshape(ranks, [BLOCKS, ROWS]) >> (row % PAIR * 16)) & 0xFFFF
    counts = tl.load(ints_ptr + lanes)
    at = ROWS + row * CAPACITY + counts[None, :] + ranks - 1
    tl.store(floats_ptr + at, pooled, mask=can_enter)
    tl.store(ints_ptr + at, tl.broadcast_to(first_block + column, [BLOCKS, ROWS]), mask=can_enter)
    counts += tl.sum(can_enter.to(tl.int32), 0)
    tl.debug_barrier()  # all have read before the next segment is scored
    tl.store(ends_ptr + lanes, last)
    tl.store(ints_ptr + lanes, counts)
    return tl.max(counts)


@triton.jit
def _log_normaliser(
    q, k2_ptr, batch, group, stride_k2, seen, log2_scale, num_full, num_keys,
    TILE: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    HAS_TMA: tl.constexpr,
):  # fmt: skip
    """Binary log of the sum of exp over the `seen` [TILE] coarse keys of each row and head; num_full are whole tiles
    that all of them see."""
    peak = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    keys = tl.arange(0, KEYS)
    dims = tl.arange(0, DIM)
    for start in tl.range(0, num_full, KEYS, num_stages=STAGES):
        if HAS_TMA:
            k2 = tl.reshape(k2_ptr.load([batch, group, start, 0]), [KEYS, DIM])
        else:
            k2 = tl.load(k2_ptr + (start + keys)[:, None] * stride_k2 + dims[None, :])
        w = tl.dot(q, tl.trans(k2), input_precision=PRECISION)
        new_peak = tl.maximum(peak, tl.max(w, 1) * log2_scale)
        total = total * tl.exp2(peak - new_peak) + tl.sum(tl.exp2(w * log2_scale - new_peak[:, None]), 1)
        peak = new_peak
    for start in tl.range(num_full, num_keys, KEYS, num_stages=1):
        columns = start + keys
        if HAS_TMA:
            k2 = tl.reshape(k2_ptr.load([batch, group, start, 0]), [KEYS, DIM])
        else:
            is_there = columns[:, None] < num_keys
            k2 = tl.load(k2_ptr + columns[:, None] * stride_k2 + dims[None, :], mask=is_there, other=0.0)
        w = tl.dot(q, tl.trans(k2), input_precision=PRECISION) * log2_scale
        w = tl.where(columns[None, :] < seen[:, None], w, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(w, 1))
        total = total * tl.exp2(peak - new_peak) + tl.sum(tl.exp2(w - new_peak[:, None]), 1)
        peak = new_peak
    return peak + tl.log2(total)


@triton.jit
def _max_of_blocks(
    score, KEYS: tl.constexpr, ROWS: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr, SIDE: tl.constexpr
):
    """The largest of the windows of every block: [KEYS, ROWS] in the order of `_walk_keys` -> [BLOCKS, ROWS]"""
    parts = tl.reshape(score, [HIGH, KEYS // (HIGH * LOW * SIDE), LOW, SIDE, ROWS])
    return tl.reshape(tl.max(tl.max(parts, 2), 0), [KEYS // (HIGH * LOW), ROWS])


@triton.jit
def _walk_keys(
    q, k1_ptr, batch, group, stride_k1n, num_keys, normaliser, log2_scale, floats_ptr, ints_ptr, first_free, end_free,
    ROWS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, KEYS: tl.constexpr, SEGMENT: tl.constexpr,
    CAPACITY: tl.constexpr, PER_BLOCK: tl.constexpr, HIGH: tl.constexpr, LOCAL: tl.constexpr,
    FREE: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, HAS_ASM: tl.constexpr, HAS_TMA: tl.constexpr, IS_LOG: tl.constexpr,
):  # fmt: skip
    """Leave the FREE largest of every row's blocks in the lists. q [DIM, ROWS * HEADS].

    IS_LOG compares logarithms, else plain sums: a quarter fewer instructions, and exact where no sum leaves fp32.
    """
    BLOCKS: tl.constexpr = KEYS // PER_BLOCK
    SEGMENT_BLOCKS: tl.constexpr = SEGMENT * BLOCKS
    # The windows of a block stand in places of the tile, HIGH times LOW of them, that one thread holds or few do.
    LOW: tl.constexpr = PER_BLOCK // HIGH
    SIDE: tl.constexpr = 1 if HAS_TMA else max(1, 16 // LOW)  # blocks side by side
    place = tl.arange(0, KEYS)
    window = place // (KEYS // HIGH) * LOW + place // SIDE % LOW
    key_of_place = (place % (KEYS // HIGH) // (SIDE * LOW) * SIDE + place % SIDE) * PER_BLOCK + window
    starts_ptr = floats_ptr + ROWS * (CAPACITY + 1)
    ends_ptr = starts_ptr + ROWS * SEGMENT_BLOCKS
    lanes = tl.arange(0, ROWS)
    dims = tl.arange(0, DIM)
    tl.store(ints_ptr + lanes, tl.zeros([ROWS], tl.int32))
    tl.store(floats_ptr + lanes, tl.full([ROWS], float("-inf"), tl.float32))
    tl.store(ends_ptr + lanes, tl.full([ROWS], LOWEST, tl.float32))
    for segment in tl.range(0, num_keys, SEGMENT * KEYS, num_stages=1):
        end = tl.minimum(segment + SEGMENT * KEYS, num_keys)
        for start in tl.range(segment, end, KEYS, num_stages=STAGES):
            # What is behind the last may not enter the lists; that much of local blocks can be read.
            if HAS_TMA:
                k1 = tl.reshape(k1_ptr.load([batch, group, start, 0]), [KEYS, DIM])
            elif KEYS <= LOCAL * PER_BLOCK:
                k1 = tl.load(k1_ptr + start * stride_k1n + (key_of_place[:, None] * stride_k1n + dims[None, :]))
            else:
                keys = tl.minimum(start + key_of_place, num_keys - 1)
                k1 = tl.load(k1_ptr + keys[:, None] * stride_k1n + dims[None, :])
            z = tl.dot(k1, q, input_precision=PRECISION) * log2_scale - normaliser[None, :]
            if IS_LOG:
                score = log_sum_over_heads(z, KEYS, ROWS, HEADS, HAS_ASM)  # [KEYS, ROWS]
            else:
                score = sum_over_heads(z, KEYS, ROWS, HEADS)
            last = tl.where((window == PER_BLOCK - 1)[:, None], score, LOWEST)
            at = ((start - segment) // PER_BLOCK + tl.arange(0, BLOCKS))[:, None] * ROWS + lanes[None, :]
            tl.store(starts_ptr + at, _max_of_blocks(score, KEYS, ROWS, HIGH, LOW, SIDE))
            tl.store(ends_ptr + ROWS + at, _max_of_blocks(last, KEYS, ROWS, HIGH, LOW, SIDE))
        longest = _append_segment(
            floats_ptr, ints_ptr, starts_ptr, ends_ptr, segment // PER_BLOCK, first_free, end_free,
            ROWS, SEGMENT_BLOCKS, CAPACITY,
        )  # fmt: skip
        if longest > CAPACITY - SEGMENT_BLOCKS:
            _cut_lists(floats_ptr, ints_ptr, ROWS, CAPACITY, FREE)
    _cut_lists(floats_ptr, ints_ptr, ROWS, CAPACITY, FREE)


@triton.jit
def _block_topk_prefill_kernel(
    q_ptr, k1_ptr, k2_ptr, picks_ptr, floats_ptr, ints_ptr, first_position, num_rows, num_groups, num_tiles,
    log2_scale, stride_qb, stride_qt, stride_qh, stride_k1b, stride_k1n, stride_k1h, stride_k2b, stride_k2n,
    stride_k2h, stride_pb, stride_pt, stride_pg,
    ROWS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, KEYS: tl.constexpr, SEGMENT: tl.constexpr,
    CAPACITY: tl.constexpr, COARSE_SIZE: tl.constexpr, COARSE_STRIDE: tl.constexpr, PER_BLOCK: tl.constexpr,
    HIGH: tl.constexpr, BLOCK: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr, FREE: tl.constexpr,
    BUDGET: tl.constexpr, BUDGET_TILE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    HAS_ASM: tl.constexpr, HAS_TMA: tl.constexpr,
):  # fmt: skip
    """A program takes every so many'th tile of ROWS query rows of one KV head.

    Of its own it has ints: lengths [ROWS], lists of blocks [ROWS, CAPACITY]; and floats: least scores [ROWS], lists of
    scores [ROWS, CAPACITY], starts [B, ROWS], ends [B + 1, ROWS].
    """
    TILE: tl.constexpr = ROWS * HEADS
    SEGMENT_BLOCKS: tl.constexpr = SEGMENT * KEYS // PER_BLOCK
    program = tl.program_id(0)
    floats_ptr += program * (ROWS * (CAPACITY + 2 * SEGMENT_BLOCKS + 2))
    ints_ptr += program * (ROWS * (CAPACITY + 1))
    tiles_per_group = tl.cdiv(num_rows, ROWS)
    dims = tl.arange(0, DIM)
    lanes = tl.arange(0, ROWS)
    for tile in tl.range(program, num_tiles, tl.num_programs(0), num_stages=1):
        batch, group = tile // tiles_per_group // num_groups, tile // tiles_per_group % num_groups
        first_row = tile % tiles_per_group * ROWS
        row, head = row_and_head(TILE, ROWS, HEADS)
        tile_rows = first_row + row
        q_at = batch * stride_qb + tile_rows * stride_qt + (group * HEADS + head) * stride_qh
        q = tl.load(q_ptr + q_at[:, None] + dims[None, :], mask=tile_rows[:, None] < num_rows, other=0.0)
        first = first_position + first_row
        last = tl.minimum(first_position + num_rows, first + ROWS) - 1
        seen = (first_position + tile_rows + 1 - COARSE_SIZE) // COARSE_STRIDE + 1
        num_full = ((first + 1 - COARSE_SIZE) // COARSE_STRIDE + 1) // KEYS * KEYS
        num_coarse = (last + 1 - COARSE_SIZE) // COARSE_STRIDE + 1
        keys_ptr, coarse_ptr = k1_ptr, k2_ptr  # descriptions of the whole if HAS_TMA
        if not HAS_TMA:
            keys_ptr += batch * stride_k1b + group * stride_k1h
            coarse_ptr += batch * stride_k2b + group * stride_k2h
        normaliser = _log_normaliser(
            q, coarse_ptr, batch, group, stride_k2n, seen, log2_scale, num_full, num_coarse,
            TILE, KEYS, DIM, PRECISION, STAGES, HAS_TMA,
        )  # fmt: skip

        own = (first_position + first_row + lanes) // BLOCK
        num_keys = (last // BLOCK - LOCAL) * PER_BLOCK
        turned = tl.trans(q)
        _walk_keys(
            turned, keys_ptr, batch, group, stride_k1n, num_keys, normaliser, log2_scale, floats_ptr, ints_ptr, INIT,
            own - LOCAL, ROWS, HEADS, DIM, KEYS, SEGMENT, CAPACITY, PER_BLOCK, HIGH, LOCAL, FREE, PRECISION, STAGES,
            HAS_ASM, HAS_TMA, False,
        )  # fmt: skip
        kept = tl.arange(0, BUDGET_TILE)[None, :]
        scores = tl.load(floats_ptr + ROWS + lanes[:, None] * CAPACITY + kept, mask=kept < FREE, other=0.0)
        least = tl.load(floats_ptr + lanes)
        is_out_of_range = (first_row + lanes < num_rows) & (
            (least < SMALLEST_SUM) | (tl.max(scores, 1) == float("inf"))
        )
        if tl.max(is_out_of_range.to(tl.int32)) > 0:
            tl.debug_barrier()  # all have read the list
            _walk_keys(
                turned, keys_ptr, batch, group, stride_k1n, num_keys, normaliser, log2_scale, floats_ptr, ints_ptr,
                INIT, own - LOCAL, ROWS, HEADS, DIM, KEYS, SEGMENT, CAPACITY, PER_BLOCK, HIGH, LOCAL, FREE, PRECISION,
                STAGES, HAS_ASM, HAS_TMA, True,
            )  # fmt: skip

        columns = tl.arange(0, BUDGET_TILE)[None, :]
        is_free = (columns >= INIT) & (columns < INIT + FREE)
        free = tl.load(ints_ptr + ROWS + lanes[:, None] * CAPACITY + columns - INIT, mask=is_free, other=0)
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
    if not all(_is_aligned(x) for x in (k1, k2)):
        launch = replace(launch, has_tma=False)
    constants = prefill_constants(launch, geometry, heads, dim, q.dtype)
    rows = constants["ROWS"]
    num_tiles = -(-num_rows // rows) * batch * num_groups
    programs = min(num_tiles, num_multiprocessors(q.device) * launch.programs_per_core)
    capacity = constants["CAPACITY"]
    segment_blocks = constants["SEGMENT"] * constants["KEYS"] // constants["PER_BLOCK"]
    floats = torch.empty(programs, rows * (capacity + 2 * segment_blocks + 2), dtype=torch.float32, device=q.device)
    ints = torch.empty(programs, rows * (capacity + 1), dtype=torch.int32, device=q.device)
    operands = (_described(x, constants["KEYS"]) if launch.has_tma else x for x in (k1, k2))
    _block_topk_prefill_kernel[(programs,)](
        q, *operands, picks, floats, ints, first_position, num_rows, num_groups, num_tiles, scale * LOG2_E,
        *q.stride()[:3], *k1.stride()[:3], *k2.stride()[:3], *picks.stride()[:3],
        **constants, num_warps=launch.num_warps, num_stages=launch.num_stages, maxnreg=launch.max_registers,
    )  # fmt: skip


def _is_aligned(keys: Tensor) -> bool:
    """Whether the copy engine can read a tensor: it starts and steps in multiples of 16 bytes."""
    return all(at % 16 == 0 for at in (keys.data_ptr(), *(step * keys.element_size() for step in keys.stride()[:3])))


def _described(keys: Tensor, num_keys: int) -> Any:
    """Pooled keys [B, N, H, D] described for the copy engine, so many of a head at a time."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(keys.transpose(1, 2), [1, 1, num_keys, keys.shape[3]])


def prefill_constants(
    launch: PrefillLaunch, geometry: BlockGeometry, heads: int, dim: int, dtype: torch.dtype
) -> dict[str, Any]:
    """The compile-time arguments of the kernel."""
    keys = max(launch.tile_keys, geometry.pooled_per_block)
    segment_blocks = launch.segment_tiles * keys // geometry.pooled_per_block
    can_halve = not launch.has_tma and keys >= 16 * launch.high and geometry.pooled_per_block % launch.high == 0
    return {
        "ROWS": max(FINEST_SIDE // heads, min(_MOST_ROWS, launch.tile_rows // heads), 1),
        "HEADS": heads,
        "DIM": dim,
        "KEYS": keys,
        "SEGMENT": launch.segment_tiles,
        "CAPACITY": triton.next_power_of_2(max(launch.list_blocks, segment_blocks + geometry.free_blocks)),
        "COARSE_SIZE": geometry.coarse_kernel_size,
        "COARSE_STRIDE": geometry.coarse_kernel_stride,
        "PER_BLOCK": geometry.pooled_per_block,
        "HIGH": launch.high if can_halve else 1,
        "BLOCK": geometry.block_size,
        "INIT": geometry.init_blocks,
        "LOCAL": geometry.local_blocks,
        "FREE": geometry.free_blocks,
        "BUDGET": geometry.budget,
        "BUDGET_TILE": triton.next_power_of_2(geometry.budget),
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        "STAGES": launch.num_stages,
        "HAS_ASM": HAS_INLINE_ASM,
        "HAS_TMA": launch.has_tma,
    }


def check_supported(q: Tensor, k1: Tensor, k2: Tensor, heads: int, geometry: BlockGeometry) -> None:
    """Raises BackendError for what no kernel of the block choice knows."""
    dim = q.shape[-1]
    sides = {"heads per KV head": heads, "head size": dim, "pooled keys per block": geometry.pooled_per_block}
    check_head_tiles("block choice", {"q": q, "k1": k1, "k2": k2}, sides)
    if not q.dtype == k1.dtype == k2.dtype:
        raise BackendError(f"block choice of {q.dtype}, {k1.dtype}, {k2.dtype}: one dtype is needed")
    if dim < FINEST_SIDE or geometry.overlap != 1 or min(geometry.local_blocks, geometry.free_blocks) < 1:
        raise BackendError(f"block choice: head size {dim} with {geometry} is not supported")
    if geometry.reach < geometry.coarse_kernel_size:
        raise BackendError(f"block choice: rows beyond {geometry.reach} tokens may see no coarse key: {geometry}")
