"""Choosing tokens on the device: the engine's own sampler draws the same, ties and limits included."""

import math
import random

import pytest
import torch

from salalocal.engine.sampling import Sampler, token_probabilities
from salalocal.engine.sampling_params import SamplingParams
from salalocal.kernels.sampling import (
    SamplingTensors,
    draw_tokens,
    draw_tokens_triton,
    greedy_tokens,
    greedy_tokens_reference,
    greedy_tokens_triton,
    new_sampling_tensors,
    sample_tokens,
    sample_tokens_definition,
    sample_tokens_reference,
    sample_tokens_triton,
)

CPU = torch.device("cpu")


def settings(params: SamplingParams, uniforms: torch.Tensor, num_rows: int = 1) -> SamplingTensors:
    sampling = new_sampling_tensors(CPU, len(uniforms), num_rows)
    sampling.uniforms.copy_(uniforms)
    for name in ("temperature", "top_k", "top_p", "min_p"):
        getattr(sampling, name).fill_(getattr(params, name))
    return sampling


def draw_params(seed: int) -> SamplingParams:
    chance = random.Random(seed)
    return SamplingParams(
        temperature=chance.choice((0.05, 0.7, 1.0, 3.0, 100.0)),
        top_k=chance.choice((0, 1, 7, 50, 5000)),
        top_p=chance.choice((1.0, 0.95, 0.5, 1e-9)),
        min_p=chance.choice((0.0, 0.05, 0.5, 1.0)),
        seed=chance.randrange(2**62),
    )


@pytest.mark.parametrize("case", range(24))
def test_the_sampler_of_the_engine_draws_the_same(case: int, seed: int) -> None:
    seed += case
    generator = torch.Generator().manual_seed(seed)
    params = draw_params(seed)
    logits = 4 * torch.randn(6, 300, generator=generator)
    if case % 2:
        logits = logits.round()  # many of equal size
    sampler = Sampler(params)
    uniforms = sampler.uniforms(seed, 6)
    expected = [sampler.sample(row, seed + place) for place, row in enumerate(logits)]
    sampling = settings(params, uniforms, 6)
    for form in (sample_tokens, sample_tokens_definition, sample_tokens_triton):
        assert form(logits, sampling).tolist() == expected, form
    assert int(sampling.is_damaged) == 0 and not sampling.counters.any()


@pytest.mark.parametrize("case", range(8))
def test_the_kernels_find_a_cut_in_any_slice(case: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed + case)
    params = draw_params(seed + case)
    logits = torch.randn(3, 3000, generator=generator).mul(3)
    logits = logits.round() if case % 3 == 0 else logits
    uniforms = torch.rand(3, generator=generator, dtype=torch.float64)
    sampling = settings(params, uniforms, 3)
    assert torch.equal(sample_tokens_triton(logits, sampling), sample_tokens_reference(logits, sampling))


@pytest.mark.parametrize("form", (draw_tokens, draw_tokens_triton))
@pytest.mark.parametrize("temperature", (0.0, 0.05, 0.9, 100.0))
@pytest.mark.parametrize("min_p", (0.0, 0.05, 1.0))
def test_a_draw_without_order_is_the_same_draw(form, temperature: float, min_p: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    params = SamplingParams(temperature=temperature, min_p=min_p, seed=seed)
    logits = (4 * torch.randn(6, 2500, generator=generator)).mul(4).round().div(4)
    sampler = Sampler(params)
    uniforms = sampler.uniforms(seed, 6)
    expected = [sampler.sample(row, seed + place) for place, row in enumerate(logits)]
    sampling = settings(params, uniforms, 6)
    sampling.top_k.fill_(1)  # not read
    sampling.top_p.fill_(0.1)
    for _ in range(2):
        assert form(logits, sampling).tolist() == expected
    assert not sampling.counters.any() and int(sampling.is_damaged) == 0


def test_numbers_are_taken_by_step_and_row_round_and_round(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, 100, generator=generator).expand(5, 100)
    uniforms = torch.rand(4, generator=generator, dtype=torch.float64)
    sampling = settings(SamplingParams(temperature=2.0), uniforms)
    sampling.step.fill_(2)
    cumulative = torch.softmax(logits[0].double() / 2, 0).cumsum(0)
    expected = [int(torch.searchsorted(cumulative, uniforms[i], right=True)) for i in (2, 3, 0, 1, 2)]
    for form in (sample_tokens_reference, sample_tokens_definition):
        assert form(logits, sampling).tolist() == expected


def test_tokens_come_as_often_as_they_should(seed: int) -> None:
    params = SamplingParams(temperature=0.8, top_k=6, top_p=0.9, min_p=0.02)
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(seed)) * 2
    count = 40_000
    uniforms = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    tokens = sample_tokens(logits.expand(count, 40), settings(params, uniforms))
    found = torch.bincount(tokens, minlength=40) / count
    torch.testing.assert_close(found, token_probabilities(logits[0], params), rtol=0, atol=2 / count, check_dtype=False)


def test_the_largest_number_below_one_gives_a_token_that_was_left(seed: int) -> None:
    logits = torch.randn(3, 500, generator=torch.Generator().manual_seed(seed))
    uniforms = torch.tensor([1 - 2.0**-53], dtype=torch.float64)
    last = logits.topk(3).indices.amax(1)
    sampling = settings(SamplingParams(temperature=1.0, top_k=3), uniforms, 3)
    assert torch.equal(sample_tokens(logits, sampling), last)
    assert torch.equal(sample_tokens_triton(logits, sampling), last)
    sampling = settings(SamplingParams(temperature=1.0, min_p=0.2), uniforms, 3)
    last = [int((row >= row.max() + math.log(0.2)).nonzero()[-1]) for row in logits]
    assert draw_tokens_triton(logits, sampling).tolist() == last


@pytest.mark.parametrize(
    "form", (greedy_tokens, greedy_tokens_reference, greedy_tokens_triton, sample_tokens, sample_tokens_triton)
)
def test_greedy_takes_the_first_of_the_largest(form, seed: int) -> None:
    logits = torch.randn(3, 2500, generator=torch.Generator().manual_seed(seed)).clamp(max=1.0)
    logits[1] = -0.0
    logits[1, 1200:] = 0.0  # equal to -0.0
    logits[2, :-1] = torch.finfo(torch.float32).min
    sampling = settings(SamplingParams(top_k=5, top_p=0.1), torch.full((1,), 0.99, dtype=torch.float64), 3)
    expected = [int((row == row.max()).nonzero()[0]) for row in logits]
    for _ in range(2):  # counters are left as they were
        assert form(logits, sampling).tolist() == expected
    assert expected[1:] == [0, 2499] and int(sampling.is_damaged) == 0 and not sampling.counters.any()


@pytest.mark.parametrize(
    "form",
    (greedy_tokens_reference, greedy_tokens_triton, draw_tokens_triton, sample_tokens_reference, sample_tokens_triton),
)
@pytest.mark.parametrize("bad", (float("nan"), float("inf"), float("-inf"), -float("nan")))
def test_damage_is_flagged_and_tokens_stay_in_the_vocabulary(form, bad: float, seed: int) -> None:
    logits = torch.randn(2, 1500, generator=torch.Generator().manual_seed(seed))
    sampling = settings(SamplingParams(), torch.full((3,), 0.5, dtype=torch.float64), 2)
    form(logits, sampling)
    assert int(sampling.is_damaged) == 0
    logits[1, 1400] = bad
    for row in (logits, logits[1:].contiguous().fill_(bad)):
        tokens = form(row, sampling)
        assert tokens.dtype == torch.int64 and bool(((tokens >= 0) & (tokens < 1500)).all())
    form(torch.zeros(2, 1500), sampling)
    assert int(sampling.is_damaged) == 1  # the host clears it, nobody else


def test_what_does_not_fit_is_named() -> None:
    sampling = new_sampling_tensors(CPU, 1, 1)
    with pytest.raises(ValueError, match="2 rows"):
        greedy_tokens_triton(torch.zeros(2, 8), sampling)
    with pytest.raises(ValueError, match="bfloat16"):
        greedy_tokens_triton(torch.zeros(1, 8).bfloat16(), sampling)
