"""The gated activation of the MLP: the definition, the reference, and the place of the rounding."""

import pytest
import torch

from salalocal.kernels.swiglu import swiglu, swiglu_definition, swiglu_reference

FORMS = (swiglu_definition, swiglu_reference, swiglu)


def draw(seed: int, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    gate, up = (torch.randn(*shape, generator=generator, dtype=torch.float64) * 4 for _ in range(2))
    return gate, up


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_tokens", (1, 2, 15, 16, 17, 63, 64, 65, 127, 1000))
def test_agrees_with_float64(form, num_tokens: int, seed: int) -> None:
    gate, up = draw(seed, 2, num_tokens, 24)
    expected = gate * torch.special.expit(gate) * up
    torch.testing.assert_close(form(gate, up), expected, rtol=1e-12, atol=1e-12)
    out = form(gate.float(), up.float())
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_is_rounded_before_the_product(form, seed: int) -> None:
    gate, up = (tensor.bfloat16() for tensor in draw(seed, 64, 256))
    silu = gate.double() * torch.special.expit(gate.double())
    out = form(gate, up)
    assert out.dtype == torch.bfloat16
    assert (out != silu.bfloat16() * up).double().mean() < 0.001
    assert (out != (silu * up.double()).bfloat16()).double().mean() > 0.05


@pytest.mark.parametrize("form", FORMS)
def test_far_values_do_not_overflow_and_inputs_are_left_alone(form) -> None:
    gate = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4])
    up = torch.full((5,), 2.0)
    out = form(gate, up)
    torch.testing.assert_close(out, torch.tensor([0.0, 0.0, 0.0, 200.0, 2e4]))
    assert torch.equal(gate, torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4])) and torch.equal(up, torch.full((5,), 2.0))


def test_gradients(seed: int) -> None:
    gate, up = draw(seed, 3, 4)
    assert torch.autograd.gradcheck(swiglu, (gate.requires_grad_(), up.requires_grad_()))
