"""Lightning attention for the 1 to 16 tokens of a step of an answer, with the layer's output norm and gate behind it.

    S_t = d S_(t-1) + k_t^T v_t        o_t = scale * q_t S_t        d = exp(-s), as a table: `lightning_decays`
    y_t = gated_norm(o_t)              q, k: raw, normed and turned in passing

In come the heads of the step's tokens and the layer's state; out go the tokens' rows for the output projection. How
many of the tokens will be kept nobody knows yet, so a step leaves them beside the state, as `PendingTokens`, and the
next one folds in as many of them as were accepted by then:
    `speculative_step`  folds in the pending tokens, then the outputs of the current ones, which become pending
    `commit_pending`    folds in the pending tokens, and that is all: where no step follows
Both add token by token in one order and with the same fused multiply-adds, which are spelled out because the compiler's
choice differs from kernel to kernel: however an answer is cut into steps, it leaves the same bits behind. Positions,
counts and states are read on the device, so that the launches can stand in a CUDA graph.
Bytes at the released shape: the state read and written, 4 MiB a layer.
Shapes: q, k [1, T, H, K]; v [1, T, H, V]; decays fp32 [H]; state fp32 [1, H, K, V]. Source: specification, sections 6
and 8; the formula by itself is `lightning_definition`.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from salalocal.errors import BackendError
from salalocal.kernels.backend import HAS_INLINE_ASM, tl, triton
from salalocal.kernels.gate import sigmoid
from salalocal.kernels.gated_norm import GatedNorm, gated_norm_reference
from salalocal.kernels.lightning_prefill import MAX_STATE_SIDE
from salalocal.kernels.qk_norm_rope import (
    NormRope,
    check_heads,
    check_norm_rope,
    cos_sin,
    qk_norm_rope_reference,
    rotary_frequencies,
    rotated,
)
from salalocal.kernels.rows import are_for_kernel, rows_of

MAX_STEPS = 16  # tokens of one step


def lightning_decays(slopes: Tensor) -> Tensor:
    """exp(-slope), rounded once: an error here would grow with every token that a head remembers. Shapes: [H] fp32."""
    return torch.exp(-slopes.double()).float()


@dataclass(frozen=True, slots=True)
class Heads:
    """One layer's inputs of a step; see the module for the shapes. norm_rope.positions: [1], of the first token."""

    q: Tensor
    k: Tensor
    v: Tensor
    decays: Tensor
    scale: float
    norm_rope: NormRope


@dataclass(frozen=True, slots=True)
class PendingTokens:
    """Tokens that a step left beside the state, in two halves: a step reads one and writes the other.

    The caller sets how many of the tokens were accepted, and turns `parity` after every step.
    Shapes: keys [2, 16, H, K], normed and turned, and values [2, 16, H, V], in the dtype of the heads; count int32 [1];
    parity int32 [1], 0 or 1: the half that is read.
    """

    keys: Tensor
    values: Tensor
    count: Tensor
    parity: Tensor


def speculative_step_reference(heads: Heads, state: Tensor, pending: PendingTokens, gated_norm: GatedNorm) -> Tensor:
    """The step token by token in plain torch: what a CPU runs.

    Shapes: gate [T, H * V]; result [1, T, H * V]. Raises: ValueError if pending tokens have another dtype than heads.
    """
    if not {pending.keys.dtype, pending.values.dtype} <= {heads.q.dtype}:
        raise ValueError(f"lightning: pending {pending.keys.dtype}, needed is {heads.q.dtype}")
    commit_pending_reference(state, pending, heads.decays)
    num_tokens = heads.q.shape[1]
    positions = heads.norm_rope.positions + torch.arange(num_tokens, device=heads.q.device)
    q, k = qk_norm_rope_reference(heads.q, heads.k, replace(heads.norm_rope, positions=positions))
    written = 1 - int(pending.parity)
    pending.keys[written, :num_tokens] = k[0]
    pending.values[written, :num_tokens] = heads.v[0]
    current, outputs = state.clone(), []
    for token in range(num_tokens):
        _fold_in(current, k[0, token], heads.v[0, token], heads.decays)
        outputs.append(heads.scale * (q[0, token, :, None].to(state.dtype) @ current[0]))
    o = torch.stack(outputs).to(heads.q.dtype).flatten(1)
    return gated_norm_reference(o, gated_norm)[None]


def commit_pending_reference(state: Tensor, pending: PendingTokens, decays: Tensor) -> None:
    """The accepted tokens into the state, in place: what a CPU runs."""
    half, count = int(pending.parity), int(pending.count)
    for k, v in zip(pending.keys[half, :count], pending.values[half, :count], strict=True):
        _fold_in(state, k, v, decays)


def _fold_in(state: Tensor, k: Tensor, v: Tensor, decays: Tensor) -> None:
    added = k[:, :, None].to(state.dtype) * v[:, None, :].to(state.dtype)
    state.mul_(decays[:, None, None]).add_(added)


@triton.jit
def _turned_vector(ptr, weight_ptr, cos, sin, HALF: tl.constexpr, EPS: tl.constexpr):
    """The two halves of one head of one token, normed and turned, as fp32 that has been rounded to the heads' dtype."""
    channels = tl.arange(0, HALF)
    first = tl.load(ptr + channels)
    second = tl.load(ptr + HALF + channels)
    dtype = first.dtype
    a = first.to(tl.float32)
    b = second.to(tl.float32)
    scale = tl.rsqrt((tl.sum(a * a, 0) + tl.sum(b * b, 0)) / (2 * HALF) + EPS)
    a_weight = tl.load(weight_ptr + channels).to(tl.float32)
    b_weight = tl.load(weight_ptr + HALF + channels).to(tl.float32)
    a = ((a * scale).to(dtype).to(tl.float32) * a_weight).to(dtype).to(tl.float32)
    b = ((b * scale).to(dtype).to(tl.float32) * b_weight).to(dtype).to(tl.float32)
    a, b = rotated(a, b, cos, sin)
    return a.to(dtype).to(tl.float32), b.to(dtype).to(tl.float32)


@triton.jit
def _turned_token(
    q_at,
    k_at,
    v_at,
    q_weight_ptr,
    k_weight_ptr,
    position,
    frequencies,
    HALF: tl.constexpr,
    EPS: tl.constexpr,
    FAST: tl.constexpr,
):
    """One head of one token: both halves of its query and of its key, and its value."""
    cos, sin = cos_sin(position.to(tl.float32) * frequencies, FAST)
    q1, q2 = _turned_vector(q_at, q_weight_ptr, cos, sin, HALF, EPS)
    k1, k2 = _turned_vector(k_at, k_weight_ptr, cos, sin, HALF, EPS)
    return q1, q2, k1, k2, tl.load(v_at).to(tl.float32)


@triton.jit
def _state_of(state_ptr, head, values, HALF: tl.constexpr, VALUE_DIM: tl.constexpr):
    """These value channels of a head's state: where the first half of its key channels lies, and both halves."""
    halves = tl.arange(0, HALF)
    at = state_ptr + head * (2 * HALF * VALUE_DIM) + halves[:, None] * VALUE_DIM + values[None, :]
    return at, tl.load(at), tl.load(at + HALF * VALUE_DIM)


@triton.jit
def _advanced(state1, state2, decay, k1, k2, v):
    """Both halves of a state, one token on."""
    state1 = tl.fma(state1, decay, k1[:, None] * v[None, :])
    state2 = tl.fma(state2, decay, k2[:, None] * v[None, :])
    return state1, state2


@triton.jit
def _with_pending(state1, state2, decay, keys_at, values_at, count, KEYS: tl.constexpr, VALUES: tl.constexpr):
    """Both halves of a state, `count` pending tokens on; KEYS, VALUES: from one token to the next."""
    for token in range(count):
        k1 = tl.load(keys_at + token * KEYS).to(tl.float32)
        k2 = tl.load(keys_at + token * KEYS + state1.shape[0]).to(tl.float32)
        v = tl.load(values_at + token * VALUES).to(tl.float32)
        state1, state2 = _advanced(state1, state2, decay, k1, k2, v)
    return state1, state2


@triton.jit
def _write_gated_row(
    o_ptr,
    y_ptr,
    gate_ptr,
    weight_ptr,
    EPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    FAST: tl.constexpr,
):
    """Norm and gate one token's outputs (WIDTH: the channels, padded), which other programs have just written."""
    channels = tl.arange(0, WIDTH)
    is_there = channels < CHANNELS
    dtype = y_ptr.dtype.element_ty
    x = tl.load(o_ptr + channels, mask=is_there, other=0.0, cache_modifier=".cg").to(tl.float32)
    weight = tl.load(weight_ptr + channels, mask=is_there, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + channels, mask=is_there, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x, 0) / CHANNELS + EPS)
    x = ((x * inverse).to(dtype).to(tl.float32) * weight).to(dtype).to(tl.float32)
    opening = sigmoid(gate, FAST).to(dtype).to(tl.float32)
    tl.store(y_ptr + channels, (x * opening).to(dtype), mask=is_there)


@triton.jit(do_not_specialize_on_alignment=["position_ptr", "count_ptr", "parity_ptr", "num_tokens"])
def _speculative_step_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    y_ptr,
    gate_ptr,
    counter_ptr,
    state_ptr,
    decays_ptr,
    keys_ptr,
    values_ptr,
    count_ptr,
    parity_ptr,
    position_ptr,
    o_weight_ptr,
    q_weight_ptr,
    k_weight_ptr,
    frequencies_ptr,
    q_stride_t,
    q_stride_h,
    k_stride_t,
    k_stride_h,
    v_stride_t,
    v_stride_h,
    gate_stride,
    scale,
    num_tokens,
    NUM_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUES: tl.constexpr,
    STEPS: tl.constexpr,
    EPS: tl.constexpr,
    O_EPS: tl.constexpr,
    WIDTH: tl.constexpr,
    MAX_FINISHERS: tl.constexpr,
    FAST: tl.constexpr,
):
    """VALUES value channels of one head; o and y [T, H * V] and the pending tokens [2, STEPS, H, .] are contiguous.

    The last programs to get there norm and gate the rows, one row each, after everybody else; at most MAX_FINISHERS.
    """
    channels: tl.constexpr = NUM_HEADS * VALUE_DIM
    programs: tl.constexpr = NUM_HEADS * (VALUE_DIM // VALUES)
    keys: tl.constexpr = NUM_HEADS * 2 * HALF  # from one pending token to the next
    piece = tl.program_id(0) % (VALUE_DIM // VALUES)
    head = tl.program_id(0) // (VALUE_DIM // VALUES)
    values = piece * VALUES + tl.arange(0, VALUES)
    halves = tl.arange(0, HALF)
    count = tl.minimum(tl.load(count_ptr), STEPS)
    parity = tl.load(parity_ptr)
    state_at, state1, state2 = _state_of(state_ptr, head, values, HALF, VALUE_DIM)
    decay = tl.load(decays_ptr + head)
    position = tl.load(position_ptr)
    frequencies = tl.load(frequencies_ptr + halves)
    q_at = q_ptr + head * q_stride_h
    k_at = k_ptr + head * k_stride_h
    v_at = v_ptr + head * v_stride_h + values
    # Ahead of its turn: the loads of the first current token and of the pending ones are under way together.
    q1, q2, k1, k2, v = _turned_token(
        q_at, k_at, v_at, q_weight_ptr, k_weight_ptr, position, frequencies, HALF, EPS, FAST
    )
    keys_at = keys_ptr + parity * (STEPS * keys) + head * (2 * HALF) + halves
    values_at = values_ptr + parity * (STEPS * channels) + head * VALUE_DIM + values
    state1, state2 = _with_pending(state1, state2, decay, keys_at, values_at, count, keys, channels)
    kept1 = state1
    kept2 = state2
    keys_at = keys_ptr + (1 - parity) * (STEPS * keys) + head * (2 * HALF) + halves
    values_at = values_ptr + (1 - parity) * (STEPS * channels) + head * VALUE_DIM + values
    for token in range(num_tokens):
        state1, state2 = _advanced(state1, state2, decay, k1, k2, v)
        o = (tl.sum(q1[:, None] * state1, 0) + tl.sum(q2[:, None] * state2, 0)) * scale
        tl.store(o_ptr + token * channels + head * VALUE_DIM + values, o.to(o_ptr.dtype.element_ty))
        tl.store(keys_at + token * keys, k1.to(keys_ptr.dtype.element_ty), mask=piece == 0)
        tl.store(keys_at + token * keys + HALF, k2.to(keys_ptr.dtype.element_ty), mask=piece == 0)
        tl.store(values_at + token * channels, v.to(values_ptr.dtype.element_ty))
        following = tl.minimum(token + 1, num_tokens - 1)
        q1, q2, k1, k2, v = _turned_token(
            q_at + following * q_stride_t,
            k_at + following * k_stride_t,
            v_at + following * v_stride_t,
            q_weight_ptr,
            k_weight_ptr,
            position + following,
            frequencies,
            HALF,
            EPS,
            FAST,
        )
    tl.debug_barrier()
    ticket = tl.atomic_add(counter_ptr, 1)
    # After the ticket: the rows need not wait for anybody's states to be written.
    tl.store(state_at, kept1)
    tl.store(state_at + HALF * VALUE_DIM, kept2)
    finishers = tl.minimum(num_tokens, MAX_FINISHERS)
    first_row = ticket - (programs - finishers)
    if first_row >= 0:
        # Fewer wait here than any card runs side by side, so those that are waited for come to their turn.
        arrived = ticket + 1
        while arrived < programs:
            arrived = tl.atomic_add(counter_ptr, 0, sem="acquire")
        for row in range(first_row, num_tokens, finishers):
            at = row * channels
            _write_gated_row(
                o_ptr + at, y_ptr + at, gate_ptr + row * gate_stride, o_weight_ptr, O_EPS, channels, WIDTH, FAST
            )
        left = programs + finishers - 1
        if num_tokens > 1:  # 1 is known when compiled: one way to the memory less
            left = tl.atomic_add(counter_ptr, 1)
        if left == programs + finishers - 1:
            tl.store(counter_ptr, 0)


@triton.jit(do_not_specialize_on_alignment=["count_ptr", "parity_ptr"])
def _commit_pending_kernel(
    state_ptr,
    decays_ptr,
    keys_ptr,
    values_ptr,
    count_ptr,
    parity_ptr,
    NUM_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUES: tl.constexpr,
    STEPS: tl.constexpr,
):
    """VALUES value channels of one head."""
    channels: tl.constexpr = NUM_HEADS * VALUE_DIM
    keys: tl.constexpr = NUM_HEADS * 2 * HALF
    head = tl.program_id(0) // (VALUE_DIM // VALUES)
    values = tl.program_id(0) % (VALUE_DIM // VALUES) * VALUES + tl.arange(0, VALUES)
    halves = tl.arange(0, HALF)
    count = tl.minimum(tl.load(count_ptr), STEPS)
    parity = tl.load(parity_ptr)
    state_at, state1, state2 = _state_of(state_ptr, head, values, HALF, VALUE_DIM)
    decay = tl.load(decays_ptr + head)
    keys_at = keys_ptr + parity * (STEPS * keys) + head * (2 * HALF) + halves
    values_at = values_ptr + parity * (STEPS * channels) + head * VALUE_DIM + values
    state1, state2 = _with_pending(state1, state2, decay, keys_at, values_at, count, keys, channels)
    tl.store(state_at, state1)
    tl.store(state_at + HALF * VALUE_DIM, state2)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeLaunch:
    """How the kernels are launched: value channels a program, warps."""

    values: int
    num_warps: int


LAUNCH = DecodeLaunch(values=16, num_warps=4)


def speculative_step_triton(
    heads: Heads,
    state: Tensor,
    pending: PendingTokens,
    gated_norm: GatedNorm,
    counters: Tensor,
    launch: DecodeLaunch = LAUNCH,
) -> Tensor:
    """Launch the kernel.

    Shapes: gate [T, H * V], its rows anywhere; counters int32, zeros, left zero; result [1, T, H * V].
    Raises: ValueError for shapes that do not fit each other; BackendError for what the kernel has no form for.
    """
    _check_heads(heads)
    _check_pending(state, pending, heads.decays, heads.q.dtype)
    _, num_tokens, num_heads, key_dim = heads.q.shape
    value_dim = heads.v.shape[3]
    width = num_heads * value_dim
    gate = rows_of(gated_norm.gate)
    if gate.shape != (num_tokens, width) or gated_norm.weight.shape != (width,) or counters.dtype != torch.int32:
        shapes = f"gate {tuple(gated_norm.gate.shape)}, weight {tuple(gated_norm.weight.shape)}"
        raise ValueError(f"lightning step: v {tuple(heads.v.shape)}, {shapes}, counters {counters.dtype}")
    o = torch.empty((num_tokens, width), dtype=heads.q.dtype, device=heads.q.device)
    y = torch.empty((1, num_tokens, width), dtype=heads.q.dtype, device=heads.q.device)
    constants = _constants(state, launch)
    programs = num_heads * (value_dim // constants["VALUES"])
    _speculative_step_kernel[(programs,)](
        heads.q,
        heads.k,
        heads.v,
        o,
        y,
        gate,
        counters,
        state,
        heads.decays,
        pending.keys,
        pending.values,
        pending.count,
        pending.parity,
        heads.norm_rope.positions,
        gated_norm.weight,
        heads.norm_rope.q_weight,
        heads.norm_rope.k_weight,
        rotary_frequencies(key_dim, heads.norm_rope.theta, heads.q.device),
        *(x.stride(axis) for x in (heads.q, heads.k, heads.v) for axis in (1, 2)),
        gate.stride(0),
        heads.scale,
        num_tokens,
        **constants,
        EPS=heads.norm_rope.eps,
        O_EPS=gated_norm.eps,
        WIDTH=triton.next_power_of_2(width),
        # The interpreter runs one program after the other: none may wait for a later one.
        MAX_FINISHERS=programs if HAS_INLINE_ASM else 1,
        FAST=HAS_INLINE_ASM,
        num_warps=launch.num_warps,
    )
    return y


def commit_pending_triton(state: Tensor, pending: PendingTokens, decays: Tensor, launch: DecodeLaunch = LAUNCH) -> None:
    """Launch the kernel; the state in place. Raises: as `speculative_step_triton`."""
    _check_pending(state, pending, decays, pending.keys.dtype)
    constants = _constants(state, launch)
    programs = state.shape[1] * (state.shape[3] // constants["VALUES"])
    _commit_pending_kernel[(programs,)](
        state,
        decays,
        pending.keys,
        pending.values,
        pending.count,
        pending.parity,
        **constants,
        num_warps=launch.num_warps,
    )


def speculative_step(
    heads: Heads, state: Tensor, pending: PendingTokens, gated_norm: GatedNorm, counters: Tensor
) -> Tensor:
    """What a step calls; float64 takes the reference. Arguments as `speculative_step_triton`."""
    if are_for_kernel(heads.q, heads.k, heads.v, pending.keys):
        return speculative_step_triton(heads, state, pending, gated_norm, counters)
    return speculative_step_reference(heads, state, pending, gated_norm)


def commit_pending(state: Tensor, pending: PendingTokens, decays: Tensor) -> None:
    """What the end of an answer calls; float64 takes the reference."""
    if are_for_kernel(pending.keys, pending.values):
        commit_pending_triton(state, pending, decays)
    else:
        commit_pending_reference(state, pending, decays)


def _constants(state: Tensor, launch: DecodeLaunch) -> dict[str, int]:
    _, num_heads, key_dim, value_dim = state.shape
    values = min(launch.values, value_dim)
    return {
        "NUM_HEADS": num_heads,
        "HALF": key_dim // 2,
        "VALUE_DIM": value_dim,
        "VALUES": values,
        "STEPS": MAX_STEPS,
    }


def _check_heads(heads: Heads) -> None:
    q, k, v = heads.q, heads.k, heads.v
    if k.shape != q.shape or v.shape[:3] != q.shape[:3] or heads.norm_rope.positions.shape != (1,):
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ValueError(f"lightning step: {shapes}, positions {tuple(heads.norm_rope.positions.shape)}")
    if q.shape[0] != 1 or not 1 <= q.shape[1] <= MAX_STEPS:
        raise BackendError(f"the kernel takes 1 to {MAX_STEPS} tokens of one sequence, not {tuple(q.shape)}")
    check_norm_rope(q, k, replace(heads.norm_rope, positions=heads.norm_rope.positions.expand(q.shape[1])))
    check_heads(v)
    for x in (q, v):
        if x.dtype != q.dtype or x.shape[3] > MAX_STATE_SIDE:
            limits = f"heads of one dtype and at most {MAX_STATE_SIDE} channels"
            raise BackendError(f"the kernel takes {limits}, not {tuple(x.shape)} {x.dtype}")


def _check_pending(state: Tensor, pending: PendingTokens, decays: Tensor, dtype: torch.dtype) -> None:
    keys, values = pending.keys, pending.values
    num_heads, key_dim, value_dim = decays.shape[0], keys.shape[-1], values.shape[-1]
    needed = (1, num_heads, key_dim, value_dim)
    if state.shape != needed or {state.dtype, decays.dtype} != {torch.float32} or not state.is_contiguous():
        raise ValueError(f"lightning: the state is {tuple(state.shape)} {state.dtype}, needed is fp32 {needed}")
    rooms = (2, MAX_STEPS, num_heads)
    fits = keys.shape[:3] == rooms and values.shape[:3] == rooms and keys.is_contiguous() and values.is_contiguous()
    if not fits or {keys.dtype, values.dtype} != {dtype}:
        shapes = f"keys {tuple(keys.shape)} {keys.dtype}, values {tuple(values.shape)} {values.dtype}"
        raise ValueError(f"lightning: pending {shapes}, needed is {dtype} {rooms}")
    for number in (pending.count, pending.parity):
        if number.shape != (1,) or number.dtype != torch.int32:
            raise ValueError(f"lightning: pending {tuple(number.shape)} {number.dtype}, needed is int32 [1]")
