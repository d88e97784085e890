"""Steps of an answer through the lightning layer, in plain torch and in Triton's interpreter: against float64, and bit
for bit against the same tokens one by one."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from salalocal.errors import BackendError
from salalocal.kernels.gated_norm import GatedNorm, gated_norm_definition
from salalocal.kernels.lightning import lightning_definition, lightning_slopes
from salalocal.kernels.lightning_decode import (
    MAX_STEPS,
    Heads,
    PendingTokens,
    commit_pending,
    commit_pending_reference,
    commit_pending_triton,
    lightning_decays,
    speculative_step,
    speculative_step_reference,
    speculative_step_triton,
)
from salalocal.kernels.qk_norm_rope import NormRope, qk_norm_rope_reference

SCALE, DIM, HEADS = 0.2, 32, 2
WIDTH = HEADS * DIM
SLOPES = torch.tensor([0.84, 0.004])
FIRST = 1_000_000
Step = Callable[[Heads, torch.Tensor, PendingTokens, GatedNorm, torch.Tensor], torch.Tensor]


def reference_step(heads: Heads, state: torch.Tensor, pending: PendingTokens, *more: object) -> torch.Tensor:
    return speculative_step_reference(heads, state, pending, more[0])  # type: ignore[arg-type]


FORMS = pytest.mark.parametrize(
    ("step", "commit"),
    ((reference_step, commit_pending_reference), (speculative_step_triton, commit_pending_triton)),
    ids=("torch", "triton"),
)


class Answer:
    """Tokens as slices of a stacked projection, a state, and the tensors of the steps over them."""

    def __init__(self, seed: int, num_tokens: int, dtype: torch.dtype = torch.bfloat16) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.rows = torch.randn(num_tokens, 4 * WIDTH, generator=generator).to(dtype)
        self.state = torch.randn(1, HEADS, DIM, DIM, generator=generator)
        weights = 0.5 + torch.rand(3, WIDTH, generator=generator)
        self.o_weight, self.q_weight, self.k_weight = (x.to(dtype) for x in weights)
        half = (2, MAX_STEPS, HEADS, DIM)
        count, parity = (torch.zeros(1, dtype=torch.int32) for _ in range(2))
        keys, values = (torch.full(half, torch.nan, dtype=dtype) for _ in range(2))
        self.pending = PendingTokens(keys, values, count, parity)
        self.counters = torch.zeros(MAX_STEPS, dtype=torch.int32)

    def inputs(self, start: int, end: int) -> tuple[Heads, GatedNorm]:
        q, k, v, z = self.rows[start:end].chunk(4, dim=1)
        q, k, v = (x.unflatten(1, (HEADS, DIM))[None] for x in (q, k, v))
        turn = NormRope(
            q_weight=self.q_weight[:DIM],
            k_weight=self.k_weight[:DIM],
            eps=1e-6,
            positions=torch.tensor([FIRST + start]),
            theta=10_000.0,
        )
        heads = Heads(q, k, v, lightning_decays(SLOPES), SCALE, turn)
        return heads, GatedNorm(weight=self.o_weight, gate=z, eps=1e-6)

    def run(self, step: Step, start: int, num_tokens: int, accepted: int) -> torch.Tensor:
        """One step as a caller makes it, `accepted` of its tokens kept."""
        heads, gated_norm = self.inputs(start, start + num_tokens)
        y = step(heads, self.state, self.pending, gated_norm, self.counters)
        self.pending.count.fill_(accepted)
        self.pending.parity.bitwise_xor_(1)
        assert not self.counters.any()
        return y

    def exact(self, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Outputs and state by the formula in float64, of heads that were turned and rounded as a step does."""
        heads, gated_norm = self.inputs(0, num_tokens)
        turn = replace(heads.norm_rope, positions=FIRST + torch.arange(num_tokens))
        q, k = qk_norm_rope_reference(heads.q, heads.k, turn)
        wide = (x.double() for x in (q, k, heads.v, SLOPES))
        o, state = lightning_definition(*wide, SCALE, self.state.double())
        wide_norm = replace(gated_norm, weight=gated_norm.weight.double(), gate=gated_norm.gate.double())
        return gated_norm_definition(o.flatten(2), wide_norm), state


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@FORMS
def test_steps_are_the_recurrence_with_norm_and_gate_behind(step: Step, commit: Callable, seed: int) -> None:
    answer = Answer(seed, 8)
    exact, exact_state = answer.exact(8)
    y = torch.cat([answer.run(step, 0, 5, 5), answer.run(step, 5, 1, 1), answer.run(step, 6, 2, 2)], dim=1)
    commit(answer.state, answer.pending, lightning_decays(SLOPES))
    # Three roundings to bf16; of the keys, a last bit that the kernel's norm rounds the other way.
    assert y.dtype == torch.bfloat16 and relative_error(y, exact) < 8e-3
    assert relative_error(answer.state, exact_state) < 1e-3


@FORMS
def test_any_steps_leave_the_bits_of_single_tokens(step: Step, commit: Callable, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    together, apart = Answer(seed, 24), Answer(seed, 24)
    start = 0
    while start < 20:
        drafted = int(torch.randint(1, 8, (1,), generator=generator))
        accepted = int(torch.randint(0, min(drafted, 24 - start) + 1, (1,), generator=generator))
        y = together.run(step, start, min(drafted, 24 - start), accepted)
        for row in range(accepted):
            assert torch.equal(apart.run(step, start + row, 1, 1), y[:, row : row + 1])
        start += accepted
    for answer in (together, apart):
        commit(answer.state, answer.pending, lightning_decays(SLOPES))
    assert torch.equal(together.state, apart.state)


@FORMS
def test_refused_tokens_leave_nothing_behind(step: Step, commit: Callable, seed: int) -> None:
    answer = Answer(seed, 6)
    before = answer.state.clone()
    answer.run(step, 0, 4, 0)
    commit(answer.state, answer.pending, lightning_decays(SLOPES))
    assert torch.equal(answer.state, before)
    answer.run(step, 0, 6, 0)
    assert torch.equal(answer.state, before)


def test_a_full_step_in_fp32_is_exact_to_its_roundings(seed: int) -> None:
    for step, commit in (
        (reference_step, commit_pending_reference),
        (speculative_step_triton, commit_pending_triton),
    ):
        answer = Answer(seed, MAX_STEPS, torch.float32)
        exact, exact_state = answer.exact(MAX_STEPS)
        y = answer.run(step, 0, MAX_STEPS, MAX_STEPS)
        commit(answer.state, answer.pending, lightning_decays(SLOPES))
        assert relative_error(y, exact) < 1e-5 and relative_error(answer.state, exact_state) < 1e-5


def test_the_kernel_writes_everything_and_nothing_beside(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = Answer(seed, 3)
    rows, rooms = answer.rows.clone(), []

    def poisoned(shape: tuple[int, ...], dtype: torch.dtype, **_: object) -> torch.Tensor:
        rooms.append(torch.full((torch.Size(shape).numel() + 128,), torch.nan, dtype=dtype))
        return rooms[-1][64:-64].view(shape)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", poisoned)
        y = answer.run(speculative_step_triton, 0, 3, 2)
    assert bool(y.isfinite().all()) and torch.equal(answer.rows, rows) and len(rooms) == 2
    assert all(bool(room[:64].isnan().all() & room[-64:].isnan().all()) for room in rooms)
    for kept in (answer.pending.keys, answer.pending.values):
        assert bool(kept[0].isnan().all() & kept[1, :3].isfinite().all() & kept[1, 3:].isnan().all())
    assert int(answer.pending.count) == 2 and int(answer.pending.parity) == 1


def test_on_a_cpu_the_plain_form_runs(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("salalocal.kernels.lightning_decode.speculative_step_triton", None)
    monkeypatch.setattr("salalocal.kernels.lightning_decode.commit_pending_triton", None)
    called, plain = Answer(seed, 2), Answer(seed, 2)
    assert torch.equal(called.run(speculative_step, 0, 2, 1), plain.run(reference_step, 0, 2, 1))
    commit_pending(called.state, called.pending, lightning_decays(SLOPES))
    commit_pending_reference(plain.state, plain.pending, lightning_decays(SLOPES))
    assert torch.equal(called.state, plain.state)


def test_decays_are_rounded_once() -> None:
    slopes = lightning_slopes(32)
    assert torch.equal(lightning_decays(slopes), torch.exp(-slopes.double()).float())


def test_what_does_not_fit_is_named(seed: int) -> None:
    answer = Answer(seed, 17)
    heads, gated_norm = answer.inputs(0, 2)
    pending, counters, decays = answer.pending, answer.counters, lightning_decays(SLOPES)
    with pytest.raises(BackendError, match=r"1 to 16 tokens of one sequence, not \(1, 17"):
        speculative_step_triton(answer.inputs(0, 17)[0], answer.state, pending, gated_norm, counters)
    with pytest.raises(ValueError, match="gate"):
        speculative_step_triton(heads, answer.state, pending, answer.inputs(0, 3)[1], counters)
    with pytest.raises(ValueError, match=r"positions \(2,\)"):
        turn = replace(heads.norm_rope, positions=torch.arange(2))
        speculative_step_triton(replace(heads, norm_rope=turn), answer.state, pending, gated_norm, counters)
    with pytest.raises(ValueError, match="the state is"):
        commit_pending_triton(answer.state.double(), pending, decays)
    with pytest.raises(ValueError, match="pending keys"):
        commit_pending_triton(answer.state, replace(pending, keys=pending.keys.float()), decays)
    with pytest.raises(ValueError, match=r"pending torch\.float32"):
        reference_step(heads, answer.state, replace(pending, keys=pending.keys.float()), gated_norm)
    with pytest.raises(ValueError, match="needed is int32"):
        commit_pending_triton(answer.state, replace(pending, count=pending.count.long()), decays)
    with pytest.raises(BackendError, match="heads of one dtype"):
        wrong = replace(heads, v=heads.v.float())
        speculative_step_triton(wrong, answer.state, pending, gated_norm, counters)
