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
def largest_of_lists(front, back, has_front, has_back, COUNT: tl.constexpr, ROWS: tl.constexpr):
    """The COUNT largest of every row's scores, of which the first half is in front and the other in back [ROWS, N].

    For each half, which are kept and the place of each among those kept; ties go to the left. Per row how many are
    kept, and the least of them, or -inf if there are fewer than COUNT. Bit by bit: best where each half of a row lies
    within a warp, which is why there are two. A row has fewer than 65,536 scores.
    """
    front = tl.where(has_front, _ordered_bits(front), 0)
    back = tl.where(has_back, _ordered_bits(back), 0)
    threshold = tl.zeros([ROWS], tl.uint32)  # the largest number that COUNT of them reach
    one = tl.full([ROWS], 1, tl.uint32)
    for step in range(32):
        higher = threshold | (one << (31 - step))
        threshold = tl.where(_num_reached(front, back, higher) >= COUNT, higher, threshold)
    front_ranks, front_total = _ranks(front, has_front, threshold)
    back_ranks, back_total = _ranks(back, has_back, threshold)
    total = front_total + back_total
    num_above, num_tied = (total & 0xFFFF).to(tl.int32), (total >> 16).to(tl.int32)
    places = COUNT - num_above
    keeps_front, to_front = _places(front, has_front, front_ranks, threshold, places)
    keeps_back, to_back = _places(back, has_back, back_ranks + front_total[:, None], threshold, places)
    counts = num_above + tl.minimum(num_tied, places)
    signed = (threshold ^ 0x80000000).to(tl.int32, bitcast=True)
    least = (signed ^ ((signed >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return keeps_front, to_front, keeps_back, to_back, counts, tl.where(counts < COUNT, float("-inf"), least)


@triton.jit
def _num_reached(front, back, threshold):
    """How many of both halves reach the threshold, per row."""
    return tl.sum((front >= threshold[:, None]).to(tl.int32) + (back >= threshold[:, None]).to(tl.int32), 1)


@triton.jit
def _ranks(ordered, is_there, threshold):
    """How many scores up to each are above the threshold and, in the high half of the number, how many equal it."""
    is_tied = is_there & (ordered == threshold[:, None])
    both = (ordered > threshold[:, None]).to(tl.uint32) + (is_tied.to(tl.uint32) << 16)
    return tl.cumsum(both, 1), tl.sum(both, 1)


@triton.jit
def _places(ordered, is_there, ranks, threshold, places):
    """Whether a score is kept, and behind how many others; `places` are left for those that equal the threshold."""
    above, tied = (ranks & 0xFFFF).to(tl.int32), (ranks >> 16).to(tl.int32)
    is_tied = is_there & (ordered == threshold[:, None]) & (tied <= places[:, None])
    return (ordered > threshold[:, None]) | is_tied, above + tl.minimum(tied, places[:, None]) - 1


@triton.jit
def largest_of_list(scores, is_there, num_there, COUNT: tl.constexpr, MOST: tl.constexpr):
    """COUNT to MOST of the largest of a list [N], fewer only where `num_there` is less: no score left out is larger.

    Which are kept, the place of each among those kept, and how many are; ties go to the left. And the scores again, of
    those that are there: read from the bits that the search holds anyway, so a caller need not hold both. Bit by bit
    from the first one in which scores differ, until the bits so far tell few enough from the others. A list has fewer
    than 65,536.
    """
    ordered = tl.where(is_there, _ordered_bits(scores), 0)
    peak = tl.max(ordered, 0)
    mask = peak ^ tl.min(tl.where(is_there, ordered, 0xFFFFFFFF), 0)
    mask |= mask >> 1
    mask |= mask >> 2
    mask |= mask >> 4
    mask |= mask >> 8
    mask |= mask >> 16
    threshold = peak ^ (peak & mask)  # the bits that all have in common: a number that all reach
    bit = tl.where(num_there > MOST, mask ^ (mask >> 1), 0)
    while bit != 0:
        higher = threshold | bit
        reached = tl.sum((ordered >= higher).to(tl.int32), 0)
        threshold = tl.where(reached >= COUNT, higher, threshold)
        bit = tl.where((reached >= COUNT) & (reached <= MOST), 0, bit >> 1)
    is_tied = is_there & (ordered == threshold)
    both = (ordered > threshold).to(tl.uint32) + (is_tied.to(tl.uint32) << 16)
    ranks, total = tl.cumsum(both, 0), tl.sum(both, 0)
    places = MOST - (total & 0xFFFF).to(tl.int32)  # left for those that equal the threshold
    tied = (ranks >> 16).to(tl.int32)
    keeps = (ordered > threshold) | (is_tied & (tied <= places))
    num_kept = MOST - places + tl.minimum((total >> 16).to(tl.int32), places)
    place = (ranks & 0xFFFF).to(tl.int32) + tl.minimum(tied, places) - 1
    signed = (ordered ^ 0x80000000).to(tl.int32, bitcast=True)
    return keeps, place, num_kept, (signed ^ ((signed >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
