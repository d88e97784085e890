"""The largest logits and their indices, in falling order, the lower index first among equals."""

import pytest
import torch

from salalocal.errors import BackendError
from salalocal.kernels import top_k as kernel
from salalocal.kernels.sampling import (
    new_sampling_tensors,
    sample_tokens,
    sample_tokens_reference,
    sample_tokens_triton,
)
from salalocal.kernels.top_k import top_k, top_k_reference, top_k_triton


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes seconds to choose among 1,024 entries."""
    monkeypatch.setattr(kernel, "BLOCK_ENTRIES", 128)


def random_logits(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("num_entries", "k"), [(300, 5), (70, 64), (7, 1)])
def test_the_largest_k_come_in_order(seed: int, num_entries: int, k: int) -> None:
    logits = random_logits(seed, 2, num_entries) * 100
    logits[:, 1::3] = logits[:, :1]  # many equals
    logits[1, 0] = -torch.inf
    values, indices = top_k_triton(logits, k)
    exact_values, exact_indices = top_k_reference(logits, k)
    assert torch.equal(values, exact_values) and torch.equal(indices, exact_indices)
    assert torch.equal(torch.topk(logits, k).values, values)
    assert torch.equal(top_k(logits, k)[1], exact_indices)


def test_no_number_is_the_largest_and_zero_has_no_sign() -> None:
    logits = torch.tensor([[1.0, torch.nan, 3.0, 2.0], [-0.0, 0.0, -1.0, -2.0]])
    values, indices = top_k_triton(logits, 2)
    assert bool(values[0, 0].isnan()) and indices.tolist() == [[1, 2], [0, 1]]


def test_more_than_a_program_keeps_is_refused() -> None:
    with pytest.raises(BackendError, match="the 65 largest of 100"):
        top_k_triton(torch.zeros(1, 100), 65)


@pytest.mark.parametrize(("top_k", "top_p", "min_p"), [(1, 1.0, 0.0), (7, 0.6, 0.0), (33, 0.95, 0.02)])
def test_sampling_from_the_largest_is_sampling_behind_a_sort(seed: int, top_k: int, top_p: float, min_p: float) -> None:
    logits = random_logits(seed, 3, 200) * 3
    logits[1] = logits[1].round()  # many equals, also where top_k ends
    sampling = new_sampling_tensors(torch.device("cpu"), 3, 3)
    sampling.uniforms.copy_(torch.rand(3, generator=torch.Generator().manual_seed(seed)))
    sampling.temperature.fill_(0.8)
    sampling.top_k.fill_(top_k)
    sampling.top_p.fill_(top_p)
    sampling.min_p.fill_(min_p)
    expected = sample_tokens_reference(logits, sampling)
    assert torch.equal(sample_tokens_triton(logits, sampling, most=top_k), expected)
    assert torch.equal(sample_tokens_triton(logits, sampling), expected)
    assert torch.equal(sample_tokens(logits, sampling, most=top_k), expected)
    assert not sampling.counters.any() and int(sampling.is_damaged) == 0
