"""The lightning kernels on a card, at the released shape: against float64, at odd lengths, from views, cut anywhere."""

import pytest
import torch

from salalocal.kernels.gated_norm import GatedNorm, gated_norm_reference, gated_norm_triton
from salalocal.kernels.lightning import lightning, lightning_reference, lightning_slopes
from salalocal.kernels.lightning_decode import (
    Heads,
    gated_step_triton,
    lightning_commit_triton,
    lightning_decays,
    lightning_step_triton,
    lightning_verify_triton,
)
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


def test_sixteen_steps_a_draft_and_a_commit_leave_the_same_bits(seed: int) -> None:
    q, k, v, state = draw(seed, 16)
    decays = lightning_decays(lightning_slopes(HEADS)).cuda()
    heads = Heads(q, k, v, decays, SCALE, norm_rope(16, 1_000))
    verified, stepped, committed = lightning_verify_triton(heads, state), state.clone(), state.clone()
    lightning_commit_triton(heads, committed, torch.tensor([11], dtype=torch.int32, device="cuda"))
    for i in range(16):
        piece = slice(i, i + 1)
        one = Heads(q[:, piece], k[:, piece], v[:, piece], decays, SCALE, norm_rope(1, 1_000 + i))
        assert torch.equal(lightning_step_triton(one, stepped), verified[:, piece])
        if i == 10:
            assert torch.equal(stepped, committed)
    # The card's own power function gives other frequencies than the CPU's, which the kernels take.
    turned = [x.cuda() for x in qk_norm_rope_reference(q.cpu(), k.cpu(), norm_rope(16, 1_000, "cpu"))]
    slopes = lightning_slopes(HEADS, torch.float64).cuda()
    exact = lightning_reference(turned[0].double(), turned[1].double(), v.double(), slopes, SCALE, state.double())
    assert relative_error(verified, exact[0]) < 4e-3 and relative_error(stepped, exact[1]) < 1e-3


def test_gated_steps_and_a_commit_leave_the_same_bits(seed: int) -> None:
    q, k, v, state = draw(seed, 16)
    decays = lightning_decays(lightning_slopes(HEADS)).cuda()
    stepped, committed = state.clone(), state.clone()
    count, counters = (torch.tensor([n], dtype=torch.int32, device="cuda") for n in (16, 0))
    lightning_commit_triton(Heads(q, k, v, decays, SCALE, norm_rope(16, 1_000_000)), committed, count)
    gated = GatedNorm(weight=torch.rand(HEADS * DIM).bfloat16().cuda(), gate=q[:, :1].flatten(2), eps=1e-6)
    for i in range(16):
        piece = slice(i, i + 1)
        one = Heads(q[:, piece], k[:, piece], v[:, piece], decays, SCALE, norm_rope(1, 1_000_000 + i))
        gated_step_triton(one, stepped, gated, counters)
    assert torch.equal(stepped, committed)


def test_gated_steps_in_a_graph_are_steps_with_norm_and_gate_behind(seed: int) -> None:
    q, k, v, state = draw(seed, 1)
    heads = Heads(q, k, v, lightning_decays(lightning_slopes(HEADS)).cuda(), SCALE, norm_rope(1, 1_000))
    gated = GatedNorm(weight=torch.rand(HEADS * DIM).bfloat16().cuda(), gate=q.flatten(2), eps=1e-6)
    counters = torch.zeros(1, dtype=torch.int32, device="cuda")
    together, apart = state.clone(), state.clone()
    gated_step_triton(heads, together.clone(), gated, counters)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = gated_step_triton(heads, together, gated, counters)
    for _ in range(50):
        graph.replay()
        expected = gated_norm_triton(lightning_step_triton(heads, apart).flatten(2), gated)
        # The row is summed up by another number of threads: a rounding may fall the other way.
        assert relative_error(y, expected) < 1e-3
    assert torch.equal(together, apart) and int(counters) == 0


def test_small_kernels_are_their_references(seed: int) -> None:
    q, k, v, _ = draw(seed, 1_001)
    found = qk_norm_rope_triton(q, k, norm_rope(1_001, 2_000_000))
    expected = qk_norm_rope_reference(q.cpu(), k.cpu(), norm_rope(1_001, 2_000_000, "cpu"))
    for ours, theirs in zip(found, expected, strict=True):
        assert relative_error(ours.cpu(), theirs) < 5e-4
    gated = GatedNorm(weight=torch.rand(HEADS * DIM).bfloat16().cuda(), gate=q.flatten(2), eps=1e-6)
    assert relative_error(gated_norm_triton(v.flatten(2), gated), gated_norm_reference(v.flatten(2), gated)) < 5e-4
