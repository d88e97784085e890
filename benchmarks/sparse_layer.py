"""One sparse layer in the shape of the 9B, for the benchmarks of its kernels: random tensors, the calls of a prefill,
and what two choices have in common.
"""

import dataclasses
import math

import torch

from salalocal.kernels.block_attention import prefill as attention
from salalocal.kernels.block_topk import BlockGeometry
from salalocal.kernels.block_topk import prefill as choice
from salalocal.kernels.kv_cache import KeyValues, quantize_tokens_reference
from salalocal.kernels.pooled_keys import num_pooled, pooled_keys

HEADS, GROUPS, DIM = 32, 2, 128
SCALE = DIM**-0.5
GEOMETRY = BlockGeometry(kernel_size=32, kernel_stride=16, block_size=64, init_blocks=1, window_size=2048, topk=64)


@dataclasses.dataclass
class Layer:
    """Tensors of one sparse layer."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    k1: torch.Tensor
    k2: torch.Tensor
    first: int

    @property
    def num_tokens(self) -> int:
        return self.k.shape[1]

    @property
    def cached(self) -> KeyValues:
        return KeyValues(self.k, self.v)

    def in_8_bits(self) -> KeyValues:
        """The cache quantized as `append_tokens` does."""
        (k, k_scales), (v, v_scales) = (quantize_tokens_reference(x) for x in (self.k, self.v))
        return KeyValues(k, v, k_scales, v_scales)

    def with_room(self, capacity: int) -> "Layer":
        """The same with room for pooled keys of so many tokens; it holds no numbers."""
        sizes = (
            (GEOMETRY.kernel_size, GEOMETRY.kernel_stride),
            (GEOMETRY.coarse_kernel_size, GEOMETRY.coarse_kernel_stride),
        )
        rooms = []
        for pooled, size in zip((self.k1, self.k2), sizes, strict=True):
            rooms.append(pooled.new_full((1, num_pooled(capacity, *size), GROUPS, DIM), math.nan))
            rooms[-1][:, : pooled.shape[1]] = pooled
        return dataclasses.replace(self, k1=rooms[0], k2=rooms[1])

    def choose(self, rows: slice = slice(None)) -> torch.Tensor:
        q = self.q[:, rows]
        first = self.first + (rows.start or 0)
        return choice.block_topk_triton(q, self.k1, self.k2, first, self.num_tokens, GEOMETRY, SCALE)

    def attend(self, picks: torch.Tensor) -> torch.Tensor:
        return attention.block_attention_triton(self.q, self.cached, picks, self.first, GEOMETRY.block_size, SCALE)


def draw(num_tokens: int, num_queries: int, is_alike: bool, seed: int) -> Layer:
    generator = torch.Generator("cuda").manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.float32)

    k = randn(1, num_tokens, GROUPS, DIM).bfloat16()
    v = randn(1, num_tokens, GROUPS, DIM).bfloat16()
    q = randn(1, num_queries, HEADS, DIM)
    if is_alike:
        keep = 0.98
        for i in range(1, num_queries):
            q[:, i] = keep * q[:, i - 1] + math.sqrt(1 - keep**2) * q[:, i]
    geometry = GEOMETRY
    n1 = num_pooled(num_tokens, geometry.kernel_size, geometry.kernel_stride)
    n2 = num_pooled(num_tokens, geometry.coarse_kernel_size, geometry.coarse_kernel_stride)
    k1 = pooled_keys(k, 0, n1, geometry.kernel_size, geometry.kernel_stride)
    k2 = pooled_keys(k, 0, n2, geometry.coarse_kernel_size, geometry.coarse_kernel_stride)
    return Layer((4 * q).bfloat16(), k, v, k1, k2, num_tokens - num_queries)


def overlap_of(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Share of picked blocks that float64 picks too; rows pick as many as it does."""
    rows = [[{*row} - {-1} for row in picks[0].flatten(0, 1).tolist()] for picks in (found, exact)]
    counts = [[len(row) for row in each] for each in rows]
    assert counts[0] == counts[1], f"rows pick {counts[0]} blocks, float64 {counts[1]}"
    return sum(len(a & b) for a, b in zip(*rows, strict=True)) / sum(counts[0])
