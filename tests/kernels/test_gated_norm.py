"""Norm over all heads and the gate in one kernel: definition = reference = kernel, odd widths, rows that lie apart."""

import pytest
import torch

from salalocal.errors import BackendError
from salalocal.kernels.gated_norm import (
    GatedNorm,
    gated_norm,
    gated_norm_definition,
    gated_norm_reference,
    gated_norm_triton,
)


def draw(seed: int, rows: int, channels: int, dtype: torch.dtype) -> tuple[torch.Tensor, GatedNorm]:
    generator = torch.Generator().manual_seed(seed)
    both = torch.randn(1, rows, 2 * channels, generator=generator).to(dtype)  # x and gate side by side
    weight = (0.5 + torch.rand(channels, generator=generator)).to(dtype)
    gated = GatedNorm(weight=weight, gate=both[..., channels:], eps=1e-6)
    return both[..., :channels], gated


@pytest.mark.parametrize(("rows", "channels"), [(1, 64), (5, 96), (3, 1000)])
def test_kernel_is_the_definition(rows: int, channels: int, seed: int) -> None:
    x, gated = draw(seed, rows, channels, torch.float32)
    exact = gated_norm_definition(x, gated)
    for form in (gated_norm_reference, gated_norm, gated_norm_triton):
        torch.testing.assert_close(form(x, gated), exact, rtol=2e-6, atol=1e-6)
    x, gated = draw(seed, rows, channels, torch.bfloat16)
    found, expected = gated_norm_triton(x, gated), gated_norm_reference(x, gated)
    assert (found != expected).double().mean() < 0.01
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-3)


def test_outputs_are_written_everywhere_and_nowhere_else(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, gated = draw(seed, 3, 100, torch.float32)
    room = torch.full((300 + 128,), torch.nan)
    expected = gated_norm_definition(x, gated)
    monkeypatch.setattr(torch, "empty", lambda shape, **_: room[64:-64].view(shape))
    torch.testing.assert_close(gated_norm_triton(x, gated), expected, rtol=2e-6, atol=1e-6)
    assert bool(room[:64].isnan().all()) and bool(room[-64:].isnan().all())


def test_what_does_not_fit_is_named(seed: int) -> None:
    x, gated = draw(seed, 3, 64, torch.float32)
    with pytest.raises(ValueError, match=r"\(1, 3, 64\)"):
        gated_norm_triton(x[:, :2], gated)
    with pytest.raises(BackendError, match="float64"):
        double = GatedNorm(weight=gated.weight.double(), gate=gated.gate.double(), eps=1e-6)
        gated_norm_triton(x.double(), double)
