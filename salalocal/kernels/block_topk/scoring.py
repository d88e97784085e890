"""What both kernels of the block choice do with scores: sum over heads, pool to blocks, find the largest.

Every reduction adds in an order that does not depend on the place, so equal keys have equal scores and ties stay ties.
"""

from salalocal.kernels.backend import tl, triton


@triton.jit
def log_sum_over_heads(z, KEYS: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr):
    """Binary log of the sum of 2**z over the heads; -inf for what is no number. [KEYS, ROWS * HEADS] -> [KEYS, ROWS]"""
    z = tl.reshape(z, [KEYS, ROWS, HEADS])
    peak = tl.max(z, 2)
    score = peak + tl.log2(tl.sum(tl.exp2(z - peak[:, :, None]), 2))
    return tl.where(score == score, score, float("-inf"))


@triton.jit
def pool_to_blocks(score, before, BLOCKS: tl.constexpr, PER_BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """The largest score of the windows that start in a block and of the one in front, which reaches into it.

    [BLOCKS * PER_BLOCK, ROWS] and `before` [ROWS], the score in front of the first, -> finite [BLOCKS, ROWS] and the
    last score, which is `before` for the blocks that follow.
    """
    score = tl.reshape(score, [BLOCKS, PER_BLOCK, ROWS])
    is_end = (tl.arange(0, PER_BLOCK) == PER_BLOCK - 1)[None, :, None]
    ends = tl.max(tl.where(is_end, score, float("-inf")), 1)  # [BLOCKS, ROWS]
    lanes = tl.arange(0, BLOCKS)[:, None]
    previous = tl.gather(ends, tl.broadcast_to(tl.maximum(lanes - 1, 0), [BLOCKS, ROWS]), 0)
    previous = tl.where(lanes == 0, before[None, :], previous)
    pooled = tl.maximum(tl.maximum(tl.max(score, 1), previous), -3.0e38) + 0.0  # + 0.0: no negative zero
    return pooled, tl.max(tl.where(lanes == BLOCKS - 1, ends, float("-inf")), 0)


@triton.jit
def is_among_largest(scores, is_there, COUNT: tl.constexpr, ROWS: tl.constexpr):
    """Whether a score is one of the COUNT largest of its row, ties to the left. [ROWS, N] -> truth of that shape"""
    bits = scores.to(tl.int32, bitcast=True)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.uint32, bitcast=True) ^ 0x80000000
    ordered = tl.where(is_there, ordered, 0)
    # Bit by bit, the largest number that COUNT of them reach.
    threshold = tl.zeros([ROWS], tl.uint32)
    for bit in tl.static_range(32):
        higher = threshold | (tl.full([ROWS], 1, tl.uint32) << (31 - bit))
        num_reaching = tl.sum((ordered >= higher[:, None]).to(tl.int32), 1)
        threshold = tl.where(num_reaching >= COUNT, higher, threshold)
    is_above = ordered > threshold[:, None]
    is_tied = is_there & (ordered == threshold[:, None])
    places = COUNT - tl.sum(is_above.to(tl.int32), 1)
    return is_above | (is_tied & (tl.cumsum(is_tied.to(tl.int32), 1) <= places[:, None]))
