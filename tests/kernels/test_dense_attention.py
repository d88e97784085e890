"""Dense attention: the tiles and the fused path are the causal softmax, at any offset, in any dtype."""

import math
import random

import numpy as np
import oracle
import pytest
import torch
from torch import Tensor

from salalocal.kernels import dense_attention as module
from salalocal.kernels.dense_attention import (
    dense_attention_definition,
    dense_attention_fused,
    dense_attention_reference,
)

# Absolute error against float64 for unit normal values. fp32: a few hundred roundings of 6e-8; the half precisions
# are bounded by the rounding of their inputs' products and of the output.
BOUNDS = {torch.float64: 1e-13, torch.float32: 3e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def draw(
    rows: int, keys: int, heads: int = 4, groups: int = 2, dim: int = 16, batch: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, and keys and values as views of the storage that a KV cache has."""
    q = 2 * torch.randn(batch, rows, heads, dim, dtype=torch.float64)
    k = torch.randn(batch, groups, keys, dim, dtype=torch.float64).transpose(1, 2)
    v = torch.randn(batch, groups, keys, dim, dtype=torch.float64).transpose(1, 2)
    return q, k, v


def test_definition_is_the_oracle(seed: int) -> None:
    torch.manual_seed(seed)
    q, k, v = draw(rows=9, keys=40)
    found = dense_attention_definition(q, k, v, 0.25, 31)[0].numpy()
    expected = oracle.dense_attention(q[0].numpy(), k[0].numpy(), v[0].numpy(), 31, 0.25)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("rows", [1, 2, 63, 64, 65, 130])
@pytest.mark.parametrize("first", [0, 1, 77])
def test_reference_is_the_definition(rows: int, first: int, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    rng = random.Random(seed)
    groups = rng.choice([1, 2, 3])
    q, k, v = draw(
        rows, first + rows + rng.choice([0, 5]), groups * rng.choice([1, 2, 5]), groups, 8, rng.choice([1, 2])
    )
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    found = dense_attention_reference(q, k, v, 0.3, first)
    expected = dense_attention_definition(q.double(), k.double(), v.double(), 0.3, first)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=BOUNDS[dtype])


@pytest.mark.parametrize(("rows", "first"), [(1, 0), (1, 40), (65, 0), (30, 77)])
def test_the_fused_form_is_the_definition(rows: int, first: int, seed: int) -> None:
    torch.manual_seed(seed)
    q, k, v = draw(rows, first + rows + 5, heads=6, groups=2)
    found = dense_attention_fused(q, k, v, 0.3, first)
    torch.testing.assert_close(found, dense_attention_definition(q, k, v, 0.3, first), rtol=0, atol=1e-13)


@pytest.mark.parametrize("limit", [1, 200, 3000])
def test_tile_size_does_not_matter(limit: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(seed)
    q, k, v = draw(rows=40, keys=93)
    whole = dense_attention_reference(q, k, v, 0.25, 53)
    monkeypatch.setattr(module, "MAX_TILE_SCORES", limit)
    torch.testing.assert_close(dense_attention_reference(q, k, v, 0.25, 53), whole, rtol=0, atol=1e-13)


def test_any_chunking_gives_the_same_rows(seed: int) -> None:
    torch.manual_seed(seed)
    q, k, v = draw(rows=150, keys=150)
    q, k, v = q.float(), k.float(), v.float()
    whole = dense_attention_reference(q, k, v, 0.25, 0)
    at = 0
    while at < 150:
        end = min(150, at + random.Random(seed + at).choice([1, 3, 40, 70]))
        part = dense_attention_reference(q[:, at:end], k[:, :end], v[:, :end], 0.25, at)
        torch.testing.assert_close(part, whole[:, at:end], rtol=0, atol=2 * BOUNDS[torch.float32])
        at = end


@pytest.mark.parametrize("first", [0, 3])
def test_huge_scores_stay_finite(first: int, seed: int) -> None:
    torch.manual_seed(seed)
    q, k, v = draw(rows=20, keys=23)
    found = dense_attention_reference((1e4 * q).float(), k.float(), v.float(), 1.0, first)
    assert found.isfinite().all()
    expected = dense_attention_definition(1e4 * q, k, v, 1.0, first)
    # One key wins each row by a wide margin, but for near ties, which may fall either way.
    close = (found.double() - expected).abs().amax((0, 2, 3)) < 1e-3
    assert close.float().mean() > 0.5


@pytest.mark.parametrize("first", [0, 7])
def test_gradients_are_those_of_the_definition(first: int, seed: int) -> None:
    torch.manual_seed(seed)
    tensors = [x.requires_grad_() for x in draw(rows=70, keys=first + 70)]
    found = torch.autograd.grad(dense_attention_reference(*tensors, 0.25, first).square().sum(), tensors)
    expected = torch.autograd.grad(dense_attention_definition(*tensors, 0.25, first).square().sum(), tensors)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


def test_later_keys_have_no_say(seed: int) -> None:
    torch.manual_seed(seed)
    q, k, v = draw(rows=6, keys=30)
    for first in (0, 10):
        before = dense_attention_reference(q, k, v, 0.25, first)
        k[:, first + 6 :], v[:, first + 6 :] = math.nan, math.nan
        assert torch.equal(dense_attention_reference(q, k, v, 0.25, first), before)
        k, v = k.nan_to_num(), v.nan_to_num()


def test_wrong_shapes_are_refused() -> None:
    q, k, v = draw(rows=5, keys=10)
    with pytest.raises(ValueError, match=r"6\.\.10"):
        dense_attention_reference(q, k, v, 0.25, 6)
    with pytest.raises(ValueError, match="do not divide"):
        dense_attention_reference(q[:, :, :3], k, v, 0.25, 0)
