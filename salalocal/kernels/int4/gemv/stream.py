"""One to four rows at memory speed, weights flowing past activations that stay: they are held in registers as int8,
and each program walks over many rows of the weights.

The programs fill the card once. While one set of words is multiplied the next is on its way, also from one kernel into
the next: its first words, and some more into the L2 cache, are asked for before the activations are there. So a program
can afford to norm and quantize the activations itself, and no kernel is needed in between. What it gates it can also
quantize for the next product: it then walks over neighbouring sets of rows, until a group of outputs is whole.
Shapes: rows bf16 [M, K], M <= 4, K a power of two; 4 bits alone.
"""

import torch

from salalocal.errors import BackendError
from salalocal.kernels.backend import HAS_INLINE_ASM, dependent_launch, num_multiprocessors, tl, triton
from salalocal.kernels.int4.activations_by_group import (
    ACTIVATION_GROUP,
    GroupedActivations,
    RawActivations,
)
from salalocal.kernels.int4.gemv.epilogue import Target, tile_rows, write_token
from salalocal.kernels.int4.gemv.launch import MAX_WORD_TOKENS, Launch, StreamLaunch
from salalocal.kernels.int4.gemv.product import Product
from salalocal.kernels.int4.gemv.tiles import ask_for

_GROUP_WORDS = tl.constexpr(ACTIVATION_GROUP // 8)
GATED_GROUP = 32  # features that share a scale where the product quantizes its gated outputs
_GATED_GROUP = tl.constexpr(GATED_GROUP)


@triton.jit
def _even(pair):
    """The first of two bf16 in a word, as fp32."""
    return (pair << 16).to(tl.float32, bitcast=True)


@triton.jit
def _odd(pair):
    """The second of two bf16 in a word, as fp32."""
    return (pair & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _normed(v, root, gain):
    """v / rms * gain, rounded as `kernels.norm` says."""
    return ((v * root).to(tl.bfloat16).to(tl.float32) * gain).to(tl.bfloat16).to(tl.float32)


@triton.jit
def _code(v, step):
    """The int8 nearest to v * step, ties to even, as the low byte of a word, with other bits above it.

    1.5 * 2^23 is added, where floats are whole numbers; those hold them in two's complement.
    """
    return (v * step + 12582912.0).to(tl.int32, bitcast=True)


@triton.jit
def _four_codes(v0, v1, v2, v3, step):
    """A word of four int8."""
    first = (_code(v0, step) & 255) | ((_code(v1, step) & 255) << 8)
    return first | ((_code(v2, step) & 255) << 16) | (_code(v3, step) << 24)


@triton.jit
def _four_pairs(ptr, GROUPS: tl.constexpr):
    """bf16 two in a word, by their place in words of 8 features: four tensors [GROUPS, 16], each word one load."""
    columns = tl.arange(0, 4 * _GROUP_WORDS)[None, :]
    pairs = tl.load(ptr + tl.arange(0, GROUPS)[:, None] * (4 * _GROUP_WORDS) + columns)
    p02, p13 = tl.split(tl.reshape(pairs, [GROUPS, _GROUP_WORDS, 2, 2]))
    p0, p2 = tl.split(p02)
    p1, p3 = tl.split(p13)
    return p0, p1, p2, p3


@triton.jit
def _quantized_row(x_ptr, gain_ptr, eps, K: tl.constexpr, NORM: tl.constexpr):
    """One row of bf16, two in a word -> the even and the odd features as words of int8 [K / 8], scales [K / 32]."""
    GROUPS: tl.constexpr = K // (8 * _GROUP_WORDS)
    p0, p1, p2, p3 = _four_pairs(x_ptr, GROUPS)
    if NORM:
        g0, g1, g2, g3 = _four_pairs(gain_ptr, GROUPS)
    e0, e1, e2, e3 = _even(p0), _even(p1), _even(p2), _even(p3)
    o0, o1, o2, o3 = _odd(p0), _odd(p1), _odd(p2), _odd(p3)
    if NORM:
        squares = e0 * e0 + o0 * o0 + e1 * e1 + o1 * o1 + e2 * e2 + o2 * o2 + e3 * e3 + o3 * o3
        root = tl.rsqrt(tl.sum(tl.sum(squares, axis=1), axis=0) / K + eps)
        e0, o0 = _normed(e0, root, _even(g0)), _normed(o0, root, _odd(g0))
        e1, o1 = _normed(e1, root, _even(g1)), _normed(o1, root, _odd(g1))
        e2, o2 = _normed(e2, root, _even(g2)), _normed(o2, root, _odd(g2))
        e3, o3 = _normed(e3, root, _even(g3)), _normed(o3, root, _odd(g3))
    first = tl.maximum(tl.maximum(tl.abs(e0), tl.abs(o0)), tl.maximum(tl.abs(e1), tl.abs(o1)))
    last = tl.maximum(tl.maximum(tl.abs(e2), tl.abs(o2)), tl.maximum(tl.abs(e3), tl.abs(o3)))
    largest = tl.max(tl.maximum(first, last), axis=1)
    limit = tl.full([GROUPS], 127.0, tl.float32)
    step = tl.where(largest > 0, tl.div_rn(limit, largest), 0.0)[:, None]
    even, odd = _four_codes(e0, e1, e2, e3, step), _four_codes(o0, o1, o2, o3, step)
    zeros = e0 * 0.0 + o0 * 0.0 + e1 * 0.0 + o1 * 0.0 + e2 * 0.0 + o2 * 0.0 + e3 * 0.0 + o3 * 0.0
    scale = tl.div_rn(largest, limit) + tl.sum(zeros, axis=1)
    scales = tl.broadcast_to(scale[:, None], [GROUPS, _GROUP_WORDS // 4])
    return tl.reshape(even, [K // 8]), tl.reshape(odd, [K // 8]), tl.reshape(scales, [K // 32])


@triton.jit
def _dp4a(a, b, NATIVE: tl.constexpr):
    """The products of four bytes, those of a without a sign, those of b with one."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, 0;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
        )
    c = tl.zeros_like(a)
    for i in tl.static_range(4):
        c += ((a >> (8 * i)) & 255) * ((b << (24 - 8 * i)) >> 24)
    return c


@triton.jit
def _four_words(sums, CHUNKS: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr):
    """Sums of each four words. Shapes: [CHUNKS, ROWS, SPAN] -> [CHUNKS, ROWS, SPAN / 4]."""
    return tl.sum(tl.reshape(sums, [CHUNKS, ROWS, SPAN // 4, 4]), axis=3)


@triton.jit
def _row_of_x(
    x_ptr,
    x_scales_ptr,
    gain_ptr,
    eps,
    token,
    num_tokens,
    K: tl.constexpr,
    X_GROUP: tl.constexpr,
    RAW: tl.constexpr,
    NORM: tl.constexpr,
    SPAN: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """What a program holds of one token: even and odd words [CHUNKS, 1, SPAN]; for each four words their scale and what
    unsigned codes add too much [CHUNKS, 1, SPAN / 4]."""
    CHUNKS: tl.constexpr = K // 8 // SPAN
    row = tl.minimum(token, num_tokens - 1)
    if RAW:
        even, odd, scales = _quantized_row(x_ptr + row * (K // 2), gain_ptr, eps, K, NORM)
    else:
        words = x_ptr + row * (K // 4) + tl.arange(0, K // 8)
        even, odd = tl.load(words), tl.load(words + K // 8)
        scales = tl.load(x_scales_ptr + row * (K // X_GROUP) + tl.arange(0, K // 32) // (X_GROUP // 32))
    even, odd = tl.reshape(even, [CHUNKS, 1, SPAN]), tl.reshape(odd, [CHUNKS, 1, SPAN])
    ones = tl.full([CHUNKS, 1, SPAN], 0x01010101, tl.int32)
    totals = _dp4a(ones, even, NATIVE) + _dp4a(ones, odd, NATIVE)
    return even, odd, tl.reshape(scales, [CHUNKS, 1, SPAN // 4]), _four_words(totals, CHUNKS, 1, SPAN) * 128


@triton.jit
def _products(
    words, scale, even, odd, x_scale, excess, CHUNKS: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    """Products of ROWS rows with one token, a code in the upper half of a byte being 16 times its value.

    Shapes: words int32 [CHUNKS, ROWS, SPAN], scale fp32 [CHUNKS, ROWS, SPAN / 4] -> fp32 [ROWS].
    """
    low = _four_words(_dp4a(words & 0x0F0F0F0F, even, NATIVE), CHUNKS, ROWS, SPAN)
    high = _four_words(_dp4a(words & -252645136, odd, NATIVE), CHUNKS, ROWS, SPAN)  # & 0xF0F0F0F0
    sums = (low * 16 + high - excess).to(tl.float32)
    return tl.sum(tl.sum(sums * (scale * x_scale), axis=0), axis=1) * 0.0625


@triton.jit
def _group_outputs(target, codes_ptr, code_scales_ptr, token, group):
    """Read a whole group of gated outputs back, and write it as int8 in split order, with its scale."""
    PAIRS: tl.constexpr = _GATED_GROUP // 2
    is_token = token < target.num_tokens
    num_features = target.num_rows // 2
    pair = tl.arange(0, PAIRS)[None, :]
    first = target.out + token * target.out_stride + group * _GATED_GROUP + 2 * pair
    even = tl.load(first, mask=is_token, other=0.0).to(tl.float32)
    odd = tl.load(first + 1, mask=is_token, other=0.0).to(tl.float32)
    largest = tl.max(tl.maximum(tl.abs(even), tl.abs(odd)), axis=1)
    limit = tl.full([1], 127.0, tl.float32)
    step = tl.where(largest > 0, tl.div_rn(limit, largest), 0.0)[:, None]
    codes = codes_ptr + token * num_features + group * PAIRS + pair
    tl.store(codes, _code(even, step).to(tl.int8), mask=is_token)
    tl.store(codes + num_features // 2, _code(odd, step).to(tl.int8), mask=is_token)
    scale = tl.div_rn(largest, limit) + tl.sum(even * 0.0 + odd * 0.0, axis=1)
    scale_at = code_scales_ptr + token * (num_features // _GATED_GROUP) + group + tl.arange(0, 1)
    tl.store(scale_at, scale, mask=is_token)


@triton.jit
def _int4_gemv_stream_kernel(
    x_ptr,
    x_scales_ptr,
    gain_ptr,
    eps,
    words_ptr,
    scales_ptr,
    residual_ptr,
    out_ptr,
    codes_ptr,
    code_scales_ptr,
    factor,
    num_tokens,
    num_rows,
    residual_stride,
    out_stride,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    X_GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    EPILOGUE: tl.constexpr,
    UNIT: tl.constexpr,
    RAW: tl.constexpr,
    NORM: tl.constexpr,
    ROWS: tl.constexpr,
    SPAN: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """One program: every num_programs-th set of ROWS rows of the weights, and all TOKENS tokens. With a UNIT above 1
    every num_programs-th UNIT of sets, whose gated outputs are a group and go to codes and their scales as well."""
    CHUNKS: tl.constexpr = K // 8 // SPAN
    target = Target(residual_ptr, out_ptr, factor, num_tokens, num_rows, residual_stride, out_stride)
    tile = tl.program_id(0) * UNIT
    stride = tl.num_programs(0)
    num_tiles = (num_rows + ROWS - 1) // ROWS
    first_word = tl.arange(0, CHUNKS)[:, None, None] * SPAN
    word_ptrs = words_ptr + first_word + tl.arange(0, SPAN)[None, None, :]
    scale_ptrs = scales_ptr + (first_word + tl.arange(0, SPAN // 4)[None, None, :] * 4) * 8 // GROUP
    rows = tile_rows(tile, num_rows, EPILOGUE, ROWS)[None, :, None]
    words = tl.load(word_ptrs + rows * (K // 8))
    scales = tl.load(scale_ptrs + rows * (K // GROUP))
    if PDL:  # weights do not depend on the kernel before, activations do
        for i in tl.static_range(1, AHEAD + 1):
            later = tile_rows(tile + (i if UNIT > 1 else i * stride), num_rows, EPILOGUE, ROWS)
            ask_for(words_ptr.to(tl.pointer_type(tl.int8)), later, 0, K // 2, K // 2)
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    x0, odd0, by0, excess0 = _row_of_x(
        x_ptr, x_scales_ptr, gain_ptr, eps, 0, num_tokens, K, X_GROUP, RAW, NORM, SPAN, NATIVE
    )
    if TOKENS > 1:
        x1, odd1, by1, excess1 = _row_of_x(
            x_ptr, x_scales_ptr, gain_ptr, eps, 1, num_tokens, K, X_GROUP, RAW, NORM, SPAN, NATIVE
        )
    if TOKENS > 2:
        x2, odd2, by2, excess2 = _row_of_x(
            x_ptr, x_scales_ptr, gain_ptr, eps, 2, num_tokens, K, X_GROUP, RAW, NORM, SPAN, NATIVE
        )
        x3, odd3, by3, excess3 = _row_of_x(
            x_ptr, x_scales_ptr, gain_ptr, eps, 3, num_tokens, K, X_GROUP, RAW, NORM, SPAN, NATIVE
        )
    while tile < num_tiles:
        here, scale = words, scales.to(tl.float32)
        is_last = (tile + 1) % UNIT == 0
        following = tile + 1 + tl.where(is_last, (stride - 1) * UNIT, 0)
        rows = tile_rows(following, num_rows, EPILOGUE, ROWS)[None, :, None]
        has_next = following < num_tiles
        words = tl.load(word_ptrs + rows * (K // 8), mask=has_next, other=0)
        scales = tl.load(scale_ptrs + rows * (K // GROUP), mask=has_next, other=0.0)
        v = _products(here, scale, x0, odd0, by0, excess0, CHUNKS, ROWS, SPAN, NATIVE)
        write_token(v, 0, tile, target, EPILOGUE, ROWS)
        if TOKENS > 1:
            v = _products(here, scale, x1, odd1, by1, excess1, CHUNKS, ROWS, SPAN, NATIVE)
            write_token(v, 1, tile, target, EPILOGUE, ROWS)
        if TOKENS > 2:
            v = _products(here, scale, x2, odd2, by2, excess2, CHUNKS, ROWS, SPAN, NATIVE)
            write_token(v, 2, tile, target, EPILOGUE, ROWS)
            v = _products(here, scale, x3, odd3, by3, excess3, CHUNKS, ROWS, SPAN, NATIVE)
            write_token(v, 3, tile, target, EPILOGUE, ROWS)
        if UNIT > 1:  # noqa: SIM102 - decided when it is compiled
            if is_last:
                tl.debug_barrier()  # what other threads wrote is read
                for token in tl.static_range(TOKENS):
                    _group_outputs(target, codes_ptr, code_scales_ptr, token, tile // UNIT)
        tile = following


def can_group(num_rows: int, launch: Launch) -> bool:
    """Whether a product of so many weight rows, gate and up, can quantize what it gates."""
    is_wanted = isinstance(launch, StreamLaunch) and launch.quantizes
    return is_wanted and num_rows % (2 * GATED_GROUP) == 0 and 2 * GATED_GROUP % launch.rows == 0


def launch_stream(product: Product, launch: StreamLaunch, gated: GroupedActivations | None = None) -> None:
    """Launch for a checked product; `gated`: where its gated outputs are quantized to, in groups of `GATED_GROUP`.

    Raises: BackendError for rows that are not taken whole.
    """
    shape, x = product.shape, product.x
    if shape.bits != 4 or shape.K & (shape.K - 1) or product.num_tokens > MAX_WORD_TOKENS:
        raise BackendError(
            f"{product.num_tokens} rows of {shape.K:,} features and {shape.bits} bits, this form takes 1 to "
            f"{MAX_WORD_TOKENS} rows of a power of two and 4 bits"
        )
    unit = 1 if gated is None else 2 * GATED_GROUP // launch.rows
    num_units = triton.cdiv(shape.N, launch.rows * unit)
    num_programs = min(num_units, launch.programs * num_multiprocessors(product.out.device))
    values, scales, norm = _operands(x)
    outputs = (product.out, product.out) if gated is None else (gated.values, gated.scales)
    gain, eps = (values, 0.0) if norm is None else (norm[0].view(torch.int32), norm[1])
    _int4_gemv_stream_kernel[(num_programs,)](
        x_ptr=values,
        x_scales_ptr=values if scales is None else scales,
        gain_ptr=gain,
        eps=eps,
        words_ptr=product.weight.words,
        codes_ptr=outputs[0],
        code_scales_ptr=outputs[1],
        **product.arguments,
        X_GROUP=x.group if isinstance(x, GroupedActivations) else ACTIVATION_GROUP,
        UNIT=unit,
        TOKENS=triton.next_power_of_2(product.num_tokens),
        RAW=scales is None,
        NORM=norm is not None,
        ROWS=launch.rows,
        SPAN=launch.span,
        AHEAD=(launch.ahead if unit == 1 else min(launch.ahead, unit - 1)) if HAS_INLINE_ASM else 0,
        NATIVE=HAS_INLINE_ASM,
        num_warps=launch.num_warps,
        num_stages=1,
        **dependent_launch(product.out.device),
    )


def _operands(
    x: GroupedActivations | RawActivations,
) -> tuple[torch.Tensor, torch.Tensor | None, tuple[torch.Tensor, float] | None]:
    """Words of activations, and their scales or what they are normed with."""
    if isinstance(x, RawActivations):
        return x.values.view(torch.int32), None, x.norm
    assert x.scales is not None
    return x.values.view(torch.int32), x.scales, None
