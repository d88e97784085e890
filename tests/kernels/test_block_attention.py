"""Attention over picked blocks: both forms are the softmax over exactly the visible tokens of the picked blocks."""

import math
import random

import numpy as np
import oracle
import pytest
import torch
from torch import Tensor

from salalocal.kernels.block_attention import block_attention_definition, block_attention_reference
from salalocal.kernels.block_attention import reference as module
from salalocal.kernels.dense_attention import dense_attention_definition

# Absolute error against float64 for unit normal values; the half precisions are dominated by their rounded output.
BOUNDS = {torch.float64: 1e-13, torch.float32: 3e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SCALE = 0.3
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def draw(rng: random.Random, rows: int, num_tokens: int, block: int = 16, picks: int = 5) -> Inputs:
    """Queries, keys and values in a cache's storage, and random picks: some rows have fewer, the own block is in."""
    torch.manual_seed(rng.randrange(2**31))
    batch, groups, per_group, dim = rng.choice([1, 2]), rng.choice([1, 2, 3]), rng.choice([1, 2, 5]), rng.choice([4, 8])
    q = 2 * torch.randn(batch, rows, groups * per_group, dim, dtype=torch.float64)
    k = torch.randn(batch, groups, num_tokens + 9, dim, dtype=torch.float64)[:, :, :num_tokens].transpose(1, 2)
    v = torch.randn(batch, groups, num_tokens + 9, dim, dtype=torch.float64)[:, :, :num_tokens].transpose(1, 2)
    blocks = torch.full((batch, rows, groups, picks), -1)
    for b, t, g in np.ndindex(batch, rows, groups):
        own = (num_tokens - rows + t) // block
        count = min(own + 1, picks - rng.choice([0, 0, 1]))
        blocks[b, t, g, :count] = torch.tensor(sorted([*rng.sample(range(own), count - 1), own]))
    return q, k, v, blocks


def test_definition_is_the_oracle(seed: int) -> None:
    rng = random.Random(seed)
    for num_tokens in (40, 100, 111):
        q, k, v, blocks = draw(rng, 9, num_tokens)
        picked = [[tuple(x for x in row if x >= 0) for row in groups] for groups in blocks[0].tolist()]
        arrays = (x[0].numpy() for x in (q, k, v))
        expected = oracle.block_attention(*arrays, picked, num_tokens - 9, 16, SCALE)
        found = block_attention_definition(q, k, v, blocks, num_tokens - 9, 16, SCALE)[0]
        np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 17, 63, 64, 65, 130])
def test_reference_is_the_definition(rows: int, dtype: torch.dtype, seed: int) -> None:
    rng = random.Random(seed)
    for num_tokens in (rows, rows + rng.randint(1, 15), 256, rng.choice([257, 271, 300, 319, 320])):
        block = rng.choice([4, 16, 64])
        q, k, v, blocks = draw(rng, rows, num_tokens, block, rng.choice([2, 5, 9]))
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        found = block_attention_reference(q, k, v, blocks, num_tokens - rows, block, SCALE)
        wide = (q.double(), k.double(), v.double())
        expected = block_attention_definition(*wide, blocks, num_tokens - rows, block, SCALE)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=BOUNDS[dtype])


@pytest.mark.parametrize("rows", [1, 3, 4, 90])
def test_all_blocks_are_dense_attention(rows: int, seed: int) -> None:
    rng = random.Random(seed)
    num_tokens = rng.randint(100, 140)
    q, k, v, blocks = draw(rng, rows, num_tokens)
    everything = torch.arange(9).expand(*blocks.shape[:3], 9)  # block 8 and others may lie wholly ahead of a row
    found = block_attention_reference(q, k, v, everything, num_tokens - rows, 16, SCALE)
    expected = dense_attention_definition(q, k, v, SCALE, num_tokens - rows)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("rows", [1, 40])
def test_neither_order_nor_other_blocks_have_a_say(rows: int, seed: int) -> None:
    rng = random.Random(seed)
    q, k, v, blocks = draw(rng, rows, 331)
    blocks = blocks[:, :1, :1].expand_as(blocks).contiguous()  # one choice for all, so that the rest is read by nobody
    before = block_attention_reference(q, k, v, blocks, 331 - rows, 16, SCALE)
    shuffled = blocks[..., torch.randperm(blocks.shape[-1])]
    torch.testing.assert_close(
        block_attention_reference(q, k, v, shuffled, 331 - rows, 16, SCALE), before, rtol=0, atol=1e-13
    )
    unread = [t for t in range(331) if t // 16 not in set(blocks.flatten().tolist())]
    k[:, unread], v[:, unread] = math.nan, math.nan
    assert torch.equal(block_attention_reference(q, k, v, blocks, 331 - rows, 16, SCALE), before)


@pytest.mark.parametrize("rows", [1, 40])
def test_a_row_may_leave_out_its_own_block(rows: int, seed: int) -> None:
    rng = random.Random(seed)
    q, k, v, blocks = draw(rng, rows, 330)
    own = (330 - rows + torch.arange(rows)) // 16
    blocks = blocks.where(blocks != own[:, None, None], 0)
    blocks[..., 1:] = blocks[..., 1:].where(blocks[..., 1:] != 0, -1)  # block 0 once
    blocks[..., 0] = 0
    found = block_attention_reference(q, k, v, blocks, 330 - rows, 16, SCALE)
    expected = block_attention_definition(q, k, v, blocks, 330 - rows, 16, SCALE)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


def test_any_chunking_gives_the_same_rows(seed: int) -> None:
    rng = random.Random(seed)
    q, k, v, blocks = draw(rng, 150, 333)
    q, k, v = q.float(), k.float(), v.float()
    whole = block_attention_reference(q, k, v, blocks, 183, 16, SCALE)
    at = 0
    while at < 150:
        end = min(150, at + rng.choice([1, 2, 3, 4, 17, 64]))
        keys, values = k[:, : 183 + end], v[:, : 183 + end]
        part = block_attention_reference(q[:, at:end], keys, values, blocks[:, at:end], 183 + at, 16, SCALE)
        torch.testing.assert_close(part, whole[:, at:end], rtol=0, atol=2 * BOUNDS[torch.float32])
        at = end


@pytest.mark.parametrize(("scores", "partial", "gathered"), [(1, 1, 3), (100, 500, 0), (5000, 1 << 20, 1000)])
def test_limits_do_not_matter(
    scores: int, partial: int, gathered: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    q, k, v, blocks = draw(rng, 50, 333)
    whole = block_attention_reference(q, k, v, blocks, 283, 16, SCALE)
    monkeypatch.setattr(module, "MAX_TILE_SCORES", scores)
    monkeypatch.setattr(module, "MAX_TILE_VALUES", scores)
    monkeypatch.setattr(module, "MAX_PARTIAL_VALUES", partial)
    monkeypatch.setattr(module, "MAX_GATHERED_ROWS", gathered)
    found = block_attention_reference(q, k, v, blocks, 283, 16, SCALE)
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-13)


@pytest.mark.parametrize("shared_by", [0, 1, 2, 1000])
def test_what_is_shared_does_not_matter(shared_by: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read for all rows of a query block, or what all picked, or half of them, or anyone."""
    rng = random.Random(seed)
    q, k, v, blocks = draw(rng, 50, 333)
    blocks[:, 20:30] = blocks[:, 20:21]
    expected = block_attention_definition(q, k, v, blocks, 283, 16, SCALE)
    monkeypatch.setattr(module, "SHARED_BY", shared_by)
    found = block_attention_reference(q, k, v, blocks, 283, 16, SCALE)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("rows", [1, 30])
def test_huge_scores_stay_finite(rows: int, seed: int) -> None:
    rng = random.Random(seed)
    q, k, v, blocks = draw(rng, rows, 333)
    for factor in (1e4, -1e4, 0.0):
        found = block_attention_reference((factor * q).float(), k.float(), v.float(), blocks, 333 - rows, 16, 1.0)
        assert found.isfinite().all()
        assert found.abs().max() <= v.abs().max() * 1.0001


def test_equal_keys_average_the_visible_values(seed: int) -> None:
    rng = random.Random(seed)
    q, k, v, blocks = draw(rng, 20, 333)
    k = k[:, :1].expand_as(k)
    found = block_attention_reference(q, k, v, blocks, 313, 16, SCALE)
    for t in range(20):
        seen = [p for p in range(313 + t + 1) if p // 16 in blocks[0, t, 0].tolist()]
        torch.testing.assert_close(found[0, t, 0], v[0, seen, 0].mean(0), rtol=0, atol=1e-13)


@pytest.mark.parametrize("rows", [2, 40])
def test_gradients_are_those_of_the_definition(rows: int, seed: int) -> None:
    q, k, v, blocks = draw(random.Random(seed), rows, 170)
    tensors = [x.requires_grad_() for x in (q, k, v)]
    found = block_attention_reference(*tensors, blocks, 170 - rows, 16, SCALE)
    expected = block_attention_definition(*tensors, blocks, 170 - rows, 16, SCALE)
    weight = torch.randn_like(found)
    one = torch.autograd.grad((found * weight).sum(), tensors)
    other = torch.autograd.grad((expected * weight).sum(), tensors)
    for x, y in zip(one, other, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-11)


def test_wrong_shapes_are_refused(seed: int) -> None:
    q, k, v, blocks = draw(random.Random(seed), 5, 100)
    with pytest.raises(ValueError, match="do not fit together"):
        block_attention_reference(q, k, v, blocks[:, :4], 95, 16, SCALE)
    with pytest.raises(ValueError, match="only 100 keys"):
        block_attention_reference(q, k, v, blocks, 96, 16, SCALE)
