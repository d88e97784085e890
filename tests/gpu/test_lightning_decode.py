"""Steps of an answer through the lightning layer on a card, at the released shape: against float64, bit for bit against
the same tokens one by one, and in a CUDA graph."""

import pytest
import torch
from torch import Tensor

from salalocal.kernels.gated_norm import GatedNorm, gated_norm_reference
from salalocal.kernels.lightning import lightning_reference, lightning_slopes
from salalocal.kernels.lightning_decode import (
    MAX_STEPS,
    Heads,
    PendingTokens,
    commit_pending,
    lightning_decays,
    speculative_step,
)
from salalocal.kernels.qk_norm_rope import NormRope, qk_norm_rope_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
HEADS, DIM = 32, 128
SCALE = DIM**-0.5


def norm_rope(num_tokens: int, first: int, device: str = "cuda") -> NormRope:
    weight = (0.5 + torch.arange(DIM) / DIM).bfloat16().to(device)
    positions = torch.arange(first, first + num_tokens, device=device)
    return NormRope(q_weight=weight, k_weight=weight.flip(0), eps=1e-6, positions=positions, theta=10_000.0)


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


class Answer:
    """Tokens as slices of a stacked projection, a state, and what the steps over them work on, at fixed addresses."""

    def __init__(self, seed: int, num_tokens: int, first: int = 1_000_000) -> None:
        generator = torch.Generator("cuda").manual_seed(seed)
        self.rows = torch.randn(num_tokens, 4 * HEADS * DIM, device="cuda", generator=generator).bfloat16()
        self.state = torch.randn(1, HEADS, DIM, DIM, device="cuda", generator=generator)
        self.o_weight = (0.5 + torch.rand(HEADS * DIM, device="cuda", generator=generator)).bfloat16()
        self.decays = lightning_decays(lightning_slopes(HEADS)).cuda()
        self.first, self.turn = first, norm_rope(1, first)
        kept = torch.full((2, 2, MAX_STEPS, HEADS, DIM), torch.nan, device="cuda", dtype=torch.bfloat16)
        count, parity = (torch.zeros(1, dtype=torch.int32, device="cuda") for _ in range(2))
        self.pending = PendingTokens(kept[0], kept[1], count, parity)
        self.counters = torch.zeros(MAX_STEPS, dtype=torch.int32, device="cuda")

    def step(self, rows: Tensor) -> Tensor:
        """One step over rows that stand where `turn` says."""
        q, k, v, z = rows.chunk(4, dim=1)
        q, k, v = (x.unflatten(1, (HEADS, DIM))[None] for x in (q, k, v))
        heads = Heads(q, k, v, self.decays, SCALE, self.turn)
        gated_norm = GatedNorm(weight=self.o_weight, gate=z, eps=1e-6)
        return speculative_step(heads, self.state, self.pending, gated_norm, self.counters)

    def run(self, start: int, num_tokens: int, accepted: int) -> Tensor:
        """One step as a caller makes it, `accepted` of its tokens kept."""
        self.turn.positions.fill_(self.first + start)
        y = self.step(self.rows[start : start + num_tokens])
        self.pending.count.fill_(accepted)
        self.pending.parity.bitwise_xor_(1)
        return y

    def exact(self) -> tuple[Tensor, Tensor]:
        """Outputs and state after all tokens, in float64."""
        q, k, v, z = self.rows.chunk(4, dim=1)
        q, k, v = (x.unflatten(1, (HEADS, DIM))[None] for x in (q, k, v))
        # The card's own power function gives other frequencies than the CPU's, which the kernels take.
        turn = norm_rope(len(self.rows), self.first, "cpu")
        q, k = (x.cuda().double() for x in qk_norm_rope_reference(q.cpu(), k.cpu(), turn))
        slopes = lightning_slopes(HEADS, torch.float64).cuda()
        o, state = lightning_reference(q, k, v.double(), slopes, SCALE, self.state.double())
        gated_norm = GatedNorm(weight=self.o_weight.double(), gate=z[None].double(), eps=1e-6)
        return gated_norm_reference(o.flatten(2), gated_norm), state


@pytest.mark.parametrize("num_tokens", (1, 2, 5, MAX_STEPS))
def test_steps_are_the_recurrence_with_norm_and_gate_behind(num_tokens: int, seed: int) -> None:
    answer = Answer(seed, 3 * num_tokens)
    exact, exact_state = answer.exact()
    y = torch.cat([answer.run(i * num_tokens, num_tokens, num_tokens) for i in range(3)], dim=1)
    commit_pending(answer.state, answer.pending, answer.decays)
    assert relative_error(y, exact) < 8e-3 and relative_error(answer.state, exact_state) < 1e-3
    assert not answer.counters.any()


def test_any_steps_leave_the_bits_of_single_tokens(seed: int) -> None:
    num_tokens, start = 400, 0
    together, apart = Answer(seed, num_tokens + MAX_STEPS), Answer(seed, num_tokens + MAX_STEPS)
    generator = torch.Generator().manual_seed(seed)
    while start < num_tokens:
        drafted = int(torch.randint(1, MAX_STEPS + 1, (1,), generator=generator))
        accepted = int(torch.randint(0, drafted + 1, (1,), generator=generator))
        y = together.run(start, drafted, accepted)
        for row in range(accepted):
            assert torch.equal(apart.run(start + row, 1, 1), y[:, row : row + 1])
        start += accepted
    for answer in (together, apart):
        commit_pending(answer.state, answer.pending, answer.decays)
    assert torch.equal(together.state, apart.state) and not together.counters.any()


@pytest.mark.parametrize("num_tokens", (1, 4, MAX_STEPS))
def test_steps_in_a_graph_leave_the_bits_of_steps_by_themselves(num_tokens: int, seed: int) -> None:
    replayed, plain = Answer(seed, num_tokens), Answer(seed, num_tokens)
    plain.step(plain.rows)  # compiles; nothing is pending, so the state stays
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = replayed.step(replayed.rows)
        replayed.turn.positions.add_(num_tokens)
        replayed.pending.count.fill_(num_tokens)
        replayed.pending.parity.bitwise_xor_(1)
    for _ in range(200):
        expected = plain.step(plain.rows)
        plain.turn.positions.add_(num_tokens)
        plain.pending.count.fill_(num_tokens)
        plain.pending.parity.bitwise_xor_(1)
        graph.replay()
        assert torch.equal(y, expected)
    assert torch.equal(replayed.state, plain.state) and not replayed.counters.any()
