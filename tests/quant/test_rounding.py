"""Rounding to nearest: exact where it can be, never worse than no search, close to the best scale there is."""

import pytest
import torch
from torch import Tensor

from salalocal.quant.int4 import IntScheme, IntWeight
from salalocal.quant.rounding import round_codes, round_to_nearest, search_scales, squared_norms

BFLOAT16 = torch.bfloat16


def heavy_tailed(shape: tuple[int, int], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    chi = torch.randn(5, *shape, generator=generator).square().mean(0)
    return 0.02 * torch.randn(shape, generator=generator) / chi.sqrt()


def lost(weight: Tensor, quantized: IntWeight) -> float:
    return squared_norms(weight, quantized)[0]


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_on_the_grid_come_back_exactly(bits: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    zero = 2 ** (bits - 1)
    codes = torch.randint(0, 2 * zero, (6, 4, 32), generator=generator, dtype=torch.uint8)
    codes[..., 0] = 2 * zero - 1  # the largest value, which fixes the scale
    codes[..., 1:].clamp_(min=1)
    scales = (2.0 ** torch.randint(-9, -2, (6, 4), generator=generator)).to(BFLOAT16)
    weight = IntWeight(codes.flatten(1), scales, bits, 32).dequantize()
    found = round_to_nearest(weight, IntScheme(bits, 32), BFLOAT16)
    assert torch.equal(found.codes, codes.flatten(1)) and torch.equal(found.scales, scales)
    assert squared_norms(weight, found) == (0.0, pytest.approx(float(weight.double().square().sum())))


@pytest.mark.parametrize("bits", [4, 8])
def test_no_group_is_worse_than_without_the_search(bits: int, seed: int) -> None:
    weight = heavy_tailed((40, 256), seed)
    found = round_to_nearest(weight, IntScheme(bits, 64), BFLOAT16)
    plain = (weight.view(40, 4, 64).abs().amax(2) / (2 ** (bits - 1) - 1)).to(BFLOAT16)
    codes = round_codes(weight, plain.float().repeat_interleave(64, 1), bits)
    errors = [
        (quantized.dequantize() - weight).view(40, 4, 64).square().sum(2)
        for quantized in (found, IntWeight(codes, plain, bits, 64))
    ]
    assert (errors[0] <= errors[1] * (1 + 1e-6)).all()
    if bits == 4:
        assert errors[0].sum() < 0.95 * errors[1].sum()


def test_the_scale_is_close_to_the_best_of_all(seed: int) -> None:
    weight = heavy_tailed((8, 128), seed).double()
    best = torch.full((8,), torch.inf, dtype=torch.float64)
    for fraction in torch.linspace(0.3, 1.05, 2000, dtype=torch.float64):
        scales = weight.abs().amax(1, keepdim=True) / 7 * fraction
        rounded = torch.round(weight / scales).clamp(-8, 7) * scales
        best = torch.minimum(best, (rounded - weight).square().sum(1))
    found = round_to_nearest(weight.float(), IntScheme(4, 128), BFLOAT16)
    error = (found.dequantize(torch.float64) - weight).square().sum(1)
    assert (error <= 1.2 * best).all() and error.sum() <= 1.03 * best.sum()


def test_codes_are_the_nearest(seed: int) -> None:
    weight = heavy_tailed((16, 96), seed)
    found = round_to_nearest(weight, IntScheme(4, 32), BFLOAT16)
    scales = found.scales.float().repeat_interleave(32, 1)
    is_inside = (weight / scales).clamp(-8, 7) == weight / scales
    assert ((found.dequantize() - weight).abs() <= 0.5001 * scales)[is_inside].all()
    assert set(found.codes[~is_inside].tolist()) <= {0, 15}


@pytest.mark.parametrize("dtype", [BFLOAT16, torch.float16])
def test_zeros_and_extremes_stay_numbers(dtype: torch.dtype) -> None:
    weight = torch.zeros(4, 32)
    weight[1] = 1e-30
    weight[2, 5] = 60_000.0
    weight[3] = -60_000.0
    found = round_to_nearest(weight, IntScheme(4, 16), dtype)
    assert found.dequantize().isfinite().all() and (found.scales > 0).all()
    assert (found.dequantize()[0] == 0).all()
    assert found.dequantize()[2, 5] == pytest.approx(60_000, rel=0.01)
    assert found.dequantize()[3] == pytest.approx(weight[3], rel=0.01)


def test_a_short_last_group_has_its_own_scale(seed: int) -> None:
    weight = heavy_tailed((3, 40), seed)
    scales = search_scales(weight, IntScheme(4, 32), BFLOAT16)
    assert torch.equal(scales[:, 1:], search_scales(weight[:, 32:], IntScheme(4, 8), BFLOAT16))
    assert lost(weight, round_to_nearest(weight, IntScheme(4, 32), BFLOAT16)) < 0.05 * float(weight.square().sum())
