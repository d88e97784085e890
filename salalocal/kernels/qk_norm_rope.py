"""RMS norm over each head and rotary embedding in one step, for the queries and keys of a lightning layer.

    n = round( x / sqrt(mean_d(x^2) + eps) ) * weight        y = rotary(n, p)        round: to the dtype of x

In come the projected queries and keys, out they come normed and turned. The decode kernels of the lightning layer take
the same `NormRope` and do it in passing; the functions for Triton at the top are theirs too. Angles are fp32 products
p * f_i with the frequencies of `rotary`, so positions far past 2^20 turn as they do there.
Shapes: q [B, T, H, D], k [B, T, Hkv, D], heads anywhere in memory, channels adjacent; positions int64 [T], absolute.
Source: specification, sections 6 and 7.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from salalocal.errors import BackendError
from salalocal.kernels.backend import HAS_INLINE_ASM, tl, triton
from salalocal.kernels.norm import rms_norm_definition, rms_norm_reference
from salalocal.kernels.rotary import rotary_definition, rotary_reference
from salalocal.kernels.rows import ROW_DTYPES, are_for_kernel

MIN_HEAD_DIM = 32  # halves of a head are operands of matrix products, whose sides are 16 at least
MAX_HEAD_DIM = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class NormRope:
    """What norm and rotation need beside the heads. Shapes: weights [D], in the dtype of q; positions int64 [T]."""

    q_weight: Tensor
    k_weight: Tensor
    eps: float
    positions: Tensor
    theta: float


def qk_norm_rope_definition(q: Tensor, k: Tensor, norm_rope: NormRope) -> tuple[Tensor, Tensor]:
    """The formula: norm, then rotation."""
    positions, theta = norm_rope.positions, norm_rope.theta
    q = rms_norm_definition(q, norm_rope.q_weight, norm_rope.eps)
    k = rms_norm_definition(k, norm_rope.k_weight, norm_rope.eps)
    return rotary_definition(q, positions, theta), rotary_definition(k, positions, theta)


def qk_norm_rope_reference(q: Tensor, k: Tensor, norm_rope: NormRope) -> tuple[Tensor, Tensor]:
    """The same in large operations: what a CPU runs."""
    positions, theta = norm_rope.positions, norm_rope.theta
    q = rms_norm_reference(q, norm_rope.q_weight, norm_rope.eps)
    k = rms_norm_reference(k, norm_rope.k_weight, norm_rope.eps)
    return rotary_reference(q, positions, theta), rotary_reference(k, positions, theta)


@cache
def rotary_frequencies(head_dim: int, theta: float, device: torch.device) -> Tensor:
    """The frequencies of `rotary`, as fp32 and from the CPU's power function on every device. Shapes: [D/2]."""
    exponents = torch.arange(0, head_dim, 2).float() / head_dim
    return (1.0 / (theta**exponents)).to(device)


@triton.jit
def cos_sin(phi, FAST: tl.constexpr):
    """cos and sin of fp32 angles up to 2^24, within 1e-6.

    The library's functions branch on large arguments. 2 pi is taken off here in two parts by fused multiply-adds, which
    is exact to 3e-7, and the rest goes to the card's own sine. Only the explicit tl.fma keeps the compiler from fusing
    the product that made phi, which would undo its rounding.
    """
    if FAST:
        turns = tl.floor(phi * 0.15915494309189535 + 0.5)
        rest = tl.fma(turns, -6.2831854820251465, phi)
        rest = tl.fma(turns, 1.7484555314695172e-7, rest)
        cos = tl.inline_asm_elementwise("cos.approx.ftz.f32 $0, $1;", "=f,f", [rest], tl.float32, True, 1)
        sin = tl.inline_asm_elementwise("sin.approx.ftz.f32 $0, $1;", "=f,f", [rest], tl.float32, True, 1)
    else:
        cos = tl.cos(phi)
        sin = tl.sin(phi)
    return cos, sin


@triton.jit
def rotated(a, b, cos, sin):
    """Turn the two halves of heads, in fp32; the products that are rounded are chosen here, not by the compiler."""
    return tl.fma(a, cos, -(b * sin)), tl.fma(b, cos, a * sin)


@triton.jit
def turned_rows(first, second, weight_ptr, cos, sin, HALF: tl.constexpr, EPS: tl.constexpr):
    """Norm and turn rows that came in as two halves [R, HALF]; cos and sin broadcast to them. Zeros stay zeros."""
    dtype = first.dtype
    a = first.to(tl.float32)
    b = second.to(tl.float32)
    mean_square = (tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * HALF)
    scale = tl.rsqrt(mean_square + EPS)[:, None]
    columns = tl.arange(0, HALF)[None, :]
    a_weight = tl.load(weight_ptr + columns).to(tl.float32)
    b_weight = tl.load(weight_ptr + HALF + columns).to(tl.float32)
    a = ((a * scale).to(dtype).to(tl.float32) * a_weight).to(dtype).to(tl.float32)
    b = ((b * scale).to(dtype).to(tl.float32) * b_weight).to(dtype).to(tl.float32)
    a, b = rotated(a, b, cos, sin)
    return a.to(dtype), b.to(dtype)


@triton.jit(do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=["positions_ptr"])
def _norm_rope_kernel(
    x_ptr,
    y_ptr,
    weight_ptr,
    positions_ptr,
    frequencies_ptr,
    stride_b,
    stride_t,
    stride_h,
    num_tokens,
    EPS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
    FAST: tl.constexpr,
):
    """One token of one batch row per program, all its heads (ROWS: padded); y is contiguous."""
    token = (tl.program_id(0) % num_tokens).to(tl.int64)
    batch = (tl.program_id(0) // num_tokens).to(tl.int64)
    columns = tl.arange(0, HALF)
    heads = tl.arange(0, ROWS)[:, None]
    is_there = heads < NUM_HEADS
    at = x_ptr + batch * stride_b + token * stride_t + heads * stride_h + columns[None, :]
    first = tl.load(at, mask=is_there, other=0.0)
    second = tl.load(at + HALF, mask=is_there, other=0.0)
    phi = tl.load(positions_ptr + token).to(tl.float32) * tl.load(frequencies_ptr + columns)
    cos, sin = cos_sin(phi, FAST)
    first, second = turned_rows(first, second, weight_ptr, cos[None, :], sin[None, :], HALF, EPS)
    to = y_ptr + ((batch * num_tokens + token) * NUM_HEADS + heads) * (2 * HALF) + columns[None, :]
    tl.store(to, first, mask=is_there)
    tl.store(to + HALF, second, mask=is_there)


NUM_WARPS = 4  # 16 bytes for each thread and half of 32 heads of 128: one load instruction each


def qk_norm_rope_triton(q: Tensor, k: Tensor, norm_rope: NormRope) -> tuple[Tensor, Tensor]:
    """Launch the kernel. Raises: BackendError for heads or dtypes it has no form for; ValueError for wrong shapes."""
    check_norm_rope(q, k, norm_rope)
    return turned(q, norm_rope.q_weight, norm_rope), turned(k, norm_rope.k_weight, norm_rope)


def turned(x: Tensor, weight: Tensor, norm_rope: NormRope) -> Tensor:
    """One of the two by the kernel, everything checked. Shapes: [B, T, H, D]."""
    batch, num_tokens, num_heads, head_dim = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if batch * num_tokens:
        _norm_rope_kernel[(batch * num_tokens,)](
            x,
            y,
            weight,
            norm_rope.positions,
            rotary_frequencies(head_dim, norm_rope.theta, x.device),
            *x.stride()[:3],
            num_tokens,
            EPS=norm_rope.eps,
            NUM_HEADS=num_heads,
            ROWS=triton.next_power_of_2(num_heads),
            HALF=head_dim // 2,
            FAST=HAS_INLINE_ASM,
            num_warps=NUM_WARPS,
        )
    return y


def qk_norm_rope(q: Tensor, k: Tensor, norm_rope: NormRope) -> tuple[Tensor, Tensor]:
    """What the model calls; gradients and float64 take the reference."""
    if are_for_kernel(q, k, norm_rope.q_weight):
        return qk_norm_rope_triton(q, k, norm_rope)
    return qk_norm_rope_reference(q, k, norm_rope)


def check_norm_rope(q: Tensor, k: Tensor, norm_rope: NormRope) -> None:
    """Hold the shapes against each other and against what the kernels take. Raises: ValueError, BackendError."""
    head_dim = q.shape[-1]
    fits = k.shape[:2] == q.shape[:2] and k.shape[3] == head_dim and norm_rope.positions.shape == (q.shape[1],)
    if not fits or {norm_rope.q_weight.shape, norm_rope.k_weight.shape} != {(head_dim,)}:
        raise ValueError(
            f"q/k norm and RoPE: q {tuple(q.shape)}, k {tuple(k.shape)}, positions {tuple(norm_rope.positions.shape)},"
            f" weights {tuple(norm_rope.q_weight.shape)} and {tuple(norm_rope.k_weight.shape)}"
        )
    if not {q.dtype, k.dtype, norm_rope.q_weight.dtype, norm_rope.k_weight.dtype} <= {q.dtype}:
        raise ValueError(f"q/k norm and RoPE: q is {q.dtype}, k {k.dtype}, weights {norm_rope.q_weight.dtype}")
    check_heads(q)
    check_heads(k)


def check_heads(x: Tensor) -> None:
    """Raises: BackendError for heads that the kernels of the lightning layer have no form for."""
    head_dim = x.shape[-1]
    is_power = head_dim & (head_dim - 1) == 0
    if not is_power or not MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM or x.dtype not in ROW_DTYPES:
        limits = f"powers of two from {MIN_HEAD_DIM} to {MAX_HEAD_DIM} in bfloat16, float16 or float32"
        raise BackendError(f"the kernel takes heads of {limits}, not {tuple(x.shape)} in {x.dtype}")
    if x.stride(-1) != 1 and head_dim > 1:
        raise BackendError(f"the kernel takes heads whose channels are adjacent, not strides {x.stride()}")
