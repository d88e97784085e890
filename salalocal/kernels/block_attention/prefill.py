"""Attention over picked blocks for many rows on a GPU; see the package.

Neighbouring rows pick much the same blocks: all share the local ones and most of the others. So a program takes a few
rows with all heads of a KV head as one tile of queries, and walks the union of their blocks: each block is read once
for the tile, and a bit per row says who picked it. What the tile computes for rows that did not is the price, and less
than reading the block for each row by itself.
`merge_blocks` makes the unions, ascending, so the blocks that need the causal mask are the last.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from salalocal.errors import BackendError
from salalocal.kernels.backend import compute_capability, entry_of_card, tl, triton
from salalocal.kernels.head_tiles import FINEST_SIDE, LOG2_E, check_head_tiles
from salalocal.kernels.kv_cache import KeyValues

_NO_BLOCK = 2**20  # more than any block number, with room for the bits of a row beside it


@dataclass(frozen=True)
class PrefillLaunch:
    """Tile sizes. `rows`: query rows that share a union, at most 8; `max_registers`: of a thread."""

    rows: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


# By compute capability; the one at or below the card's is taken.
LAUNCH = {
    80: PrefillLaunch(rows=4, num_warps=4, num_stages=2),
    86: PrefillLaunch(rows=4, num_warps=4, num_stages=2),
    90: PrefillLaunch(rows=4, num_warps=4, num_stages=3),
    120: PrefillLaunch(rows=4, num_warps=4, num_stages=2),
}


@triton.jit
def _merge_blocks_kernel(
    blocks_ptr, union_ptr, counts_ptr, num_rows, num_groups, num_picks, capacity,
    stride_b, stride_t, stride_g,
    ROWS: tl.constexpr, PICKS: tl.constexpr, NO_BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: the union of the blocks of ROWS rows, ascending, as block * 256 + bits of the rows that picked it.

    Every (block, row) is a number; sorted, the rows of a block stand side by side.
    """
    SIZE: tl.constexpr = ROWS * PICKS
    batch, group = tl.program_id(1) // num_groups, tl.program_id(1) % num_groups
    lanes = tl.arange(0, SIZE)
    row, pick = lanes // PICKS, lanes % PICKS
    rows = tl.program_id(0) * ROWS + row
    at = batch * stride_b + rows * stride_t + group * stride_g + pick
    block = tl.load(blocks_ptr + at, mask=(rows < num_rows) & (pick < num_picks), other=-1).to(tl.int32)
    block = tl.where(block < 0, NO_BLOCK, block)
    pairs = tl.sort(block * ROWS + row)
    block = pairs // ROWS
    before = tl.gather(block, tl.maximum(lanes - 1, 0), 0)
    is_first = ((lanes == 0) | (before != block)) & (block < NO_BLOCK)
    bits = tl.zeros([SIZE], tl.int32)
    for ahead in tl.static_range(ROWS):
        other = tl.gather(pairs, tl.minimum(lanes + ahead, SIZE - 1), 0)
        is_same = (other // ROWS == block) & (lanes + ahead < SIZE)
        bits |= tl.where(is_same, tl.full([SIZE], 1, tl.int32) << (other % ROWS), 0)
    place = tl.cumsum(is_first.to(tl.int32), 0) - 1
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(union_ptr + program * capacity + place, block * 256 + bits, mask=is_first)
    tl.store(counts_ptr + program, tl.sum(is_first.to(tl.int32), 0))


@triton.jit
def _attend_block(
    q, k_ptr, v_ptr, k_scales_ptr, v_scales_ptr, entry, stride_kn, stride_vn, stride_sn, num_keys, positions, tile_row,
    peak, total, out, log2_scale,
    BLOCK: tl.constexpr, DIM: tl.constexpr, IS_LAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys into the running softmax of a tile; IS_LAST applies the causal mask and the end of the keys."""
    tokens = (entry >> 8) * BLOCK + tl.arange(0, BLOCK)
    dims = tl.arange(0, DIM)
    is_there = tokens < num_keys
    if IS_LAST:
        k = tl.load(k_ptr + tokens[:, None] * stride_kn + dims[None, :], mask=is_there[:, None], other=0.0)
        v = tl.load(v_ptr + tokens[:, None] * stride_vn + dims[None, :], mask=is_there[:, None], other=0.0)
    else:
        k = tl.load(k_ptr + tokens[:, None] * stride_kn + dims[None, :])
        v = tl.load(v_ptr + tokens[:, None] * stride_vn + dims[None, :])
    scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=PRECISION)
    if k_scales_ptr is not None:
        scores *= tl.load(k_scales_ptr + tokens * stride_sn, mask=is_there, other=0.0).to(tl.float32)[None, :]
    has_picked = ((entry >> tile_row) & 1) > 0
    scores = tl.where(has_picked[:, None], scores, float("-inf"))
    if IS_LAST:
        scores = tl.where(tokens[None, :] <= positions[:, None], scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1) * log2_scale)
    weights = tl.exp2(scores * log2_scale - new_peak[:, None])
    rescale = tl.exp2(peak - new_peak)
    total = total * rescale + tl.sum(weights, 1)
    if v_scales_ptr is not None:
        weights *= tl.load(v_scales_ptr + tokens * stride_sn, mask=is_there, other=0.0).to(tl.float32)[None, :]
    out = tl.dot(weights.to(q.dtype), v.to(q.dtype), out * rescale[:, None], input_precision=PRECISION)
    return new_peak, total, out


@triton.jit
def _block_attention_prefill_kernel(
    q_ptr, k_ptr, v_ptr, k_scales_ptr, v_scales_ptr, out_ptr, union_ptr, counts_ptr, first_position, num_rows, num_keys,
    num_groups, capacity, log2_scale,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_sb, stride_sn, stride_sh, stride_ob, stride_ot, stride_oh,
    ROWS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One program: ROWS query rows of one KV head over the union of their blocks."""
    TILE: tl.constexpr = ROWS * HEADS
    batch, group = tl.program_id(1) // num_groups, tl.program_id(1) % num_groups
    tile_row = tl.arange(0, TILE) // HEADS
    rows = tl.program_id(0) * ROWS + tile_row
    heads = group * HEADS + tl.arange(0, TILE) % HEADS
    dims = tl.arange(0, DIM)
    q_at = batch * stride_qb + rows * stride_qt + heads * stride_qh
    q = tl.load(q_ptr + q_at[:, None] + dims[None, :], mask=rows[:, None] < num_rows, other=0.0)
    k_ptr += batch.to(tl.int64) * stride_kb + group * stride_kh
    v_ptr += batch.to(tl.int64) * stride_vb + group * stride_vh
    if k_scales_ptr is not None:
        k_scales_ptr += batch.to(tl.int64) * stride_sb + group * stride_sh
        v_scales_ptr += batch.to(tl.int64) * stride_sb + group * stride_sh
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    union_ptr += program * capacity
    count = tl.load(counts_ptr + program)

    positions = first_position + rows
    peak = tl.full([TILE], -1.0e30, tl.float32)  # finite: a row may have picked none of the blocks so far
    total = tl.zeros([TILE], tl.float32)
    out = tl.zeros([TILE, DIM], tl.float32)
    # Only the last two can hold keys ahead of a row: the tile's own block and, if rows cross into it, the next.
    num_complete = tl.maximum(count - 2, 0)
    for i in tl.range(0, num_complete, num_stages=STAGES):
        entry = tl.load(union_ptr + i)
        peak, total, out = _attend_block(
            q, k_ptr, v_ptr, k_scales_ptr, v_scales_ptr, entry, stride_kn, stride_vn, stride_sn, num_keys, positions,
            tile_row, peak, total, out, log2_scale, BLOCK, DIM, False, PRECISION,
        )  # fmt: skip
    for i in tl.range(num_complete, count, num_stages=1):
        entry = tl.load(union_ptr + i)
        peak, total, out = _attend_block(
            q, k_ptr, v_ptr, k_scales_ptr, v_scales_ptr, entry, stride_kn, stride_vn, stride_sn, num_keys, positions,
            tile_row, peak, total, out, log2_scale, BLOCK, DIM, True, PRECISION,
        )  # fmt: skip
    out = out / total[:, None]
    out_at = batch * stride_ob + rows * stride_ot + heads * stride_oh
    tl.store(out_ptr + out_at[:, None] + dims[None, :], out.to(out_ptr.dtype.element_ty), mask=rows[:, None] < num_rows)


def merge_blocks(blocks: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The union of the blocks of every `rows` neighbouring rows.

    Shapes: blocks integer [B, T, Hkv, S], -1 for none, S * rows at most 1,024 -> union int32 [B * Hkv, ceil(T / rows),
    S * rows], entries block * 256 + one bit per row, ascending, and counts int32 [B * Hkv, ceil(T / rows)] of them.
    """
    batch, num_rows, num_groups, num_picks = blocks.shape
    grid = (-(-num_rows // rows), batch * num_groups)
    union = torch.empty(grid[1], grid[0], num_picks * rows, dtype=torch.int32, device=blocks.device)
    counts = torch.empty(grid[1], grid[0], dtype=torch.int32, device=blocks.device)
    _merge_blocks_kernel[grid](
        blocks, union, counts, num_rows, num_groups, num_picks, union.shape[2], *blocks.stride()[:3],
        ROWS=rows, PICKS=triton.next_power_of_2(num_picks), NO_BLOCK=_NO_BLOCK, num_warps=max(1, rows // 4),
    )  # fmt: skip
    return union, counts


def block_attention_triton(
    q: Tensor, cached: KeyValues, blocks: Tensor, first_position: int, block_size: int, scale: float
) -> Tensor:
    """See `block_attention_reference`; all in bf16, fp16 or fp32, or keys and values in int8 with scales.

    Raises: ValueError as the reference; BackendError for shapes or dtypes that the kernel does not know.
    """
    batch, num_rows, num_heads, dim = q.shape
    k, v, k_scales, v_scales = cached.keys, cached.values, cached.key_scales, cached.value_scales
    num_groups = k.shape[2]
    if num_heads % num_groups or blocks.shape[:3] != (batch, num_rows, num_groups):
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and blocks {tuple(blocks.shape)} do not fit together")
    if k.shape[1] < first_position + num_rows:
        raise ValueError(f"{num_rows} queries from position {first_position} on, but only {k.shape[1]} keys")
    check_supported(q, cached, blocks, block_size)
    launch = entry_of_card(LAUNCH, compute_capability(q.device))
    union, counts = merge_blocks(blocks, launch.rows)
    out = torch.empty_like(q)
    constants = prefill_constants(launch, num_heads // num_groups, dim, block_size, q.dtype)
    _block_attention_prefill_kernel[(counts.shape[1], counts.shape[0])](
        q, k, v, k_scales, v_scales, out, union, counts, first_position, num_rows, k.shape[1], num_groups,
        union.shape[2], scale * LOG2_E, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        *((0, 0, 0) if k_scales is None else k_scales.stride()), *out.stride()[:3],
        **constants, num_warps=launch.num_warps, num_stages=launch.num_stages, maxnreg=launch.max_registers,
    )  # fmt: skip
    return out


def prefill_constants(
    launch: PrefillLaunch, heads: int, dim: int, block_size: int, dtype: torch.dtype
) -> dict[str, Any]:
    """The compile-time arguments of the kernel."""
    return {
        "ROWS": launch.rows,
        "HEADS": heads,
        "DIM": dim,
        "BLOCK": block_size,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        "STAGES": launch.num_stages,
    }


def check_supported(q: Tensor, cached: KeyValues, blocks: Tensor, block_size: int) -> None:
    """Raises BackendError for what no kernel of the block attention knows."""
    k, v = cached.keys, cached.values
    sides = {"heads per KV head": q.shape[2] // k.shape[2], "head size": q.shape[3], "block size": block_size}
    check_head_tiles("block attention", {"q": q, "k": k, "v": v, "blocks": blocks}, sides)
    if k.dtype not in (q.dtype, torch.int8):
        raise BackendError(f"block attention of {q.dtype} and {k.dtype}: keys of one dtype with q are needed, or int8")
    strides = {scales.stride() for scales in (cached.key_scales, cached.value_scales) if scales is not None}
    if len(strides) > 1:
        raise BackendError("block attention: the scales of keys and values must lie alike")
    if min(q.shape[3], block_size) < FINEST_SIDE:
        raise BackendError(f"block attention: head size {q.shape[3]}, block size {block_size}: at least 16 are needed")
    if k.shape[1] > _NO_BLOCK * block_size:
        raise BackendError(f"block attention: {k.shape[1]:,} keys, at most {_NO_BLOCK * block_size:,} are supported")
