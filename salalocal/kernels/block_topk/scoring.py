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
def row_and_head(TILE: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr):
    """Which row and head of a KV head each of TILE queries is: in the order that `_by_head` takes apart.

    A thread of a matrix unit holds two neighbours of every eight columns of a product, or of every sixteen where two
    warps share them; in this order they are heads of few rows, so that a sum over heads stays in the thread.
    """
    PAIR: tl.constexpr = min(2, HEADS)
    QUAD: tl.constexpr = min(4, ROWS)
    place = tl.arange(0, TILE)
    head = place // (PAIR * ROWS) * PAIR + place % PAIR
    return place // PAIR % QUAD * (ROWS // QUAD) + place // (PAIR * QUAD) % (ROWS // QUAD), head


@triton.jit
def _by_head(z, KEYS: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr):
    """[KEYS, ROWS * HEADS] -> [KEYS, heads, rows, rows, heads], as the places of `row_and_head` are made up."""
    PAIR: tl.constexpr = min(2, HEADS)
    QUAD: tl.constexpr = min(4, ROWS)
    return tl.reshape(z, [KEYS, HEADS // PAIR, ROWS // QUAD, QUAD, PAIR])


@triton.jit
def _by_row(score, KEYS: tl.constexpr, ROWS: tl.constexpr):
    """Undo the order of rows: [KEYS, rows, rows] -> [KEYS, ROWS]."""
    return tl.reshape(tl.permute(score, (0, 2, 1)), [KEYS, ROWS])


@triton.jit
def log_sum_over_heads(z, KEYS: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, HAS_ASM: tl.constexpr):
    """Binary log of the sum of 2**z over the heads; the lowest finite one for what is no number.

    Shapes: [KEYS, ROWS * HEADS] -> [KEYS, ROWS].
    """
    z = _by_head(z, KEYS, ROWS, HEADS)
    peak = tl.max(tl.max(z, 4), 1)
    total = tl.sum(tl.sum(tl.exp2(z - peak[:, None, :, :, None]), 4), 1)
    score = _by_row(peak + _log2(total, HAS_ASM), KEYS, ROWS)
    return tl.where(score > LOWEST, score, LOWEST) + 0.0  # + 0.0: no negative zero


@triton.jit
def sum_over_heads(z, KEYS: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr):
    """The sum of 2**z over the heads. [KEYS, ROWS * HEADS] -> [KEYS, ROWS]"""
    return _by_row(tl.sum(tl.sum(tl.exp2(_by_head(z, KEYS, ROWS, HEADS)), 4), 1), KEYS, ROWS)


@triton.jit
def _ordered_bits(scores):
    """Unsigned integers in the order of the numbers, all above 0."""
    bits = scores.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
def largest_of_lists(scores, is_there, COUNT: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr):
    """The COUNT largest of every row's scores [PARTS, ROWS, N], which stand part by part, ties to the front.

    Truth of that shape; the place of each among those kept, in their order; per row how many are kept, and the least of
    them, or -inf if there are fewer than COUNT. Bit by bit; best where a row lies within one warp. A row has fewer than
    65,536 scores.
    """
    ordered = tl.where(is_there, _ordered_bits(scores), 0)
    threshold = tl.zeros([ROWS], tl.uint32)  # the largest number that COUNT of them reach
    one = tl.full([ROWS], 1, tl.uint32)
    for step in range(32):
        higher = threshold | (one << (31 - step))
        reached = tl.sum(tl.sum((ordered >= higher[None, :, None]).to(tl.int32), 0), 1)
        threshold = tl.where(reached >= COUNT, higher, threshold)
    is_above = ordered > threshold[None, :, None]
    is_tied = is_there & (ordered == threshold[None, :, None])
    # Both are counted at once: those above in the low half.
    both = is_above.to(tl.uint32) + (is_tied.to(tl.uint32) << 16)
    totals = tl.sum(both, 2)
    before = tl.cumsum(totals, 0) - totals
    ranks = tl.cumsum(both, 2) + before[:, :, None]
    totals = tl.sum(totals, 0)
    num_above, num_tied = (totals & 0xFFFF).to(tl.int32), (totals >> 16).to(tl.int32)
    places = COUNT - num_above
    rank_above, rank_tied = (ranks & 0xFFFF).to(tl.int32), (ranks >> 16).to(tl.int32)
    kept = is_above | (is_tied & (rank_tied <= places[None, :, None]))
    at = rank_above + tl.minimum(rank_tied, places[None, :, None]) - 1
    counts = num_above + tl.minimum(num_tied, places)
    signed = (threshold ^ 0x80000000).to(tl.int32, bitcast=True)
    least = (signed ^ ((signed >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return kept, at, counts, tl.where(counts < COUNT, float("-inf"), least)
