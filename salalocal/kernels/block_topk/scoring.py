"""What both kernels of the block choice do with scores: sum over heads, find the largest.

Every reduction adds in an order that does not depend on the place, so equal keys have equal scores and ties stay ties.
"""

from salalocal.kernels.backend import tl, triton

LOWEST = tl.constexpr(-3.0e38)  # below every score, and finite


@triton.jit
def _log2(x, HAS_ASM: tl.constexpr):
    """Binary logarithm by the card's own unit, good to 2**-22; Triton's takes a polynomial of ten times the steps."""
    if HAS_ASM:
        y = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        y = tl.log2(x)
    return y


@triton.jit
def log_sum_over_heads(z, KEYS: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, HAS_ASM: tl.constexpr):
    """Binary log of the sum of 2**z over the heads; the lowest finite one for what is no number.

    Shapes: [KEYS, ROWS * HEADS] -> [KEYS, ROWS].
    """
    z = tl.reshape(z, [KEYS, ROWS, HEADS])
    peak = tl.max(z, 2)
    score = peak + _log2(tl.sum(tl.exp2(z - peak[:, :, None]), 2), HAS_ASM)
    return tl.where(score > LOWEST, score, LOWEST) + 0.0  # + 0.0: no negative zero


@triton.jit
def sum_over_heads(z, KEYS: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr):
    """The sum of 2**z over the heads, 0 for what is no number. [KEYS, ROWS * HEADS] -> [KEYS, ROWS]"""
    score = tl.sum(tl.exp2(tl.reshape(z, [KEYS, ROWS, HEADS])), 2)
    return tl.where(score == score, score, 0.0)


@triton.jit
def is_among_largest(scores, is_there, COUNT: tl.constexpr, ROWS: tl.constexpr):
    """Whether a score is one of the COUNT largest of its row, ties to the left. [ROWS, N] -> truth of that shape"""
    bits = scores.to(tl.int32, bitcast=True)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.uint32, bitcast=True) ^ 0x80000000
    ordered = tl.where(is_there, ordered, 0)
    # The largest number that COUNT of them reach, two bits a step: the three counts share an integer.
    threshold = tl.zeros([ROWS], tl.uint32)
    one = tl.full([ROWS], 1, tl.uint32)
    for step in range(16):
        low, high = one << (30 - 2 * step), one << (31 - 2 * step)
        reached = (ordered >= (threshold | low)[:, None]).to(tl.int64)
        reached += (ordered >= (threshold | high)[:, None]).to(tl.int64) << 20
        reached += (ordered >= (threshold | high | low)[:, None]).to(tl.int64) << 40
        counts = tl.sum(reached, 1)
        threshold |= tl.where((counts >> 20) & 0xFFFFF >= COUNT, high, 0)
        threshold |= tl.where(tl.where(threshold & high > 0, counts >> 40, counts & 0xFFFFF) >= COUNT, low, 0)
    is_above = ordered > threshold[:, None]
    is_tied = is_there & (ordered == threshold[:, None])
    places = COUNT - tl.sum(is_above.to(tl.int32), 1)
    return is_above | (is_tied & (tl.cumsum(is_tied.to(tl.int32), 1) <= places[:, None]))
