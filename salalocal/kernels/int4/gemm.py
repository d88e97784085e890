"""Matrix product with packed int4 weights that are unpacked in registers, for 16 rows of activations and more.

    int8 math:  y[m, n] = x_scales[m] * row_scales[n] * sum_k x[m, k] * w8[n, k]     w8 as in `kernels.int4.scratch`
    bf16 math:  y[m, n] = sum_k x[m, k] * round(code[n, k] * scales[n, g(k)])        sums in fp32
    with a residual:  y = residual + factor * (the same)

No weight is written anywhere: the kernel reads half a byte for each. Tiles are computed as W x^T, so that the unpacked
weights are the operand that matrix units take from registers. Where there are few tiles, several programs share one and
split K; the last of them to end adds the others' partial sums in a fixed order, so results do not depend on timing.
int8 sums are exact: every way to cut the work, and the scratch route, give the same bits.

Shapes: x [M, K] in split order: `QuantizedRows` of int8, or bf16 (`split_rows`); y, residual [M, N], rows may lie
apart.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from salalocal.errors import BackendError
from salalocal.kernels.backend import HAS_INLINE_ASM, compute_capability, num_multiprocessors, tl, triton, use_triton
from salalocal.kernels.int4.activations_by_row import QuantizedRows, from_split_order
from salalocal.kernels.int4.gemm_launch import INT4_BF16_LAUNCH, INT4_INT8_LAUNCH, GemmLaunch, pick_launch
from salalocal.kernels.int4.int8_gemm import (
    Ending,
    Residual,
    check_gemm,
    int8_gemm_reference,
    operand,
    store_scaled,
    tile_of_program,
)
from salalocal.kernels.int4.scratch import Int4Weight, decode_bf16_reference, decode_int8_reference, fold_high, fold_low

INT8_GROUPS = (64, 128)  # half a group is a step of the integer matrix unit, which takes 32 features at least
MAX_SPLITS = 16
_MIN_STEPS_OF_SPLIT = 4
_PARTIAL_SUMS, _TILES = 2**22, 2**12


class SplitWorkspace(NamedTuple):
    """Where programs that share a tile meet; one for each device and stream, reused by every call.

    Shapes: partials int32 [2**22] (fp32 sums as bits); counters int32 [2**12], zero between calls.
    """

    partials: Tensor
    counters: Tensor


def new_split_workspace(device: torch.device) -> SplitWorkspace:
    """16 MiB, allocated once."""
    partials = torch.empty(_PARTIAL_SUMS, dtype=torch.int32, device=device)
    return SplitWorkspace(partials, torch.zeros(_TILES, dtype=torch.int32, device=device))


def int4_gemm_definition(x: QuantizedRows | Tensor, weight: Int4Weight, residual: Residual | None = None) -> Tensor:
    """The formula, in float64."""
    if isinstance(x, QuantizedRows):
        w8 = decode_int8_reference(weight).double()
        y = x.codes.double() @ w8.t() * x.scales.double().unsqueeze(-1) * weight.row_scales.double()
    else:
        y = from_split_order(x).double() @ decode_bf16_reference(weight).double().t()
    return y if residual is None else residual.values.double() + residual.factor * y


def int4_gemm_reference(
    x: QuantizedRows | Tensor, weight: Int4Weight, out: Tensor, residual: Residual | None = None
) -> Tensor:
    """The same with fp32 at the end, by way of a decoded matrix."""
    if isinstance(x, QuantizedRows):
        return int8_gemm_reference(x, decode_int8_reference(weight), weight.row_scales, out, residual)
    y = from_split_order(x).float() @ decode_bf16_reference(weight).float().t()
    return out.copy_(y if residual is None else residual.values.float() + residual.factor * y)


@triton.jit
def _scale_codes(octets, scales, HAS_ASM: tl.constexpr):
    """bf16 weights of the low code of every byte; scales bf16, broadcast against octets.

    128 + code is a bf16 number whose lowest mantissa bits are the code, so a byte shuffle makes floats of codes.
    """
    if HAS_ASM:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 codes, a, b, base, one, centre, zero;
            mov.b32 base, 0x43434343;
            mov.b32 one, 0x3F803F80;
            mov.b32 centre, 0xC308C308;
            mov.b32 zero, 0x80008000;
            and.b32 codes, $2, 0x0F0F0F0F;
            prmt.b32 a, codes, base, 0x5140;
            prmt.b32 b, codes, base, 0x7362;
            fma.rn.bf16x2 a, a, one, centre;
            fma.rn.bf16x2 b, b, one, centre;
            fma.rn.bf16x2 a, a, $3, zero;
            fma.rn.bf16x2 b, b, $4, zero;
            mov.b32 $0, a;
            mov.b32 $1, b;
            }""",
            "=r,=r,r,r,r",
            [octets, scales],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=4,
        )
    return (((octets.to(tl.int32) & 15) - 8).to(tl.float32) * scales.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _settled(sums, HAS_ASM: tl.constexpr):
    """The same fp32 sums, behind the products that are on their way.

    wgmma reads its register operand while it runs. Triton lets the last product of a turn of the loop run on into the
    next, where unpacking writes to those registers; a use of the sums makes it wait. The copy itself costs nothing.
    """
    if HAS_ASM:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [sums], dtype=tl.float32, is_pure=True, pack=1)
    return sums


@triton.jit(do_not_specialize=["num_rows", "num_splits"])
def _int4_gemm_kernel(
    x,
    octets,
    scales,
    inverses,
    x_scales,
    row_scales,
    residual,
    factor,
    y,
    partials,
    counters,
    num_rows,
    num_columns,
    num_groups,
    num_splits,
    residual_stride,
    y_stride,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
    SPAN: tl.constexpr,
    STAGES: tl.constexpr,
    IS_INT8: tl.constexpr,
    HAS_SPLITS: tl.constexpr,
    HAS_TMA: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_ASM: tl.constexpr,
):
    """x and octets are pointers, or descriptors with blocks [ROWS, GROUP / 2] and [COLUMNS, GROUP / 2]."""
    HALF: tl.constexpr = GROUP // 2
    PER_BLOCK: tl.constexpr = 128 // GROUP  # groups in a block of split order
    SUM: tl.constexpr = tl.int32 if IS_INT8 else tl.float32
    ending = Ending(x_scales, row_scales, residual, factor, y, num_rows, num_columns, residual_stride, y_stride)
    tile = tl.program_id(0)
    row_tile, column_tile = tile_of_program(tile, num_rows, num_columns, ROWS, COLUMNS, SPAN)
    row = row_tile * ROWS + tl.arange(0, ROWS)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    there = tl.where(column < num_columns, column, 0)
    if not HAS_TMA:
        half = tl.arange(0, HALF)
        x_tile = x + tl.where(row < num_rows, row, 0).to(tl.int64)[None, :] * (num_groups * GROUP) + half[:, None]
        w_tile = octets + there.to(tl.int64)[:, None] * (num_groups * HALF) + half[None, :]
    length = tl.cdiv(num_groups // STEPS, num_splits) * STEPS
    first = tl.program_id(1) * length
    last = tl.minimum(num_groups, first + length)
    inverse = tl.load(inverses + there)
    scale_tile = scales + there * num_groups
    sums = tl.zeros([COLUMNS, ROWS], SUM)
    for start in tl.range(first, last, STEPS, num_stages=STAGES):
        for step in tl.static_range(STEPS):
            group = start + step
            scale = tl.load(scale_tile + group)
            even = group * 128 if PER_BLOCK == 1 else group // PER_BLOCK * 128 + group % PER_BLOCK * HALF
            if HAS_TMA:
                packed = octets.load([column_tile * COLUMNS, group * HALF])
                x_even = x.load([row_tile * ROWS, even]).T
                x_odd = x.load([row_tile * ROWS, even + 64]).T
            else:
                packed = tl.load(w_tile + group * HALF)
                x_even = tl.load(x_tile + even)
                x_odd = tl.load(x_tile + even + 64)
            if IS_INT8:
                factors = tl.floor(scale.to(tl.float32) * inverse + 0.5).to(tl.int32)[:, None]
                low, high = fold_low(packed, factors, HAS_ASM), fold_high(packed, factors, HAS_ASM)
            else:
                rounded = scale.to(tl.bfloat16)[:, None]
                low, high = _scale_codes(packed, rounded, HAS_ASM), _scale_codes(packed >> 4, rounded, HAS_ASM)
            sums = tl.dot(low, x_even, sums, out_dtype=SUM)
            sums = tl.dot(high, x_odd, sums, out_dtype=SUM)
            if not IS_INT8:
                sums = _settled(sums, HAS_ASM)
    if not HAS_SPLITS:
        store_scaled(sums, row[None, :], column[:, None], ending, IS_INT8, HAS_RESIDUAL)
    else:
        inside = tl.arange(0, COLUMNS)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
        meeting = partials + tile * (num_splits * COLUMNS * ROWS) + inside
        tl.store(meeting + tl.program_id(1) * (COLUMNS * ROWS), sums.to(tl.int32, bitcast=True), cache_modifier=".cg")
        tl.debug_barrier()
        if tl.atomic_add(counters + tile, 1, sem="acq_rel") == num_splits - 1:
            tl.debug_barrier()
            sums = tl.zeros([COLUMNS, ROWS], SUM)
            for split in tl.range(0, num_splits):
                part = tl.load(meeting + split * (COLUMNS * ROWS), cache_modifier=".cg")
                sums += part.to(SUM, bitcast=True)
            tl.store(counters + tile, 0)
            store_scaled(sums, row[None, :], column[:, None], ending, IS_INT8, HAS_RESIDUAL)


def int4_gemm_triton(
    x: QuantizedRows | Tensor,
    weight: Int4Weight,
    out: Tensor,
    workspace: SplitWorkspace,
    residual: Residual | None = None,
    launch: GemmLaunch | None = None,
) -> Tensor:
    """Programs for tiles, and for parts of K where tiles are few.

    Raises: BackendError for groups of 32 with int8 activations, and for activations of other dtypes.
    """
    is_int8 = isinstance(x, QuantizedRows)
    codes = (x.codes if isinstance(x, QuantizedRows) else x).contiguous()
    num_columns, num_groups = weight.scales.shape
    check_gemm(codes, weight.shape, out, residual)
    _check_kind(codes, weight, is_int8)
    if len(codes) == 0:
        return out
    table = INT4_INT8_LAUNCH if is_int8 else INT4_BF16_LAUNCH
    launch = launch or pick_launch(table, compute_capability(out.device), len(codes), num_columns, codes.shape[1])
    num_tiles = triton.cdiv(len(codes), launch.rows) * triton.cdiv(num_columns, launch.columns)
    steps = math.gcd(num_groups, max(1, launch.depth // weight.group_size))
    splits = num_splits(num_tiles, num_groups // steps, launch, num_multiprocessors(out.device))
    block = weight.group_size // 2
    _int4_gemm_kernel[(num_tiles, splits)](
        operand(codes, (launch.rows, block), launch),
        operand(weight.words.view(torch.int8), (launch.columns, block), launch),
        weight.scales,
        weight.inverses,
        x.scales if isinstance(x, QuantizedRows) else weight.inverses,
        weight.row_scales,
        out if residual is None else residual.values,
        1.0 if residual is None else residual.factor,
        out,
        *workspace,
        len(codes),
        num_columns,
        num_groups,
        splits,
        out.stride(0) if residual is None else residual.values.stride(0),
        out.stride(0),
        GROUP=weight.group_size,
        ROWS=launch.rows,
        COLUMNS=launch.columns,
        STEPS=steps,
        SPAN=launch.span,
        STAGES=launch.num_stages,
        IS_INT8=is_int8,
        HAS_SPLITS=splits > 1,
        HAS_TMA=launch.has_tma,
        HAS_RESIDUAL=residual is not None,
        HAS_ASM=HAS_INLINE_ASM,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        enable_fp_fusion=False,
    )
    return out


def int4_gemm(
    x: QuantizedRows | Tensor,
    weight: Int4Weight,
    out: Tensor,
    workspace: SplitWorkspace,
    residual: Residual | None = None,
) -> Tensor:
    """The product into `out`, which may be the residual itself."""
    if use_triton(weight.words, out):
        return int4_gemm_triton(x, weight, out, workspace, residual)
    return int4_gemm_reference(x, weight, out, residual)


def num_splits(num_tiles: int, num_steps: int, launch: GemmLaunch, multiprocessors: int) -> int:
    """How many programs share a tile: as many as keep the card busy, each with a few steps at least."""
    wanted = min(launch.programs * multiprocessors // num_tiles, MAX_SPLITS, num_steps // _MIN_STEPS_OF_SPLIT)
    room = _PARTIAL_SUMS // (num_tiles * launch.rows * launch.columns)
    wanted = max(1, min(wanted, room)) if num_tiles <= _TILES else 1
    return -(-num_steps // -(-num_steps // wanted))


def _check_kind(codes: Tensor, weight: Int4Weight, is_int8: bool) -> None:
    if codes.dtype != (torch.int8 if is_int8 else torch.bfloat16):
        raise BackendError(f"activations are {codes.dtype}, the kernel takes int8 with scales, or bfloat16")
    if weight.bits != 4:
        raise BackendError(f"{weight.bits}-bit weights are not unpacked in registers", "take a scratch route")
    if is_int8 and weight.group_size not in INT8_GROUPS:
        raise BackendError(f"groups of {weight.group_size} with int8 activations, the kernel takes 64 and 128")
