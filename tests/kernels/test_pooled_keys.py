"""Pooled keys: complete windows only, exact means, the same bits however the cache grew."""

import random

import pytest
import torch

from salalocal.kernels.pooled_keys import num_pooled, pooled_keys_definition, pooled_keys_reference

WINDOWS = [(32, 16), (128, 64), (8, 4), (12, 4), (16, 16), (5, 1), (7, 7)]


@pytest.mark.parametrize(
    ("num_tokens", "fine", "coarse"),
    [
        *[(0, 0, 0), (15, 0, 0), (31, 0, 0), (32, 1, 0), (33, 1, 0), (47, 1, 0), (48, 2, 0)],
        *[(63, 2, 0), (64, 3, 0), (65, 3, 0), (127, 6, 0), (128, 7, 1), (129, 7, 1)],
        *[(191, 10, 1), (192, 11, 2), (193, 11, 2)],
    ],
)
def test_counts_of_the_released_sizes(num_tokens: int, fine: int, coarse: int) -> None:
    assert num_pooled(num_tokens, 32, 16) == fine
    assert num_pooled(num_tokens, 128, 64) == coarse


@pytest.mark.parametrize(("kernel", "stride"), WINDOWS)
def test_a_window_counts_from_its_last_token_on(kernel: int, stride: int) -> None:
    for num_tokens in range(4 * kernel):
        ends = [stride * j + kernel for j in range(4 * kernel)]
        assert num_pooled(num_tokens, kernel, stride) == sum(end <= num_tokens for end in ends)


@pytest.mark.parametrize(("kernel", "stride"), WINDOWS)
def test_reference_is_the_definition(kernel: int, stride: int, seed: int) -> None:
    torch.manual_seed(seed)
    for num_tokens in (kernel, kernel + 1, kernel + stride, 3 * kernel + 2):
        keys = torch.randn(2, 3, num_tokens, 5, dtype=torch.float64).transpose(1, 2)
        last = num_pooled(num_tokens, kernel, stride)
        first = random.Random(seed).randrange(last)
        for dtype, bound in (
            (torch.float64, 1e-15),
            (torch.float32, 3e-7),
            (torch.float16, 1e-3),
            (torch.bfloat16, 8e-3),
        ):
            cast = keys.to(dtype)
            found = pooled_keys_reference(cast, first, last, kernel, stride)
            expected = pooled_keys_definition(cast.double(), first, last, kernel, stride)
            assert found.dtype == dtype
            assert found.shape == expected.shape == (2, last - first, 3, 5)
            torch.testing.assert_close(found.double(), expected, rtol=bound, atol=bound)


def test_sums_are_kept_in_fp32() -> None:
    keys = torch.ones(1, 128, 1, 1, dtype=torch.bfloat16)
    keys[:, 0] = 256.0  # in bf16 256 + 1 is 256 again
    assert pooled_keys_reference(keys, 0, 1, 128, 64).item() == torch.tensor(383 / 128).bfloat16().item()


@pytest.mark.parametrize(("kernel", "stride"), WINDOWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_growing_gives_the_same_bits_as_one_shot(kernel: int, stride: int, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    cuts = random.Random(seed)
    keys = torch.randn(1, 6 * kernel + 3, 2, 8).to(dtype)
    whole = pooled_keys_reference(keys, 0, num_pooled(keys.shape[1], kernel, stride), kernel, stride)
    parts, done, num_tokens = [], 0, 0
    while num_tokens < keys.shape[1]:
        num_tokens = min(keys.shape[1], num_tokens + cuts.choice([1, 1, 2, stride, kernel + 1]))
        last = num_pooled(num_tokens, kernel, stride)
        parts.append(pooled_keys_reference(keys[:, :num_tokens], done, last, kernel, stride))
        done = last
    assert torch.equal(torch.cat(parts, 1), whole)


@pytest.mark.parametrize(("kernel", "stride"), WINDOWS)
def test_equal_keys_have_equal_means(kernel: int, stride: int, seed: int) -> None:
    torch.manual_seed(seed)
    keys = torch.randn(1, 1, 2, 33).expand(1, 9 * kernel, 2, 33)
    means = pooled_keys_reference(keys, 0, num_pooled(9 * kernel, kernel, stride), kernel, stride)
    assert torch.equal(means, means[:, :1].expand_as(means))
    if kernel & (kernel - 1) == 0:
        assert torch.equal(means, keys[:, : means.shape[1]])


def test_no_windows_is_empty_not_an_error() -> None:
    keys = torch.randn(2, 31, 3, 4)
    assert pooled_keys_reference(keys, 0, 0, 32, 16).shape == (2, 0, 3, 4)
    assert pooled_keys_definition(keys, 0, 0, 32, 16).shape == (2, 0, 3, 4)


def test_misuse_is_refused() -> None:
    keys = torch.randn(1, 47, 1, 4)
    with pytest.raises(ValueError, match="ends at key 48, but there are 47"):
        pooled_keys_reference(keys, 0, 2, 32, 16)
    with pytest.raises(ValueError, match="not a multiple"):
        pooled_keys_reference(keys, 0, 1, 32, 12)
