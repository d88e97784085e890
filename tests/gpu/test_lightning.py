"""The lightning prefill kernels on a card, at the released shape: against float64, odd lengths, views, cut anywhere."""

import pytest
import torch

from salalocal.kernels.gated_norm import GatedNorm, gated_norm_reference, gated_norm_triton
from salalocal.kernels.lightning import lightning, lightning_reference, lightning_slopes
from salalocal.kernels.lightning_prefill import Recurrence, lightning_prefill_triton
from salalocal.kernels.qk_norm_rope import NormRope, qk_norm_rope_reference, qk_norm_rope_triton

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
HEADS, DIM = 32, 128
SCALE = DIM**-0.5
TOKENS = (1, 2, 15, 16, 17, 63, 64, 65, 127, 1000, 4097)


def draw(seed: int, num_tokens: int) -> tuple[torch.Tensor, ...]:
    """q, k, v as views of one projection, and a state."""
    generator = torch.Generator("cuda").manual_seed(seed)
    qkv = torch.randn(1, num_tokens, 3, HEADS, DIM, device="cuda", generator=generator).bfloat16()
    return *qkv.unbind(2), torch.randn(1, HEADS, DIM, DIM, device="cuda", generator=generator)


def norm_rope(num_tokens: int, first: int, device: str = "cuda") -> NormRope:
    weight = (0.5 + torch.arange(DIM) / DIM).bfloat16().to(device)
    positions = torch.arange(first, first + num_tokens, device=device)
    return NormRope(q_weight=weight, k_weight=weight.flip(0), eps=1e-6, positions=positions, theta=10_000.0)


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.parametrize("num_tokens", TOKENS)
@pytest.mark.parametrize("first", (None, 0, 2_000_000), ids=("plain", "turned", "turned far out"))
def test_prefill_errs_at_most_twice_as_much_as_torch(num_tokens: int, first: int | None, seed: int) -> None:
    q, k, v, state = draw(seed, num_tokens)
    turn = None if first is None else norm_rope(num_tokens, first)
    o, (after,) = lightning_prefill_triton(q, k, v, Recurrence(lightning_slopes(HEADS).cuda(), SCALE, state, turn))
    if first is not None:  # the CPU's frequencies are the kernel's on every device
        q, k = (x.cuda() for x in qk_norm_rope_reference(q.cpu(), k.cpu(), norm_rope(num_tokens, first, "cpu")))
    slopes = lightning_slopes(HEADS, torch.float64).cuda()
    exact = lightning_reference(q.double(), k.double(), v.double(), slopes, SCALE, state.double())
    plain, _ = lightning_reference(q, k, v, slopes.float(), SCALE, state)
    assert relative_error(o, exact[0]) <= 2 * relative_error(plain.bfloat16(), exact[0]) + 1e-4
    assert relative_error(after, exact[1]) <= (2e-5 if turn is None else 1e-3)


def test_boundaries_and_cuts_give_the_same_states(seed: int) -> None:
    q, k, v, state = draw(seed, 9_001)
    slopes = lightning_slopes(HEADS).cuda()
    _, states = lightning_prefill_triton(q, k, v, Recurrence(slopes, SCALE, state), (1, 777, 8_192))
    current, start = state, 0
    for found, end in zip(states, (1, 777, 8_192, 9_001), strict=True):
        piece = slice(start, end)
        given = Recurrence(slopes, SCALE, current)
        _, (current,) = lightning_prefill_triton(q[:, piece], k[:, piece], v[:, piece], given)
        assert relative_error(found, current) < 2e-5
        start = end


def test_the_same_call_gives_the_same_bits(seed: int) -> None:
    q, k, v, state = draw(seed, 6_000)
    slopes = lightning_slopes(HEADS).cuda()
    first, second = (lightning(q, k, v, slopes, SCALE, state) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert first[0].dtype == torch.bfloat16


def test_outputs_overwrite_poisoned_memory(seed: int) -> None:
    q, k, v, state = draw(seed, 3_001)
    poison = [torch.full((3_001 * HEADS * DIM,), torch.nan, device="cuda", dtype=torch.bfloat16) for _ in range(8)]
    poison += [torch.full((8 * HEADS * DIM * DIM,), torch.nan, device="cuda") for _ in range(4)]
    del poison  # the allocator hands the same blocks out again
    o, (after,) = lightning_prefill_triton(q, k, v, Recurrence(lightning_slopes(HEADS).cuda(), SCALE, state))
    assert bool(o.isfinite().all()) and bool(after.isfinite().all())


def test_small_kernels_are_their_references(seed: int) -> None:
    q, k, v, _ = draw(seed, 1_001)
    found = qk_norm_rope_triton(q, k, norm_rope(1_001, 2_000_000))
    expected = qk_norm_rope_reference(q.cpu(), k.cpu(), norm_rope(1_001, 2_000_000, "cpu"))
    for ours, theirs in zip(found, expected, strict=True):
        assert relative_error(ours.cpu(), theirs) < 5e-4
    gated = GatedNorm(weight=torch.rand(HEADS * DIM).bfloat16().cuda(), gate=q.flatten(2), eps=1e-6)
    assert relative_error(gated_norm_triton(v.flatten(2), gated), gated_norm_reference(v.flatten(2), gated)) < 5e-4
