"""Rotary position embedding: the definition, the reference, angles far out, and that a cut changes nothing."""

import pytest
import torch

from salalocal.kernels.rotary import rotary_definition, rotary_reference

FORMS = (rotary_definition, rotary_reference)


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def as_complex_turn(x: torch.Tensor, positions: torch.Tensor, theta: float) -> torch.Tensor:
    """The same rotation written with complex numbers, in float64."""
    half = x.shape[-1] // 2
    angle = positions.double()[:, None] * theta ** (-2 * torch.arange(half, dtype=torch.float64) / x.shape[-1])
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)[:, None, :]
    return torch.cat((turned.real, turned.imag), dim=-1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_tokens", (1, 2, 15, 16, 17, 63, 64, 65, 127, 1000))
def test_agrees_with_a_complex_turn(form, num_tokens: int, seed: int) -> None:
    x = draw(seed, 2, num_tokens, 3, 8)
    positions = torch.arange(5, 5 + num_tokens)
    expected = as_complex_turn(x, positions, 500.0)
    torch.testing.assert_close(form(x, positions, 500.0), expected, rtol=1e-11, atol=1e-11)
    out = form(x.float(), positions, 500.0)
    assert out.dtype == torch.float32
    # The angle itself carries fp32 rounding: half a unit in the last place of numbers near 1000.
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=3e-4)


@pytest.mark.parametrize("form", FORMS)
def test_position_zero_changes_nothing(form, seed: int) -> None:
    x = draw(seed, 1, 1, 2, 16).float()
    assert torch.equal(form(x, torch.tensor([0]), 10_000.0), x)


@pytest.mark.parametrize("form", FORMS)
def test_angles_are_fp32_products_even_past_two_million(form, seed: int) -> None:
    positions = torch.tensor([0, 1, 524_288, 1_048_577, 2_097_151, 16_777_215])
    x = draw(seed, 1, len(positions), 1, 128).float()
    frequencies = 1.0 / (10_000.0 ** (torch.arange(0, 128, 2).float() / 128))
    phi = torch.stack([torch.tensor(float(p)) * frequencies for p in positions])[None, :, None, :]
    first, second = x[..., :64], x[..., 64:]
    expected = torch.cat((first * phi.cos() - second * phi.sin(), second * phi.cos() + first * phi.sin()), dim=-1)
    torch.testing.assert_close(form(x, positions, 10_000.0), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_is_rotated_in_fp32_and_rounded_once(form, seed: int) -> None:
    x = draw(seed, 1, 64, 2, 32).bfloat16()
    positions = torch.arange(64)
    out = form(x, positions, 10_000.0)
    assert out.dtype == torch.bfloat16
    assert (out != as_complex_turn(x.double(), positions, 10_000.0).bfloat16()).double().mean() < 0.005


def test_products_depend_on_distance_alone(seed: int) -> None:
    q, k = draw(seed, 1, 1, 1, 64), draw(seed + 1, 1, 1, 1, 64)
    products = [
        (rotary_reference(q, torch.tensor([p + 37]), 10_000.0) * rotary_reference(k, torch.tensor([p]), 10_000.0)).sum()
        for p in (0, 3, 1000, 2**21)
    ]
    torch.testing.assert_close(torch.stack(products), products[0].expand(4), rtol=1e-7, atol=1e-7)


def test_a_cut_changes_no_bit(seed: int) -> None:
    x = draw(seed, 1, 130, 4, 32).float()
    positions = torch.arange(7_000, 7_130)
    whole = rotary_reference(x, positions, 10_000.0)
    for cut in (1, 63, 64, 65):
        parts = [rotary_reference(x[:, part], positions[part], 10_000.0) for part in (slice(0, cut), slice(cut, None))]
        assert torch.equal(torch.cat(parts, dim=1), whole)


def test_gradients(seed: int) -> None:
    x = draw(seed, 1, 3, 2, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: rotary_reference(a, torch.arange(3), 100.0), (x,))
