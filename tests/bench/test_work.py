"""Counting: closed forms against counting row by row, and the released shape against figures worked out elsewhere."""

import dataclasses
import random
from math import prod

import pytest
from checkpoint_cases import small_config

from salalocal.bench.work import QWEN3_8B, DenseCost, DenseShape, SalaCost, Work, dense_shape_like
from salalocal.checkpoint.names import EMBEDDING, HEAD, expected_tensors
from salalocal.model.config import LIGHTNING, SPARSE, SalaConfig


def cost_of(config: SalaConfig, bytes_per_weight: float = 2.0, **options: float) -> SalaCost:
    sizes = {name: int(bytes_per_weight * prod(shape)) for name, shape in expected_tensors(config).items()}
    return SalaCost(config, sizes, **options)


def released_int4() -> SalaCost:
    config, sizes = SalaConfig.released(), {}
    for name, shape in expected_tensors(config).items():
        width = 2.0 if len(shape) == 1 or name == EMBEDDING else 1.0 if name == HEAD else 0.5 + 2 / 128
        sizes[name] = int(width * prod(shape))
    return SalaCost(config, sizes)


def drawn_config(seed: int) -> SalaConfig:
    drawn = random.Random(seed)
    sparse = dataclasses.replace(
        small_config().sparse,
        dense_len=drawn.randrange(0, 200),
        topk=drawn.randrange(2, 6),
        window_size=8 * drawn.randrange(0, 5),
        kernel_size=drawn.choice((2, 4, 8)),
    )
    return dataclasses.replace(small_config(), sparse=sparse)


def attention_row_by_row(config: SalaConfig, start: int, end: int) -> int:
    """FLOP between tokens as the specification has them, one row and one head at a time."""
    sparse, lightning, flops = config.sparse, config.lightning, 0
    budget = sparse.topk + sparse.window_size // sparse.block_size
    for position in range(start, end):
        own = position // sparse.block_size
        is_choosing = position + 1 >= sparse.dense_len and own + 1 > budget
        if is_choosing:
            keys = (budget - 1) * sparse.block_size + position % sparse.block_size + 1
            for factor in (1, 4):
                starts = range(0, position + 2 - factor * sparse.kernel_size, factor * sparse.kernel_stride)
                flops += (
                    config.mixer_types.count(SPARSE) * sparse.num_attention_heads * 2 * sparse.head_dim * len(starts)
                )
        else:
            keys = position + 1
        flops += config.mixer_types.count(SPARSE) * sparse.num_attention_heads * 4 * sparse.head_dim * keys
        flops += config.mixer_types.count(LIGHTNING) * lightning.num_heads * 4 * lightning.head_dim**2
    return flops


def test_attention_is_what_counting_row_by_row_gives(seed: int) -> None:
    for attempt in range(8):
        config = drawn_config(seed + attempt)
        cost = cost_of(config)
        for start, end in ((0, 1), (0, 300), (57, 58), (63, 130), (200, 457)):
            assert cost.read(start, end).attention_flops == attention_row_by_row(config, start, end)


def test_chunks_add_up_but_for_what_each_reads_again() -> None:
    cost = cost_of(small_config())
    whole, parts = cost.read(0, 400), cost.read(0, 150) + cost.read(150, 400)
    assert parts.linear_flops == whole.linear_flops and parts.attention_flops == whole.attention_flops
    assert parts.num_bytes > whole.num_bytes


def test_the_released_shape_is_as_in_the_project_s_own_arithmetic() -> None:
    """256K tokens: 4.65 PFLOP of products, 5.05 in all; 1M: attention 17 %; a token drawn: 5.1 GB at 256K."""
    cost = released_int4()
    work = Work()
    for start in range(0, 2**18, 8192):
        work += cost.read(start, start + 8192)
    assert work.linear_flops == pytest.approx(4.653e15, rel=1e-3)
    assert work.linear_flops + work.attention_flops == pytest.approx(5.05e15, rel=2e-3)
    step = cost.step(2**18)
    assert step.num_bytes == pytest.approx(5.11e9, rel=2e-3)
    assert step.num_bytes - cost.step(8191).num_bytes == pytest.approx(8.4e6 * 8 * 1.25, rel=0.05)  # pooled keys alone
    assert cost.model_bytes == pytest.approx(5.48e9, rel=1e-3)


def test_a_token_drawn_reads_every_weight_once_and_one_row_of_the_embedding() -> None:
    config = dataclasses.replace(small_config(), mixer_types=(LIGHTNING,) * 4)
    cost = cost_of(config, cache_item_bytes=0.0)
    states = 2 * 4 * config.lightning.num_heads * config.lightning.head_dim**2 * 4
    table = cost.tensor_bytes[EMBEDDING]
    assert cost.step(1000).num_bytes == cost.model_bytes - table + table // config.vocab_size + states


def test_tied_embeddings_are_the_output_matrix() -> None:
    tied, untied = small_config(tie_word_embeddings=True), small_config()
    assert cost_of(tied).step(5) == cost_of(untied).step(5)


def test_smaller_caches_move_fewer_bytes() -> None:
    config = small_config()
    wide, narrow = cost_of(config, cache_item_bytes=4.0), cost_of(config, cache_item_bytes=1.0)
    assert narrow.step(500).num_bytes < wide.step(500).num_bytes
    assert narrow.step(500).attention_flops == wide.step(500).attention_flops


def test_the_dense_shape_is_that_of_qwen3_8b() -> None:
    """8,190,735,360 parameters by the model's own card; 147,456 bytes of cache a token in bf16."""
    assert QWEN3_8B.num_parameters == 8_190_735_360
    assert QWEN3_8B.cache_bytes(1, 2) == 147_456


def test_dense_work_row_by_row() -> None:
    shape = DenseShape(50, 16, 24, 3, 4, 2, 8)
    cost = DenseCost(shape, 2)
    pairs = sum(position + 1 for position in range(7, 20))
    work = cost.read(7, 20)
    assert work.attention_flops == 3 * 4 * 4 * 8 * pairs
    assert work.linear_flops == 2 * 13 * 3 * (16 * 8 * (4 + 4 + 2 + 2) + 3 * 16 * 24)
    step = cost.step(20)
    assert step.linear_flops == cost.read(20, 21).linear_flops + 2 * 50 * 16
    assert step.num_bytes - cost.read(20, 21).num_bytes == 50 * 16 * 2


def test_the_baseline_of_a_small_model_has_its_sizes() -> None:
    config = small_config()
    shape = dense_shape_like(config)
    assert (shape.hidden_size, shape.num_layers, shape.num_kv_heads) == (48, 4, 2)
