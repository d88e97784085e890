"""Conformance of the functions one by one: each kernel that the model calls against the oracle, over drawn sizes."""

import math
import random

import numpy as np
import oracle
import pytest
import torch

from salalocal.kernels.block_attention import block_attention
from salalocal.kernels.block_topk import BlockGeometry, block_topk
from salalocal.kernels.dense_attention import dense_attention
from salalocal.kernels.kv_cache import KeyValues
from salalocal.kernels.lightning import lightning, lightning_slopes
from salalocal.kernels.norm import rms_norm
from salalocal.kernels.pooled_keys import num_pooled, pooled_keys
from salalocal.kernels.rotary import rotary_reference

DRAWS = range(12)


def normal(seed: int, *shape: int) -> torch.Tensor:
    """Float64 numbers of variance one."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drawn_geometry(source: random.Random) -> oracle.Geometry:
    """Any sizes that section 16 admits, small."""
    stride = source.choice((1, 2, 4))
    block = stride * source.choice((1, 2, 4))
    init = source.randint(0, 2)
    return oracle.Geometry(
        kernel_size=stride * source.randint(1, 5),
        kernel_stride=stride,
        block_size=block,
        init_blocks=init,
        window_size=block * source.randint(0, 4),
        topk=init + 1 + source.randint(0, 4),
    )


@pytest.mark.parametrize("num_heads", [1, 2, 3, 5, 6, 7, 8, 12, 24, 31, 32, 33, 40])
def test_slopes(num_heads: int) -> None:
    assert np.allclose(lightning_slopes(num_heads).numpy(), oracle.lightning_slopes(num_heads), rtol=1e-6)
    assert lightning_slopes(num_heads).shape == (num_heads,)


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 127, 128, 200, 530])
def test_lightning(length: int, seed: int) -> None:
    q, k = normal(seed, 2, 1, length, 3, 6)
    v, start = normal(seed + 1, 1, length, 3, 4), normal(seed + 2, 1, 3, 6, 4)
    slopes = torch.tensor([0.84, 0.25, 0.004], dtype=torch.float64)
    for state in (None, start):
        kept = None if state is None else state.clone()
        o, end = lightning(q, k, v, slopes, 0.3, state)
        wanted = oracle.lightning(
            *(x[0].numpy() for x in (q, k, v)), slopes.numpy(), 0.3, None if state is None else state[0].numpy()
        )
        assert np.allclose(o[0].numpy(), wanted[0], rtol=0, atol=1e-10)
        assert np.allclose(end[0].numpy(), wanted[1], rtol=0, atol=1e-10)
        assert state is None or torch.equal(state, kept), "the given state must stay as it is"


def test_norm_and_rotary(seed: int) -> None:
    x, weight = 3 * normal(seed, 1, 5, 3, 8), normal(seed + 1, 8)
    assert np.allclose(rms_norm(x, weight, 0.1).numpy(), oracle.rms_norm(x.numpy(), weight.numpy(), 0.1), atol=1e-12)
    positions = [0, 1, 77, 4095, 1_000_003]
    turned = rotary_reference(x, torch.tensor(positions), 5000.0)[0].numpy()
    assert np.allclose(turned, oracle.rotary(x[0].numpy(), positions, 5000.0), rtol=0, atol=1e-8)


@pytest.mark.parametrize("draw", DRAWS)
def test_pooling_choice_and_attention(draw: int, seed: int) -> None:
    source = random.Random(f"{seed} {draw}")
    geometry = drawn_geometry(source)
    length = geometry.reach + source.randint(1, 12 * geometry.block_size)
    first = source.choice((0, source.randrange(length)))
    num_groups, group, dim = source.randint(1, 3), source.randint(1, 3), source.choice((2, 5))
    # Large products put whole powers of e between the scores, more than fp32 holds without logarithms.
    q = source.choice((1, 20)) * normal(seed + draw, 1, length - first, num_groups * group, dim)
    k, v = normal(seed + draw + 1000, 2, 1, length, num_groups, dim)
    note = f"{geometry}, rows {first}..{length - 1}"
    pooled, scale = [], 1 / math.sqrt(dim)
    for factor in (1, 4):
        sizes = (factor * geometry.kernel_size, factor * geometry.kernel_stride)
        windows = pooled_keys(k, 0, num_pooled(length, *sizes), *sizes)
        assert np.allclose(windows[0].numpy(), oracle.compressed_keys(k[0].numpy(), *sizes), rtol=0, atol=1e-13), note
        pooled.append(windows)
    blocks = block_topk(q, *pooled, first, length, BlockGeometry(**vars(geometry)), scale)
    attended = block_attention(q, KeyValues(k, v), blocks, first, geometry.block_size, scale)[0].numpy()
    wide = [x[0].numpy() for x in (q, k, v, *pooled)]
    chosen = [
        oracle.select_row(wide[0][row], wide[3], wide[4], first + row, geometry, scale) for row in range(length - first)
    ]
    for row, (wanted, margins) in enumerate(chosen):
        got = [tuple(x for x in head if x >= 0) for head in blocks[0, row].tolist()]
        for g, margin in enumerate(margins):
            assert got[g] == wanted[g] or 0 < margin < 1e-9, f"{note}, row {row}, head {g}"
    wanted_attention = oracle.block_attention(*wide[:3], [row for row, _ in chosen], first, geometry.block_size, scale)
    assert np.allclose(attended, wanted_attention, rtol=0, atol=1e-10), note


@pytest.mark.parametrize("draw", DRAWS)
def test_attention_over_any_blocks_and_over_all(draw: int, seed: int) -> None:
    source = random.Random(f"{seed} {draw}")
    size, length = source.choice((1, 3, 16)), source.randint(1, 90)
    first = source.choice((0, source.randrange(length)))
    rows = source.choice((1, 2, length))  # few rows take other paths; keys may go on after the last row
    end = min(first + rows, length)
    num_groups, group = source.randint(1, 2), source.randint(1, 4)
    q = 2 * normal(seed + draw, 1, end - first, num_groups * group, 6)
    k, v = normal(seed + draw + 1000, 2, 1, length, num_groups, 6)
    picked = [
        [tuple(sorted({p // size} | {x for x in range(p // size) if source.random() < 0.4})) for _ in range(num_groups)]
        for p in range(first, end)
    ]
    width = max(len(blocks) for row in picked for blocks in row)
    table = torch.tensor([[[*blocks, *[-1] * (width - len(blocks))] for blocks in row] for row in picked])[None]
    wide = [x[0].numpy() for x in (q, k, v)]
    got = block_attention(q, KeyValues(k, v), table, first, size, 0.4)[0].numpy()
    assert np.allclose(got, oracle.block_attention(*wide, picked, first, size, 0.4), rtol=0, atol=1e-11)
    got = dense_attention(q, k, v, 0.4, first)[0].numpy()
    assert np.allclose(got, oracle.dense_attention(*wide, first, 0.4), rtol=0, atol=1e-11)


def test_scores_far_apart_still_rank_in_float32(seed: int) -> None:
    """exp(z - L) reaches e^150 here, beyond fp32; the order of the scores is not lost with it."""
    geometry = oracle.Geometry(kernel_size=2, kernel_stride=1, block_size=2, init_blocks=1, window_size=2, topk=5)
    length = 80
    k1 = torch.zeros(1, num_pooled(length, 2, 1), 1, 1)
    k2 = torch.zeros(1, num_pooled(length, 8, 4), 1, 1)
    order = np.random.default_rng(seed).permutation(k1.shape[1])
    k1[0, :, 0, 0] = torch.from_numpy(100 + 0.5 * order).float()
    q = torch.ones(1, 1, 2, 1)
    blocks = block_topk(q, k1, k2, length - 1, length, BlockGeometry(**vars(geometry)), 1.0)
    wanted, _ = oracle.select_row(
        q[0, 0].double().numpy(), k1[0].double().numpy(), k2[0].double().numpy(), length - 1, geometry, 1.0
    )
    assert tuple(blocks[0, 0, 0].tolist()) == wanted[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("period", [1, 4, 7, 16, 32])
def test_equal_keys_tie_to_the_lower_block_however_the_rows_are_cut(period: int, dtype: torch.dtype, seed: int) -> None:
    """Text that repeats itself ties most rows; the choice must not follow the last bits of some order of additions."""
    geometry = oracle.Geometry(kernel_size=8, kernel_stride=4, block_size=16, init_blocks=1, window_size=32, topk=4)
    length, group = 260, 3
    q = (2 * normal(seed, 1, length, 2 * group, 8)).to(dtype)
    k = normal(seed + 1, 1, period, 2, 8).repeat(1, length // period + 1, 1, 1)[:, :length].to(dtype)
    pooled = [pooled_keys(k, 0, num_pooled(length, f * 8, f * 4), f * 8, f * 4) for f in (1, 4)]
    sizes = BlockGeometry(**vars(geometry))
    whole = block_topk(q, *pooled, 0, length, sizes, 0.35)
    for chunk in (1, 7, 64):
        parts = [block_topk(part, *pooled, i * chunk, length, sizes, 0.35) for i, part in enumerate(q.split(chunk, 1))]
        assert torch.equal(torch.cat(parts, 1), whole), chunk
    wide = [x[0].double().numpy() for x in (q, *pooled)]
    for p in range(geometry.reach, length):
        wanted, margins = oracle.select_row(wide[0][p], wide[1], wide[2], p, geometry, 0.35)
        for g, margin in enumerate(margins):
            assert tuple(whole[0, p, g].tolist()) == wanted[g] or 0 < margin < 1e-5, (p, g)
