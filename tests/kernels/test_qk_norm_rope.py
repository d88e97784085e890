"""q/k norm and RoPE in one kernel: definition = reference = kernel, far positions, views, heads it has no form for."""

import pytest
import torch

from salalocal.errors import BackendError
from salalocal.kernels.qk_norm_rope import (
    NormRope,
    qk_norm_rope,
    qk_norm_rope_definition,
    qk_norm_rope_reference,
    qk_norm_rope_triton,
)
from salalocal.kernels.rotary import rotary_reference

POSITIONS = (0, 1, 63, 4_097, 524_288, 1_048_577, 2_097_151)


def draw(seed: int, dtype: torch.dtype, heads: tuple[int, int] = (3, 2), dim: int = 32) -> tuple[torch.Tensor, ...]:
    """q and k as views of one projection, and two weights."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, len(POSITIONS), sum(heads), dim)
    both = torch.randn(*shape, generator=generator).to(dtype)
    q_weight, k_weight = (0.5 + torch.rand(2, dim, generator=generator)).to(dtype)
    return both[:, :, : heads[0]], both[:, :, heads[0] :], q_weight, k_weight


def norm_rope(q_weight: torch.Tensor, k_weight: torch.Tensor) -> NormRope:
    positions = torch.tensor(POSITIONS)
    return NormRope(q_weight=q_weight, k_weight=k_weight, eps=1e-6, positions=positions, theta=10_000.0)


@pytest.mark.parametrize("heads", [(3, 2), (4, 4), (1, 1)])
def test_kernel_gives_the_bits_of_the_reference_in_bfloat16(heads: tuple[int, int], seed: int) -> None:
    q, k, *weights = draw(seed, torch.bfloat16, heads)
    found = qk_norm_rope_triton(q, k, norm_rope(*weights))
    expected = qk_norm_rope_reference(q, k, norm_rope(*weights))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.is_contiguous()
        # fp32 sums in another order move a rounding now and then, by one bit.
        assert (ours != theirs).double().mean() < 0.01
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=1e-3)


def test_kernel_and_reference_are_the_definition_in_fp32(seed: int) -> None:
    q, k, *weights = draw(seed, torch.float32)
    exact = qk_norm_rope_definition(q, k, norm_rope(*weights))
    for form in (qk_norm_rope_reference, qk_norm_rope, qk_norm_rope_triton):
        for ours, theirs in zip(form(q, k, norm_rope(*weights)), exact, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=3e-6)


def test_angles_are_those_of_rotary_at_every_position(seed: int) -> None:
    q, k, *_ = draw(seed, torch.float32, dim=128)
    ones = torch.ones(128)
    normed = q * torch.rsqrt(q.square().mean(-1, keepdim=True) + 1e-6)
    found, _ = qk_norm_rope_triton(q, k, norm_rope(ones, ones))
    torch.testing.assert_close(found, rotary_reference(normed, torch.tensor(POSITIONS), 10_000.0), rtol=0, atol=3e-6)


def test_outputs_are_written_everywhere_and_nowhere_else(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, *weights = draw(seed, torch.bfloat16)
    given = q.clone(), k.clone()
    expected = qk_norm_rope_reference(q, k, norm_rope(*weights))
    rooms: list[torch.Tensor] = []

    def poisoned(shape: torch.Size, **_: object) -> torch.Tensor:
        rooms.append(torch.full((shape.numel() + 128,), torch.nan, dtype=torch.bfloat16))
        return rooms[-1][64:-64].view(shape)

    monkeypatch.setattr(torch, "empty", poisoned)
    found = qk_norm_rope_triton(q, k, norm_rope(*weights))
    assert len(rooms) == 2
    for ours, theirs, room in zip(found, expected, rooms, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=1e-3)
        assert bool(room[:64].isnan().all()) and bool(room[-64:].isnan().all())
    assert torch.equal(q, given[0]) and torch.equal(k, given[1])


def test_what_does_not_fit_is_named(seed: int) -> None:
    q, k, *weights = draw(seed, torch.bfloat16)
    with pytest.raises(ValueError, match=r"positions \(7,\)"):
        qk_norm_rope_triton(q[:, :3], k[:, :3], norm_rope(*weights))
    with pytest.raises(ValueError, match="bfloat16"):
        qk_norm_rope_triton(q, k.float(), norm_rope(*weights))
    narrow = [weight[:24] for weight in weights]
    with pytest.raises(BackendError, match="powers of two from 32"):
        qk_norm_rope_triton(q[..., :24], k[..., :24], norm_rope(*narrow))
    with pytest.raises(BackendError, match="adjacent"):
        qk_norm_rope_triton(q.mT.contiguous().mT, k, norm_rope(*weights))


def test_gradients_take_the_reference(seed: int) -> None:
    q, k, *weights = draw(seed, torch.float32)
    q = q.clone().requires_grad_()
    qk_norm_rope(q, k, norm_rope(*weights))[0].sum().backward()
    assert q.grad is not None and bool(q.grad.isfinite().all())
