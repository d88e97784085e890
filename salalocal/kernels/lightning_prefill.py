"""Lightning attention over many tokens, in Triton: one launch, parallel over heads and segments of the sequence.

In come the heads of a prefill chunk and the state before it, out come its outputs and the state after it; for
`lightning`, whose formula and reference this follows. Tokens are cut into segments, these into chunks of C tokens. With
S_n the state before chunk n:
    S_(n+1) = exp(-s C) S_n + sum_j exp(-s (C - 1 - j)) k_j^T v_j
    o_i     = scale * ( exp(-s (i + 1)) q_i S_n + sum_{j <= i} exp(-s (i - j)) (q_i . k_j) v_j )
A program has VALUES value channels of one head in one segment, and one of two jobs:
    sum       what the segment adds to the state, from its keys and values alone; then it waits for the state before the
              segment, adds, and hands on the state after it: one short step a segment is all that is serial
    outputs   waits for the state before the segment and walks over its chunks, the state in registers
Programs draw tickets, segment by segment: the sums of one, and the outputs of the segment LAG before. They wait only
for lower tickets; keys and values come from memory for the sum, and for the outputs soon after from the L2 cache.
Precision: what is handed on is fp32 and adds exp(-s ...) v_j as the sum of two bf16 numbers, good to 2^-16. What ends
in outputs only (scores, S_n under q, the v_j of a segment's own state) is rounded to bf16 once, as the output itself.
All exponents are differences of positions, so nothing overflows.
Raw queries and keys are normed and turned by a launch of their own before, which copies at the speed of memory; turned
in passing, by either job or by a third one, they took no less time.
Bytes at the released shape: 32 KiB a token and layer for q, k, v and o, raw heads 32 KiB more; in the L2 cache k and v
once more, and states (fp32), 2 MiB written and 4 MiB read a segment.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from salalocal.errors import BackendError
from salalocal.kernels.backend import compute_capability, entry_of_card, tl, triton
from salalocal.kernels.qk_norm_rope import NormRope, check_heads, check_norm_rope, qk_norm_rope_triton

LOG2_E = 1.4426950408889634


@triton.jit
def _wait_for(counter_ptr, count):
    """Until a counter that other programs count up has come to `count`."""
    while tl.atomic_add(counter_ptr, 0, sem="acquire") < count:
        pass


@triton.jit
def _state_before(
    segment,
    state_ptr,
    states_ptr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUES: tl.constexpr,
    HAS_STATE: tl.constexpr,
):
    """The state before a segment [K, VALUES], which is there; past the L1 cache where this launch wrote it."""
    at = tl.arange(0, KEY_DIM)[:, None] * VALUE_DIM + tl.arange(0, VALUES)[None, :]
    if segment > 0:
        state = tl.load(states_ptr + at, cache_modifier=".cg")
    elif HAS_STATE:
        state = tl.load(state_ptr + at)
    else:
        state = tl.zeros((KEY_DIM, VALUES), tl.float32)
    return state


@triton.jit
def _segment_sum(
    k_ptr,
    v_ptr,
    k_stride_t,
    v_stride_t,
    slope,
    count,
    CHUNK: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """What `count` tokens add to VALUES value channels of one head's state [K, VALUES]."""
    steps = tl.arange(0, CHUNK)
    rows = steps[:, None]
    columns = tl.arange(0, KEY_DIM)[None, :]
    values = tl.arange(0, VALUES)[None, :]
    state = tl.zeros((KEY_DIM, VALUES), tl.float32)
    for first in tl.range(0, count, CHUNK, num_stages=STAGES):
        left = tl.minimum(count - first, CHUNK)
        k = tl.load(k_ptr + (first + rows) * k_stride_t + columns, mask=rows < left, other=0.0)
        v = tl.load(v_ptr + (first + rows) * v_stride_t + values, mask=rows < left, other=0.0)
        decay = tl.exp2(-slope * tl.maximum(left - 1 - steps, 0).to(tl.float32))
        wide = v.to(tl.float32) * decay[:, None]
        high = (wide.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)  # a bf16 number
        keys = tl.trans(k)
        state *= tl.exp2(-slope * left)
        state = tl.dot(keys, high.to(k.dtype), state)
        state = tl.dot(keys, (wide - high).to(k.dtype), state)
    return state


@triton.jit
def _segment_outputs(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    q_stride_t,
    k_stride_t,
    v_stride_t,
    o_stride_t,
    state,
    slope,
    scale,
    count,
    CHUNK: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The outputs of `count` tokens in VALUES value channels of one head; `state` [K, VALUES] is the one before."""
    steps = tl.arange(0, CHUNK)
    rows = steps[:, None]
    columns = tl.arange(0, KEY_DIM)[None, :]
    values = tl.arange(0, VALUES)[None, :]
    since_start = tl.exp2(-slope * (steps + 1)) * scale
    until_end = tl.exp2(-slope * (CHUNK - 1 - steps))
    over_chunk = tl.exp2(-slope * CHUNK)
    for first in tl.range(0, count, CHUNK, num_stages=STAGES):
        is_there = rows < count - first
        q = tl.load(q_ptr + (first + rows) * q_stride_t + columns, mask=is_there, other=0.0)
        k = tl.load(k_ptr + (first + rows) * k_stride_t + columns, mask=is_there, other=0.0)
        v = tl.load(v_ptr + (first + rows) * v_stride_t + values, mask=is_there, other=0.0)
        o = tl.dot(q, state.to(q.dtype)) * since_start[:, None]
        # After the last chunk, which may be short, nobody reads the state.
        decayed = (v.to(tl.float32) * until_end[:, None]).to(v.dtype)
        state = tl.dot(tl.trans(k), decayed, state * over_chunk)
        exponents = (-slope * steps)[:, None] + (slope * steps)[None, :]
        exponents = tl.where(rows >= steps[None, :], exponents, float("-inf"))
        scores = (tl.dot(q, tl.trans(k)) * (tl.exp2(exponents) * scale)).to(q.dtype)
        o = tl.dot(scores, v, o)
        tl.store(o_ptr + (first + rows) * o_stride_t + values, o.to(o_ptr.dtype.element_ty), mask=is_there)


@triton.jit(do_not_specialize=["num_tokens", "segment_tokens", "num_rows"])
def _prefill_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    state_ptr,
    new_state_ptr,
    states_ptr,
    counters_ptr,
    slopes_ptr,
    q_stride_b,
    q_stride_t,
    q_stride_h,
    k_stride_b,
    k_stride_t,
    k_stride_h,
    v_stride_b,
    v_stride_t,
    v_stride_h,
    o_stride_b,
    o_stride_t,
    o_stride_h,
    scale,
    num_tokens,
    segment_tokens,
    num_rows,
    NUM_HEADS: tl.constexpr,
    CHUNK: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUES: tl.constexpr,
    LAG: tl.constexpr,
    SUM_STAGES: tl.constexpr,
    OUTPUT_STAGES: tl.constexpr,
    LOG2_E: tl.constexpr,
    HAS_STATE: tl.constexpr,
):
    """One job by ticket; num_rows: B * H. The state before segment n > 0 is states[n - 1].

    states fp32 [segments - 1, B * H, K, V]; counters [1 + strands], zero before: tickets, and how many states each
    strand has handed on.
    """
    strands: tl.constexpr = VALUE_DIM // VALUES
    num_strands = num_rows * strands
    num_segments = tl.cdiv(num_tokens, segment_tokens)
    ticket = tl.atomic_add(counters_ptr, 1)
    strand = ticket % num_strands
    is_sum = ticket // num_strands % 2 == 0
    segment = ticket // num_strands // 2
    segment -= 0 if is_sum else LAG
    if (segment >= 0) & (segment < num_segments):
        row = strand // strands
        first_value = strand % strands * VALUES
        batch = (row // NUM_HEADS).to(tl.int64)
        head = row % NUM_HEADS
        first = segment.to(tl.int64) * segment_tokens
        count = tl.minimum(num_tokens - segment * segment_tokens, segment_tokens)
        slope = tl.load(slopes_ptr + head) * LOG2_E
        counter_ptr = counters_ptr + 1 + strand
        q_ptr += batch * q_stride_b + first * q_stride_t + head * q_stride_h
        k_ptr += batch * k_stride_b + first * k_stride_t + head * k_stride_h
        v_ptr += batch * v_stride_b + first * v_stride_t + head * v_stride_h + first_value
        o_ptr += batch * o_stride_b + first * o_stride_t + head * o_stride_h + first_value
        at_row = row.to(tl.int64) * (KEY_DIM * VALUE_DIM) + first_value
        states_stride = num_rows.to(tl.int64) * (KEY_DIM * VALUE_DIM)
        states_ptr += (segment - 1) * states_stride + at_row
        if HAS_STATE:
            state_ptr += at_row
        if is_sum:
            added = _segment_sum(
                k_ptr, v_ptr, k_stride_t, v_stride_t, slope, count, CHUNK, KEY_DIM, VALUES, SUM_STAGES
            )  # fmt: skip
            _wait_for(counter_ptr, segment)
            state = _state_before(segment, state_ptr, states_ptr, KEY_DIM, VALUE_DIM, VALUES, HAS_STATE)
            state = tl.fma(state, tl.exp2(-slope * count), added)
            to = new_state_ptr + at_row if segment == num_segments - 1 else states_ptr + states_stride
            to += tl.arange(0, KEY_DIM)[:, None] * VALUE_DIM + tl.arange(0, VALUES)[None, :]
            tl.store(to, state)
            tl.debug_barrier()
            tl.atomic_xchg(counter_ptr, segment + 1, sem="release")
        else:
            _wait_for(counter_ptr, segment)
            state = _state_before(segment, state_ptr, states_ptr, KEY_DIM, VALUE_DIM, VALUES, HAS_STATE)
            _segment_outputs(
                q_ptr, k_ptr, v_ptr, o_ptr, q_stride_t, k_stride_t, v_stride_t, o_stride_t,
                state, slope, scale, count, CHUNK, KEY_DIM, VALUES, OUTPUT_STAGES,
            )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillLaunch:
    """How the kernel is launched: tokens of a segment, at most, and of a chunk, value channels of a program, warps.

    `lag`: segments by which outputs follow sums. `sum_stages`, `output_stages`: Triton's pipeline stages of the loops
    over chunks; from 3 on, a chunk is on its way from memory while another is computed.
    """

    segment: int
    chunk: int
    values: int
    lag: int
    num_warps: int
    sum_stages: int
    output_stages: int


# By compute capability, the largest that is not above the card's. Only 90 has wgmma.
LAUNCHES = {
    80: PrefillLaunch(segment=512, chunk=32, values=64, lag=1, num_warps=4, sum_stages=3, output_stages=3),
    90: PrefillLaunch(segment=512, chunk=64, values=64, lag=0, num_warps=4, sum_stages=3, output_stages=2),
    100: PrefillLaunch(segment=512, chunk=32, values=64, lag=1, num_warps=4, sum_stages=3, output_stages=3),
}
PREFILL_DTYPE = torch.bfloat16
MAX_STATE_SIDE = 128  # channels of a key or value head: a program holds a whole chunk of one
MIN_SEGMENTS = 8  # where segments are longer than two chunks
MAX_LAUNCH_TOKENS = 8192  # 30 MiB of states at 32 heads of 128 and segments of 512


@dataclass(frozen=True, slots=True)
class Recurrence:
    """What a prefill needs beside q, k and v; with `norm_rope` q and k are raw. See `lightning_prefill_triton`."""

    slopes: Tensor
    scale: float
    state: Tensor | None
    norm_rope: NormRope | None = None


def lightning_prefill_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    recurrence: Recurrence,
    boundaries: Sequence[int] = (),
) -> tuple[Tensor, list[Tensor]]:
    """Lightning attention over T tokens by the kernel.

    Shapes: q, k [B, T, H, K]; v [B, T, H, V], all bf16; slopes fp32 [H]; state fp32 [B, H, K, V], left as it is, None
    for zeros. `boundaries`: counts of tokens, ascending and below T, after which the state is wanted as well.
    Result: outputs [B, T, H, V] in the dtype of q, and the states after each boundary and after the last token.
    Raises: ValueError for shapes that do not fit each other; BackendError for heads that the kernels have no form for.
    """
    check_prefill(q, k, v, recurrence)
    return run_prefill(q, k, v, recurrence, launch_for(q.device), boundaries)


def launch_for(device: torch.device) -> PrefillLaunch:
    """The launch data of a card."""
    return entry_of_card(LAUNCHES, compute_capability(device))


def run_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    recurrence: Recurrence,
    launch: PrefillLaunch,
    boundaries: Sequence[int] = (),
) -> tuple[Tensor, list[Tensor]]:
    """The same with everything checked and the launch given."""
    num_tokens = q.shape[1]
    o = torch.empty(v.shape, dtype=q.dtype, device=q.device)
    state = recurrence.state
    kept: list[Tensor] = []
    for start, end in pairwise([0, *boundaries, num_tokens]):
        for first in range(start, end, MAX_LAUNCH_TOKENS):
            piece = slice(first, min(first + MAX_LAUNCH_TOKENS, end))
            block = (*_turned(q[:, piece], k[:, piece], recurrence.norm_rope, piece), v[:, piece], o[:, piece])
            state = _launch(block, recurrence, state, launch)
        kept.append(q.new_zeros(_state_shape(q, v), dtype=torch.float32) if state is None else state)
    return o, kept


def _turned(q: Tensor, k: Tensor, norm_rope: NormRope | None, piece: slice) -> tuple[Tensor, Tensor]:
    """A piece of queries and keys, normed and turned if they are raw."""
    if norm_rope is None:
        return q, k
    return qk_norm_rope_triton(q, k, replace(norm_rope, positions=norm_rope.positions[piece]))


def _launch(
    block: tuple[Tensor, Tensor, Tensor, Tensor],
    recurrence: Recurrence,
    state: Tensor | None,
    launch: PrefillLaunch,
) -> Tensor:
    """The kernel over q, k, v, o of some tokens; the state after them."""
    q, v = block[0], block[2]
    batch, num_heads, key_dim, value_dim = _state_shape(q, v)
    values = min(launch.values, value_dim)
    segment_tokens = segment_tokens_for(q.shape[1], launch)
    num_rows, num_segments = batch * num_heads, triton.cdiv(q.shape[1], segment_tokens)
    num_strands = num_rows * (value_dim // values)
    after = torch.empty((batch, num_heads, key_dim, value_dim), dtype=torch.float32, device=q.device)
    states = torch.empty((num_segments - 1, num_rows, key_dim, value_dim), dtype=torch.float32, device=q.device)
    counters = torch.zeros(1 + num_strands, dtype=torch.int32, device=q.device)
    _prefill_kernel[(2 * num_strands * (num_segments + launch.lag),)](
        *block,
        state,
        after,
        states,
        counters,
        recurrence.slopes,
        *(stride for x in block for stride in x.stride()[:3]),
        recurrence.scale,
        q.shape[1],
        segment_tokens,
        num_rows,
        NUM_HEADS=num_heads,
        CHUNK=launch.chunk,
        KEY_DIM=key_dim,
        VALUE_DIM=value_dim,
        VALUES=values,
        LAG=launch.lag,
        SUM_STAGES=launch.sum_stages,
        OUTPUT_STAGES=launch.output_stages,
        LOG2_E=LOG2_E,
        HAS_STATE=state is not None,
        num_warps=launch.num_warps,
    )
    return after


def segment_tokens_for(num_tokens: int, launch: PrefillLaunch) -> int:
    """Shorter segments for few tokens, so that all multiprocessors have work."""
    wanted = int(triton.next_power_of_2(triton.cdiv(num_tokens, MIN_SEGMENTS)))
    return max(2 * launch.chunk, min(wanted, launch.segment))


def _state_shape(q: Tensor, v: Tensor) -> tuple[int, int, int, int]:
    return q.shape[0], q.shape[2], q.shape[3], v.shape[3]


def check_prefill(q: Tensor, k: Tensor, v: Tensor, recurrence: Recurrence) -> None:
    """Raises: ValueError, BackendError as `lightning_prefill_triton`."""
    slopes, state = recurrence.slopes, recurrence.state
    if k.shape != q.shape or v.shape[:3] != q.shape[:3] or slopes.shape != (q.shape[2],):
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, slopes {tuple(slopes.shape)}"
        raise ValueError(f"lightning: {shapes}")
    needed = (q.shape[0], *q.shape[2:], v.shape[3])
    if state is not None and (state.shape != needed or state.dtype != torch.float32 or not state.is_contiguous()):
        raise ValueError(f"lightning: the state is {tuple(state.shape)} {state.dtype}, needed is fp32 {needed}")
    if not {k.dtype, v.dtype} <= {q.dtype} or slopes.dtype != torch.float32:
        raise ValueError(f"lightning: q is {q.dtype}, k {k.dtype}, v {v.dtype}, slopes {slopes.dtype}")
    for x in (q, k, v):
        check_heads(x)
        if x.shape[3] > MAX_STATE_SIDE or x.dtype != PREFILL_DTYPE:
            limits = f"bfloat16 heads of at most {MAX_STATE_SIDE} channels"
            raise BackendError(f"the kernel takes {limits}, not {tuple(x.shape)} in {x.dtype}")
    if recurrence.norm_rope is not None:
        check_norm_rope(q, k, recurrence.norm_rope)
