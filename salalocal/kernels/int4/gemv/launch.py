"""How the products of a few rows are launched: settings by card and shape, and one rule that reads them.

benchmarks/int4_gemv.py finds and prints them; so far on an H100 alone. No tuning happens at run time.
"""

from dataclasses import dataclass, replace
from math import log2
from typing import Literal

MAX_TOKENS = 16
# What activations come as: int8 in groups, floats, or floats that the product is to make int8 itself.
Math = Literal["int8", "float", "raw"]


@dataclass(frozen=True)
class WordLaunch:
    """Products of whole words in integer registers: a program takes `rows` rows, `words` words of each at a time, and
    at most `MAX_WORD_TOKENS` tokens."""

    rows: int
    words: int
    num_warps: int


@dataclass(frozen=True)
class TileLaunch:
    """Products on tensor cores: a program takes `rows` rows and all tokens; `split` programs share a row; loads are on
    their way for `num_stages` steps of `unroll` pairs of groups; `ahead` bytes of every row are asked for before the
    activations are there. Units: `ahead` in bytes, a multiple of 128."""

    rows: int
    num_warps: int
    num_stages: int
    split: int
    unroll: int = 1
    ahead: int = 0


@dataclass(frozen=True)
class StreamLaunch:
    """Products of whole rows in integer registers: `programs` on each multiprocessor walk over the weights, `rows` rows
    at a time, with at most `MAX_WORD_TOKENS` tokens; `span` words of a row lie side by side in the threads, 128 in a
    warp; `ahead` sets of rows are asked for before the activations are there. `quantizes`: what a program gates leaves
    it quantized, see `gated`; not measured yet, so no launch below does."""

    rows: int
    span: int
    num_warps: int
    programs: int
    ahead: int = 1
    quantizes: bool = False


Launch = WordLaunch | TileLaunch | StreamLaunch
MAX_WORD_TOKENS = 4


@dataclass(frozen=True)
class GemvShape:
    """What a launch is chosen by. Shapes: weights [N, K] of `bits` bits in groups of `group_size`."""

    N: int
    K: int
    bits: int
    group_size: int


# By capability (of that card or newer), math, bits and most tokens: for a shape [N, K], or for any (None). A shape that
# was not measured takes that of the nearest K and N if both are within a factor of two, see `_nearest`.
# 90: an H100, launches overlapping; times stand where the setting was measured, shares are of what reading alone takes.
# Records: benchmarks/results/2026-11-23-h100-int4-gemv.json; that of times with a * was not kept.
# 80: nothing measured yet, settings that fit every card.
# Where "raw" has no launch, a kernel quantizes before the product.
LAUNCH: dict[int, dict[tuple[Math, int, int], dict[tuple[int, int] | None, Launch]]] = {
    80: {
        ("int8", 4, 1): {None: WordLaunch(rows=2, words=512, num_warps=2)},
        ("int8", 4, 2): {None: WordLaunch(rows=2, words=512, num_warps=2)},
        ("int8", 4, 4): {None: WordLaunch(rows=4, words=512, num_warps=4)},
        ("int8", 4, 8): {
            None: TileLaunch(rows=64, num_warps=4, num_stages=4, split=4),
            (32768, 4096): TileLaunch(rows=64, num_warps=4, num_stages=4, split=1),
            (16384, 4096): TileLaunch(rows=64, num_warps=4, num_stages=4, split=2),
        },
        ("int8", 4, 16): {
            None: TileLaunch(rows=64, num_warps=4, num_stages=4, split=4),
            (32768, 4096): TileLaunch(rows=64, num_warps=4, num_stages=4, split=1),
            (16384, 4096): TileLaunch(rows=64, num_warps=4, num_stages=4, split=2),
        },
        ("int8", 8, 1): {None: WordLaunch(rows=2, words=512, num_warps=2)},
        ("int8", 8, 2): {None: WordLaunch(rows=4, words=256, num_warps=2)},
        ("int8", 8, 4): {None: WordLaunch(rows=4, words=512, num_warps=4)},
        ("int8", 8, 8): {None: TileLaunch(rows=64, num_warps=4, num_stages=4, split=1)},
        ("int8", 8, 16): {None: TileLaunch(rows=64, num_warps=4, num_stages=4, split=1)},
        ("float", 4, 8): {
            None: TileLaunch(rows=64, num_warps=4, num_stages=3, split=4),
            (32768, 4096): TileLaunch(rows=64, num_warps=4, num_stages=3, split=1),
            (16384, 4096): TileLaunch(rows=64, num_warps=4, num_stages=3, split=2),
        },
        ("float", 4, 16): {
            None: TileLaunch(rows=64, num_warps=4, num_stages=3, split=4),
            (32768, 4096): TileLaunch(rows=64, num_warps=4, num_stages=3, split=1),
            (16384, 4096): TileLaunch(rows=64, num_warps=4, num_stages=3, split=2),
        },
    },
    90: {
        ("int8", 4, 1): {
            None: WordLaunch(rows=4, words=256, num_warps=2),
            (32768, 4096): WordLaunch(rows=4, words=256, num_warps=2),  # gate_up: 23.6 us, 94 %
            (16384, 4096): WordLaunch(rows=4, words=256, num_warps=2),  # qkvz: 13.0 us, 86 %
            (12288, 4096): StreamLaunch(rows=8, span=128, num_warps=4, programs=3),  # qkv: 9.8 us, 85 %
            (8704, 4096): StreamLaunch(rows=8, span=128, num_warps=4, programs=3),  # qkv_gate: 7.1 us, 83 %
            (4608, 4096): StreamLaunch(rows=4, span=128, num_warps=4, programs=4),  # qkv_sparse: 4.7 us, 66 %
            (4096, 4096): StreamLaunch(rows=4, span=128, num_warps=4, programs=4),  # o: 4.4 us, 63 %
            (4096, 16384): WordLaunch(rows=2, words=512, num_warps=4),  # down: 13.5 us, 82 %
        },
        # With the quantizer inside. down_proj's is not: made again by every program, it takes 15.5 us.
        ("raw", 4, 1): {
            (32768, 4096): StreamLaunch(rows=8, span=128, num_warps=8, programs=2),  # gate_up: 25.7 us
            (16384, 4096): StreamLaunch(rows=8, span=128, num_warps=4, programs=3),  # qkvz: 15.1 us
            (12288, 4096): StreamLaunch(rows=8, span=128, num_warps=8, programs=2),  # qkv: 12.1 us
            (8704, 4096): StreamLaunch(rows=8, span=128, num_warps=8, programs=2),  # qkv_gate: 9.0 us
            (4096, 4096): StreamLaunch(rows=8, span=128, num_warps=8, programs=2),  # o: 4.9 us
        },
        ("int8", 4, 2): {
            None: WordLaunch(rows=4, words=128, num_warps=1),
            (32768, 4096): WordLaunch(rows=4, words=128, num_warps=1),  # gate_up: 25.8 us
            (16384, 4096): StreamLaunch(rows=4, span=512, num_warps=4, programs=4, ahead=2),  # qkvz: 14.2 us
            (4096, 4096): WordLaunch(rows=2, words=512, num_warps=2),  # o: 4.6 us *
            (4096, 16384): WordLaunch(rows=2, words=512, num_warps=4),  # down: 15.1 us
        },
        ("int8", 4, 4): {
            None: WordLaunch(rows=4, words=128, num_warps=1),
            (32768, 4096): WordLaunch(rows=4, words=128, num_warps=1),  # gate_up: 27.9 us
            (16384, 4096): WordLaunch(rows=4, words=128, num_warps=1),  # qkvz: 17.2 us
            (8704, 4096): WordLaunch(rows=2, words=512, num_warps=2),  # qkv_gate: 11.2 us *
            (4096, 4096): WordLaunch(rows=4, words=128, num_warps=1),  # o: 5.7 us *
            (4096, 16384): WordLaunch(rows=4, words=128, num_warps=1),  # down: 17.0 us
        },
        ("int8", 4, 8): {
            None: TileLaunch(rows=128, num_warps=8, num_stages=3, split=2, ahead=256),
            (32768, 4096): TileLaunch(rows=128, num_warps=8, num_stages=3, split=1, ahead=256),  # gate_up: 28.4 us
            (16384, 4096): TileLaunch(rows=128, num_warps=8, num_stages=3, split=2, ahead=256),  # qkvz: 16.1 us
            (4096, 4096): TileLaunch(rows=64, num_warps=4, num_stages=4, split=8, ahead=256),  # not measured
            (4096, 16384): TileLaunch(rows=128, num_warps=8, num_stages=3, split=8, ahead=256),  # down: 17.2 us
        },
        ("int8", 4, 16): {
            None: TileLaunch(rows=128, num_warps=8, num_stages=3, split=2, ahead=256),
            (32768, 4096): TileLaunch(rows=64, num_warps=4, num_stages=4, split=2, ahead=256),  # gate_up: 32.3 us
            (16384, 4096): TileLaunch(rows=128, num_warps=8, num_stages=3, split=2, ahead=256),  # qkvz: 16.5 us
            (4096, 4096): TileLaunch(rows=64, num_warps=4, num_stages=4, split=8, ahead=256),  # not measured
            (4096, 16384): TileLaunch(rows=128, num_warps=8, num_stages=3, split=8, ahead=256),  # down: 17.2 us
        },
        ("int8", 8, 1): {None: WordLaunch(rows=4, words=256, num_warps=2)},  # lm_head: 98.5 us, 99 %
        # Not measured from here to the next that names a time.
        ("int8", 8, 2): {None: WordLaunch(rows=4, words=256, num_warps=2)},
        ("int8", 8, 4): {None: WordLaunch(rows=4, words=256, num_warps=2)},
        ("int8", 8, 8): {None: TileLaunch(rows=64, num_warps=4, num_stages=4, split=1)},
        ("int8", 8, 16): {None: TileLaunch(rows=64, num_warps=4, num_stages=4, split=1)},
        ("float", 4, 8): {
            None: TileLaunch(rows=64, num_warps=4, num_stages=4, split=4, ahead=256),
            (32768, 4096): TileLaunch(
                rows=64, num_warps=4, num_stages=4, split=2, ahead=256
            ),  # gate_up, M = 1: 29.7 us
            (4096, 16384): TileLaunch(rows=64, num_warps=4, num_stages=3, split=8, ahead=256),  # down, M = 1: 19.8 us
        },
        ("float", 4, 16): {
            None: TileLaunch(rows=64, num_warps=4, num_stages=4, split=4, ahead=256),
            (32768, 4096): TileLaunch(rows=64, num_warps=4, num_stages=4, split=1, ahead=256),  # gate_up: 37.8 us
            (4096, 16384): TileLaunch(rows=64, num_warps=4, num_stages=4, split=8, ahead=256),  # down: 26.6 us
        },
    },
}

# int8 tensor cores multiply 32 features at once, and the even and the odd ones of a group apart.
_SMALLEST_INT8_TILE_GROUP = 64

# Rows times programs that share one: more fill no card better, and the scratch has room for so many.
_MOST_SPLIT_ROWS = 2**17


def choose_launch(capability: int, math: Math, num_tokens: int, shape: GemvShape) -> Launch:
    """The launch of the nearest older card, made to fit the shape; for "raw" one of "int8" if it has none."""
    table = LAUNCH[max(known for known in LAUNCH if known <= max(capability, min(LAUNCH)))]
    buckets = [tokens for kind, bits, tokens in table if (kind, bits) == (math, shape.bits) and tokens >= num_tokens]
    launch = _nearest(table[math, shape.bits, min(buckets)], shape) if buckets else None
    if math == "raw" and (launch is None or shape.K & (shape.K - 1)):
        return choose_launch(capability, "int8", num_tokens, shape)
    if isinstance(launch, TileLaunch) and math == "int8" and shape.group_size < _SMALLEST_INT8_TILE_GROUP:
        launch = table[math, shape.bits, MAX_WORD_TOKENS][None]
    assert launch is not None  # every other line has a launch for any shape
    return fitted(launch, shape)


def _nearest(by_shape: dict[tuple[int, int] | None, Launch], shape: GemvShape) -> Launch | None:
    """The launch of the measured shape that is most like this one, in K before N, if both are within a factor of two;
    else the one for any shape, if there is one."""
    like = [known for known in by_shape if known is not None and shape.K <= 2 * known[1] <= 4 * shape.K]
    if not like:
        return by_shape.get(None)
    distances = {known: (abs(log2(known[1] / shape.K)), abs(log2(known[0] / shape.N))) for known in like}
    nearest = min(like, key=lambda known: distances[known])
    return by_shape.get(nearest if distances[nearest][1] <= 1 else None)


def fitted(launch: Launch, shape: GemvShape) -> Launch:
    """The launch with no more words or parts than a row has, and a number of words that divides a row."""
    if isinstance(launch, TileLaunch):
        most = min(shape.K // 256, _MOST_SPLIT_ROWS // shape.N)
        return replace(launch, split=max(1, min(launch.split, most)))
    row_words = shape.K * shape.bits // 32
    if isinstance(launch, StreamLaunch):
        return replace(launch, span=min(launch.span, row_words))
    return WordLaunch(launch.rows, min(launch.words, row_words & -row_words), launch.num_warps)
