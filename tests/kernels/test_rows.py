"""The norm and the gates as kernels over rows: the numbers of the reference, everywhere and nowhere else."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from salalocal.errors import BackendError
from salalocal.kernels.gate import sigmoid_gate_reference, sigmoid_gate_triton
from salalocal.kernels.norm import rms_norm_reference, rms_norm_triton
from salalocal.kernels.rows import MAX_CHANNELS, are_for_kernel, needs_gradient
from salalocal.kernels.swiglu import swiglu_reference, swiglu_triton

# kernel, reference; both take two tensors of rows, the norm only the first row of the second.
FORMS = {
    "norm": (
        lambda x, y: rms_norm_triton(x, y.reshape(-1, y.shape[-1])[0], 1e-6),
        lambda x, y: rms_norm_reference(x, y.reshape(-1, y.shape[-1])[0], 1e-6),
    ),
    "gate": (sigmoid_gate_triton, sigmoid_gate_reference),
    "swiglu": (swiglu_triton, swiglu_reference),
}
Form = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture(params=FORMS)
def forms(request: pytest.FixtureRequest) -> tuple[Form, Form]:
    return FORMS[request.param]


def draw(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two slices of one stacked projection."""
    generator = torch.Generator().manual_seed(seed)
    both = (3 * torch.randn(*shape[:-1], 2 * shape[-1] + 8, generator=generator)).to(dtype)
    return both[..., : shape[-1]], both[..., shape[-1] : 2 * shape[-1]]


@pytest.mark.parametrize("shape", [(1, 64), (5, 96), (1, 3, 2500), (2, 17, 8)], ids=str)
def test_kernel_is_the_reference(forms: tuple[Form, Form], shape: tuple[int, ...], seed: int) -> None:
    kernel, reference = forms
    x, y = draw(seed, shape, torch.float32)
    torch.testing.assert_close(kernel(x, y), reference(x, y), rtol=3e-6, atol=1e-6)
    x, y = draw(seed, shape, torch.bfloat16)
    found, expected = kernel(x, y), reference(x, y)
    assert found.shape == expected.shape and found.dtype == expected.dtype and found.is_contiguous()
    assert (found != expected).double().mean() <= max(0.01, 1.5 / found.numel())
    torch.testing.assert_close(found, expected, rtol=2**-6, atol=1e-3)


def test_outputs_are_written_everywhere_and_nowhere_else(
    forms: tuple[Form, Form], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, reference = forms
    x, y = draw(seed, (7, 100), torch.float32)
    expected = reference(x, y)
    room = torch.full((700 + 128,), torch.nan)
    monkeypatch.setattr(torch, "empty", lambda shape, **_: room[64:-64].view(shape))
    torch.testing.assert_close(kernel(x, y), expected, rtol=3e-6, atol=1e-6)
    assert bool(room[:64].isnan().all()) and bool(room[-64:].isnan().all())


@pytest.mark.parametrize("kernel", (sigmoid_gate_triton, swiglu_triton))
def test_far_values_do_not_overflow(kernel: Form) -> None:
    gate, other = torch.tensor([-1e4, -200.0, 0.0, 200.0, 1e4]), torch.full((5,), 3.0)
    if kernel is sigmoid_gate_triton:
        torch.testing.assert_close(kernel(other, gate), torch.tensor([0.0, 0.0, 1.5, 3.0, 3.0]))
    else:
        torch.testing.assert_close(kernel(gate, other), torch.tensor([0.0, 0.0, 0.0, 600.0, 3e4]))


def test_no_rows_and_rows_of_zeros(forms: tuple[Form, Form]) -> None:
    kernel, _ = forms
    assert kernel(torch.zeros(3, 32), torch.ones(3, 32)).eq(0).all()
    if kernel is not FORMS["norm"][0]:
        assert kernel(torch.zeros(0, 32), torch.ones(0, 32)).shape == (0, 32)
    assert rms_norm_triton(torch.zeros(0, 32), torch.ones(32), 1e-6).shape == (0, 32)


@pytest.mark.parametrize(
    ("call", "error", "told"),
    [
        (lambda: rms_norm_triton(torch.ones(2, 64), torch.ones(32), 1e-6), ValueError, r"\(32,\)"),
        (lambda: rms_norm_triton(torch.ones(2, 64).double(), torch.ones(64).double(), 1e-6), BackendError, "float64"),
        (
            lambda: rms_norm_triton(torch.ones(1, MAX_CHANNELS + 1), torch.ones(MAX_CHANNELS + 1), 1e-6),
            BackendError,
            "32769",
        ),
        (lambda: sigmoid_gate_triton(torch.ones(2, 64), torch.ones(3, 64)), ValueError, r"\(3, 64\)"),
        (lambda: sigmoid_gate_triton(torch.ones(64, 2).T, torch.ones(2, 64)), BackendError, "adjacent"),
        (lambda: swiglu_triton(torch.ones(2, 64), torch.ones(2, 64).bfloat16()), ValueError, "bfloat16"),
    ],
)
def test_what_does_not_fit_is_named(call: Callable[[], Any], error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        call()


def test_gradients_are_noticed_and_a_cpu_keeps_the_reference() -> None:
    x = torch.ones(2, requires_grad=True)
    assert needs_gradient(torch.ones(2), x) and not needs_gradient(torch.ones(2))
    with torch.no_grad():
        assert not needs_gradient(x)
    assert not are_for_kernel(torch.ones(2), torch.ones(2))
