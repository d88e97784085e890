"""Up to sixteen rows at memory speed: tiles of packed weights times tiles of activations on tensor cores.

    acc[n, m] += scales[n, g] * sum over k in g of code[n, k] * x[m, k]

The weights are the left operand, unpacked in registers: the even codes of a group meet the even features, the odd ones
the odd features. Programs that share a row write partial sums; the last one to come adds them in their order, so the
result does not depend on who came last.
"""

import torch

from salalocal.errors import BackendError
from salalocal.kernels.backend import HAS_INLINE_ASM, dependent_launch, tl, triton
from salalocal.kernels.int4.activations_by_group import ACTIVATION_GROUP, GroupedActivations
from salalocal.kernels.int4.gemv.epilogue import Target, logit_key, tile_rows
from salalocal.kernels.int4.gemv.launch import TileLaunch
from salalocal.kernels.int4.gemv.product import Product, Scratch

_ACTIVATION_GROUP = tl.constexpr(ACTIVATION_GROUP)
# Tensor cores take 8 tokens or a multiple.
_TOKEN_TILES = (8, 16)
_COPIED_BYTES = 4 * 32  # a warp copies at least so many ahead of their use; of less it would wait for each load


@triton.jit
def _signed_nibbles(octets, NATIVE: tl.constexpr):
    """The two codes of every byte, less 8 and times 16, as int8: the lower one and the upper one."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            """{ .reg .b32 t; shl.b32 t, $2, 4;
            lop3.b32 $0, t, 0x80808080, 0xF0F0F0F0, 0x28;
            lop3.b32 $1, $2, 0x80808080, 0xF0F0F0F0, 0x28; }""",
            "=r,=r,r",
            [octets],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    return ((octets << 4) ^ -128) & -16, (octets ^ -128) & -16


@triton.jit
def _signed_bytes(octets, NATIVE: tl.constexpr):
    """Codes of 8 bits less 128, as int8."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "xor.b32 $0, $1, 0x80808080;", "=r,r", [octets], dtype=tl.int8, is_pure=True, pack=4
        )
    return octets ^ -128


@triton.jit
def _float_nibbles(octets, KIND: tl.constexpr, NATIVE: tl.constexpr):
    """The two codes of every byte, less 8, as floats.

    A code in the lowest bits of 128.0 (bf16) or 1024.0 (fp16) is that number plus the code; the rest is one
    subtraction, which is exact.
    """
    if NATIVE and tl.bfloat16 == KIND:
        return tl.inline_asm_elementwise(
            """{ .reg .b32 t, u; and.b32 t, $4, 0x0F0F0F0F; shr.u32 u, $4, 4; and.b32 u, u, 0x0F0F0F0F;
            prmt.b32 $0, t, 0x43434343, 0x4140; prmt.b32 $1, t, 0x43434343, 0x4342;
            prmt.b32 $2, u, 0x43434343, 0x4140; prmt.b32 $3, u, 0x43434343, 0x4342;
            mov.b32 t, 0x3F803F80; mov.b32 u, 0xC308C308;
            fma.rn.bf16x2 $0, $0, t, u; fma.rn.bf16x2 $1, $1, t, u;
            fma.rn.bf16x2 $2, $2, t, u; fma.rn.bf16x2 $3, $3, t, u; }""",
            "=&r,=&r,=&r,=&r,r",
            [octets],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=4,
        )
    if NATIVE and tl.float16 == KIND:
        return tl.inline_asm_elementwise(
            """{ .reg .b32 t, u; and.b32 t, $4, 0x0F0F0F0F; shr.u32 u, $4, 4; and.b32 u, u, 0x0F0F0F0F;
            prmt.b32 $0, t, 0x64646464, 0x4140; prmt.b32 $1, t, 0x64646464, 0x4342;
            prmt.b32 $2, u, 0x64646464, 0x4140; prmt.b32 $3, u, 0x64646464, 0x4342;
            mov.b32 t, 0x3C003C00; mov.b32 u, 0xE408E408;
            fma.rn.f16x2 $0, $0, t, u; fma.rn.f16x2 $1, $1, t, u;
            fma.rn.f16x2 $2, $2, t, u; fma.rn.f16x2 $3, $3, t, u; }""",
            "=&r,=&r,=&r,=&r,r",
            [octets],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=4,
        )
    return ((octets & 15) - 8).to(KIND), (((octets >> 4) & 15) - 8).to(KIND)


@triton.jit
def ask_for(octets_ptr, rows, first, row_octets, AHEAD: tl.constexpr):
    """Asks the L2 cache for AHEAD bytes of every row, from its byte `first` on, 128 at a time."""
    starts = tl.minimum(first + tl.arange(0, AHEAD // 128) * 128, row_octets - 1)
    addresses = (octets_ptr + rows[:, None] * row_octets + starts[None, :]).to(tl.int64)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [addresses], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _write_tile(
    acc,
    tile,
    target,
    TOKENS: tl.constexpr,
    EPILOGUE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The epilogue for a tile: acc [ROWS, TOKENS] fp32 -> memory."""
    tokens = tl.arange(0, TOKENS)[None, :]
    num_rows, out = target.num_rows, target.out
    dtype = out.dtype.element_ty
    if EPILOGUE == "swiglu":
        gate, up = tl.split(tl.permute(tl.reshape(acc, [ROWS // 2, 2, TOKENS]), (0, 2, 1)))
        n = tile * (ROWS // 2) + tl.arange(0, ROWS // 2)[:, None]
        y = gate / (1.0 + tl.exp(-gate)) * up
        half = num_rows // 2
        inside = (n < half) & (tokens < target.num_tokens)
        tl.store(out + tokens * target.out_stride + n, y.to(dtype), mask=inside)
    else:
        n = tile * ROWS + tl.arange(0, ROWS)[:, None]
        inside = (n < num_rows) & (tokens < target.num_tokens)
        y = acc * target.factor
        if EPILOGUE == "best":
            keys = tl.where(n < num_rows, logit_key(y, n), -0x7FFFFFFFFFFFFFFF)
            token = tl.arange(0, TOKENS)
            tl.store(out + token * target.out_stride + tile, tl.max(keys, axis=0), mask=token < target.num_tokens)
        else:
            if EPILOGUE == "residual":
                residual = target.residual + tokens * target.residual_stride + n
                y += tl.load(residual, mask=inside, other=0.0).to(tl.float32)
            tl.store(out + tokens * target.out_stride + n, y.to(dtype), mask=inside)


@triton.jit
def _dots(octets, x, x_odd, NATIVE: tl.constexpr):
    """Sums of a group, fp32, before its scale. Shapes: octets [ROWS, 64], x, x_odd [64, TOKENS] -> [ROWS, TOKENS]."""
    KIND: tl.constexpr = x.dtype
    if tl.int8 == KIND:
        even, odd = _signed_nibbles(octets, NATIVE)
        dots = tl.dot(even, x, out_dtype=tl.int32)
        sums = tl.dot(odd, x_odd, dots, out_dtype=tl.int32).to(tl.float32)
    else:
        even, odd = _float_nibbles(octets, KIND, NATIVE)
        dots = tl.dot(even, x, out_dtype=tl.float32)
        sums = tl.dot(odd, x_odd, dots, out_dtype=tl.float32)
    return sums


@triton.jit
def _paired_sums(
    x_ptr,
    x_scales_ptr,
    octets_ptr,
    scales_ptr,
    rows,
    tokens,
    num_tokens,
    first,
    last,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    UNROLL: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Sums over pairs of groups of 128, from pair `first` to before `last`. Shapes: [ROWS, TOKENS] fp32.

    The scales of a pair are one word, so that they too can be copied ahead of their use; 2 bytes cannot.
    """
    INT8: tl.constexpr = x_ptr.dtype.element_ty == tl.int8
    is_token = (tokens < num_tokens)[None, :]
    octet_ptrs = octets_ptr + rows[:, None] * (K // 2) + tl.arange(0, 64)[None, :]
    x_ptrs = x_ptr + tokens[None, :] * K + tl.arange(0, 64)[:, None]
    scale_ptrs = scales_ptr.to(tl.pointer_type(tl.int32)) + rows * (K // 256)
    x_scale_ptrs = x_scales_ptr + tokens * (K // 128)
    acc = tl.zeros([ROWS, TOKENS], tl.float32)
    for pair in tl.range(first, last, num_stages=STAGES, loop_unroll_factor=UNROLL):
        octets0 = tl.load(octet_ptrs + pair * 128)
        octets1 = tl.load(octet_ptrs + pair * 128 + 64)
        both = tl.load(scale_ptrs + pair)
        x0 = tl.load(x_ptrs + pair * 128, mask=is_token, other=0)
        x1 = tl.load(x_ptrs + pair * 128 + 64, mask=is_token, other=0)
        odd0 = tl.load(x_ptrs + K // 2 + pair * 128, mask=is_token, other=0)
        odd1 = tl.load(x_ptrs + K // 2 + pair * 128 + 64, mask=is_token, other=0)
        scale0 = (both << 16).to(tl.float32, bitcast=True)[:, None]
        scale1 = (both & -65536).to(tl.float32, bitcast=True)[:, None]
        if INT8:
            x_scale0 = tl.load(x_scale_ptrs + pair * 2, mask=tokens < num_tokens, other=0.0)[None, :]
            x_scale1 = tl.load(x_scale_ptrs + pair * 2 + 1, mask=tokens < num_tokens, other=0.0)[None, :]
            acc += _dots(octets0, x0, odd0, NATIVE) * (scale0 * x_scale0)
            acc += _dots(octets1, x1, odd1, NATIVE) * (scale1 * x_scale1)
        else:
            acc += _dots(octets0, x0, odd0, NATIVE) * scale0
            acc += _dots(octets1, x1, odd1, NATIVE) * scale1
    return acc


@triton.jit
def _grouped_sums(
    x_ptr,
    x_scales_ptr,
    octets_ptr,
    scales_ptr,
    rows,
    tokens,
    num_tokens,
    first,
    last,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    UNROLL: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """The same for 8 bits and other groups: sums over steps of at most 128 features that have one scale."""
    INT8: tl.constexpr = x_ptr.dtype.element_ty == tl.int8
    STEP: tl.constexpr = GROUP if GROUP < 128 else 128
    OCTETS: tl.constexpr = STEP * BITS // 8
    STEPS: tl.constexpr = K // STEP
    is_token = tokens < num_tokens
    octet_ptrs = octets_ptr + rows[:, None] * (K * BITS // 8) + tl.arange(0, OCTETS)[None, :]
    x_ptrs = x_ptr + tokens[None, :] * K + tl.arange(0, OCTETS)[:, None]
    scale_ptrs = scales_ptr + rows * (K // GROUP)
    scale = tl.load(scale_ptrs + tl.minimum(first, STEPS - 1) * STEP // GROUP).to(tl.float32)
    acc = tl.zeros([ROWS, TOKENS], tl.float32)
    for step in tl.range(first, last, num_stages=STAGES, loop_unroll_factor=UNROLL):
        octets = tl.load(octet_ptrs + step * OCTETS)
        x = tl.load(x_ptrs + step * OCTETS, mask=is_token[None, :], other=0)
        ahead = tl.load(scale_ptrs + tl.minimum(step + 1, STEPS - 1) * STEP // GROUP)
        if BITS == 4:
            x_odd = tl.load(x_ptrs + K // 2 + step * OCTETS, mask=is_token[None, :], other=0)
            dots = _dots(octets, x, x_odd, NATIVE)
        else:
            dots = tl.dot(_signed_bytes(octets, NATIVE), x, out_dtype=tl.int32).to(tl.float32)
        if INT8:
            x_scale_ptrs = x_scales_ptr + tokens * (K // _ACTIVATION_GROUP) + step * STEP // _ACTIVATION_GROUP
            acc += dots * (scale[:, None] * tl.load(x_scale_ptrs, mask=is_token, other=0.0)[None, :])
        else:
            acc += dots * scale[:, None]
        scale = ahead.to(tl.float32)
    return acc


@triton.jit
def _int4_gemv_tiles_kernel(
    x_ptr,
    x_scales_ptr,
    octets_ptr,
    scales_ptr,
    residual_ptr,
    out_ptr,
    partials_ptr,
    tickets_ptr,
    factor,
    num_tokens,
    num_rows,
    residual_stride,
    out_stride,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    TOKENS: tl.constexpr,
    EPILOGUE: tl.constexpr,
    ROWS: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    UNROLL: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """One program: ROWS rows of the weights, one part of SPLIT of the features, all tokens."""
    INT8: tl.constexpr = x_ptr.dtype.element_ty == tl.int8
    # Features at a time: as many as have one scale, or two groups of the usual size.
    PAIRED: tl.constexpr = BITS == 4 and GROUP == 128 and K % 256 == 0 and scales_ptr.dtype.element_ty == tl.bfloat16
    STEP: tl.constexpr = 256 if PAIRED else (GROUP if GROUP < 128 else 128)
    OCTETS: tl.constexpr = STEP * BITS // 8
    STEPS: tl.constexpr = K // STEP
    PART: tl.constexpr = (STEPS + SPLIT - 1) // SPLIT
    target = Target(residual_ptr, out_ptr, factor, num_tokens, num_rows, residual_stride, out_stride)
    tile = tl.program_id(0)
    part = tl.program_id(1)
    rows = tile_rows(tile, num_rows, EPILOGUE, ROWS)
    tokens = tl.arange(0, TOKENS)
    first = part * PART
    last = tl.minimum(first + PART, STEPS)
    if PDL:
        if AHEAD > 0:
            ask_for(octets_ptr, rows, first * OCTETS, K * BITS // 8, AHEAD)
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if PAIRED:
        acc = _paired_sums(
            x_ptr, x_scales_ptr, octets_ptr, scales_ptr, rows, tokens, num_tokens, first, last, K, ROWS, TOKENS, STAGES,
            UNROLL, NATIVE,
        )  # fmt: skip
    else:
        acc = _grouped_sums(
            x_ptr, x_scales_ptr, octets_ptr, scales_ptr, rows, tokens, num_tokens, first, last, K, GROUP, BITS, ROWS,
            TOKENS, STAGES, UNROLL, NATIVE,
        )  # fmt: skip
    if INT8 and BITS == 4:
        acc *= 0.0625
    if SPLIT == 1:
        _write_tile(acc, tile, target, TOKENS, EPILOGUE, ROWS)
    else:
        cells = tile * (ROWS * TOKENS) + tl.arange(0, ROWS)[:, None] * TOKENS + tokens[None, :]
        part_size = tl.num_programs(0) * (ROWS * TOKENS)
        tl.store(partials_ptr + part * part_size + cells, acc)
        tl.debug_barrier()
        if tl.atomic_add(tickets_ptr + tile, 1, sem="acq_rel") == SPLIT - 1:
            total = tl.zeros([ROWS, TOKENS], tl.float32)
            for other in range(SPLIT):
                total += tl.load(partials_ptr + other * part_size + cells, cache_modifier=".cg")
            _write_tile(total, tile, target, TOKENS, EPILOGUE, ROWS)
            tl.store(tickets_ptr + tile, 0)


def launch_tiles(product: Product, launch: TileLaunch, scratch: Scratch | None) -> None:
    """Launch for a checked product. Raises: BackendError if the scratch is too small, or groups are small."""
    shape, x = product.shape, product.x
    assert isinstance(x, GroupedActivations)
    if x.group != ACTIVATION_GROUP:
        raise BackendError(f"activations in groups of {x.group}, this form takes {ACTIVATION_GROUP}")
    least = launch.num_warps * _COPIED_BYTES // (64 * x.values.dtype.itemsize)
    tokens = min((size for size in _TOKEN_TILES if size >= max(product.num_tokens, least)), default=_TOKEN_TILES[-1])
    num_tiles = triton.cdiv(shape.N, launch.rows)
    scratch = _fitting(scratch, num_tiles, launch, tokens, x.values.device)
    _int4_gemv_tiles_kernel[num_tiles, launch.split](
        x_ptr=x.values,
        x_scales_ptr=x.values if x.scales is None else x.scales,
        octets_ptr=product.weight.words.view(torch.int8),
        partials_ptr=product.out if scratch is None else scratch.partials,
        tickets_ptr=product.out if scratch is None else scratch.tickets,
        **product.arguments,
        BITS=shape.bits,
        TOKENS=tokens,
        ROWS=launch.rows,
        SPLIT=launch.split,
        STAGES=launch.num_stages,
        UNROLL=launch.unroll,
        AHEAD=launch.ahead,
        NATIVE=HAS_INLINE_ASM,
        num_warps=launch.num_warps,
        **dependent_launch(x.values.device),
    )


def _fitting(
    scratch: Scratch | None, num_tiles: int, launch: TileLaunch, tokens: int, device: torch.device
) -> Scratch | None:
    """The scratch that a launch needs; a new one where it needs some and none was given."""
    if launch.split == 1:
        return None
    num_partials = num_tiles * launch.rows * tokens * launch.split
    if scratch is None:
        return Scratch.make(device, num_partials, num_tiles)
    if scratch.partials.numel() < num_partials or scratch.tickets.numel() < num_tiles:
        raise BackendError(
            f"scratch of {scratch.partials.numel():,} sums and {scratch.tickets.numel():,} counters, "
            f"needed are {num_partials:,} and {num_tiles:,}"
        )
    return scratch
