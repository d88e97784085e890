"""The blocks of a step's rows, picked by scores that lie in memory; what comes behind `decode`'s scores.

In come, of every row and KV head, the scores of its blocks in two halves, out go its picks and what they scored. One
program searches up to some thousand blocks bit by bit; each bit is a sum over all its threads, so more blocks than that
are searched in two launches:
    shortlist   one program a row, KV head and part: the largest of some thousand blocks; parts behind the end leave
    choose      one program a row and KV head: the largest of what the shortlists hold
Both are exact: shortlists keep the order of blocks, so ties go to the lower one. What shortlists cost follows the
number of blocks that a row sees, not the room for them.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from salalocal.errors import BackendError
from salalocal.kernels.backend import compute_capability, dependent_launch, entry_of_card, tl, triton
from salalocal.kernels.block_topk.geometry import BlockGeometry
from salalocal.kernels.block_topk.scoring import LOWEST, largest_of_list

MOST_BLOCKS = 2**16  # 4M tokens; the shortlists of more are searched in registers that spill
_MOST_LISTED = 2**15  # that the search for the largest can count


@dataclass(frozen=True)
class ChoiceLaunch:
    """`whole_blocks`: that one program searches without shortlists; `part_blocks`: of a shortlist, a power of two;
    `thread_scores`: of a thread, in either search."""

    whole_blocks: int
    part_blocks: int
    thread_scores: int

    def room(self, num_blocks: int) -> int:
        """Blocks that the scores of a row need memory for: whole programs load without asking where the end is."""
        if num_blocks <= self.whole_blocks:
            return max(16, 1 << (num_blocks - 1).bit_length())
        return -(-num_blocks // self.part_blocks) * self.part_blocks

    def num_warps(self, num_scores: int) -> int:
        """Warps of a program that searches so many scores."""
        return min(32, max(1, num_scores // (32 * self.thread_scores)))


# By compute capability; the one at or below the card's is taken.
LAUNCH = {80: ChoiceLaunch(whole_blocks=4096, part_blocks=2048, thread_scores=16)}


@triton.jit
def _load_scores(starts_ptr, ends_ptr, block):
    """The scores of blocks: of the windows that start in a block, and of the last that starts in the one before."""
    end = tl.load(ends_ptr + block)
    return tl.maximum(tl.load(starts_ptr + block), tl.where(block > 0, end, LOWEST))


@triton.jit
def _shortlist_kernel(
    starts_ptr, ends_ptr, position_ptr, scores_ptr, blocks_ptr, num_groups, sparse_from, capacity,
    PART: tl.constexpr, PARTS: tl.constexpr, ROOM: tl.constexpr, BLOCK: tl.constexpr, INIT: tl.constexpr,
    LOCAL: tl.constexpr, FREE: tl.constexpr, BUDGET: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: FREE to ROOM of the largest scores of a part of the blocks of one row and KV head, ascending by
    block, and -1 behind them. Scores and blocks [rows, Hkv, PARTS, ROOM]."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    part, row, group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    lists = row * num_groups + group
    block = part * PART + tl.arange(0, PART)
    scores = _load_scores(starts_ptr + lists * capacity, ends_ptr + lists * capacity, block)  # as the position comes
    position = tl.load(position_ptr).to(tl.int32) + row
    own = position // BLOCK
    end_free = own - LOCAL
    if (own >= BUDGET) & (position >= sparse_from) & (part * PART < end_free):
        can_be = (block >= INIT) & (block < end_free)
        num_there = tl.minimum(end_free, (part + 1) * PART) - tl.maximum(part * PART, INIT)
        keeps, place, num_kept, scores = largest_of_list(scores, can_be, num_there, FREE, ROOM)
        at = (lists * PARTS + part) * ROOM
        tl.store(scores_ptr + at + place, scores, mask=keeps)
        tl.store(blocks_ptr + at + place, block, mask=keeps)
        rest = tl.arange(0, ROOM)
        tl.store(blocks_ptr + at + rest, tl.full([ROOM], -1, tl.int32), mask=rest >= num_kept)


@triton.jit
def _store_picks(
    picks_ptr, weights_ptr, own, num_picks, scores, block, can_be, num_there,
    PICKS_TILE: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr, FREE: tl.constexpr, BUDGET: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """The FREE largest of the blocks that can be chosen, and the forced ones around them; with weights if wanted."""
    keeps, place, _, scores = largest_of_list(scores, can_be, num_there, FREE, FREE)
    columns = tl.arange(0, PICKS_TILE)
    forced = tl.where(columns < INIT, columns, own - LOCAL + columns - INIT - FREE)
    forced = tl.where(columns < BUDGET, forced, -1)
    is_forced = ((columns < INIT) | (columns >= INIT + FREE)) & (columns < num_picks)
    if HAS_WEIGHTS:  # ahead of the picks: after them ptxas spills
        tl.store(weights_ptr + INIT + place, scores, mask=keeps)
        tl.store(weights_ptr + columns, tl.full([PICKS_TILE], float("-inf"), tl.float32), mask=is_forced)
    tl.store(picks_ptr + INIT + place, block.to(tl.int64), mask=keeps)
    tl.store(picks_ptr + columns, forced.to(tl.int64), mask=is_forced)


@triton.jit
def _store_every_block(picks_ptr, own, num_picks, PICKS_TILE: tl.constexpr):
    columns = tl.arange(0, PICKS_TILE)
    tl.store(picks_ptr + columns, tl.where(columns <= own, columns, -1).to(tl.int64), mask=columns < num_picks)


@triton.jit
def _choose_kernel(
    starts_ptr, ends_ptr, position_ptr, picks_ptr, weights_ptr, num_groups, num_picks, sparse_from, capacity,
    stride_pt, stride_pg,
    BLOCKS: tl.constexpr, PICKS_TILE: tl.constexpr, BLOCK: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr,
    FREE: tl.constexpr, BUDGET: tl.constexpr, HAS_WEIGHTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: the picks of one row and KV head out of all scores, ascending; ties go to the lower block."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row, group = tl.program_id(0), tl.program_id(1)
    lists = (row * num_groups + group) * capacity
    block = tl.arange(0, BLOCKS)
    scores = _load_scores(starts_ptr + lists, ends_ptr + lists, block)
    position = tl.load(position_ptr).to(tl.int32) + row
    own = position // BLOCK
    at = row * stride_pt + group * stride_pg
    if (own < BUDGET) | (position < sparse_from):
        _store_every_block(picks_ptr + at, own, num_picks, PICKS_TILE)
    else:
        can_be = (block >= INIT) & (block < own - LOCAL)
        _store_picks(
            picks_ptr + at, weights_ptr + at, own, num_picks, scores, block, can_be, own - LOCAL - INIT,
            PICKS_TILE, INIT, LOCAL, FREE, BUDGET, HAS_WEIGHTS,
        )  # fmt: skip


@triton.jit
def _choose_listed_kernel(
    scores_ptr, blocks_ptr, position_ptr, picks_ptr, weights_ptr, num_groups, num_picks, sparse_from,
    stride_pt, stride_pg,
    PART: tl.constexpr, LISTED: tl.constexpr, ROOM: tl.constexpr, PICKS_TILE: tl.constexpr, BLOCK: tl.constexpr,
    INIT: tl.constexpr, LOCAL: tl.constexpr, FREE: tl.constexpr, BUDGET: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program: as `_choose_kernel`, out of the shortlists of one row and KV head, which hold LISTED in all."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row, group = tl.program_id(0), tl.program_id(1)
    entries = tl.arange(0, LISTED)
    lists = (row * num_groups + group) * LISTED
    scores, block = tl.load(scores_ptr + lists + entries), tl.load(blocks_ptr + lists + entries)
    position = tl.load(position_ptr).to(tl.int32) + row
    own = position // BLOCK
    at = row * stride_pt + group * stride_pg
    if (own < BUDGET) | (position < sparse_from):
        _store_every_block(picks_ptr + at, own, num_picks, PICKS_TILE)
    else:
        is_there = (entries < tl.cdiv(own - LOCAL, PART) * ROOM) & (block >= 0)
        _store_picks(
            picks_ptr + at, weights_ptr + at, own, num_picks, scores, block, is_there, tl.sum(is_there.to(tl.int32), 0),
            PICKS_TILE, INIT, LOCAL, FREE, BUDGET, HAS_WEIGHTS,
        )  # fmt: skip


def room_for_scores(num_blocks: int, device: torch.device) -> int:
    """Blocks that scores of a row need memory for. Raises: BackendError for more than the search can count."""
    if num_blocks > MOST_BLOCKS:
        raise BackendError(f"block choice: {num_blocks:,} blocks, {MOST_BLOCKS:,} are supported")
    return entry_of_card(LAUNCH, compute_capability(device)).room(num_blocks)


def choose_by_scores(
    starts: Tensor,
    ends: Tensor,
    position: Tensor,
    picks: Tensor,
    weights: Tensor | None,
    geometry: BlockGeometry,
    sparse_from: int,
) -> None:
    """Write the picks of rows of which the first sits at `position`, and the scores that decided them, if wanted.

    A row whose position is below the reach or `sparse_from` picks every block up to its own and leaves its weights.
    Shapes: starts, ends fp32 [R, Hkv, N], N of `room_for_scores`: best score of the windows that start in a block, and
    of the last that starts in the block before; picks int64 [1, T, Hkv, S], weights fp32 alike, T at most R.
    """
    launch = entry_of_card(LAUNCH, compute_capability(starts.device))
    _, num_rows, num_groups, most_picks = picks.shape
    capacity = starts.shape[2]
    outputs = (picks, picks if weights is None else weights)
    strides = picks.stride()[1:3]
    sizes = choice_constants(geometry)
    chosen = {
        **sizes,
        "PICKS_TILE": triton.next_power_of_2(most_picks),
        "HAS_WEIGHTS": weights is not None,
        **dependent_launch(starts.device),
    }
    if capacity <= launch.whole_blocks:
        _choose_kernel[(num_rows, num_groups)](
            starts, ends, position, *outputs, num_groups, most_picks, sparse_from, capacity, *strides,
            BLOCKS=capacity, num_warps=launch.num_warps(capacity), **chosen,
        )  # fmt: skip
        return
    lists = shortlist_constants(launch, geometry, capacity)
    listed = lists["PARTS"] * lists["ROOM"]
    if listed > _MOST_LISTED:
        raise BackendError(f"block choice: shortlists of {listed:,} blocks, {_MOST_LISTED:,} are supported")
    scores = torch.empty(num_rows, num_groups, listed, dtype=torch.float32, device=starts.device)
    blocks = torch.empty(num_rows, num_groups, listed, dtype=torch.int32, device=starts.device)
    _shortlist_kernel[(capacity // launch.part_blocks, num_rows, num_groups)](
        starts, ends, position, scores, blocks, num_groups, sparse_from, capacity,
        num_warps=launch.num_warps(launch.part_blocks), **lists, **sizes, **dependent_launch(starts.device),
    )  # fmt: skip
    _choose_listed_kernel[(num_rows, num_groups)](
        scores, blocks, position, *outputs, num_groups, most_picks, sparse_from, *strides,
        PART=launch.part_blocks, LISTED=listed, ROOM=lists["ROOM"], num_warps=launch.num_warps(listed), **chosen,
    )  # fmt: skip


def choice_constants(geometry: BlockGeometry) -> dict[str, Any]:
    """The compile-time arguments of every launch."""
    return {
        "BLOCK": geometry.block_size,
        "INIT": geometry.init_blocks,
        "LOCAL": geometry.local_blocks,
        "FREE": geometry.free_blocks,
        "BUDGET": geometry.budget,
    }


def shortlist_constants(launch: ChoiceLaunch, geometry: BlockGeometry, capacity: int) -> dict[str, int]:
    """Those of the shortlists over so many blocks."""
    parts = triton.next_power_of_2(capacity // launch.part_blocks)
    return {"PART": launch.part_blocks, "PARTS": parts, "ROOM": triton.next_power_of_2(max(1, geometry.free_blocks))}
