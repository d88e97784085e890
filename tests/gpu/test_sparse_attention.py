"""Block choice and block attention on a card at the released sizes: against float64, at chunk offsets of every kind."""

import random

import pytest
import torch
from torch import Tensor

from salalocal.kernels.block_attention import (
    block_attention_decode,
    block_attention_reference,
    block_attention_triton,
)
from salalocal.kernels.block_topk import BlockGeometry, block_topk_decode, block_topk_reference, block_topk_triton
from salalocal.kernels.pooled_keys import num_pooled, pooled_keys

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GEOMETRY = BlockGeometry(kernel_size=32, kernel_stride=16, block_size=64, init_blocks=1, window_size=2048, topk=64)
SCALE = 128**-0.5


def draw(seed: int, num_tokens: int, num_rows: int, is_equal: bool = False) -> tuple[Tensor, ...]:
    """q, k, v, k1 and k2 in bf16."""
    generator = torch.Generator("cuda").manual_seed(seed)
    shapes = [(1, num_rows, 32, 128), (1, num_tokens, 2, 128), (1, num_tokens, 2, 128)]
    q, k, v = (torch.randn(*shape, generator=generator, device="cuda").bfloat16() for shape in shapes)
    if is_equal:
        k[:] = k[:, :1]
    sizes = [
        (GEOMETRY.kernel_size, GEOMETRY.kernel_stride),
        (GEOMETRY.coarse_kernel_size, GEOMETRY.coarse_kernel_stride),
    ]
    k1, k2 = (pooled_keys(k, 0, num_pooled(num_tokens, *size), *size) for size in sizes)
    return 4 * q, k, v, k1, k2


@pytest.mark.parametrize("num_tokens", [6_145, 20_000, 65_537])
def test_choice_and_attention_are_those_of_float64(num_tokens: int, seed: int) -> None:
    num_rows = random.Random(seed).randrange(65, 140)
    q, k, v, k1, k2 = draw(seed, num_tokens, num_rows)
    first = num_tokens - num_rows
    exact = block_topk_reference(q.double(), k1.double(), k2.double(), first, num_tokens, GEOMETRY, SCALE)
    found = block_topk_triton(q, k1, k2, first, num_tokens, GEOMETRY, SCALE)
    assert (found != exact).float().mean() < 2e-3  # margins below the rounding of fp32 sums
    arguments = (k, v, exact, first, GEOMETRY.block_size, SCALE)
    wide = block_attention_reference(q.double(), k.double(), v.double(), *arguments[2:])
    errors = [
        float((form(q, *arguments).double() - wide).norm() / wide.norm())
        for form in (block_attention_triton, block_attention_reference)
    ]
    assert errors[0] < 2 * errors[1]


@pytest.mark.parametrize("num_rows", [1, 5, 16])
@pytest.mark.parametrize("num_tokens", [6_200, 70_001])
def test_a_captured_step_follows_the_position(num_tokens: int, num_rows: int, seed: int) -> None:
    q, k, v, k1, k2 = draw(seed, num_tokens, num_rows)
    position = torch.zeros(1, dtype=torch.int64, device="cuda")

    def step() -> tuple[Tensor, Tensor]:
        picks = block_topk_decode(q, k1, k2, position, GEOMETRY, SCALE)
        return picks, block_attention_decode(q, k, v, picks, position, GEOMETRY.block_size, SCALE)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        picks, attended = step()
    for first in (num_tokens - num_rows, num_tokens // 2, 100):
        position.fill_(first)
        graph.replay()
        last = first + num_rows
        exact = block_topk_reference(q.double(), k1.double(), k2.double(), first, last, GEOMETRY, SCALE)
        assert (picks != exact).float().mean() < 5e-3
        wide = block_attention_reference(q.double(), k.double(), v.double(), picks, first, GEOMETRY.block_size, SCALE)
        assert (attended.double() - wide).norm() < 5e-3 * wide.norm()


def test_equal_keys_go_to_the_lower_blocks(seed: int) -> None:
    q, _, _, k1, k2 = draw(seed, 30_000, 70, is_equal=True)
    expected = [*range(63), *range(29_999 // 64 - 32, 29_999 // 64 + 1)]
    found = block_topk_triton(q, k1, k2, 29_930, 30_000, GEOMETRY, SCALE)
    assert found[0, -1].tolist() == [expected, expected]
    position = torch.tensor([29_930], device="cuda")
    assert torch.equal(block_topk_decode(q[:, :16], k1, k2, position, GEOMETRY, SCALE), found[:, :16])


def test_a_planted_key_is_always_picked(seed: int) -> None:
    q, k, _, k1, k2 = draw(seed, 40_000, 64)
    block = random.Random(seed).randrange(1, 500)
    k[:, 64 * block + 20 : 64 * block + 24] = 30 * q[:, 40, ::16] / q[:, 40, ::16].norm(dim=-1, keepdim=True)
    sizes = [
        (GEOMETRY.kernel_size, GEOMETRY.kernel_stride),
        (GEOMETRY.coarse_kernel_size, GEOMETRY.coarse_kernel_stride),
    ]
    k1, k2 = (pooled_keys(k, 0, num_pooled(40_000, *size), *size) for size in sizes)
    found = block_topk_triton(q, k1, k2, 40_000 - 64, 40_000, GEOMETRY, SCALE)
    assert (found[0, 40] == block).any(-1).all()
