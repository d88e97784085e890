"""The likeliest token of an 8-bit output matrix at the released size, on a card: the one that logits would give."""

import pytest
import torch

from salalocal.kernels.backend import compute_capability
from salalocal.kernels.int4.activations_by_group import RawActivations
from salalocal.kernels.int4.gemv import PLAIN, int4_gemv_triton
from salalocal.kernels.int4.vocabulary import likeliest_tokens_triton
from salalocal.kernels.sampling import greedy_tokens, new_sampling_tensors, sample_tokens
from salalocal.kernels.top_k import top_k_triton
from salalocal.quant.int4 import PackedWeight

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
VOCABULARY, HIDDEN = 73_448, 4096
CUDA = torch.device("cuda")


def head(seed: int) -> PackedWeight:
    """Random words; every row stands there twice, so that the largest logit has an equal behind it."""
    generator = torch.Generator("cuda").manual_seed(seed)
    shape = (VOCABULARY // 2, HIDDEN // 4)
    words = torch.randint(-(2**31), 2**31, shape, generator=generator, device=CUDA).int().repeat(2, 1)
    scales = torch.rand(VOCABULARY // 2, HIDDEN // 128, generator=generator, device=CUDA).add(0.5).bfloat16()
    return PackedWeight(words, scales.repeat(2, 1), 8, 128)


@pytest.mark.parametrize("num_rows", [1, 2, 4, 8, 16])
def test_a_captured_step_chooses_what_logits_would_give(seed: int, num_rows: int) -> None:
    weight, sampling = head(seed), new_sampling_tensors(CUDA, 1, 16)
    rows = torch.randn(num_rows, HIDDEN, generator=torch.Generator("cuda").manual_seed(seed), device=CUDA).bfloat16()
    given, damage = rows.clone(), torch.zeros(1, dtype=torch.int32, device=CUDA)
    likeliest_tokens_triton(RawActivations(given), weight, damage)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = likeliest_tokens_triton(RawActivations(given), weight, damage)
    for turn in range(4):
        given.copy_(rows.roll(turn, 1) * (turn + 1))
        graph.replay()
        logits = int4_gemv_triton(RawActivations(given), weight, PLAIN, torch.bfloat16)
        assert tokens.tolist() == greedy_tokens(logits.float(), sampling).tolist()
        assert int(tokens.max()) < VOCABULARY // 2
    assert int(damage) == 0
    given[num_rows - 1, 100] = torch.nan
    graph.replay()
    assert int(damage) == 1, f"capability {compute_capability(CUDA)}"


@pytest.mark.parametrize("num_rows", [1, 8])
@pytest.mark.parametrize("top_k", [1, 20, 64])
def test_a_small_top_k_draws_what_a_sort_would_give(seed: int, num_rows: int, top_k: int) -> None:
    generator = torch.Generator("cuda").manual_seed(seed)
    logits = torch.randn(num_rows, VOCABULARY, generator=generator, device=CUDA).mul(3).bfloat16().float()
    values, ids = torch.sort(logits, dim=1, descending=True, stable=True)
    found_values, found_ids = top_k_triton(logits, top_k)
    assert torch.equal(found_values, values[:, :top_k]) and torch.equal(found_ids, ids[:, :top_k])
    sampling = new_sampling_tensors(CUDA, 16, num_rows)
    sampling.uniforms.uniform_(generator=generator)
    sampling.temperature.fill_(0.9)
    sampling.top_k.fill_(top_k)
    sampling.top_p.fill_(0.95)
    assert torch.equal(sample_tokens(logits, sampling, most=top_k), sample_tokens(logits, sampling))
