"""Activations for integer and fp8 matrix units: rows of floats in, codes with one scale a row out; for the GEMMs.

    scale[m] = max_k |x[m, k]| / limit        code[m, k] = round(x[m, k] / scale[m])       limit: 127, or 448 for fp8

The codes of a row lie in split order, in which packed int4 weights unpack without a shuffle: in every block of 128
input features the 64 with an even index come first, then the odd ones; `activations_by_group` splits a row as a whole.
A product over k does not see the order, if both factors have it. A row with NaN or infinity gets a scale of NaN, so
that it cannot pass for numbers.

Four producers of such rows quantize on the way: the RMS norm before a projection, the SwiGLU before down_proj, and the
output gate before o_proj, with the norm of a lightning layer or without. They round as `kernels.norm`, `swiglu`, `gate`
and `gated_norm` do, then quantize. Rows may lie apart. Shapes: x [..., K], K a multiple of 128.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from salalocal.errors import BackendError
from salalocal.kernels.backend import HAS_INLINE_ASM, tl, triton, use_triton
from salalocal.kernels.gate import sigmoid, sigmoid_gate_reference
from salalocal.kernels.gated_norm import GatedNorm, gated_norm_reference
from salalocal.kernels.norm import rms_norm_reference
from salalocal.kernels.swiglu import swiglu_reference

SPLIT_BLOCK = 128  # input features in which even and odd indices are kept apart
LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
MAX_COLUMNS = 65_536  # a row is held in the registers of one program
# 1.5 * 2**23: added to a float below 2**22 it leaves the nearest even integer, as bits of the mantissa.
_ROUNDER = tl.constexpr(12582912.0)


class QuantizedRows(NamedTuple):
    """Shapes: codes int8 or float8_e4m3fn [..., K] in split order; scales fp32 [...]."""

    codes: Tensor
    scales: Tensor


def to_split_order(x: Tensor) -> Tensor:
    """Even features of every block of 128 before the odd ones. Raises: BackendError unless blocks are whole."""
    num_columns = _checked_columns(x)
    pairs = x.reshape(*x.shape[:-1], num_columns // SPLIT_BLOCK, SPLIT_BLOCK // 2, 2)
    return pairs.transpose(-1, -2).reshape(x.shape)


def from_split_order(x: Tensor) -> Tensor:
    """Undo `to_split_order`."""
    halves = x.reshape(*x.shape[:-1], x.shape[-1] // SPLIT_BLOCK, 2, SPLIT_BLOCK // 2)
    return halves.transpose(-1, -2).reshape(x.shape)


def quantize_rows_definition(x: Tensor, dtype: torch.dtype = torch.int8) -> QuantizedRows:
    """The formula, in float64."""
    exact = x.double()
    scales = exact.abs().amax(dim=-1) / LIMITS[dtype]
    scales = torch.where(scales.isfinite(), scales, torch.nan)
    steps = torch.nan_to_num(exact / scales.unsqueeze(-1), nan=0.0)
    codes = (steps.round() if dtype == torch.int8 else steps.float()).to(dtype)
    return QuantizedRows(to_split_order(codes), scales.float())


def quantize_rows_reference(x: Tensor, dtype: torch.dtype = torch.int8) -> QuantizedRows:
    """The same in fp32, with one division a row: what a CPU runs, and what the kernel computes bit for bit."""
    _checked_columns(x)
    wide = x.float()
    largest = wide.abs().amax(dim=-1)
    is_number = largest.isfinite()
    limit = torch.full_like(largest, LIMITS[dtype])  # a tensor: torch divides a number by way of the reciprocal
    inverse = torch.where(is_number & (largest > 0), limit / largest, 0.0)
    steps = torch.where(is_number.unsqueeze(-1), wide * inverse.unsqueeze(-1), 0.0)
    codes = (steps.round() if dtype == torch.int8 else steps).to(dtype)
    scales = torch.where(is_number, largest * (1 / LIMITS[dtype]), torch.nan)
    return QuantizedRows(to_split_order(codes), scales)


@triton.jit
def _split_columns(row, num_columns, BLOCK: tl.constexpr):
    """Where the even features of a row go in split order, and which of them exist; the odd ones are 64 behind.

    The mask is plainly the same for 64 neighbours, without which stores would be of single bytes. The places are
    written as runs of 4, so that a thread has 4 of them, whose pairs are 16 bytes next to those of the next thread.
    """
    pair = tl.arange(0, BLOCK // 2)
    block = pair // 64 * 128
    return row * num_columns + block + pair // 4 % 16 * 4 + pair % 4, block < num_columns


@triton.jit
def _load_pairs(x, num_columns, BLOCK: tl.constexpr, IN_WORDS: tl.constexpr):
    """Even and odd features of one row in fp32; IN_WORDS: of bf16 pairs in int32, which unfold without a shuffle."""
    pair = tl.arange(0, BLOCK // 2)
    is_there = pair // 64 * 128 < num_columns
    if IN_WORDS:
        words = tl.load(x + pair, mask=is_there, other=0)
        even, odd = words << 16, words & -65536
        return even.to(tl.float32, bitcast=True), odd.to(tl.float32, bitcast=True)
    even = tl.load(x + pair * 2, mask=is_there, other=0.0).to(tl.float32)
    return even, tl.load(x + pair * 2 + 1, mask=is_there, other=0.0).to(tl.float32)


@triton.jit
def _store_quantized(even, odd, row, num_columns, codes, scales, LIMIT: tl.constexpr, BLOCK: tl.constexpr):
    """Quantize one row of fp32 values, zeros behind its end.

    As bits, magnitudes are ordered like numbers, infinity above them and NaN on top: one maximum finds the damage too.
    """
    bits = tl.maximum(even.to(tl.int32, bitcast=True) & 0x7FFFFFFF, odd.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    magnitude = tl.max(bits)
    is_number = magnitude < 0x7F800000
    largest = tl.where(is_number, magnitude, 0).to(tl.float32, bitcast=True)
    inverse = tl.where(largest > 0, tl.div_rn(LIMIT, tl.where(largest > 0, largest, 1.0)), 0.0)
    if LIMIT == 127.0:
        even_codes = (even * inverse + _ROUNDER).to(tl.int32, bitcast=True) * is_number  # codes in the lowest byte
        odd_codes = (odd * inverse + _ROUNDER).to(tl.int32, bitcast=True) * is_number
    else:
        even_codes = tl.where(is_number, even * inverse, 0.0)
        odd_codes = tl.where(is_number, odd * inverse, 0.0)
    target, is_there = _split_columns(row, num_columns, BLOCK)
    tl.store(codes + target, even_codes.to(codes.dtype.element_ty), mask=is_there)
    tl.store(codes + target + 64, odd_codes.to(codes.dtype.element_ty), mask=is_there)
    tl.store(scales + row, tl.where(is_number, largest * (1.0 / LIMIT), float("nan")))


@triton.jit
def _rounded(even, odd, x, IN_WORDS: tl.constexpr, HAS_ASM: tl.constexpr):
    """fp32 values as they are once stored in the dtype of x. The assembly rounds two at once."""
    if IN_WORDS and HAS_ASM:
        words = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [even, odd], dtype=tl.int32, is_pure=True, pack=1
        )
        even, odd = words << 16, words & -65536
        return even.to(tl.float32, bitcast=True), odd.to(tl.float32, bitcast=True)
    DTYPE: tl.constexpr = tl.bfloat16 if IN_WORDS else x.dtype.element_ty
    return even.to(DTYPE).to(tl.float32), odd.to(DTYPE).to(tl.float32)


@triton.jit
def _quantize_rows_kernel(
    x, codes, scales, x_stride, num_columns, LIMIT: tl.constexpr, BLOCK: tl.constexpr, IN_WORDS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    even, odd = _load_pairs(x + row * x_stride, num_columns, BLOCK, IN_WORDS)
    _store_quantized(even, odd, row, num_columns, codes, scales, LIMIT, BLOCK)


@triton.jit
def _split_rows_kernel(x, y, x_stride, num_columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    values = tl.load(x + row * x_stride + column, mask=column < num_columns, other=0.0)
    even, odd = tl.split(tl.reshape(values, [BLOCK // 2, 2]))
    target, is_there = _split_columns(row, num_columns, BLOCK)
    tl.store(y + target, even, mask=is_there)
    tl.store(y + target + 64, odd, mask=is_there)


@triton.jit
def _rms_norm_quantize_rows_kernel(
    x,
    weight,
    codes,
    scales,
    x_stride,
    num_columns,
    eps,
    LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
    IN_WORDS: tl.constexpr,
    HAS_ASM: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    even, odd = _load_pairs(x + row * x_stride, num_columns, BLOCK, IN_WORDS)
    factor = tl.rsqrt(tl.sum(even * even + odd * odd) / num_columns + eps)
    even_gain, odd_gain = _load_pairs(weight, num_columns, BLOCK, IN_WORDS)
    even, odd = _rounded(even * factor, odd * factor, x, IN_WORDS, HAS_ASM)
    even, odd = _rounded(even * even_gain, odd * odd_gain, x, IN_WORDS, HAS_ASM)
    _store_quantized(even, odd, row, num_columns, codes, scales, LIMIT, BLOCK)


@triton.jit
def _swiglu_quantize_kernel(
    gate,
    up,
    codes,
    scales,
    gate_stride,
    up_stride,
    num_columns,
    LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
    IN_WORDS: tl.constexpr,
    HAS_ASM: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    even, odd = _load_pairs(gate + row * gate_stride, num_columns, BLOCK, IN_WORDS)
    even_up, odd_up = _load_pairs(up + row * up_stride, num_columns, BLOCK, IN_WORDS)
    even, odd = even * sigmoid(even, HAS_ASM), odd * sigmoid(odd, HAS_ASM)
    even, odd = _rounded(even, odd, gate, IN_WORDS, HAS_ASM)
    even, odd = _rounded(even * even_up, odd * odd_up, gate, IN_WORDS, HAS_ASM)
    _store_quantized(even, odd, row, num_columns, codes, scales, LIMIT, BLOCK)


@triton.jit
def _gate_quantize_kernel(
    x,
    gate,
    weight,
    codes,
    scales,
    x_stride,
    gate_stride,
    num_columns,
    eps,
    NORM: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
    IN_WORDS: tl.constexpr,
    HAS_ASM: tl.constexpr,
):
    """One row, with NORM its RMS norm first; the weight is not read without."""
    row = tl.program_id(0).to(tl.int64)
    even, odd = _load_pairs(x + row * x_stride, num_columns, BLOCK, IN_WORDS)
    even_gate, odd_gate = _load_pairs(gate + row * gate_stride, num_columns, BLOCK, IN_WORDS)
    if NORM:
        factor = tl.rsqrt(tl.sum(even * even + odd * odd) / num_columns + eps)
        even_gain, odd_gain = _load_pairs(weight, num_columns, BLOCK, IN_WORDS)
        even, odd = _rounded(even * factor, odd * factor, x, IN_WORDS, HAS_ASM)
        even, odd = _rounded(even * even_gain, odd * odd_gain, x, IN_WORDS, HAS_ASM)
    even_gate, odd_gate = sigmoid(even_gate, HAS_ASM), sigmoid(odd_gate, HAS_ASM)
    even_gate, odd_gate = _rounded(even_gate, odd_gate, x, IN_WORDS, HAS_ASM)
    even, odd = _rounded(even * even_gate, odd * odd_gate, x, IN_WORDS, HAS_ASM)
    _store_quantized(even, odd, row, num_columns, codes, scales, LIMIT, BLOCK)


def quantize_rows_triton(x: Tensor, dtype: torch.dtype = torch.int8) -> QuantizedRows:
    """One program a row. Raises: BackendError for rows that are too long or not of whole blocks."""
    rows, block = _as_rows(x)
    made = _new_rows(x, dtype)
    (words,), in_words = _in_words(rows)
    _quantize_rows_kernel[(len(rows),)](
        words, *made, words.stride(0), rows.shape[1], LIMIT=LIMITS[dtype], BLOCK=block, IN_WORDS=in_words,
        **_settings(block),
    )  # fmt: skip
    return made


def split_rows_triton(x: Tensor) -> Tensor:
    """`to_split_order` in one pass. Raises: BackendError for rows that are too long or not of whole blocks."""
    rows, block = _as_rows(x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _split_rows_kernel[(len(rows),)](rows, y, rows.stride(0), rows.shape[1], BLOCK=block, **_settings(block))
    return y


def rms_norm_quantize_rows_triton(
    x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype = torch.int8
) -> QuantizedRows:
    """One program a row. Raises: BackendError for rows that are too long or not of whole blocks."""
    rows, block = _as_rows(x)
    made = _new_rows(x, dtype)
    (words, gain), in_words = _in_words(rows, weight.unsqueeze(0))
    _rms_norm_quantize_rows_kernel[(len(rows),)](
        words, gain, *made, words.stride(0), rows.shape[1], eps, LIMIT=LIMITS[dtype], BLOCK=block, IN_WORDS=in_words,
        HAS_ASM=HAS_INLINE_ASM, **_settings(block),
    )  # fmt: skip
    return made


def swiglu_quantize_triton(gate: Tensor, up: Tensor, dtype: torch.dtype = torch.int8) -> QuantizedRows:
    """One program a row. Raises: BackendError for rows that are too long or not of whole blocks."""
    gates, block = _as_rows(gate)
    ups, _ = _as_rows(up)
    if gates.shape != ups.shape:
        raise ValueError(f"gate is {tuple(gate.shape)}, up {tuple(up.shape)}")
    made = _new_rows(gate, dtype)
    (gate_words, up_words), in_words = _in_words(gates, ups)
    _swiglu_quantize_kernel[(len(gates),)](
        gate_words, up_words, *made, gate_words.stride(0), up_words.stride(0), gates.shape[1], LIMIT=LIMITS[dtype],
        BLOCK=block, IN_WORDS=in_words, HAS_ASM=HAS_INLINE_ASM, **_settings(block),
    )  # fmt: skip
    return made


def gate_quantize_triton(
    x: Tensor, gate: Tensor, norm: tuple[Tensor, float] | None = None, dtype: torch.dtype = torch.int8
) -> QuantizedRows:
    """One program a row; `norm`: weight [K] and eps of the RMS norm before the gate.

    Raises: ValueError for different shapes; BackendError for rows that are too long or not of whole blocks.
    """
    rows, block = _as_rows(x)
    gates, _ = _as_rows(gate)
    if rows.shape != gates.shape or rows.dtype != gates.dtype:
        raise ValueError(f"x is {tuple(x.shape)} {x.dtype}, gate {tuple(gate.shape)} {gate.dtype}")
    made = _new_rows(x, dtype)
    weight, eps = (rows[:1], 0.0) if norm is None else (norm[0].unsqueeze(0), norm[1])
    (words, gate_words, weight_words), in_words = _in_words(rows, gates, weight)
    _gate_quantize_kernel[(len(rows),)](
        words, gate_words, weight_words, *made, words.stride(0), gate_words.stride(0), rows.shape[1], eps,
        NORM=norm is not None, LIMIT=LIMITS[dtype], BLOCK=block, IN_WORDS=in_words, HAS_ASM=HAS_INLINE_ASM,
        **_settings(block),
    )  # fmt: skip
    return made


def quantize_rows(x: Tensor, dtype: torch.dtype = torch.int8) -> QuantizedRows:
    """Activations with one scale a row. Shapes: x [..., K]; see `QuantizedRows`."""
    return quantize_rows_triton(x, dtype) if use_triton(x) else quantize_rows_reference(x, dtype)


def split_rows(x: Tensor) -> Tensor:
    """Activations in split order and their own dtype, for bf16 products with packed weights."""
    return split_rows_triton(x) if use_triton(x) else to_split_order(x)


def rms_norm_quantize_rows(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype = torch.int8) -> QuantizedRows:
    """The RMS norm of every row, quantized. Shapes: x [..., K], weight [K]."""
    if use_triton(x, weight):
        return rms_norm_quantize_rows_triton(x, weight, eps, dtype)
    return quantize_rows_reference(rms_norm_reference(x, weight, eps), dtype)


def swiglu_quantize(gate: Tensor, up: Tensor, dtype: torch.dtype = torch.int8) -> QuantizedRows:
    """silu(gate) * up, quantized. Shapes: gate, up [..., K]; halves of one tensor may come as views."""
    if use_triton(gate, up):
        return swiglu_quantize_triton(gate, up, dtype)
    return quantize_rows_reference(swiglu_reference(gate, up), dtype)


def sigmoid_gate_quantize_rows(x: Tensor, gate: Tensor, dtype: torch.dtype = torch.int8) -> QuantizedRows:
    """x * sigmoid(gate), quantized: what o_proj of a sparse layer takes. Shapes: x, gate [..., K]."""
    if use_triton(x, gate):
        return gate_quantize_triton(x, gate, dtype=dtype)
    return quantize_rows_reference(sigmoid_gate_reference(x, gate), dtype)


def gated_norm_quantize_rows(x: Tensor, gated_norm: GatedNorm, dtype: torch.dtype = torch.int8) -> QuantizedRows:
    """The RMS norm of every row, gated and quantized: what o_proj of a lightning layer takes. Shapes: x [..., K]."""
    if use_triton(x, gated_norm.gate, gated_norm.weight):
        return gate_quantize_triton(x, gated_norm.gate, (gated_norm.weight, gated_norm.eps), dtype)
    return quantize_rows_reference(gated_norm_reference(x, gated_norm), dtype)


def _checked_columns(x: Tensor) -> int:
    num_columns = x.shape[-1]
    if num_columns == 0 or num_columns % SPLIT_BLOCK:
        raise BackendError(
            f"rows of {num_columns:,} features cannot be quantized in blocks of {SPLIT_BLOCK}", "use bf16 matmul"
        )
    return num_columns


def _as_rows(x: Tensor) -> tuple[Tensor, int]:
    """A matrix whose rows are contiguous, and the power of two that holds a row."""
    num_columns = _checked_columns(x)
    if num_columns > MAX_COLUMNS:
        raise BackendError(f"rows of {num_columns:,} features, at most {MAX_COLUMNS:,} are quantized at once")
    rows = x.reshape(-1, num_columns)
    return rows if rows.stride(-1) == 1 else rows.contiguous(), 1 << (num_columns - 1).bit_length()


def _in_words(*matrices: Tensor) -> tuple[list[Tensor], bool]:
    """Matrices whose rows are contiguous as int32 words of two features, if all of them are bf16; and whether so."""
    if any(matrix.dtype != torch.bfloat16 for matrix in matrices):
        return list(matrices), False
    is_even = [one.stride(0) % 2 == 0 and one.data_ptr() % 4 == 0 for one in matrices]
    copied = [
        one if even else one.clone(memory_format=torch.contiguous_format)
        for one, even in zip(matrices, is_even, strict=True)
    ]
    return [one.view(torch.int32) for one in copied], True


def _new_rows(x: Tensor, dtype: torch.dtype) -> QuantizedRows:
    codes = torch.empty(x.shape, dtype=dtype, device=x.device)
    return QuantizedRows(codes, torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device))


def _num_warps(block: int) -> int:
    """32 features a thread are four loads of 16 bytes in flight."""
    return min(max(block // 1024, 1), 16)


def _settings(block: int) -> dict[str, object]:
    """Without fused multiply-adds the codes are those of the reference."""
    return {"num_warps": _num_warps(block), "enable_fp_fusion": False}
