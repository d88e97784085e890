"""Up to four rows at memory speed: words of packed weights times bytes of activations in integer registers.

sum over k of (code[k] - 8) * x[k], a word at a time: two masks make two registers of four signed bytes, each 16 times
its value, and two dp4a multiply and add them. Every four words the sum is scaled and joins an fp32 accumulator.
"""

import torch

from salalocal.kernels.backend import HAS_INLINE_ASM, dependent_launch, tl, triton
from salalocal.kernels.int4.activations_by_group import GroupedActivations
from salalocal.kernels.int4.gemv.epilogue import Target, tile_rows, write_token
from salalocal.kernels.int4.gemv.launch import MAX_WORD_TOKENS, WordLaunch
from salalocal.kernels.int4.gemv.product import Product


@triton.jit
def _dp4a(a, b, c, NATIVE: tl.constexpr):
    """c plus the products of four signed bytes."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
        )
    for i in tl.static_range(4):
        c += ((a << (24 - 8 * i)) >> 24) * ((b << (24 - 8 * i)) >> 24)
    return c


@triton.jit
def _token_sums(
    low,
    high,
    x_ptr,
    x_scales_ptr,
    token,
    num_tokens,
    step,
    K: tl.constexpr,
    X_GROUP: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Products of a step's words with one token, summed over four words and scaled by the activations' scale."""
    row = tl.minimum(token, num_tokens - 1)
    x = x_ptr + row * (K // 4) + step * WORDS + tl.arange(0, WORDS)[None, :]
    sums = _dp4a(low, tl.load(x), tl.zeros([ROWS, WORDS], tl.int32), NATIVE)
    if BITS == 4:
        sums = _dp4a(high, tl.load(x + K // 8), sums, NATIVE)
    four = tl.sum(tl.reshape(sums, [ROWS, WORDS // 4, 4]), axis=2).to(tl.float32)
    first = (step * (WORDS // 4) + tl.arange(0, WORDS // 4)) * (128 // BITS)
    return four * tl.load(x_scales_ptr + row * (K // X_GROUP) + first // X_GROUP)[None, :]


@triton.jit
def _int4_gemv_words_kernel(
    x_ptr,
    x_scales_ptr,
    words_ptr,
    scales_ptr,
    residual_ptr,
    out_ptr,
    factor,
    num_tokens,
    num_rows,
    residual_stride,
    out_stride,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    X_GROUP: tl.constexpr,
    BITS: tl.constexpr,
    TOKENS: tl.constexpr,
    EPILOGUE: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    PDL: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """One program: ROWS rows of the weights and TOKENS tokens, WORDS words of each row at a time."""
    ROW_WORDS: tl.constexpr = K * BITS // 32
    STEPS: tl.constexpr = ROW_WORDS // WORDS
    target = Target(residual_ptr, out_ptr, factor, num_tokens, num_rows, residual_stride, out_stride)
    tile = tl.program_id(0)
    token = tl.program_id(1) * TOKENS
    rows = tile_rows(tile, num_rows, EPILOGUE, ROWS)[:, None]
    word_ptrs = words_ptr + rows * ROW_WORDS + tl.arange(0, WORDS)[None, :]
    first_codes = tl.arange(0, WORDS // 4)[None, :] * (128 // BITS)
    scale_ptrs = scales_ptr + rows * (K // GROUP)
    words = tl.load(word_ptrs)
    scales = tl.load(scale_ptrs + first_codes // GROUP)
    if PDL:  # weights do not depend on the kernel before, activations do
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    acc0 = tl.zeros([ROWS, WORDS // 4], tl.float32)
    acc1 = acc0
    acc2 = acc0
    acc3 = acc0
    for step in range(STEPS):
        if BITS == 4:
            low = ((words << 4) ^ -2139062144) & -252645136  # ^ 0x80808080, & 0xF0F0F0F0
            high = (words ^ -2139062144) & -252645136
        else:
            low = words ^ -2139062144
            high = low
        scale = scales.to(tl.float32)
        has_next = step + 1 < STEPS
        ahead = tl.minimum(step + 1, STEPS - 1)
        if STEPS > 1:
            words = tl.load(word_ptrs + ahead * WORDS, mask=has_next, other=0)
            scales = tl.load(scale_ptrs + (ahead * (WORDS * 32 // BITS) + first_codes) // GROUP)
        sums = _token_sums(
            low, high, x_ptr, x_scales_ptr, token, num_tokens, step, K, X_GROUP, BITS, ROWS, WORDS, NATIVE
        )
        acc0 += sums * scale
        if TOKENS > 1:
            sums = _token_sums(
                low, high, x_ptr, x_scales_ptr, token + 1, num_tokens, step, K, X_GROUP, BITS, ROWS, WORDS, NATIVE
            )
            acc1 += sums * scale
        if TOKENS > 2:
            sums = _token_sums(
                low, high, x_ptr, x_scales_ptr, token + 2, num_tokens, step, K, X_GROUP, BITS, ROWS, WORDS, NATIVE
            )
            acc2 += sums * scale
        if TOKENS > 3:
            sums = _token_sums(
                low, high, x_ptr, x_scales_ptr, token + 3, num_tokens, step, K, X_GROUP, BITS, ROWS, WORDS, NATIVE
            )
            acc3 += sums * scale
    UNIT: tl.constexpr = 0.0625 if BITS == 4 else 1.0
    for t in tl.static_range(TOKENS):
        acc = acc0 if t == 0 else (acc1 if t == 1 else (acc2 if t == 2 else acc3))
        write_token(tl.sum(acc, axis=1) * UNIT, token + t, tile, target, EPILOGUE, ROWS)


def launch_words(product: Product, launch: WordLaunch) -> None:
    """Launch for a checked product; more tokens than a program takes read the weights again."""
    shape, x = product.shape, product.x
    assert isinstance(x, GroupedActivations) and x.scales is not None
    tokens = min(product.num_tokens, MAX_WORD_TOKENS)
    grid = (triton.cdiv(shape.N, launch.rows), triton.cdiv(product.num_tokens, tokens))
    _int4_gemv_words_kernel[grid](
        x_ptr=x.values.view(torch.int32),
        x_scales_ptr=x.scales,
        words_ptr=product.weight.words,
        **product.arguments,
        X_GROUP=x.group,
        BITS=shape.bits,
        TOKENS=tokens,
        ROWS=launch.rows,
        WORDS=launch.words,
        NATIVE=HAS_INLINE_ASM,
        num_warps=launch.num_warps,
        num_stages=1,
        **dependent_launch(x.values.device),
    )
