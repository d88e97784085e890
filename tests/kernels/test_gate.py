"""The output gate: the definition, the reference, and the place of the rounding."""

import pytest
import torch

from salalocal.kernels.gate import sigmoid_gate, sigmoid_gate_definition, sigmoid_gate_reference

FORMS = (sigmoid_gate_definition, sigmoid_gate_reference, sigmoid_gate)


def draw(seed: int, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, gate = (torch.randn(*shape, generator=generator, dtype=torch.float64) * 4 for _ in range(2))
    return x, gate


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_tokens", (1, 2, 15, 16, 17, 63, 64, 65, 127, 1000))
def test_agrees_with_float64(form, num_tokens: int, seed: int) -> None:
    x, gate = draw(seed, 2, num_tokens, 24)
    expected = x * torch.special.expit(gate)
    torch.testing.assert_close(form(x, gate), expected, rtol=1e-12, atol=1e-12)
    out = form(x.float(), gate.float())
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_gate_is_rounded_before_the_product(form, seed: int) -> None:
    x, gate = (tensor.bfloat16() for tensor in draw(seed, 64, 256))
    sigmoid = torch.special.expit(gate.double())
    out = form(x, gate)
    assert out.dtype == torch.bfloat16
    assert (out != x * sigmoid.bfloat16()).double().mean() < 0.001
    assert (out != (x.double() * sigmoid).bfloat16()).double().mean() > 0.05


@pytest.mark.parametrize("form", FORMS)
def test_far_values_do_not_overflow(form) -> None:
    out = form(torch.full((4,), 3.0), torch.tensor([-1e4, -200.0, 200.0, 1e4]))
    torch.testing.assert_close(out, torch.tensor([0.0, 0.0, 3.0, 3.0]))


def test_gradients(seed: int) -> None:
    x, gate = draw(seed, 3, 4)
    assert torch.autograd.gradcheck(sigmoid_gate, (x.requires_grad_(), gate.requires_grad_()))
