"""What benchmarks/int4_gemv.py measures: linear maps of the 9B, and the launches worth trying for each.

With --dry on the command line: tiny shapes for the interpreter.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass

from salalocal.kernels.int4.gemv.launch import GemvShape, Launch, StreamLaunch, TileLaunch, WordLaunch, fitted

DRY = "--dry" in sys.argv
TOKENS = (1, 3, 16) if DRY else (1, 2, 4, 8, 16)
SPARSE_LAYERS = {0} if DRY else {0, 9, 16, 17, 22, 29, 30, 31}  # of 32


@dataclass(frozen=True)
class Layer:
    """One linear map of the 9B, or several read in one launch."""

    name: str
    N: int
    K: int
    kind: str


LAYERS = (
    Layer("gate_up", 32768, 4096, "swiglu"),
    Layer("down", 4096, 16384, "residual"),
    Layer("qkvz", 16384, 4096, "plain"),
    Layer("qkv", 12288, 4096, "plain"),
    Layer("qkv_gate", 8704, 4096, "plain"),
    Layer("o", 4096, 4096, "residual"),
    Layer("qkv_sparse", 4608, 4096, "plain"),
)
VOCABULARY = Layer("lm_head", 73448, 4096, "plain")
if DRY:
    LAYERS = (Layer("gate_up", 256, 128, "swiglu"), Layer("down", 128, 128, "residual"),
              Layer("qkvz", 128, 128, "plain"), Layer("qkv_gate", 130, 128, "plain"),
              Layer("o", 128, 128, "residual"))  # fmt: skip
    VOCABULARY = Layer("lm_head", 300, 128, "plain")

WORDS = [(2, 256, 1), (2, 512, 2), (2, 512, 4), (4, 128, 1), (4, 256, 2), (4, 512, 2)]
WORDS_MANY = [(2, 512, 2), (2, 512, 4), (4, 128, 1)]
# rows, span, warps, programs on a multiprocessor, sets of rows asked for ahead; by the width of the matrix
STREAMS = {
    4096: [(8, 128, 8, 2, 1), (8, 128, 8, 2, 3), (8, 128, 8, 3, 2), (16, 128, 16, 1, 3), (4, 128, 4, 4, 1),
           (4, 128, 4, 4, 3), (4, 512, 4, 4, 2), (8, 512, 8, 2, 2), (4, 128, 1, 16, 1), (8, 128, 4, 3, 1)],
    16384: [(2, 512, 8, 2, 1), (2, 512, 8, 2, 3), (2, 2048, 8, 2, 2), (4, 512, 16, 1, 3), (4, 2048, 16, 1, 2),
            (1, 512, 4, 4, 2), (2, 512, 8, 3, 1)],
}  # fmt: skip
STREAMS_MANY = {4096: [(8, 128, 8, 2, 2), (4, 128, 4, 3, 2), (4, 512, 4, 4, 2)],
                16384: [(2, 512, 8, 2, 2), (2, 2048, 8, 2, 2)]}  # fmt: skip
# rows, warps, stages, unroll in pairs of groups, bytes asked for ahead
TILES = [(64, 4, 4, 1, 256), (64, 4, 3, 1, 256), (64, 4, 6, 1, 256), (64, 4, 3, 2, 512), (32, 4, 4, 1, 256),
         (128, 8, 3, 1, 256), (64, 2, 4, 1, 256)]  # fmt: skip
FLOAT_TILES = [(64, 4, 3, 1, 256), (64, 4, 4, 1, 256), (128, 8, 3, 1, 256)]
if DRY:
    WORDS, WORDS_MANY, TILES, FLOAT_TILES = [(32, 16, 1)], [(64, 16, 2)], [(64, 4, 2, 1, 0)], [(64, 4, 2, 2, 0)]
    STREAMS = STREAMS_MANY = {128: [(32, 16, 2, 2, 1)]}


def candidates(layer: Layer, math_kind: str, num_tokens: int) -> list[Launch]:
    """Launches worth trying for a shape."""
    shape = GemvShape(layer.N, layer.K, 4, 128)
    found: list[Launch] = []
    if math_kind == "raw":
        return [fitted(StreamLaunch(*one), shape) for one in STREAMS[layer.K] if one[2] > 1]
    if math_kind == "int8" and num_tokens <= 4:
        found += [WordLaunch(*one) for one in (WORDS if num_tokens == 1 else WORDS_MANY)]
        found += [StreamLaunch(*one) for one in (STREAMS if num_tokens == 1 else STREAMS_MANY)[layer.K]]
    if math_kind == "float" or num_tokens > 4:
        for rows, warps, stages, unroll, ahead in TILES if math_kind == "int8" else FLOAT_TILES:
            tiles = layer.N / rows
            for split in (1, 2, 4, 8):
                if DRY or 250 <= tiles * split <= (530 if rows == 128 else 1060):
                    found.append(TileLaunch(rows, warps, stages, split, unroll, ahead))
                if DRY:
                    break
    return list(dict.fromkeys(fitted(launch, shape) for launch in found))


def chosen_cases(names: str) -> list[tuple[Layer, str, int]]:
    """The cases, or those named, such as `o int8 16,gate_up int8`: each part of what it holds."""
    parts = names.split(",")
    return [(layer, kind, tokens) for layer, kind, tokens in cases()
            if any(f" {part} " in f" {layer.name} {kind} {tokens} " or not part for part in parts)]  # fmt: skip


def cases() -> Iterator[tuple[Layer, str, int]]:
    """Layer, what the activations are, tokens: first what a decode step needs, so that a cut leaves that.
    raw: rows that the product norms (where the model does) and quantizes itself."""
    for kind, tokens in (("int8", 1), ("raw", 1), ("int8", 8), ("int8", 16), ("int8", 4), ("int8", 2)):
        for layer in LAYERS if tokens == 1 else LAYERS[:3]:
            if DRY and tokens not in TOKENS:
                continue
            yield layer, kind, tokens
    for layer in LAYERS[:2]:
        for num_tokens in (1, TOKENS[-1]):
            yield layer, "float", num_tokens
    for layer in LAYERS[3:]:
        for num_tokens in TOKENS[-2:]:
            yield layer, "int8", num_tokens
