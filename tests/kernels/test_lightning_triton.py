"""The lightning prefill kernel in Triton's interpreter, against float64."""

import itertools
from dataclasses import replace

import pytest
import torch

from salalocal.errors import BackendError
from salalocal.kernels import lightning_prefill
from salalocal.kernels.lightning import lightning_reference
from salalocal.kernels.lightning_prefill import (
    LAUNCHES,
    PrefillLaunch,
    Recurrence,
    lightning_prefill_triton,
    run_prefill,
    segment_tokens_for,
)
from salalocal.kernels.qk_norm_rope import NormRope, qk_norm_rope_reference

SCALE, DIM = 0.2, 32
SLOPES = torch.tensor([0.84, 0.004])
SMALL = PrefillLaunch(segment=32, chunk=16, values=16, lag=1, num_warps=4, sum_stages=1, output_stages=1)
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def draw(seed: int, num_tokens: int, dtype: torch.dtype = torch.bfloat16, batch: int = 1) -> Tensors:
    """q, k, v [B, T, 2, 32], views of one projection, and a state."""
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(batch, num_tokens, 3, 2, DIM, generator=generator).to(dtype)
    return *qkv.unbind(2), torch.randn(batch, 2, DIM, DIM, generator=generator)


def norm_rope(num_tokens: int, dtype: torch.dtype = torch.bfloat16, first: int = 1_000_000) -> NormRope:
    weight = (0.5 + torch.arange(DIM) / DIM).to(dtype)
    positions = torch.arange(first, first + num_tokens)
    return NormRope(q_weight=weight, k_weight=weight.flip(0), eps=1e-6, positions=positions, theta=10_000.0)


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def assert_right(found: tuple[torch.Tensor, torch.Tensor], inputs: Tensors, turn: NormRope | None = None) -> None:
    """Outputs err at most twice as much as plain torch's, rounded alike; the state to 2^-16."""
    q, k, v, state = inputs
    if turn is not None:
        q, k = qk_norm_rope_reference(q, k, turn)
    exact = lightning_reference(*(x.double() for x in (q, k, v)), SLOPES.double(), SCALE, state.double())
    plain, _ = lightning_reference(q, k, v, SLOPES, SCALE, state)
    assert found[0].dtype == q.dtype and found[1].dtype == torch.float32
    # From nothing, the first token's output is one score times v: that score's own rounding is not averaged out.
    is_one_score = q.shape[1] == 1 and not state.any()
    # A few tokens do not average the roundings of their scores either: a sixteenth of bf16's step on top.
    constant = 1e-6 if q.dtype == torch.float32 else 2**-12
    allowed = 2**-8 if is_one_score else 2 * relative_error(plain.to(q.dtype), exact[0]) + constant
    assert relative_error(found[0], exact[0]) <= allowed
    # A key whose last bit the kernel's norm rounds the other way counts as bf16 noise of one element in a thousand.
    assert relative_error(found[1], exact[1]) <= (2**-16 if turn is None else 5e-4)


@pytest.mark.parametrize("num_tokens", (1, 2, 15, 16, 17, 63, 64, 65, 127))
def test_prefill_is_the_recurrence(num_tokens: int, seed: int) -> None:
    inputs = draw(seed, num_tokens)
    o, states = run_prefill(*inputs[:3], Recurrence(SLOPES, SCALE, inputs[3]), SMALL)
    assert_right((o, states[-1]), inputs)


@pytest.mark.parametrize("num_tokens", (1, 17, 70))
@pytest.mark.parametrize("has_state", (False, True))
def test_raw_heads_are_normed_and_turned_on_the_way(num_tokens: int, has_state: bool, seed: int) -> None:
    q, k, v, state = draw(seed, num_tokens, batch=2)
    turn = norm_rope(num_tokens)
    recurrence = Recurrence(SLOPES, SCALE, state if has_state else None, turn)
    o, states = run_prefill(q, k, v, recurrence, SMALL, [num_tokens // 2] if num_tokens > 1 else [])
    assert_right((o, states[-1]), (q, k, v, state if has_state else torch.zeros_like(state)), turn)


@pytest.mark.parametrize(("values", "segment", "lag"), [(16, 64, 0), (64, 32, 2), (32, 128, 1)])
@pytest.mark.parametrize("has_turn", (False, True), ids=("plain", "raw"))
def test_any_cut_into_programs_is_the_recurrence(
    values: int, segment: int, lag: int, has_turn: bool, seed: int
) -> None:
    inputs, turn = draw(seed, 130), norm_rope(130) if has_turn else None
    launch = replace(SMALL, segment=segment, chunk=32, values=values, lag=lag)
    o, states = run_prefill(*inputs[:3], Recurrence(SLOPES, SCALE, inputs[3], turn), launch)
    assert_right((o, states[-1]), inputs, turn)


@pytest.mark.parametrize("num_tokens", (1000, 4097))
def test_long_prefill_by_the_launch_of_the_oldest_card(num_tokens: int, seed: int) -> None:
    q, k, v, state = (x[..., :1, :] if x.dim() == 4 and x.shape[1] == num_tokens else x for x in draw(seed, num_tokens))
    state = state[:, :1].contiguous()
    slopes = SLOPES[1:]
    o, states = run_prefill(q, k, v, Recurrence(slopes, SCALE, state), LAUNCHES[80])
    exact = lightning_reference(*(x.double() for x in (q, k, v)), slopes.double(), SCALE, state.double())
    assert relative_error(o, exact[0]) < 4e-3 and relative_error(states[-1], exact[1]) < 2**-16


def test_segments_are_shorter_in_short_calls() -> None:
    launch = replace(SMALL, segment=512, chunk=64)
    found = [segment_tokens_for(num_tokens, launch) for num_tokens in (1, 700, 1024, 1025, 4096, 8192)]
    assert found == [128, 128, 128, 256, 512, 512]


def test_long_calls_are_cut_into_launches(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, turn = draw(seed, 70), norm_rope(70)
    monkeypatch.setattr(lightning_prefill, "MAX_LAUNCH_TOKENS", 32)
    o, states = run_prefill(*inputs[:3], Recurrence(SLOPES, SCALE, inputs[3], turn), SMALL)
    assert_right((o, states[-1]), inputs, turn)


def test_any_cut_and_any_boundary_give_the_same_state(seed: int) -> None:
    q, k, v, state = draw(seed, 70)
    cuts = sorted(torch.randperm(69, generator=torch.Generator().manual_seed(seed))[:2].add(1).tolist())
    recurrence = Recurrence(SLOPES, SCALE, state)
    o, states = run_prefill(q, k, v, recurrence, SMALL, cuts)
    assert len(states) == 3
    current, parts = state, []
    for i, (start, end) in enumerate(itertools.pairwise([0, *cuts, 70])):
        piece = slice(start, end)
        given = Recurrence(SLOPES, SCALE, current)
        out, (current,) = run_prefill(q[:, piece], k[:, piece], v[:, piece], given, SMALL)
        parts.append(out)
        assert relative_error(states[i], current.double()) < 2**-16
    assert relative_error(torch.cat(parts, 1), o.double()) < 6e-3


def test_inputs_are_left_alone_and_outputs_written_everywhere(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = draw(seed, 50)
    copies = [x.clone() for x in inputs]
    rooms: list[torch.Tensor] = []

    def poisoned(shape: torch.Size, dtype: torch.dtype, **_: object) -> torch.Tensor:
        rooms.append(torch.full((torch.Size(shape).numel() + 128,), torch.nan, dtype=dtype))
        return rooms[-1][64:-64].view(shape)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", poisoned)
        o, states = run_prefill(*inputs[:3], Recurrence(SLOPES, SCALE, inputs[3]), SMALL)
    assert all(torch.equal(x, copy) for x, copy in zip(inputs, copies, strict=True))
    assert len(rooms) >= 3 and all(bool(room[:64].isnan().all() & room[-64:].isnan().all()) for room in rooms)
    assert_right((o, states[-1]), inputs)


def test_nothing_overflows_for_a_steep_slope(seed: int) -> None:
    q, k, v, state = draw(seed, 40)
    o, states = run_prefill(q, k, v, Recurrence(torch.tensor([40.0, 3.0]), SCALE, state), SMALL)
    assert bool(o.isfinite().all()) and bool(states[-1].isfinite().all())


def test_what_does_not_fit_is_named(seed: int) -> None:
    q, k, v, state = draw(seed, 17)
    with pytest.raises(ValueError, match="slopes"):
        lightning_prefill_triton(q, k, v, Recurrence(torch.ones(3), 1.0, None))
    with pytest.raises(ValueError, match="the state is"):
        lightning_prefill_triton(q, k, v, Recurrence(SLOPES, 1.0, state.double()))
    with pytest.raises(BackendError, match=r"\(1, 17, 2, 24\)"):
        lightning_prefill_triton(q[..., :24], k[..., :24], v, Recurrence(SLOPES, 1.0, None))
    for wrong in (torch.zeros(1, 1, 2, 256).bfloat16(), torch.zeros(1, 1, 2, 32)):
        with pytest.raises(BackendError, match="bfloat16 heads of at most 128 channels"):
            lightning_prefill_triton(wrong, wrong, wrong, Recurrence(SLOPES, 1.0, None))
