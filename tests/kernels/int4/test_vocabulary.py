"""Choosing tokens: the largest logits and their indices, the lower index first among equals."""

import pytest
import torch
from quantized_cases import random_weight

from salalocal.errors import BackendError
from salalocal.kernels.int4.activations_by_group import quantize_groups_definition
from salalocal.kernels.int4.gemv import int4_gemv_definition
from salalocal.kernels.int4.vocabulary import (
    top_k,
    top_k_reference,
    top_k_triton,
    vocabulary_best,
    vocabulary_best_triton,
    vocabulary_logits,
)
from salalocal.quant.int4 import IntScheme


def random_logits(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("num_tokens", [1, 5])
def test_the_best_logit_is_found_without_writing_logits(seed: int, num_tokens: int) -> None:
    weight = random_weight(72, 256, IntScheme(8, 128), seed).packed()
    x = quantize_groups_definition(random_logits(seed, num_tokens, 256), is_split=False)
    exact = int4_gemv_definition(x, weight) / 16
    logits = vocabulary_logits(x, weight, 1 / 16)
    assert float((logits.double() - exact).norm() / exact.norm()) < 3e-6
    for values, indices in (vocabulary_best(x, weight, 1 / 16), vocabulary_best_triton(x, weight, 1 / 16)):
        assert indices.tolist() == exact.argmax(dim=1).tolist()
        assert torch.allclose(values.double(), exact.amax(dim=1), rtol=1e-5)


def test_equal_logits_leave_the_lowest_index(seed: int) -> None:
    one = random_weight(36, 128, IntScheme(8, 128), seed)
    codes, scales = one.codes.repeat(2, 1), one.scales.repeat(2, 1)
    weight = type(one)(codes, scales, 8, 128).packed()
    x = quantize_groups_definition(random_logits(seed, 1, 128), is_split=False)
    best = int(int4_gemv_definition(x, one.packed()).argmax())
    assert int(vocabulary_best_triton(x, weight, 1.0)[1]) == best == int(vocabulary_best(x, weight, 1.0)[1])


@pytest.mark.parametrize(("num_entries", "k"), [(1100, 5), (70, 64), (7, 1)])
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
