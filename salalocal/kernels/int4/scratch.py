"""Packed weights unfolded into a scratch that a matrix unit reads: int8, fp8 or bf16; once per prefill chunk.

    int8:  factor[n, g] = floor(scales[n, g] * 254 / max_g |scales[n]| + 1/2)         integers from -254 to 254
           w8[n, k] = floor((code[n, k] * factor[n, g(k)] + 8) / 16)                  W ~ w8 * row_scales[n]
           row_scales[n] = 16 / 254 * max_g |scales[n]|
    bf16:  W[n, k] = round(code[n, k] * scales[n, g(k)])
    fp8:   W ~ round(code[n, k] * scales[n, g(k)] / fp8_scales[n]) * fp8_scales[n]
           fp8_scales[n] = row_scales[n] * 127 / 448

with code from -8 to 7 and g(k) = k // group_size. One scale an output channel is what an integer GEMM can take outside
its loop. The int8 form is integer arithmetic only, so that the GEMM that unpacks in registers (`kernels.int4.gemm`)
and this scratch give the same product to the last bit. 8-bit weights, with code from -128 to 127, are the same but for

    int8:  w8[n, k] = round(code[n, k] * (scales[n, g(k)] / row_scales[n]))         row_scales[n] = max_g |scales[n]|

Shapes: words int32 [N, K * bits / 32], see `kernels.packing`; scales [N, groups]; K a multiple of 128 and of the group
size. int8 and fp8 lie in split order (`kernels.int4.activations_by_row`), bf16 in plain order.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from salalocal.errors import BackendError
from salalocal.kernels.backend import HAS_INLINE_ASM, tl, triton, use_triton
from salalocal.kernels.int4.activations_by_row import LIMITS, SPLIT_BLOCK, to_split_order
from salalocal.kernels.packing import unpack_codes

GROUP_SIZES = (32, 64, 128)
FACTOR_LIMIT = 254
_FP8_RATIO = 448.0 / 127.0
_ROWS, _FEATURES, _WARPS = 8, 512, 4  # the tile of one program
# 1.5 * 2**23: added to a float below 2**22 it leaves the nearest even integer, as bits of the mantissa.
_ROUNDER = tl.constexpr(12582912.0)


class Int4Weight(NamedTuple):
    """A packed matrix, of 4 bits or of 8, with what folding its groups needs.

    Shapes: words int32 [N, K * bits / 32]; scales [N, groups]; row_scales fp32 [N]; inverses fp32 [N]: what makes of
    scales the factors above, 254 / max_g |scales| or, for 8 bits, 1 / max_g |scales|; 0 for a row of zeros.
    """

    words: Tensor
    scales: Tensor
    group_size: int
    row_scales: Tensor
    inverses: Tensor
    bits: int = 4

    @property
    def shape(self) -> tuple[int, int]:
        """N and K."""
        return self.words.shape[0], self.words.shape[1] * (32 // self.bits)

    def part(self, rows: slice) -> "Int4Weight":
        """Some output channels, as views."""
        return self._replace(
            words=self.words[rows],
            scales=self.scales[rows],
            row_scales=self.row_scales[rows],
            inverses=self.inverses[rows],
        )


def int4_weight(words: Tensor, scales: Tensor, group_size: int, bits: int = 4) -> Int4Weight:
    """Checks a packed matrix and folds its scales. Raises: BackendError for a shape that no kernel here takes."""
    num_out, num_in = words.shape[0], words.shape[1] * (32 // bits)
    if group_size not in GROUP_SIZES or num_in % SPLIT_BLOCK:
        raise BackendError(
            f"int{bits} weights [{num_out:,}, {num_in:,}] in groups of {group_size}: kernels take groups of 32, 64 "
            f"and 128 and input features in blocks of {SPLIT_BLOCK}",
            "SALALOCAL_KERNELS=reference computes any shape",
        )
    if scales.shape != (num_out, num_in // group_size):
        raise ValueError(f"scales are {tuple(scales.shape)}, needed are {(num_out, num_in // group_size)}")
    largest = scales.float().abs().amax(dim=1)
    limit, unit = (FACTOR_LIMIT, 16) if bits == 4 else (1, 1)
    inverses = torch.where(largest > 0, limit / largest, 0.0)
    return Int4Weight(words.contiguous(), scales.contiguous(), group_size, largest * (unit / limit), inverses, bits)


def folded_factors(weight: Int4Weight) -> Tensor:
    """The integer factor of every group of 4-bit weights. Shapes: int32 [N, groups]."""
    return (weight.scales.float() * weight.inverses.unsqueeze(1) + 0.5).floor().int()


def fp8_scales(weight: Int4Weight) -> Tensor:
    """The scale of every output channel of `decode_fp8`. Shapes: fp32 [N]."""
    return weight.row_scales / _FP8_RATIO


def decode_int8_definition(weight: Int4Weight) -> Tensor:
    """The formula with fractions, in float64."""
    if weight.bits == 8:
        return to_split_order((_centred(weight, torch.float64) * _ratios(weight).double()).round().to(torch.int8))
    product = _centred(weight, torch.float64) * _per_feature(weight, folded_factors(weight)).double()
    return to_split_order(((product + 8) / 16).floor().to(torch.int8))


def decode_int8_reference(weight: Int4Weight) -> Tensor:
    """The same in integers, or for 8 bits in fp32: what a CPU runs."""
    if weight.bits == 8:
        return to_split_order((_centred(weight, torch.float32) * _ratios(weight)).round().to(torch.int8))
    product = _centred(weight, torch.int32) * _per_feature(weight, folded_factors(weight))
    return to_split_order(((product + 8) >> 4).to(torch.int8))


def decode_bf16_reference(weight: Int4Weight) -> Tensor:
    """Plain weights, rounded once."""
    return (_centred(weight, torch.float32) * _per_feature(weight, weight.scales.float())).bfloat16()


def decode_fp8_reference(weight: Int4Weight) -> Tensor:
    """Weights in steps of `fp8_scales`."""
    ratios = weight.scales.float() * _fp8_inverses(weight).unsqueeze(1)
    return to_split_order((_centred(weight, torch.float32) * _per_feature(weight, ratios)).to(torch.float8_e4m3fn))


@triton.jit
def fold_low(octets, factors, HAS_ASM: tl.constexpr):
    """int8 weights of the low code of every byte: floor((code * factor + 8) / 16).

    factors int32, one for each four neighbouring bytes at least, broadcasts against octets. The assembly multiplies two
    codes at once, each in 16 bits of a word; `tail` rounds and centres, and its lower half may borrow from the upper
    one without harm, since products there are multiples of 16 and 8 are to spare.
    """
    if HAS_ASM:
        tail = (136 - factors * 128) * 65537
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 even, odd;
            shr.b32 odd, $1, 8;
            and.b32 odd, odd, 0x000F000F;
            and.b32 even, $1, 0x000F000F;
            mad.lo.s32 even, even, $2, $6;
            mad.lo.s32 odd, odd, $2, $6;
            prmt.b32 $0, even, odd, 0x7351;
            }""",
            "=r,r,r,r,r,r,r,r,r,r",
            [octets, factors * 16, tail],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )
    return ((((octets.to(tl.int32) & 15) - 8) * factors + 8) >> 4).to(tl.int8)


@triton.jit
def fold_high(octets, factors, HAS_ASM: tl.constexpr):
    """The same for the high code of every byte, which stands 16 times as high in its half word already."""
    if HAS_ASM:
        tail = (136 - factors * 128) * 65537
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 even, odd;
            shr.b32 odd, $1, 8;
            and.b32 odd, odd, 0x00F000F0;
            and.b32 even, $1, 0x00F000F0;
            mad.lo.s32 even, even, $2, $6;
            mad.lo.s32 odd, odd, $2, $6;
            prmt.b32 $0, even, odd, 0x7351;
            }""",
            "=r,r,r,r,r,r,r,r,r,r",
            [octets, factors, tail],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )
    return (((((octets.to(tl.int32) >> 4) & 15) - 8) * factors + 8) >> 4).to(tl.int8)


@triton.jit
def _decode_kernel(
    octets,
    scales,
    ratios,
    y,
    y_stride,
    num_rows,
    num_groups,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    HAS_ASM: tl.constexpr,
):
    """KIND: int8, fp8 or bf16. octets int8, for 8 bits int16: of two codes each, an even one and an odd one. ratios
    fp32 [N]: what the scales of a row are multiplied with."""
    HALF: tl.constexpr = GROUP // 2
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None, None]
    group = (tl.program_id(1) * GROUPS + tl.arange(0, GROUPS))[None, :, None]
    octet = tl.arange(0, HALF)[None, None, :]
    is_there = (row < num_rows) & (group < num_groups)
    place = row.to(tl.int64) * num_groups + group
    packed = tl.load(octets + place * HALF + octet, mask=is_there, other=0)
    scale = tl.load(scales + place, mask=is_there, other=0.0).to(tl.float32)
    wide = packed.to(tl.int32)
    MASK: tl.constexpr = (1 << BITS) - 1
    CENTRE: tl.constexpr = 1 << (BITS - 1)
    even = ((wide & MASK) - CENTRE).to(tl.float32)
    odd = (((wide >> BITS) & MASK) - CENTRE).to(tl.float32)
    if KIND == "bf16":
        low, high = even * scale, odd * scale
        both = tl.interleave(low.to(tl.bfloat16), high.to(tl.bfloat16))
        target = y + row.to(tl.int64) * y_stride + group * GROUP
        tl.store(target + tl.arange(0, GROUP)[None, None, :], both, mask=is_there)
    else:
        ratio = scale * tl.load(ratios + row, mask=row < num_rows, other=0.0)
        if KIND == "fp8":
            low, high = (even * ratio).to(tl.float8e4nv), (odd * ratio).to(tl.float8e4nv)
        elif BITS == 8:
            low = (even * ratio + _ROUNDER).to(tl.int32, bitcast=True).to(tl.int8)
            high = (odd * ratio + _ROUNDER).to(tl.int32, bitcast=True).to(tl.int8)
        else:
            factors = tl.floor(ratio + 0.5).to(tl.int32)
            low, high = fold_low(packed, factors, HAS_ASM), fold_high(packed, factors, HAS_ASM)
        column = group * HALF + octet
        target = y + row.to(tl.int64) * y_stride + (column // 64) * 128 + column % 64
        tl.store(target, low, mask=is_there)
        tl.store(target + 64, high, mask=is_there)


def decode_int8_triton(weight: Int4Weight, out: Tensor) -> Tensor:
    """int8 weights in split order into `out`, whose rows may lie apart. Shapes: out int8 [N, K]."""
    return _decode(weight, weight.inverses, out, "int8")


def decode_bf16_triton(weight: Int4Weight, out: Tensor) -> Tensor:
    """Plain weights into `out`, whose rows may lie apart. Shapes: out bf16 [N, K]."""
    return _decode(weight, weight.inverses, out, "bf16")


def decode_fp8_triton(weight: Int4Weight, out: Tensor) -> Tensor:
    """fp8 weights in split order into `out`, whose rows may lie apart. Shapes: out float8_e4m3fn [N, K]."""
    return _decode(weight, _fp8_inverses(weight), out, "fp8")


def decode_int8(weight: Int4Weight, out: Tensor) -> Tensor:
    """int8 weights with one scale an output channel, `row_scales`, in split order, into `out`."""
    if use_triton(weight.words, out):
        return decode_int8_triton(weight, out)
    return out.copy_(decode_int8_reference(weight))


def decode_bf16(weight: Int4Weight, out: Tensor) -> Tensor:
    """Plain weights into `out`."""
    if use_triton(weight.words, out):
        return decode_bf16_triton(weight, out)
    return out.copy_(decode_bf16_reference(weight))


def decode_fp8(weight: Int4Weight, out: Tensor) -> Tensor:
    """fp8 weights with one scale an output channel, `fp8_scales`, in split order, into `out`."""
    if use_triton(weight.words, out):
        return decode_fp8_triton(weight, out)
    return out.copy_(decode_fp8_reference(weight))


_KINDS = {"int8": torch.int8, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}


def _decode(weight: Int4Weight, ratios: Tensor, out: Tensor, kind: str) -> Tensor:
    num_out, num_in = weight.shape
    if out.dtype != _KINDS[kind] or out.shape != (num_out, num_in) or out.stride(1) != 1:
        raise ValueError(
            f"scratch is {out.dtype} {tuple(out.shape)} {out.stride()}, needed is {_KINDS[kind]} {(num_out, num_in)}"
        )
    num_groups, groups = num_in // weight.group_size, _FEATURES // weight.group_size
    grid = (triton.cdiv(num_out, _ROWS), triton.cdiv(num_groups, groups))
    _decode_kernel[grid](
        weight.words.view(torch.int8 if weight.bits == 4 else torch.int16),
        weight.scales,
        ratios,
        out,
        out.stride(0),
        num_out,
        num_groups,
        GROUP=weight.group_size,
        BITS=weight.bits,
        KIND=kind,
        ROWS=_ROWS,
        GROUPS=groups,
        HAS_ASM=HAS_INLINE_ASM,
        num_warps=_WARPS,
        enable_fp_fusion=False,
    )
    return out


def _centred(weight: Int4Weight, dtype: torch.dtype) -> Tensor:
    return unpack_codes(weight.words, weight.bits, dtype).sub_(2 ** (weight.bits - 1))


def _ratios(weight: Int4Weight) -> Tensor:
    """What 8-bit codes are multiplied with, for every feature. Shapes: fp32 [N, K]."""
    return _per_feature(weight, weight.scales.float() * weight.inverses.unsqueeze(1))


def _fp8_inverses(weight: Int4Weight) -> Tensor:
    return weight.inverses * (_FP8_RATIO / (16 if weight.bits == 4 else 1))


def _per_feature(weight: Int4Weight, groups: Tensor) -> Tensor:
    return groups.repeat_interleave(weight.group_size, dim=1)


assert LIMITS[torch.float8_e4m3fn] / LIMITS[torch.int8] == _FP8_RATIO
