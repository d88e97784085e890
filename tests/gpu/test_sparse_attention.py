"""Block choice and block attention on a card at the released sizes: against float64, at chunk offsets of every kind."""

import math
import random

import pytest
import torch
from torch import Tensor

from salalocal.kernels.block_attention import (
    KeyValues,
    block_attention_decode,
    block_attention_reference,
    block_attention_triton,
)
from salalocal.kernels.block_topk import BlockGeometry, block_topk_decode, block_topk_reference, block_topk_triton
from salalocal.kernels.dense_attention import dense_attention, dense_attention_definition
from salalocal.kernels.kv_cache import RECENT_TOKENS, CacheRows, append_tokens, quantize_tokens_reference
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
    choice = (exact, first, GEOMETRY.block_size, SCALE)
    cached = KeyValues(k, v)
    assert error(block_attention_triton(q, cached, *choice), q, cached, choice) < 2 * error(
        block_attention_reference(q, k, v, *choice), q, cached, choice
    )


def error(found: Tensor, q: Tensor, cached: KeyValues, choice: tuple[Tensor, int, int, float]) -> float:
    """Of an attention against float64, relative to its norm."""
    wide = cached.widened(torch.float64)
    exact = block_attention_reference(q.double(), wide.keys.double(), wide.values.double(), *choice)
    return float((found.double() - exact).norm() / exact.norm())


def appended(k: Tensor, v: Tensor, is_quantized: bool, steps: list[int]) -> CacheRows:
    """A cache filled by the kernel in steps of so many tokens, poisoned elsewhere."""
    capacity = k.shape[1] + 200
    dtype = torch.int8 if is_quantized else torch.bfloat16

    def poisoned(*shape: int) -> Tensor:
        return torch.full(shape, math.nan, dtype=torch.bfloat16, device="cuda")

    codes = [torch.full((2, capacity, 128), -128, dtype=dtype, device="cuda") for _ in range(2)]
    scales = [poisoned(2, capacity) if is_quantized else None for _ in range(2)]
    recent = poisoned(RECENT_TOKENS, 2, 128) if is_quantized else None
    rows = CacheRows(*codes, *scales, poisoned(2, capacity // 16, 128), poisoned(2, capacity // 64, 128), recent)
    at = 0
    for num_tokens in steps:
        step = slice(at, at + num_tokens)
        append_tokens(rows, k[0, step], v[0, step], torch.tensor([at], device="cuda"), GEOMETRY)
        at += num_tokens
    return rows


@pytest.mark.parametrize("is_quantized", [False, True], ids=["bf16", "int8"])
def test_a_cache_appended_on_the_card_serves_choice_and_attention(is_quantized: bool, seed: int) -> None:
    rng = random.Random(seed)
    steps = [8192, rng.randrange(1, 400), *(rng.randrange(1, 17) for _ in range(60))]
    num_tokens = sum(steps)
    q, k, v, k1, k2 = draw(seed, num_tokens, 70)
    rows = appended(k, v, is_quantized, steps)
    for found, expected in ((rows.k1, k1), (rows.k2, k2)):
        count = expected.shape[1]
        assert torch.equal(found[:, :count].transpose(0, 1), expected[0]) and found[:, count:].isnan().all()
    cached = rows.key_values
    if is_quantized:
        for x, codes, scales in ((k, cached.keys, cached.key_scales), (v, cached.values, cached.value_scales)):
            exact_codes, exact_scales = quantize_tokens_reference(x)
            assert torch.equal(scales[:, :num_tokens], exact_scales)
            assert torch.equal(codes[:, :num_tokens], exact_codes)
    picks = block_topk_reference(q.double(), k1.double(), k2.double(), num_tokens - 70, num_tokens, GEOMETRY, SCALE)
    choice = (picks, num_tokens - 70, GEOMETRY.block_size, SCALE)
    held = cached.first(num_tokens)
    assert error(block_attention_triton(q, held, *choice), q, held, choice) < 4e-3
    few = (picks[:, -9:], torch.tensor([num_tokens - 9], device="cuda"), GEOMETRY.block_size, SCALE)
    choice = (picks[:, -9:], num_tokens - 9, GEOMETRY.block_size, SCALE)
    assert error(block_attention_decode(q[:, -9:], cached, *few), q[:, -9:], held, choice) < 4e-3


def test_a_captured_step_crosses_the_switch(seed: int) -> None:
    """Appends, chooses and attends, from dense rows below 8,191 to picked ones, with one captured step of 3 rows."""
    num_tokens, switch = 8_215, 8_191
    q, k, v, _, _ = draw(seed, num_tokens, num_tokens - 8_000)
    rows = appended(k, v, False, [8_000])
    position = torch.tensor([8_000], device="cuda")
    new = [x[0, 8_000:8_003].clone() for x in (k, v)]
    queries, gate = q[:, :3].clone(), torch.randn(3, 4096, device="cuda").bfloat16()
    k1, k2 = (x.transpose(0, 1)[None] for x in (rows.k1, rows.k2))

    def step() -> tuple[Tensor, Tensor]:
        append_tokens(rows, *new, position, GEOMETRY)
        picks = block_topk_decode(queries, k1, k2, position, GEOMETRY, SCALE, switch)
        arguments = (queries, rows.key_values, picks, position, GEOMETRY.block_size, SCALE)
        return picks, block_attention_decode(*arguments, gate)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        picks, attended = step()
    for first in range(8_000, num_tokens - 2, 3):
        position.fill_(first)
        for x, source in zip(new, (k, v), strict=True):
            x.copy_(source[0, first : first + 3])
        queries.copy_(q[:, first - 8_000 : first - 7_997])
        graph.replay()
        for t in range(3):
            count = int((picks[0, t] >= 0).sum()) // 2
            assert count == (96 if first + t >= switch else (first + t) // 64 + 1)
        choice = (picks, first, GEOMETRY.block_size, SCALE)
        plain = block_attention_reference(queries.double(), k.double(), v.double(), *choice)
        exact = plain.flatten(2) * torch.sigmoid(gate.double())
        assert (attended.double().flatten(2) - exact).norm() < 8e-3 * exact.norm()


@pytest.mark.parametrize(("num_rows", "first"), [(300, 0), (300, 5_000), (1, 4_000)])
def test_dense_attention_at_any_offset(num_rows: int, first: int, seed: int) -> None:
    q, k, v, _, _ = draw(seed, first + num_rows + 9, num_rows)
    exact = dense_attention_definition(q.double(), k.double(), v.double(), SCALE, first)
    found = dense_attention(q, k, v, SCALE, first)
    assert (found.double() - exact).norm() < 5e-3 * exact.norm()


@pytest.mark.parametrize("num_rows", [1, 5, 16])
@pytest.mark.parametrize("num_tokens", [6_200, 70_001])
def test_a_captured_step_follows_the_position(num_tokens: int, num_rows: int, seed: int) -> None:
    q, k, v, k1, k2 = draw(seed, num_tokens, num_rows)
    position = torch.zeros(1, dtype=torch.int64, device="cuda")

    def step() -> tuple[Tensor, Tensor]:
        picks = block_topk_decode(q, k1, k2, position, GEOMETRY, SCALE)
        return picks, block_attention_decode(q, KeyValues(k, v), picks, position, GEOMETRY.block_size, SCALE)

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
