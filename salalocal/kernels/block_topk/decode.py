"""The block choice for one or a few rows on a GPU, spread over the whole card; see the package.

Launches, none of which needs a number from the host, so a captured step stays valid as the sequence grows:
    normalise   every program: peak and sum of exp over its slice of the coarse keys
    score       every program: the normaliser out of all slices, then the block scores of its slice
    choose      one or two launches of `decode_choice`: the largest scores
The position of the first row is read from the device. Scores are logarithms in fp32, as for many rows.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from salalocal.kernels.backend import (
    HAS_INLINE_ASM,
    compute_capability,
    dependent_launch,
    entry_of_card,
    num_multiprocessors,
    tl,
    triton,
)
from salalocal.kernels.block_topk.decode_choice import choose_by_scores, room_for_scores
from salalocal.kernels.block_topk.geometry import BlockGeometry
from salalocal.kernels.block_topk.prefill import check_supported
from salalocal.kernels.block_topk.reference import heads_per_group
from salalocal.kernels.block_topk.scoring import log_sum_over_heads, row_and_head
from salalocal.kernels.head_tiles import LOG2_E

MAX_ROWS = 16  # a step of speculative decoding; more rows are prefill's
_MOST_PARTS = 128  # whose normalisers one program joins at once
_TILE_SCORES = 4096  # of one program at a time; more would not fit its registers
_TILE_ROWS = 4  # rows that one program works on; more would not fit the registers with 16 heads each


@dataclass(frozen=True)
class DecodeLaunch:
    """Tile sizes. `tile_keys`: k1 or k2 at a time; `programs_per_core`: slices per multiprocessor."""

    tile_keys: int
    programs_per_core: int
    num_warps: int
    num_stages: int


# By compute capability; the one at or below the card's is taken.
LAUNCH = {
    80: DecodeLaunch(tile_keys=64, programs_per_core=1, num_warps=4, num_stages=3),
    90: DecodeLaunch(tile_keys=128, programs_per_core=2, num_warps=4, num_stages=2),
    120: DecodeLaunch(tile_keys=64, programs_per_core=1, num_warps=4, num_stages=3),
}


@triton.jit
def _load_queries(
    q_ptr, stride_qt, stride_qh, group, first_row, num_rows, TILE: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr
):
    """All heads of a KV head of some rows, [TILE, DIM]; rows behind the last are zeros."""
    row, head = row_and_head(TILE, TILE // HEADS, HEADS)
    row += first_row
    at = (row * stride_qt + (group * HEADS + head) * stride_qh)[:, None] + tl.arange(0, DIM)[None, :]
    return tl.load(q_ptr + at, mask=row[:, None] < num_rows, other=0.0)


@triton.jit
def _normalise_kernel(
    q_ptr, k2_ptr, position_ptr, parts_ptr, num_rows, log2_scale, stride_qt, stride_qh, stride_kn, stride_kh,
    TILE: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, KEYS: tl.constexpr, COARSE_SIZE: tl.constexpr,
    COARSE_STRIDE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: peak and sum, in binary logarithms, of a slice of k2 for some rows and a KV head.

    Parts [row tiles, Hkv, slices, 2, TILE].
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    part, group, first_row = tl.program_id(0), tl.program_id(1), tl.program_id(2) * (TILE // HEADS)
    first = tl.load(position_ptr).to(tl.int32)
    q = _load_queries(q_ptr, stride_qt, stride_qh, group, first_row, num_rows, TILE, HEADS, DIM)
    row, _ = row_and_head(TILE, TILE // HEADS, HEADS)
    # Divided after the maximum: a card rounds towards zero, and would see a key where there is none yet.
    before: tl.constexpr = COARSE_STRIDE - COARSE_SIZE
    seen = tl.maximum(first + first_row + row + 1 + before, 0) // COARSE_STRIDE
    num_keys = tl.maximum(first + num_rows + before, 0) // COARSE_STRIDE
    per_part = tl.cdiv(tl.cdiv(num_keys, KEYS), tl.num_programs(0)) * KEYS
    k2_ptr += group * stride_kh
    peak = tl.full([TILE], -1.0e30, tl.float32)
    total = tl.zeros([TILE], tl.float32)
    dims = tl.arange(0, DIM)
    for start in tl.range(part * per_part, tl.minimum((part + 1) * per_part, num_keys), KEYS, num_stages=STAGES):
        keys = start + tl.arange(0, KEYS)
        k2 = tl.load(k2_ptr + keys[:, None] * stride_kn + dims[None, :], mask=keys[:, None] < num_keys, other=0.0)
        w = tl.dot(q, tl.trans(k2), input_precision=PRECISION) * log2_scale
        w = tl.where(keys[None, :] < seen[:, None], w, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(w, 1))
        total = total * tl.exp2(peak - new_peak) + tl.sum(tl.exp2(w - new_peak[:, None]), 1)
        peak = new_peak
    tile = tl.program_id(2) * tl.num_programs(1) + group
    at = parts_ptr + (tile * tl.num_programs(0) + part) * (2 * TILE) + tl.arange(0, TILE)
    tl.store(at, peak)
    tl.store(at + TILE, total)


@triton.jit
def _score_kernel(
    q_ptr, k1_ptr, position_ptr, parts_ptr, starts_ptr, ends_ptr, num_rows, num_parts, capacity, log2_scale,
    stride_qt, stride_qh, stride_kn, stride_kh,
    ROWS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, KEYS: tl.constexpr, PARTS: tl.constexpr,
    PER_BLOCK: tl.constexpr, BLOCK: tl.constexpr, LOCAL: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    HAS_ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: a slice of k1 for some rows and a KV head. starts and ends [rows, Hkv, capacity]: of every block the
    best window that starts in it, and the last that starts in the block before, which reaches into it."""
    TILE: tl.constexpr = ROWS * HEADS
    BLOCKS: tl.constexpr = KEYS // PER_BLOCK
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    part, group, first_row = tl.program_id(0), tl.program_id(1), tl.program_id(2) * ROWS
    first = tl.load(position_ptr).to(tl.int32)
    q = tl.trans(_load_queries(q_ptr, stride_qt, stride_qh, group, first_row, num_rows, TILE, HEADS, DIM))
    k1_ptr += group * stride_kh
    dims = tl.arange(0, DIM)

    slices = tl.arange(0, PARTS)
    tile = tl.program_id(2) * tl.num_programs(1) + group
    parts_at = parts_ptr + (tile * num_parts + slices[:, None]) * (2 * TILE) + tl.arange(0, TILE)[None, :]
    peaks = tl.load(parts_at, mask=slices[:, None] < num_parts, other=-1.0e30)
    totals = tl.load(parts_at + TILE, mask=slices[:, None] < num_parts, other=0.0)
    peak = tl.max(peaks, 0)
    normaliser = peak + tl.log2(tl.sum(totals * tl.exp2(peaks - peak[None, :]), 0))

    end_block = (first + num_rows - 1) // BLOCK - LOCAL
    num_keys = end_block * PER_BLOCK
    per_part = tl.cdiv(tl.cdiv(num_keys, KEYS), tl.num_programs(0)) * KEYS
    begin = part * per_part
    lists = ((first_row + tl.arange(0, ROWS)[None, :]) * tl.num_programs(1) + group) * capacity
    for start in tl.range(begin, tl.minimum(begin + per_part, num_keys), KEYS, num_stages=STAGES):
        keys = start + tl.arange(0, KEYS)
        k1 = tl.load(k1_ptr + keys[:, None] * stride_kn + dims[None, :], mask=keys[:, None] < num_keys, other=0.0)
        z = tl.dot(k1, q, input_precision=PRECISION) * log2_scale - normaliser[None, :]
        score = log_sum_over_heads(z, KEYS, ROWS, HEADS, HAS_ASM)
        block = start // PER_BLOCK + tl.arange(0, BLOCKS)
        starts = tl.max(tl.reshape(score, [BLOCKS, PER_BLOCK, ROWS]), 1)
        tl.store(starts_ptr + lists + block[:, None], starts, mask=(block < end_block)[:, None])
        is_end = (keys % PER_BLOCK == PER_BLOCK - 1) & (keys < num_keys - 1)  # no block is behind the last
        tl.store(ends_ptr + lists + (keys // PER_BLOCK + 1)[:, None], score, mask=is_end[:, None])


@dataclass(frozen=True, eq=False, slots=True)
class PickRecord:
    """Where a step leaves what it picked, and how large the scores were.

    Shapes: picks int64 [1, T, Hkv, S], as the result; weights, if wanted, fp32 of the same shape and strides: the
    binary logarithm of P_x, see the package, for the picks that it decided, -inf for all others. Rows that pick every
    block leave theirs as they are.
    """

    picks: Tensor
    weights: Tensor | None = None

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises: ValueError unless both have this shape."""
        picks, weights = self.picks, self.weights
        if picks.shape != shape or picks.dtype != torch.int64 or picks.stride(3) != 1:
            raise ValueError(f"picks are {tuple(picks.shape)} {picks.dtype}, needed is int64 {shape}")
        if weights is None:
            return
        if weights.shape != shape or weights.dtype != torch.float32 or weights.stride() != picks.stride():
            raise ValueError(f"weights of picks are {tuple(weights.shape)} {weights.dtype}, needed is fp32 {shape}")


def block_topk_decode(
    q: Tensor,
    k1: Tensor,
    k2: Tensor,
    position: Tensor,
    geometry: BlockGeometry,
    scale: float,
    sparse_from: int = 0,
    record: "PickRecord | None" = None,
) -> Tensor:
    """The blocks of up to 16 rows, the first of which sits at `position`; k1 and k2 may hold room for more keys.

    Launches are the same for every position. A row whose position is below `sparse_from` picks every block up to its
    own, which is dense attention, and the result has room for them. `record`: memory for the result and its weights.
    Shapes: q [1, T, Hq, D]; k1 [1, N1, Hkv, D]; k2 [1, N2, Hkv, D]; position int32 or int64 [1] on the device; result
    int64 [1, T, Hkv, S], S = `num_picks`, -1 behind the last.
    Raises: ValueError for shapes that do not fit; BackendError for a geometry or dtype that is not known.
    """
    if q.shape[0] != 1 or not 1 <= q.shape[1] <= MAX_ROWS:
        raise ValueError(f"q is {tuple(q.shape)}, needed are 1 to {MAX_ROWS} rows of one sequence")
    heads = heads_per_group(q, k1, k2, 0, q.shape[1], geometry)
    check_supported(q, k1, k2, heads, geometry)
    launch = entry_of_card(LAUNCH, compute_capability(q.device))
    constants = decode_constants(launch, geometry, heads, q)
    num_rows, num_groups = q.shape[1], k1.shape[2]
    tile = constants["ROWS"] * heads
    row_tiles = -(-num_rows // constants["ROWS"])
    programs = num_multiprocessors(q.device) * launch.programs_per_core
    num_parts = min(_MOST_PARTS, max(1, programs // (num_groups * row_tiles)))
    num_blocks = max(1, k1.shape[1] // geometry.pooled_per_block + 1 - geometry.local_blocks)  # that can be chosen
    capacity = room_for_scores(num_blocks, q.device)
    parts = torch.empty(row_tiles, num_groups, num_parts, 2, tile, dtype=torch.float32, device=q.device)
    starts, ends = torch.empty(
        2, row_tiles * constants["ROWS"], num_groups, capacity, dtype=torch.float32, device=q.device
    )
    wanted = (1, num_rows, num_groups, num_picks(geometry, sparse_from))
    record = record or PickRecord(torch.empty(wanted, dtype=torch.int64, device=q.device))
    record.check(wanted)
    settings = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, **dependent_launch(q.device)}
    q_strides = (q.stride(1), q.stride(2))
    _normalise_kernel[(num_parts, num_groups, row_tiles)](
        q, k2, position, parts, num_rows, scale * LOG2_E, *q_strides, k2.stride(1), k2.stride(2),
        TILE=tile, **_only(constants, "HEADS DIM KEYS COARSE_SIZE COARSE_STRIDE PRECISION STAGES"), **settings,
    )  # fmt: skip
    _score_kernel[(num_parts, num_groups, row_tiles)](
        q, k1, position, parts, starts, ends, num_rows, num_parts, capacity, scale * LOG2_E,
        *q_strides, k1.stride(1), k1.stride(2), PARTS=triton.next_power_of_2(num_parts),
        **_only(constants, "ROWS HEADS DIM KEYS PER_BLOCK BLOCK LOCAL PRECISION STAGES HAS_ASM"), **settings,
    )  # fmt: skip
    choose_by_scores(starts, ends, position, record.picks, record.weights, geometry, sparse_from)
    return record.picks


def num_picks(geometry: BlockGeometry, sparse_from: int) -> int:
    """The most blocks that a row of a step picks."""
    return max(geometry.budget, -(-sparse_from // geometry.block_size))


def decode_constants(launch: DecodeLaunch, geometry: BlockGeometry, heads: int, q: Tensor) -> dict[str, Any]:
    """The compile-time arguments of both kernels."""
    rows = max(min(triton.next_power_of_2(q.shape[1]), _TILE_ROWS), 16 // heads)
    return {
        "ROWS": rows,
        "HEADS": heads,
        "DIM": q.shape[3],
        "KEYS": max(min(launch.tile_keys, _TILE_SCORES // (rows * heads)), geometry.pooled_per_block),
        "COARSE_SIZE": geometry.coarse_kernel_size,
        "COARSE_STRIDE": geometry.coarse_kernel_stride,
        "PER_BLOCK": geometry.pooled_per_block,
        "BLOCK": geometry.block_size,
        "LOCAL": geometry.local_blocks,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
        "STAGES": launch.num_stages,
        "HAS_ASM": HAS_INLINE_ASM,
    }


def _only(constants: dict[str, Any], names: str) -> dict[str, Any]:
    return {name: constants[name] for name in names.split()}
