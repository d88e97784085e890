"""Attention over picked blocks for one or a few rows on a GPU, spread over the whole card; see the package.

Two launches, valid for every position, which is read from the device: the blocks of a row are dealt out to programs,
each of which leaves its peak, sum and unscaled output; a second launch joins them and applies the output gate.
Codes of an 8-bit cache enter the products as they are; their scales multiply scores and weights.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from salalocal.kernels.backend import compute_capability, dependent_launch, entry_of_card, tl, triton
from salalocal.kernels.block_attention.prefill import check_supported
from salalocal.kernels.head_tiles import LOG2_E
from salalocal.kernels.kv_cache import KeyValues

MAX_ROWS = 16  # a step of speculative decoding; more rows are prefill's
_LEAST_TILE = 16  # what tl.dot takes at least


@dataclass(frozen=True)
class DecodeLaunch:
    """`programs`: so many share the blocks of all rows of a KV head, but at most `parts` those of one row."""

    programs: int
    parts: int
    num_warps: int


# By compute capability; the one at or below the card's is taken.
LAUNCH = {80: DecodeLaunch(programs=256, parts=96, num_warps=8)}


@triton.jit
def _attend_part_kernel(
    q_ptr, k_ptr, v_ptr, k_scales_ptr, v_scales_ptr, picks_ptr, position_ptr, outs_ptr, weights_ptr, num_picks,
    log2_scale, stride_qt, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh, stride_sn, stride_sh, stride_pt,
    stride_pg,
    HEADS: tl.constexpr, TILE: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program: every `parts`-th block of one row and KV head. Outs [T, Hkv, parts, HEADS, D] of which the peaks and
    sums stand in weights [T, Hkv, parts, 2, HEADS]."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    part, row, group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    parts = tl.num_programs(0)
    position = tl.load(position_ptr).to(tl.int32) + row
    head, dims = tl.arange(0, TILE), tl.arange(0, DIM)
    q_at = row * stride_qt + (group * HEADS + head)[:, None] * stride_qh + dims[None, :]
    q = tl.load(q_ptr + q_at, mask=head[:, None] < HEADS, other=0.0)
    k_ptr += group * stride_kh
    v_ptr += group * stride_vh
    picks_ptr += row * stride_pt + group * stride_pg
    peak = tl.full([TILE], -1.0e30, tl.float32)
    total = tl.zeros([TILE], tl.float32)
    out = tl.zeros([TILE, DIM], tl.float32)
    for i in tl.range(part, num_picks, parts, num_stages=1):
        block = tl.load(picks_ptr + i)
        if block >= 0:
            tokens = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            is_seen = tokens <= position
            k = tl.load(k_ptr + tokens[:, None] * stride_kn + dims[None, :], mask=is_seen[:, None], other=0.0)
            v = tl.load(v_ptr + tokens[:, None] * stride_vn + dims[None, :], mask=is_seen[:, None], other=0.0)
            scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=PRECISION) * log2_scale
            if k_scales_ptr is not None:
                scales_at = group * stride_sh + tokens * stride_sn
                scores *= tl.load(k_scales_ptr + scales_at, mask=is_seen, other=0.0).to(tl.float32)[None, :]
            scores = tl.where(is_seen[None, :], scores, float("-inf"))
            new_peak = tl.maximum(peak, tl.max(scores, 1))
            weights = tl.exp2(scores - new_peak[:, None])
            rescale = tl.exp2(peak - new_peak)
            total = total * rescale + tl.sum(weights, 1)
            if v_scales_ptr is not None:
                weights *= tl.load(v_scales_ptr + scales_at, mask=is_seen, other=0.0).to(tl.float32)[None, :]
            out = tl.dot(weights.to(q.dtype), v.to(q.dtype), out * rescale[:, None], input_precision=PRECISION)
            peak = new_peak
    at = (row * tl.num_programs(2) + group) * parts + part
    out_at = at * (HEADS * DIM) + head[:, None] * DIM + dims[None, :]
    tl.store(outs_ptr + out_at, out, mask=head[:, None] < HEADS)
    tl.store(weights_ptr + at * (2 * HEADS) + head, peak, mask=head < HEADS)
    tl.store(weights_ptr + at * (2 * HEADS) + HEADS + head, total, mask=head < HEADS)


@triton.jit
def _join_parts_kernel(
    outs_ptr, weights_ptr, gate_ptr, out_ptr, parts, stride_gt, stride_ot, stride_oh,
    HEADS: tl.constexpr, DIM: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: one head of one row, its parts weighed by their sums, times the gate if there is one."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    head, row = tl.program_id(0), tl.program_id(1)
    num_groups = tl.num_programs(0) // HEADS
    at = (row * num_groups + head // HEADS) * parts + tl.arange(0, PARTS)
    lane = head % HEADS
    is_there = tl.arange(0, PARTS) < parts
    peaks = tl.load(weights_ptr + at * (2 * HEADS) + lane, mask=is_there, other=-1.0e30)
    totals = tl.load(weights_ptr + at * (2 * HEADS) + HEADS + lane, mask=is_there, other=0.0)
    weights = tl.exp2(peaks - tl.max(peaks, 0))
    dims = tl.arange(0, DIM)
    outs_at = (at * HEADS + lane)[:, None] * DIM + dims[None, :]
    outs = tl.load(outs_ptr + outs_at, mask=is_there[:, None], other=0.0)
    out = tl.sum(outs * weights[:, None], 0) / tl.sum(totals * weights, 0)
    out = out.to(out_ptr.dtype.element_ty)
    if gate_ptr is not None:  # rounded where kernels/gate.py rounds
        gate = tl.load(gate_ptr + row * stride_gt + head * DIM + dims)
        gate = (1 / (1 + tl.exp(-gate.to(tl.float32)))).to(gate.dtype)
        out = (out.to(tl.float32) * gate.to(tl.float32)).to(out.dtype)
    tl.store(out_ptr + row * stride_ot + head * stride_oh + dims, out)


def block_attention_decode(
    q: Tensor,
    cached: KeyValues,
    picks: Tensor,
    position: Tensor,
    block_size: int,
    scale: float,
    gate: Tensor | None = None,
) -> Tensor:
    """Attend from up to 16 rows, the first of which sits at `position`; the cache may hold room for more tokens.

    Shapes: q [1, T, Hq, D]; cached as `KeyValues` says, of one sequence; picks integer [1, T, Hkv, S], -1 for none;
    position int32 or int64 [1] on the device; gate [T, Hq * D] of what `kernels.gate` applies to the result; result
    as q. Raises: ValueError for shapes that do not fit; BackendError for what is not supported.
    """
    batch, num_rows, num_heads, dim = q.shape
    num_groups = cached.keys.shape[2]
    if batch != 1 or not 1 <= num_rows <= MAX_ROWS or picks.shape[:3] != (1, num_rows, num_groups):
        raise ValueError(f"q {tuple(q.shape)} and picks {tuple(picks.shape)}: 1 to {MAX_ROWS} rows of one sequence")
    if gate is not None and (gate.shape != (num_rows, num_heads * dim) or gate.stride(-1) != 1):
        raise ValueError(f"gate is {tuple(gate.shape)}, needed is {(num_rows, num_heads * dim)}, its last axis dense")
    check_supported(q, cached, picks, block_size)
    launch = entry_of_card(LAUNCH, compute_capability(q.device))
    constants = decode_constants(num_heads // num_groups, dim, block_size, q.dtype)
    parts = min(launch.parts, max(1, launch.programs // num_rows))
    heads = num_heads // num_groups
    outs = torch.empty(num_rows, num_groups, parts, heads, dim, dtype=torch.float32, device=q.device)
    weights = torch.empty(num_rows, num_groups, parts, 2, heads, dtype=torch.float32, device=q.device)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k, v, k_scales, v_scales = cached.keys, cached.values, cached.key_scales, cached.value_scales
    pdl = dependent_launch(q.device)
    _attend_part_kernel[(parts, num_rows, num_groups)](
        q, k, v, k_scales, v_scales, picks, position, outs, weights, picks.shape[3], scale * LOG2_E,
        *q.stride()[1:3], *k.stride()[1:3], *v.stride()[1:3],
        *((0, 0) if k_scales is None else k_scales.stride()[1:3]), *picks.stride()[1:3],
        **constants, num_warps=launch.num_warps, **pdl,
    )  # fmt: skip
    _join_parts_kernel[(num_heads, num_rows)](
        outs, weights, gate, out, parts, 0 if gate is None else gate.stride(0), *out.stride()[1:3],
        HEADS=heads, DIM=dim, PARTS=triton.next_power_of_2(parts), num_warps=4, **pdl,
    )  # fmt: skip
    return out


def decode_constants(heads: int, dim: int, block_size: int, dtype: torch.dtype) -> dict[str, Any]:
    """The compile-time arguments of the first kernel."""
    return {
        "HEADS": heads,
        "TILE": max(_LEAST_TILE, heads),
        "DIM": dim,
        "BLOCK": block_size,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
    }
