"""The likeliest token without logits: the one that greedy choice takes from logits as they are stored."""

import math
from dataclasses import replace

import pytest
import torch
from quantized_cases import random_weight
from torch import Tensor

from salalocal.kernels.int4.activations_by_group import RawActivations, float_activations, quantize_groups_definition
from salalocal.kernels.int4.gemv import PLAIN, Activations, PackedMatrix, int4_gemv_triton, operation
from salalocal.kernels.int4.gemv.launch import Launch, StreamLaunch, TileLaunch, WordLaunch
from salalocal.kernels.int4.vocabulary import likeliest_tokens, likeliest_tokens_reference, likeliest_tokens_triton
from salalocal.kernels.sampling import greedy_tokens_reference, new_sampling_tensors
from salalocal.quant.int4 import IntScheme, PackedWeight

CPU = torch.device("cpu")
ENTRIES, FEATURES = 72, 256
LAUNCHES = [
    (8, WordLaunch(32, 32, 2)),
    (8, TileLaunch(32, 4, 2, 1)),
    (4, WordLaunch(32, 32, 2)),
    (4, TileLaunch(32, 4, 2, 2)),
    (4, StreamLaunch(16, 32, 2, 2)),  # programs that walk: fewer than there are keys of a row
]


def head(bits: int, seed: int) -> PackedWeight:
    """A matrix that leaves equal logits: every row stands there twice."""
    one = random_weight(ENTRIES // 2, FEATURES, IntScheme(bits, 128), seed)
    codes, scales = one.codes.repeat(2, 1), one.scales.repeat(2, 1)
    return replace(one, codes=codes, scales=scales).packed()


def grouped(seed: int, num_tokens: int, bits: int) -> Activations:
    rows = torch.randn(num_tokens, FEATURES, generator=torch.Generator().manual_seed(seed))
    return quantize_groups_definition(rows.bfloat16(), is_split=bits == 4)


def by_logits(x: Activations, weight: PackedMatrix, launch: Launch) -> tuple[Tensor, bool]:
    """What a step without this kernel chooses, from the same launch's logits; and whether it flags damage."""
    sampling = new_sampling_tensors(CPU, 1, x.values.shape[0])
    logits = int4_gemv_triton(x, weight, PLAIN, torch.bfloat16, launch=launch).float()
    return greedy_tokens_reference(logits, sampling), bool(sampling.is_damaged)


def flag() -> Tensor:
    return torch.zeros(1, dtype=torch.int32)


@pytest.fixture
def fixed(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> tuple[int, Launch]:
    """Bits, and the launch that is chosen for all of them."""
    bits, launch = request.param
    monkeypatch.setattr(operation, "choose_launch", lambda *_: launch)
    return bits, launch


@pytest.mark.parametrize("fixed", LAUNCHES, indirect=True, ids=str)
def test_the_token_is_that_of_the_stored_logits(seed: int, fixed: tuple[int, Launch]) -> None:
    bits, launch = fixed
    for num_tokens in (1, 3):
        weight, x, damage = head(bits, seed), grouped(seed, num_tokens, bits), flag()
        expected, _ = by_logits(x, weight, launch)
        assert likeliest_tokens_triton(x, weight, damage).tolist() == expected.tolist()
        assert int(damage) == 0 and int(expected.max()) < ENTRIES // 2


@pytest.mark.parametrize("fixed", LAUNCHES[:1], indirect=True, ids=str)
def test_logits_that_differ_only_before_rounding_leave_the_lower_index(seed: int, fixed: tuple[int, Launch]) -> None:
    weight = head(8, seed)
    x = grouped(seed, 1, 8)
    exact = int4_gemv_triton(x, weight, PLAIN, torch.float32)[0]
    best = int(exact.argmax())
    # The same row a little larger, in fp32 but not in bf16, behind its other copies.
    weight.words[ENTRIES - 1], weight.scales[ENTRIES - 1] = weight.words[best], weight.scales[best]
    wide = PackedWeight(weight.words, weight.scales.float(), 8, 128)
    wide.scales[ENTRIES - 1] *= 1 + 2**-12
    logits = int4_gemv_triton(x, wide, PLAIN, torch.float32)[0]
    rounded = logits.bfloat16()
    if rounded[-1] == rounded[best]:
        first = int((rounded == rounded.max()).nonzero()[0])  # `best`, or another that rounds to the same
        assert int(logits.argmax()) == ENTRIES - 1
        assert (
            int(likeliest_tokens_triton(x, wide, flag())) == first == int(likeliest_tokens_reference(x, wide, flag()))
        )


@pytest.mark.parametrize("fixed", [LAUNCHES[0], LAUNCHES[3]], indirect=True, ids=str)
def test_the_reference_goes_by_way_of_logits(seed: int, fixed: tuple[int, Launch]) -> None:
    bits, _ = fixed
    weight, damage = head(bits, seed), flag()
    rows = torch.randn(3, FEATURES, generator=torch.Generator().manual_seed(seed)).bfloat16()
    forms = [RawActivations(rows)] if bits == 8 else [grouped(seed, 3, bits), float_activations(rows)]
    for x in forms:
        found, expected = likeliest_tokens(x, weight, damage), likeliest_tokens_triton(x, weight, damage)
        logits = int4_gemv_triton(x, weight, PLAIN, torch.float32)
        gaps = logits.amax(1) - logits.gather(1, found[:, None])[:, 0]
        # Sums in another order may round two neighbours to the same bf16, or apart.
        assert bool((gaps <= 2**-7 * logits.amax(1)).all())
        assert found.dtype == expected.dtype == torch.int64 and int(damage) == 0


@pytest.mark.parametrize("fixed", LAUNCHES[:3], indirect=True, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_damage_is_flagged_wherever_it_is(seed: int, fixed: tuple[int, Launch], bad: float) -> None:
    bits, launch = fixed
    weight, x, damage = head(bits, seed), grouped(seed, 2, bits), flag()
    weight.scales[60, 1] = bad
    tokens = likeliest_tokens_triton(x, weight, damage)
    _, is_damaged = by_logits(x, weight, launch)
    assert is_damaged and int(damage) == 1 and bool(((tokens >= 0) & (tokens < ENTRIES)).all())
    likeliest_tokens_triton(x, head(bits, seed), damage)
    assert int(damage) == 1  # the host clears it, nobody else
    damage = flag()
    likeliest_tokens_reference(x, weight, damage)
    assert int(damage) == 1


def test_activations_that_are_no_numbers_are_flagged(seed: int) -> None:
    rows = torch.randn(2, FEATURES, generator=torch.Generator().manual_seed(seed)).bfloat16()
    rows[1, 9], damage = math.nan, flag()
    tokens = likeliest_tokens_triton(RawActivations(rows), head(8, seed), damage)
    assert int(damage) == 1 and bool(((tokens >= 0) & (tokens < ENTRIES)).all())
