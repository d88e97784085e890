"""RMS norm: the definition, the reference, and the place of the rounding."""

import pytest
import torch

from salalocal.kernels.norm import rms_norm, rms_norm_definition, rms_norm_reference

TOKENS = (1, 2, 15, 16, 17, 63, 64, 65, 127, 1000)
FORMS = (rms_norm_definition, rms_norm_reference, rms_norm)


def draw(seed: int, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64) * 3
    return x, 1 + 0.3 * torch.randn(shape[-1], generator=generator, dtype=torch.float64)


def in_float64(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x, weight = x.double(), weight.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_tokens", TOKENS)
def test_agrees_with_float64(form, num_tokens: int, seed: int) -> None:
    for shape in ((2, num_tokens, 48), (1, num_tokens, 3, 8)):
        x, weight = draw(seed, *shape)
        torch.testing.assert_close(form(x, weight, 1e-6), in_float64(x, weight, 1e-6), rtol=1e-12, atol=1e-12)
        x, weight = x.float(), weight.float()
        out = form(x, weight, 1e-6)
        assert out.dtype == torch.float32
        torch.testing.assert_close(out.double(), in_float64(x, weight, 1e-6), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_is_rounded_before_the_weight(form, seed: int) -> None:
    x, weight = (tensor.bfloat16() for tensor in draw(seed, 1, 64, 256))
    ones = torch.ones(256, dtype=torch.float64)
    before = in_float64(x, ones, 1e-6).bfloat16() * weight
    after = in_float64(x, weight, 1e-6).bfloat16()
    out = form(x, weight, 1e-6)
    assert out.dtype == torch.bfloat16
    # fp32 may fall on the other side of a tie than float64, hardly ever; the two orders differ in a quarter of places.
    assert (out != before).double().mean() < 0.001
    assert (out != after).double().mean() > 0.05


def test_sums_of_squares_are_not_taken_in_bfloat16() -> None:
    x = torch.full((1, 4096), 1.0, dtype=torch.bfloat16)
    out = rms_norm(x, torch.ones(4096, dtype=torch.bfloat16), 1e-6)
    assert torch.equal(out, x)


@pytest.mark.parametrize("form", FORMS)
def test_zeros_stay_zeros_and_the_input_is_left_alone(form) -> None:
    x = torch.zeros(3, 8)
    weight = torch.full((8,), 2.0)
    assert torch.equal(form(x, weight, 1e-6), torch.zeros(3, 8))
    x = torch.arange(8.0).reshape(1, 8)
    form(x, weight, 1e-6)
    assert torch.equal(x, torch.arange(8.0).reshape(1, 8)) and torch.equal(weight, torch.full((8,), 2.0))


def test_gradients(seed: int) -> None:
    x, weight = draw(seed, 2, 5, 6)
    x.requires_grad_()
    weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: rms_norm(a, b, 1e-6), (x, weight))
