"""Laws 2, 3 and 4: what a sparse row must choose, when the choice is no choice, and what it may depend on."""

import math

import numpy as np
import oracle
import pytest
import small_configs
import small_models
import torch
from small_configs import CONFIGS

from salalocal.kernels.block_attention import block_attention
from salalocal.kernels.block_topk import BlockGeometry, block_topk
from salalocal.kernels.dense_attention import dense_attention
from salalocal.kernels.kv_cache import KeyValues
from salalocal.kernels.pooled_keys import num_pooled, pooled_keys

RELEASED = oracle.Geometry.of(small_configs.RELEASED["sparse_config"])
ACTIVE = ["plain", "always", "tied", "wide", "apart", "bare"]


def geometry_of(geometry: oracle.Geometry) -> BlockGeometry:
    """The implementation's name for the same sizes."""
    return BlockGeometry(**vars(geometry))


def compressed(k: torch.Tensor, geometry: oracle.Geometry) -> tuple[torch.Tensor, torch.Tensor]:
    """k1 and k2 of all of k [1, N, H, D], by the implementation."""
    both = []
    for factor in (1, 4):
        sizes = (factor * geometry.kernel_size, factor * geometry.kernel_stride)
        both.append(pooled_keys(k, 0, num_pooled(k.shape[1], *sizes), *sizes))
    return both[0], both[1]


def drawn(length: int, rows: int, heads: tuple[int, int, int], seed: int) -> tuple[torch.Tensor, ...]:
    """q [1, rows, Hq, D], k and v [1, length, Hkv, D] in float64; heads is (Hq, Hkv, D)."""
    generator = torch.Generator().manual_seed(seed)
    num_heads, num_kv_heads, dim = heads
    q = 2 * torch.randn(1, rows, num_heads, dim, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 1, length, num_kv_heads, dim, generator=generator, dtype=torch.float64)
    return q, k, v


@pytest.mark.parametrize("name", ACTIVE)
def test_sparse_is_dense_within_the_budget_and_only_there(name: str, seed: int) -> None:
    case = small_models.draw(name, seed)
    reach = case.geometry.reach
    sparse = small_models.read(case.model(), case.tokens, (), "always")
    dense = small_models.read(case.with_sparse(dense_len=10**9), case.tokens)
    assert small_models.row_error(sparse[:reach], dense[:reach]) < 1e-10
    assert np.abs(sparse - dense)[reach:].max() > 1e-3, "the choice must matter somewhere"
    roomy = case.with_sparse(dense_len=0, topk=len(case.tokens) // case.geometry.block_size + 1)
    assert small_models.row_error(small_models.read(roomy, case.tokens), dense) < 1e-10


@pytest.mark.parametrize(("first", "last"), [(6140, 6150), (6200, 6208), (6270, 6300), (8185, 8200), (9599, 9601)])
def test_released_geometry_chooses_and_attends_as_the_oracle(first: int, last: int, seed: int) -> None:
    q, k, v = drawn(last, last - first, (3, 1, 8), seed)
    scale = 1 / math.sqrt(8)
    k1, k2 = compressed(k, RELEASED)
    blocks = block_topk(q, k1, k2, first, last, geometry_of(RELEASED), scale)
    got = block_attention(q, KeyValues(k, v), blocks, first, RELEASED.block_size, scale)[0].numpy()
    dense = dense_attention(q, k, v, scale, first)[0].numpy()
    wide1 = oracle.compressed_keys(k[0].numpy(), 32, 16)
    wide2 = oracle.compressed_keys(k[0].numpy(), 128, 64)
    for row, p in enumerate(range(first, last)):
        wanted, _ = oracle.select_row(q[0, row].numpy(), wide1, wide2, p, RELEASED, scale)
        assert tuple(x for x in blocks[0, row, 0].tolist() if x >= 0) == wanted[0], p
        assert len(wanted[0]) == min(p // 64 + 1, 96)
        tokens = oracle.tokens_of_blocks(wanted[0], p, 64)
        attended = oracle.attend_row(q[0, row].numpy(), k[0].numpy(), v[0].numpy(), [tokens], scale)
        assert np.allclose(got[row], attended, rtol=0, atol=1e-12), p
        assert np.allclose(got[row], dense[row], rtol=0, atol=1e-12) == (p < 6144), p


@pytest.mark.parametrize(
    "geometry", [RELEASED, *(oracle.Geometry.of(CONFIGS[name]["sparse_config"]) for name in ACTIVE)]
)
def test_counts_and_forced_blocks(geometry: oracle.Geometry, seed: int) -> None:
    size, budget = geometry.block_size, geometry.budget
    length = geometry.reach + 5 * size + 7
    starts = {0, size - 1, geometry.reach - size, geometry.reach - 1, length - 2 * size}
    q, k, _ = drawn(length, length, (2, 2, 4), seed)
    k1, k2 = compressed(k, geometry)
    for first in starts:
        rows = q[:, first : first + 2 * size]
        blocks = block_topk(rows, k1, k2, first, length, geometry_of(geometry), 0.5)
        assert tuple(blocks.shape) == (1, rows.shape[1], 2, budget) and blocks.dtype == torch.int64
        for p, row in enumerate(blocks[0].tolist(), first):
            own = p // size
            for head in row:
                count = min(own + 1, budget)
                assert head[:count] == sorted(set(head[:count])), "ascending and distinct"
                assert head[count:] == [-1] * (budget - count)
                assert set(range(min(geometry.init_blocks, own + 1))) <= set(head)
                assert set(range(max(0, own - geometry.local_blocks), own + 1)) <= set(head)
                assert head[count - 1] == own


@pytest.mark.parametrize("name", ACTIVE)
def test_choices_inside_the_model_keep_the_counts(name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = small_models.draw(name, seed)
    geometry = case.geometry
    with small_models.choices(case.model(torch.float32), monkeypatch) as found:
        small_models.read(case.model(torch.float32), case.tokens, [33])
    sparse_layers = {n for n, mixer in enumerate(case.config["mixer_types"]) if mixer == "minicpm4"}
    rows = range(max(geometry.reach, case.dense_len - 1), len(case.tokens))
    assert set(found) == {(layer, p) for layer in sparse_layers for p in rows}
    for (_, p), heads in found.items():
        own = p // geometry.block_size
        assert len(heads) == case.config["num_key_value_heads"]
        for blocks in heads:
            assert len(blocks) == len(set(blocks)) == min(own + 1, geometry.budget)
            assert oracle.forced_blocks(p, geometry) <= set(blocks) and max(blocks) == own


def test_a_kv_head_chooses_by_its_own_queries_and_keys_alone(seed: int) -> None:
    geometry = oracle.Geometry.of(CONFIGS["plain"]["sparse_config"])
    length = geometry.reach + 10 * geometry.block_size
    q, k, _ = drawn(length, length, (6, 3, 8), seed)
    other_q, other_k, _ = drawn(length, length, (6, 3, 8), seed + 1)
    for head in range(3):
        mixed_q, mixed_k = other_q.clone(), other_k.clone()
        mixed_q[:, :, 2 * head : 2 * head + 2] = q[:, :, 2 * head : 2 * head + 2]
        mixed_k[:, :, head] = k[:, :, head]
        before = block_topk(q, *compressed(k, geometry), 0, length, geometry_of(geometry), 0.3)
        after = block_topk(mixed_q, *compressed(mixed_k, geometry), 0, length, geometry_of(geometry), 0.3)
        same = (before == after).all(dim=3).all(dim=1)[0].tolist()
        assert same == [g == head for g in range(3)]


@pytest.mark.parametrize("head", [0, 1])
def test_the_model_gives_each_kv_head_its_own_weights(head: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other weights for one KV head and its query heads leave the other's choices in that layer as they are."""
    case = small_models.draw("plain", seed)
    other = small_configs.random_weights(case.config, seed + 1)
    weights = {name: tensor.clone() for name, tensor in case.weights.items()}
    for name, rows in (("q_proj", 2 * 16), ("k_proj", 16), ("v_proj", 16)):
        full = f"model.layers.0.self_attn.{name}.weight"
        weights[full][head * rows : (head + 1) * rows] = other[full][head * rows : (head + 1) * rows]
    found = []
    for model in (case.model(), small_models.build(case.config, weights)):
        with small_models.choices(model, monkeypatch) as chosen:
            small_models.read(model, case.tokens)
        found.append([heads for (layer, _), heads in sorted(chosen.items()) if layer == 0])
    before, after = found
    assert [row[1 - head] for row in before] == [row[1 - head] for row in after]
    assert [row[head] for row in before] != [row[head] for row in after]
