"""Lightning attention over many tokens, in Triton: one launch, parallel over heads and chunks of the sequence.

In come the heads of a prefill chunk and the state before it, out come its outputs and the state after it; for
`lightning`, whose formula and reference this follows. With chunks of C tokens and S_n the state before chunk n:
    S_(n+1) = exp(-s C) S_n + sum_j exp(-s (C - 1 - j)) k_j^T v_j
    o_i     = scale * ( exp(-s (i + 1)) q_i S_n + sum_{j <= i} exp(-s (i - j)) (q_i . k_j) v_j )
Programs draw tickets. The first ones each carry the state of one head, VALUES of its value channels, over all chunks
and leave behind every S_n, which is all that is serial. The others make the outputs of one chunk of one head each, in
the order of chunks; they wait only for lower tickets, so they follow close behind and find k and v in the L2 cache.
Precision: the carried state is fp32 and adds exp(-s ...) v_j as the sum of two bf16 numbers, good to 2^-16. What is an
output only (scores, S_n under q) is rounded to bf16 once, as the output itself. All exponents are differences of
positions, so nothing overflows.
Raw queries are normed and turned on their way in. Keys are read twice, once by the programs that all wait for: they are
turned by a launch of their own before.
Bytes at the released shape: 32 KiB a token and layer for q, k, v and o, raw keys 16 KiB more; in the L2 cache k and v
once more, and S_n (bf16) written and read, 16 KiB a token where C is 128.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from salalocal.errors import BackendError
from salalocal.kernels.backend import HAS_INLINE_ASM, compute_capability, entry_of_card, tl, triton
from salalocal.kernels.qk_norm_rope import (
    NormRope,
    check_heads,
    check_norm_rope,
    cos_sin,
    rotary_frequencies,
    turned,
    turned_rows,
)

LOG2_E = 1.4426950408889634


@triton.jit
def _carry_state(
    k_ptr,
    v_ptr,
    state_ptr,
    new_state_ptr,
    states_ptr,
    handed_on_ptr,
    k_stride_t,
    v_stride_t,
    slope,
    num_tokens,
    states_stride,
    CHUNK: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUES: tl.constexpr,
    HAS_STATE: tl.constexpr,
):
    """Take VALUES value channels of one head's state over all tokens; count in `handed_on` the S_n that can be read.

    The next chunk's keys and values are on their way in registers meanwhile.
    """
    steps = tl.arange(0, CHUNK)
    rows = steps[:, None]
    at = tl.arange(0, KEY_DIM)[:, None] * VALUE_DIM + tl.arange(0, VALUES)[None, :]
    if HAS_STATE:
        state = tl.load(state_ptr + at)
    else:
        state = tl.zeros((KEY_DIM, VALUES), tl.float32)
    k_at = rows * k_stride_t + tl.arange(0, KEY_DIM)[None, :]
    v_at = rows * v_stride_t + tl.arange(0, VALUES)[None, :]
    k = tl.load(k_ptr + k_at, mask=rows < num_tokens, other=0.0)
    v = tl.load(v_ptr + v_at, mask=rows < num_tokens, other=0.0)
    num_chunks = tl.cdiv(num_tokens, CHUNK)
    for index in range(num_chunks):
        left = num_tokens - index * CHUNK
        count = tl.minimum(left, CHUNK)
        decay = tl.exp2(-slope * tl.maximum(count - 1 - steps, 0).to(tl.float32))
        values = v.to(tl.float32) * decay[:, None]
        rounded = values.to(k.dtype)
        rest = (values - rounded.to(tl.float32)).to(k.dtype)
        keys = tl.trans(k)
        # One chunk late: by now the stores have long arrived, and the release waits for nothing.
        if index > 0:
            tl.debug_barrier()
            tl.atomic_xchg(handed_on_ptr, index, sem="release")
        k_ptr += CHUNK * k_stride_t
        v_ptr += CHUNK * v_stride_t
        k = tl.load(k_ptr + k_at, mask=rows < left - CHUNK, other=0.0)
        v = tl.load(v_ptr + v_at, mask=rows < left - CHUNK, other=0.0)
        tl.store(states_ptr + at, state.to(states_ptr.dtype.element_ty))
        states_ptr += states_stride
        state *= tl.exp2(-slope * count)
        state = tl.dot(keys, rounded, state)
        state = tl.dot(keys, rest, state)
    tl.debug_barrier()
    tl.atomic_xchg(handed_on_ptr, num_chunks, sem="release")
    tl.store(new_state_ptr + at, state)


@triton.jit
def _queries(
    q_ptr,
    q_stride_t,
    q_weight_ptr,
    positions_ptr,
    frequencies_ptr,
    count,
    CHUNK: tl.constexpr,
    KEY_DIM: tl.constexpr,
    EPS: tl.constexpr,
    TURN: tl.constexpr,
    FAST: tl.constexpr,
):
    """The queries of a chunk [C, K], with TURN normed and turned on the way; rows that are not there are zero."""
    half: tl.constexpr = KEY_DIM // 2
    steps = tl.arange(0, CHUNK)
    is_there = steps[:, None] < count
    at = q_ptr + steps[:, None] * q_stride_t
    if TURN:
        columns = tl.arange(0, half)[None, :]
        first = tl.load(at + columns, mask=is_there, other=0.0, eviction_policy="evict_first")
        second = tl.load(at + half + columns, mask=is_there, other=0.0, eviction_policy="evict_first")
        positions = tl.load(positions_ptr + steps, mask=steps < count, other=0).to(tl.float32)
        cos, sin = cos_sin(positions[:, None] * tl.load(frequencies_ptr + columns), FAST)
        first, second = turned_rows(first, second, q_weight_ptr, cos, sin, half, EPS)
        q = tl.join(first, second).permute(0, 2, 1).reshape(CHUNK, KEY_DIM)
    else:
        columns = tl.arange(0, KEY_DIM)[None, :]
        q = tl.load(at + columns, mask=is_there, other=0.0, eviction_policy="evict_first")
    return q


@triton.jit
def _chunk_outputs(
    q,
    k_ptr,
    v_ptr,
    o_ptr,
    state_ptr,
    handed_on_ptr,
    k_stride_t,
    v_stride_t,
    o_stride_t,
    slope,
    scale,
    count,
    index,
    CHUNK: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUES: tl.constexpr,
):
    """The outputs of a chunk of `count` tokens of one head, once the state before it is there."""
    steps = tl.arange(0, CHUNK)
    rows = steps[:, None]
    keys = tl.arange(0, KEY_DIM)
    values = tl.arange(0, VALUE_DIM)
    is_there = rows < count
    k = tl.load(k_ptr + rows * k_stride_t + keys[None, :], mask=is_there, other=0.0, eviction_policy="evict_first")
    v = tl.load(v_ptr + rows * v_stride_t + values[None, :], mask=is_there, other=0.0, eviction_policy="evict_first")
    scores = tl.dot(q, tl.trans(k))
    for strand in tl.static_range(VALUE_DIM // VALUES):
        while tl.atomic_add(handed_on_ptr + strand, 0, sem="acquire") <= index:
            pass
    # Past the L1 cache: another program of this launch wrote it.
    state = tl.load(state_ptr + keys[:, None] * VALUE_DIM + values[None, :], cache_modifier=".cg")
    exponents = (-slope * steps)[:, None] + (slope * steps)[None, :]
    exponents = tl.where(rows >= steps[None, :], exponents, float("-inf"))
    scores = (scores * tl.exp2(exponents)).to(q.dtype)
    o = tl.dot(q, state) * tl.exp2(-slope * (steps + 1))[:, None]
    o = tl.dot(scores, v, o) * scale
    tl.store(o_ptr + rows * o_stride_t + values[None, :], o.to(o_ptr.dtype.element_ty), mask=is_there)


@triton.jit(do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=["positions_ptr"])
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
    q_weight_ptr,
    positions_ptr,
    frequencies_ptr,
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
    num_rows,
    NUM_HEADS: tl.constexpr,
    CHUNK: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUES: tl.constexpr,
    LOG2_E: tl.constexpr,
    HAS_STATE: tl.constexpr,
    EPS: tl.constexpr,
    TURN: tl.constexpr,
    FAST: tl.constexpr,
):
    """One strand of a head's state over all tokens, or one chunk's outputs, by ticket; num_rows: B * H.

    states [chunks, B * H, K, V]; counters [1 + strands], zero before: tickets, and how many S_n each strand left.
    """
    strands: tl.constexpr = VALUE_DIM // VALUES
    size: tl.constexpr = KEY_DIM * VALUE_DIM
    ticket = tl.atomic_add(counters_ptr, 1)
    is_strand = ticket < num_rows * strands
    item = ticket - num_rows * strands
    row = ticket // strands if is_strand else item % num_rows
    batch = (row // NUM_HEADS).to(tl.int64)
    head = row % NUM_HEADS
    slope = tl.load(slopes_ptr + head) * LOG2_E
    q_ptr += batch * q_stride_b + head * q_stride_h
    k_ptr += batch * k_stride_b + head * k_stride_h
    v_ptr += batch * v_stride_b + head * v_stride_h
    o_ptr += batch * o_stride_b + head * o_stride_h
    at_row = row.to(tl.int64) * size
    states_stride = num_rows.to(tl.int64) * size
    if is_strand:
        values_at = ticket % strands * VALUES
        _carry_state(
            k_ptr,
            v_ptr + values_at,
            state_ptr + at_row + values_at if HAS_STATE else state_ptr,
            new_state_ptr + at_row + values_at,
            states_ptr + at_row + values_at,
            counters_ptr + 1 + ticket,
            k_stride_t,
            v_stride_t,
            slope,
            num_tokens,
            states_stride,
            CHUNK,
            KEY_DIM,
            VALUE_DIM,
            VALUES,
            HAS_STATE,
        )
    else:
        index = item // num_rows
        first = (index * CHUNK).to(tl.int64)
        count = tl.minimum(num_tokens - index * CHUNK, CHUNK)
        q = _queries(
            q_ptr + first * q_stride_t,
            q_stride_t,
            q_weight_ptr,
            positions_ptr + first if TURN else positions_ptr,
            frequencies_ptr,
            count,
            CHUNK,
            KEY_DIM,
            EPS,
            TURN,
            FAST,
        )
        _chunk_outputs(
            q,
            k_ptr + first * k_stride_t,
            v_ptr + first * v_stride_t,
            o_ptr + first * o_stride_t,
            states_ptr + index * states_stride + at_row,
            counters_ptr + 1 + row * strands,
            k_stride_t,
            v_stride_t,
            o_stride_t,
            slope,
            scale,
            count,
            index,
            CHUNK,
            KEY_DIM,
            VALUE_DIM,
            VALUES,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillLaunch:
    """How the kernel is launched: tokens of a chunk, value channels that one program carries, warps.

    `max_registers` of a thread: so few that several programs fit on a multiprocessor and hide each other's waiting.
    """

    chunk: int
    values: int
    num_warps: int
    max_registers: int


# By compute capability, the largest that is not above the card's. Only 90 has wgmma, and room for long chunks.
LAUNCHES = {
    80: PrefillLaunch(chunk=64, values=64, num_warps=8, max_registers=255),
    90: PrefillLaunch(chunk=128, values=64, num_warps=8, max_registers=255),
    100: PrefillLaunch(chunk=64, values=64, num_warps=8, max_registers=255),
}
PREFILL_DTYPE = torch.bfloat16
MAX_STATE_SIDE = 128  # channels of a key or value head: a program holds a whole chunk of one
MAX_LAUNCH_TOKENS = 8192  # 64 MiB of states at 32 heads of 128 and chunks of 128


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
    """Lightning attention over T tokens by the kernels; raw keys are normed and turned by a launch before.

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
    norm_rope, state = recurrence.norm_rope, recurrence.state
    if norm_rope is not None:
        k = turned(k, norm_rope.k_weight, norm_rope)
    kept: list[Tensor] = []
    for start, end in pairwise([0, *boundaries, num_tokens]):
        for first in range(start, end, MAX_LAUNCH_TOKENS):
            piece = slice(first, min(first + MAX_LAUNCH_TOKENS, end))
            is_all = piece == slice(0, num_tokens)
            block = (q, k, v, o) if is_all else (q[:, piece], k[:, piece], v[:, piece], o[:, piece])
            state = _launch(block, first, recurrence, state, launch)
        kept.append(q.new_zeros(_state_shape(q, v), dtype=torch.float32) if state is None else state)
    return o, kept


def _launch(
    block: tuple[Tensor, Tensor, Tensor, Tensor],
    first: int,
    recurrence: Recurrence,
    state: Tensor | None,
    launch: PrefillLaunch,
) -> Tensor:
    """The kernel over q, k, v, o of the tokens that begin with `first`; the state after them."""
    q, v = block[0], block[2]
    batch, num_heads, key_dim, value_dim = _state_shape(q, v)
    values = min(launch.values, value_dim)
    num_rows, num_chunks = batch * num_heads, -(-q.shape[1] // launch.chunk)
    num_strands = num_rows * (value_dim // values)
    after = torch.empty((batch, num_heads, key_dim, value_dim), dtype=torch.float32, device=q.device)
    states = torch.empty((num_chunks, num_rows, key_dim, value_dim), dtype=q.dtype, device=q.device)
    counters = torch.zeros(1 + num_strands, dtype=torch.int32, device=q.device)
    norm_rope = recurrence.norm_rope
    _prefill_kernel[(num_strands + num_chunks * num_rows,)](
        *block,
        state,
        after,
        states,
        counters,
        recurrence.slopes,
        None if norm_rope is None else norm_rope.q_weight,
        None if norm_rope is None else norm_rope.positions[first:],
        None if norm_rope is None else rotary_frequencies(key_dim, norm_rope.theta, q.device),
        *(stride for x in block for stride in x.stride()[:3]),
        recurrence.scale,
        q.shape[1],
        num_rows,
        NUM_HEADS=num_heads,
        CHUNK=launch.chunk,
        KEY_DIM=key_dim,
        VALUE_DIM=value_dim,
        VALUES=values,
        LOG2_E=LOG2_E,
        HAS_STATE=state is not None,
        EPS=0.0 if norm_rope is None else norm_rope.eps,
        TURN=norm_rope is not None,
        FAST=HAS_INLINE_ASM,
        num_warps=launch.num_warps,
        num_stages=1,
        maxnreg=launch.max_registers,
    )
    return after


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
