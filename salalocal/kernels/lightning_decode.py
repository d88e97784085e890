"""Lightning attention for a few tokens, in Triton: the recurrence itself, with the state in registers meanwhile.

In come the heads of 1 to 16 tokens and a layer's state, for writing an answer:
    `lightning_step`    one token; the state is advanced in place
    `gated_step`        the same with the layer's output norm and gate behind it, all in one launch
    `lightning_verify`  outputs of T drafted tokens; the state stays as it is
    `lightning_commit`  folds the first a <= T of them into the state, `a` read from the device
    S_t = d S_(t-1) + k_t^T v_t        o_t = scale * q_t S_t        d = exp(-s), as a table: `lightning_decays`
All four add in the same order with the same fused multiply-adds, which are spelled out because the compiler's choice
differs from kernel to kernel: a verified draft leaves the same bits behind as its tokens one by one. Everything is fp32
but q, k, v and o. Positions, counts and states are read on the device, so the launches can stand in a CUDA graph. With
`norm_rope` q and k are raw and are normed and turned in passing.
Bytes at the released shape: the state read and written, 4 MiB a layer.
Shapes: q, k [B, T, H, K]; v [B, T, H, V]; decays fp32 [H]; state fp32 [B, H, K, V].
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from salalocal.errors import BackendError
from salalocal.kernels.backend import HAS_INLINE_ASM, tl, triton
from salalocal.kernels.gated_norm import GatedNorm
from salalocal.kernels.lightning_prefill import MAX_STATE_SIDE
from salalocal.kernels.qk_norm_rope import NormRope, check_heads, check_norm_rope, cos_sin, rotary_frequencies, rotated

MAX_STEPS = 16


def lightning_decays(slopes: Tensor) -> Tensor:
    """exp(-slope), rounded once: an error here would grow with every token that a head remembers. Shapes: [H] fp32."""
    return torch.exp(-slopes.double()).float()


@triton.jit
def _turned_vector(ptr, weight_ptr, cos, sin, HALF: tl.constexpr, EPS: tl.constexpr, TURN: tl.constexpr):
    """The two halves of one head of one token as fp32, normed and turned if asked."""
    channels = tl.arange(0, HALF)
    first = tl.load(ptr + channels)
    second = tl.load(ptr + HALF + channels)
    dtype = first.dtype
    a = first.to(tl.float32)
    b = second.to(tl.float32)
    if TURN:
        scale = tl.rsqrt((tl.sum(a * a, 0) + tl.sum(b * b, 0)) / (2 * HALF) + EPS)
        a_weight = tl.load(weight_ptr + channels).to(tl.float32)
        b_weight = tl.load(weight_ptr + HALF + channels).to(tl.float32)
        a = ((a * scale).to(dtype).to(tl.float32) * a_weight).to(dtype).to(tl.float32)
        b = ((b * scale).to(dtype).to(tl.float32) * b_weight).to(dtype).to(tl.float32)
        first, second = rotated(a, b, cos, sin)
        a = first.to(dtype).to(tl.float32)
        b = second.to(dtype).to(tl.float32)
    return a, b


@triton.jit
def _position_angles(positions_ptr, frequencies_ptr, HALF: tl.constexpr, TURN: tl.constexpr, FAST: tl.constexpr):
    """cos and sin at one position [HALF]; nothing that is used without TURN."""
    if TURN:
        phi = tl.load(positions_ptr).to(tl.float32) * tl.load(frequencies_ptr + tl.arange(0, HALF))
        cos, sin = cos_sin(phi, FAST)
    else:
        cos = 0.0
        sin = 0.0
    return cos, sin


@triton.jit(do_not_specialize_on_alignment=["positions_ptr"])
def _recurrence_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    state_ptr,
    count_ptr,
    decays_ptr,
    q_weight_ptr,
    k_weight_ptr,
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
    scale,
    num_tokens,
    NUM_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUES: tl.constexpr,
    EPS: tl.constexpr,
    TURN: tl.constexpr,
    FAST: tl.constexpr,
    HAS_COUNT: tl.constexpr,
    HAS_OUTPUT: tl.constexpr,
    KEEPS_STATE: tl.constexpr,
):
    """VALUES value channels of one head; o is contiguous. count [B]: how many of the tokens, if HAS_COUNT."""
    values = tl.program_id(0) % (VALUE_DIM // VALUES) * VALUES + tl.arange(0, VALUES)
    row = tl.program_id(0) // (VALUE_DIM // VALUES)
    batch = (row // NUM_HEADS).to(tl.int64)
    head = row % NUM_HEADS
    state_at = state_ptr + row.to(tl.int64) * (2 * HALF * VALUE_DIM)
    state_at += tl.arange(0, HALF)[:, None] * VALUE_DIM + values[None, :]
    state1 = tl.load(state_at)
    state2 = tl.load(state_at + HALF * VALUE_DIM)
    decay = tl.load(decays_ptr + head)
    q_at = q_ptr + batch * q_stride_b + head * q_stride_h
    k_at = k_ptr + batch * k_stride_b + head * k_stride_h
    v_at = v_ptr + batch * v_stride_b + head * v_stride_h
    count = tl.minimum(tl.load(count_ptr + batch), num_tokens) if HAS_COUNT else num_tokens
    for token in range(count):
        cos, sin = _position_angles(positions_ptr + token if TURN else positions_ptr, frequencies_ptr, HALF, TURN, FAST)
        k1, k2 = _turned_vector(k_at + token * k_stride_t, k_weight_ptr, cos, sin, HALF, EPS, TURN)
        v = tl.load(v_at + token * v_stride_t + values).to(tl.float32)
        state1 = tl.fma(state1, decay, k1[:, None] * v[None, :])
        state2 = tl.fma(state2, decay, k2[:, None] * v[None, :])
        if HAS_OUTPUT:
            q1, q2 = _turned_vector(q_at + token * q_stride_t, q_weight_ptr, cos, sin, HALF, EPS, TURN)
            o = (tl.sum(q1[:, None] * state1, 0) + tl.sum(q2[:, None] * state2, 0)) * scale
            o_at = o_ptr + ((batch * num_tokens + token) * NUM_HEADS + head) * VALUE_DIM + values
            tl.store(o_at, o.to(o_ptr.dtype.element_ty))
    if KEEPS_STATE:
        tl.store(state_at, state1)
        tl.store(state_at + HALF * VALUE_DIM, state2)


@triton.jit(do_not_specialize_on_alignment=["positions_ptr"])
def _gated_step_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    y_ptr,
    gate_ptr,
    counters_ptr,
    state_ptr,
    decays_ptr,
    o_weight_ptr,
    q_weight_ptr,
    k_weight_ptr,
    positions_ptr,
    frequencies_ptr,
    q_stride_b,
    q_stride_h,
    k_stride_b,
    k_stride_h,
    v_stride_b,
    v_stride_h,
    gate_stride_b,
    scale,
    O_EPS: tl.constexpr,
    WIDTH: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUES: tl.constexpr,
    EPS: tl.constexpr,
    TURN: tl.constexpr,
    FAST: tl.constexpr,
):
    """One token; the last program of a batch row to finish norms and gates the row's H * V outputs (WIDTH: padded).

    counters [B], zero before and after; o and y [B, H * V] contiguous.
    """
    values = tl.program_id(0) % (VALUE_DIM // VALUES) * VALUES + tl.arange(0, VALUES)
    row = tl.program_id(0) // (VALUE_DIM // VALUES)
    batch = (row // NUM_HEADS).to(tl.int64)
    head = row % NUM_HEADS
    state_at = state_ptr + row.to(tl.int64) * (2 * HALF * VALUE_DIM)
    state_at += tl.arange(0, HALF)[:, None] * VALUE_DIM + values[None, :]
    state1 = tl.load(state_at)
    state2 = tl.load(state_at + HALF * VALUE_DIM)
    decay = tl.load(decays_ptr + head)
    cos, sin = _position_angles(positions_ptr, frequencies_ptr, HALF, TURN, FAST)
    k_at = k_ptr + batch * k_stride_b + head * k_stride_h
    k1, k2 = _turned_vector(k_at, k_weight_ptr, cos, sin, HALF, EPS, TURN)
    v = tl.load(v_ptr + batch * v_stride_b + head * v_stride_h + values).to(tl.float32)
    state1 = tl.fma(state1, decay, k1[:, None] * v[None, :])
    state2 = tl.fma(state2, decay, k2[:, None] * v[None, :])
    q_at = q_ptr + batch * q_stride_b + head * q_stride_h
    q1, q2 = _turned_vector(q_at, q_weight_ptr, cos, sin, HALF, EPS, TURN)
    o = (tl.sum(q1[:, None] * state1, 0) + tl.sum(q2[:, None] * state2, 0)) * scale
    dtype = y_ptr.dtype.element_ty
    tl.store(o_ptr + row.to(tl.int64) * VALUE_DIM + values, o.to(dtype))
    tl.debug_barrier()
    ticket = tl.atomic_add(counters_ptr + batch, 1)
    # After the ticket: the last program need not wait for anybody's states to be written.
    tl.store(state_at, state1)
    tl.store(state_at + HALF * VALUE_DIM, state2)
    if ticket == NUM_HEADS * (VALUE_DIM // VALUES) - 1:
        channels = tl.arange(0, WIDTH)
        width: tl.constexpr = NUM_HEADS * VALUE_DIM
        is_there = channels < width
        at = batch * width + channels
        x = tl.load(o_ptr + at, mask=is_there, other=0.0, cache_modifier=".cg").to(tl.float32)
        weight = tl.load(o_weight_ptr + channels, mask=is_there, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + batch * gate_stride_b + channels, mask=is_there, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(x * x, 0) / width + O_EPS)
        x = ((x * inverse).to(dtype).to(tl.float32) * weight).to(dtype).to(tl.float32)
        opening = (1.0 / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
        tl.store(y_ptr + at, (x * opening).to(dtype), mask=is_there)
        tl.store(counters_ptr + batch, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeLaunch:
    """How the kernels are launched: value channels a program, warps."""

    values: int
    num_warps: int


LAUNCH = DecodeLaunch(values=16, num_warps=2)


@dataclass(frozen=True, slots=True)
class Heads:
    """One layer's inputs for a few tokens; see the module for the shapes."""

    q: Tensor
    k: Tensor
    v: Tensor
    decays: Tensor
    scale: float
    norm_rope: NormRope | None = None


def lightning_step_triton(heads: Heads, state: Tensor, launch: DecodeLaunch = LAUNCH) -> Tensor:
    """Outputs [B, T, H, V] of T <= 16 tokens, advancing the state in place.

    Raises: ValueError for shapes that do not fit each other; BackendError for what the kernels have no form for.
    """
    _check(heads, state)
    o = torch.empty(heads.v.shape, dtype=heads.q.dtype, device=heads.q.device)
    _launch(heads, state, None, o, launch, keeps_state=True)
    return o


def lightning_verify_triton(heads: Heads, state: Tensor, launch: DecodeLaunch = LAUNCH) -> Tensor:
    """Outputs [B, T, H, V] of T <= 16 tokens from a state that is left as it is. Raises: as `lightning_step_triton`."""
    _check(heads, state)
    o = torch.empty(heads.v.shape, dtype=heads.q.dtype, device=heads.q.device)
    _launch(heads, state, None, o, launch, keeps_state=False)
    return o


def lightning_commit_triton(heads: Heads, state: Tensor, count: Tensor, launch: DecodeLaunch = LAUNCH) -> None:
    """Fold the first count[b] tokens into the state in place; q is not read.

    Shapes: count int32 [B]; more than T counts as T. Raises: as `lightning_step_triton`.
    """
    _check(heads, state)
    if count.shape != heads.q.shape[:1] or count.dtype != torch.int32:
        raise ValueError(f"lightning: the count is {tuple(count.shape)} {count.dtype}, needed is int32 [B]")
    _launch(heads, state, count, None, launch, keeps_state=True)


def gated_step_triton(
    heads: Heads, state: Tensor, gated_norm: GatedNorm, counters: Tensor, launch: DecodeLaunch = LAUNCH
) -> Tensor:
    """One token through recurrence, output norm and gate, advancing the state in place.

    Shapes: gate [B, 1, H * V] or [B, H * V]; counters int32 [B], zeros, left zero; result [B, 1, H * V].
    Raises: as `lightning_step_triton`; ValueError for more than one token.
    """
    _check(heads, state)
    batch, num_tokens, num_heads, key_dim = heads.q.shape
    value_dim = heads.v.shape[3]
    width = num_heads * value_dim
    gate = gated_norm.gate.view(batch, -1)
    fits = num_tokens == 1 and gate.shape == (batch, width) and gated_norm.weight.shape == (width,)
    if not fits or gate.stride(-1) != 1 or counters.shape != (batch,) or counters.dtype != torch.int32:
        shapes = f"gate {tuple(gated_norm.gate.shape)}, weight {tuple(gated_norm.weight.shape)}"
        raise ValueError(f"gated step: q {tuple(heads.q.shape)}, {shapes}, counters {tuple(counters.shape)}")
    o = torch.empty((batch, width), dtype=heads.q.dtype, device=heads.q.device)
    y = torch.empty((batch, 1, width), dtype=heads.q.dtype, device=heads.q.device)
    values = min(launch.values, value_dim)
    strides = (x.stride(axis) for x in (heads.q, heads.k, heads.v) for axis in (0, 2))
    _gated_step_kernel[(batch * num_heads * (value_dim // values),)](
        heads.q,
        heads.k,
        heads.v,
        o,
        y,
        gate,
        counters,
        state,
        heads.decays,
        gated_norm.weight,
        *_turn_tensors(heads),
        *strides,
        gate.stride(0),
        heads.scale,
        O_EPS=gated_norm.eps,
        WIDTH=triton.next_power_of_2(width),
        NUM_HEADS=num_heads,
        HALF=key_dim // 2,
        VALUE_DIM=value_dim,
        VALUES=values,
        EPS=heads.norm_rope.eps if heads.norm_rope else 0.0,
        TURN=heads.norm_rope is not None,
        FAST=HAS_INLINE_ASM,
        num_warps=launch.num_warps,
    )
    return y


def _launch(
    heads: Heads, state: Tensor, count: Tensor | None, o: Tensor | None, launch: DecodeLaunch, *, keeps_state: bool
) -> None:
    batch, num_tokens, num_heads, key_dim = heads.q.shape
    value_dim = heads.v.shape[3]
    values = min(launch.values, value_dim)
    _recurrence_kernel[(batch * num_heads * (value_dim // values),)](
        heads.q,
        heads.k,
        heads.v,
        o,
        state,
        count,
        heads.decays,
        *_turn_tensors(heads),
        *heads.q.stride()[:3],
        *heads.k.stride()[:3],
        *heads.v.stride()[:3],
        heads.scale,
        num_tokens,
        NUM_HEADS=num_heads,
        HALF=key_dim // 2,
        VALUE_DIM=value_dim,
        VALUES=values,
        EPS=heads.norm_rope.eps if heads.norm_rope else 0.0,
        TURN=heads.norm_rope is not None,
        FAST=HAS_INLINE_ASM,
        HAS_COUNT=count is not None,
        HAS_OUTPUT=o is not None,
        KEEPS_STATE=keeps_state,
        num_warps=launch.num_warps,
    )


def _turn_tensors(heads: Heads) -> tuple[Tensor | None, ...]:
    norm_rope = heads.norm_rope
    if norm_rope is None:
        return None, None, None, None
    frequencies = rotary_frequencies(heads.q.shape[-1], norm_rope.theta, heads.q.device)
    return norm_rope.q_weight, norm_rope.k_weight, norm_rope.positions, frequencies


def _check(heads: Heads, state: Tensor) -> None:
    q, k, v = heads.q, heads.k, heads.v
    if k.shape != q.shape or v.shape[:3] != q.shape[:3] or heads.decays.shape != (q.shape[2],):
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, decays {tuple(heads.decays.shape)}"
        raise ValueError(f"lightning: {shapes}")
    needed = (q.shape[0], *q.shape[2:], v.shape[3])
    if state.shape != needed or state.dtype != torch.float32 or not state.is_contiguous():
        raise ValueError(f"lightning: the state is {tuple(state.shape)} {state.dtype}, needed is fp32 {needed}")
    if not {k.dtype, v.dtype} <= {q.dtype} or heads.decays.dtype != torch.float32:
        raise ValueError(f"lightning: q is {q.dtype}, k {k.dtype}, v {v.dtype}, decays {heads.decays.dtype}")
    for x in (q, k, v):
        check_heads(x)
        if x.shape[3] > MAX_STATE_SIDE:
            raise BackendError(f"the kernel takes heads of at most {MAX_STATE_SIDE} channels, not {tuple(x.shape)}")
    if not 1 <= q.shape[1] <= MAX_STEPS:
        raise BackendError(f"the kernel takes 1 to {MAX_STEPS} tokens, not {q.shape[1]}", "use lightning_prefill")
    if heads.norm_rope is not None:
        check_norm_rope(q, k, heads.norm_rope)
