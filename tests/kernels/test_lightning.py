"""Lightning attention: slopes, definition = reference at every length and cut, state in and out, no overflow."""

import itertools
import math

import pytest
import torch

from salalocal.kernels.lightning import lightning, lightning_definition, lightning_reference, lightning_slopes

TOKENS = (1, 2, 15, 16, 17, 63, 64, 65, 127, 1000)
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def draw(seed: int, num_tokens: int, heads: int = 3, key_dim: int = 6, value_dim: int = 5, batch: int = 2) -> Inputs:
    """q, k, v and a prior state, in float64."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, num_tokens, heads, key_dim)] * 2
    shapes += [(batch, num_tokens, heads, value_dim), (batch, heads, key_dim, value_dim)]
    q, k, v, state = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return q, k, v, state


def test_slopes_of_powers_of_two_are_a_geometric_series() -> None:
    expected = torch.tensor([2.0 ** (-(h + 1) / 4) for h in range(32)])
    assert torch.equal(lightning_slopes(32), expected)
    assert lightning_slopes(32)[27] == 0.0078125
    assert lightning_slopes(1).tolist() == [2.0**-8]
    assert lightning_slopes(8).tolist() == [2.0 ** -(h + 1) for h in range(8)]


@pytest.mark.parametrize(("heads", "power"), [(3, 2), (5, 4), (6, 4), (7, 4), (12, 8), (24, 16)])
def test_other_counts_go_on_with_every_second_slope_of_the_finer_series(heads: int, power: int) -> None:
    slopes = lightning_slopes(heads)
    assert slopes.shape == (heads,) and slopes.dtype == torch.float32 and bool((slopes > 0).all())
    assert torch.equal(slopes[:power], lightning_slopes(power))
    assert torch.equal(slopes[power:], lightning_slopes(2 * power)[::2][: heads - power])


def test_float64_slopes_are_exact() -> None:
    assert lightning_slopes(32, torch.float64)[0].item() == 2.0**-0.25


@pytest.mark.parametrize("num_tokens", TOKENS)
@pytest.mark.parametrize("has_state", (False, True))
def test_reference_is_the_definition(num_tokens: int, has_state: bool, seed: int) -> None:
    q, k, v, state = draw(seed, num_tokens)
    slopes = lightning_slopes(3, torch.float64)
    prior = state if has_state else None
    expected, expected_state = lightning_definition(q, k, v, slopes, 0.37, prior)
    for chunk in (1, 5, 16, 64, 128):
        out, new_state = lightning_reference(q, k, v, slopes, 0.37, prior, chunk)
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(new_state, expected_state, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("num_tokens", TOKENS)
def test_fp32_errs_no_more_than_the_plain_recurrence(num_tokens: int, seed: int) -> None:
    q, k, v, state = draw(seed, num_tokens, heads=4, key_dim=16, value_dim=16)
    slopes = lightning_slopes(4)
    exact = lightning_definition(q, k, v, slopes.double(), 0.25, state)
    narrow = tuple(x.float() for x in (q, k, v))
    plain = lightning_definition(*narrow, slopes, 0.25, state.float())
    chunked = lightning(*narrow, slopes, 0.25, state.float())
    for truth, recurrent, ours in zip(exact, plain, chunked, strict=True):
        assert ours.dtype == torch.float32
        allowed = 2 * (recurrent.double() - truth).abs().max() + 1e-6 * truth.abs().max()
        assert (ours.double() - truth).abs().max() <= allowed


def test_a_token_sees_itself_undecayed_and_the_past_decayed() -> None:
    one = torch.ones(1, 2, 1, 1)
    out, state = lightning(one, one, one, torch.tensor([0.5]), 2.0, None)
    torch.testing.assert_close(out.flatten(), torch.tensor([2.0, 2.0 * (1 + math.exp(-0.5))]))
    torch.testing.assert_close(state.flatten(), torch.tensor([1 + math.exp(-0.5)]))


@pytest.mark.parametrize("form", (lightning_definition, lightning_reference, lightning))
def test_state_given_is_left_alone_and_inputs_too(form, seed: int) -> None:
    given = draw(seed, 70)
    copies = [x.clone() for x in given]
    out, new_state = form(*given[:3], lightning_slopes(3), 1.0, given[3])
    assert all(torch.equal(x, copy) for x, copy in zip(given, copies, strict=True))
    assert new_state.data_ptr() != given[3].data_ptr() and out.shape == given[2].shape


def test_any_cut_gives_the_same_outputs_and_state(seed: int) -> None:
    q, k, v, state = draw(seed, 200)
    slopes = lightning_slopes(3, torch.float64)
    whole, last = lightning(q, k, v, slopes, 1.0, state)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(5):
        cuts = sorted({0, 200, *torch.randint(1, 200, (6,), generator=generator).tolist()})
        parts, current = [], state
        for start, end in itertools.pairwise(cuts):
            piece = slice(start, end)
            out, current = lightning(q[:, piece], k[:, piece], v[:, piece], slopes, 1.0, current)
            parts.append(out)
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(current, last, rtol=1e-10, atol=1e-10)


def test_the_same_calls_give_the_same_bits_and_a_batch_row_does_not_see_its_neighbour(seed: int) -> None:
    q, k, v, _ = (x.float() for x in draw(seed, 300, heads=4, key_dim=32, value_dim=32))
    slopes = lightning_slopes(4)
    first, second = (lightning(q, k, v, slopes, 0.2, None) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    alone = lightning(q[1:], k[1:], v[1:], slopes, 0.2, None)
    torch.testing.assert_close(first[0][1:], alone[0])
    torch.testing.assert_close(first[1][1:], alone[1])


def test_nothing_overflows_whatever_the_chunk_and_the_slope(seed: int) -> None:
    q, k, v, state = (x.float() for x in draw(seed, 1000))
    slopes = torch.tensor([0.84, 3.0, 40.0])
    for chunk in (64, 256, 1000):
        out, new_state = lightning_reference(q, k, v, slopes, 1.0, state, chunk)
        assert bool(out.isfinite().all()) and bool(new_state.isfinite().all())


def test_bfloat16_inputs_are_computed_in_fp32(seed: int) -> None:
    q, k, v, _ = (x.bfloat16() for x in draw(seed, 100))
    out, state = lightning(q, k, v, lightning_slopes(3), 1.0, None)
    wide_out, wide_state = lightning(q.float(), k.float(), v.float(), lightning_slopes(3), 1.0, None)
    assert out.dtype == state.dtype == torch.float32
    assert torch.equal(out, wide_out) and torch.equal(state, wide_state)


@pytest.mark.parametrize("num_tokens", (1, 3, 70))
def test_gradients_are_those_of_the_definition(num_tokens: int, seed: int) -> None:
    grads = []
    for form in (lightning_definition, lightning):
        inputs = [x.requires_grad_() for x in draw(seed, num_tokens)]
        out, state = form(*inputs[:3], lightning_slopes(3, torch.float64), 0.7, inputs[3])
        grads.append(torch.autograd.grad(out.sin().sum() + state.cos().sum(), inputs))
    for expected, found in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_wrong_shapes_are_named() -> None:
    q = torch.zeros(1, 4, 2, 3)
    with pytest.raises(ValueError, match=r"\(1, 4, 2, 3\).*\(1, 5, 2, 3\)"):
        lightning(q, torch.zeros(1, 5, 2, 3), q, torch.ones(2), 1.0, None)
    with pytest.raises(ValueError, match="slopes"):
        lightning(q, q, q, torch.ones(3), 1.0, None)
    with pytest.raises(ValueError, match="state is"):
        lightning(q, q, q, torch.ones(2), 1.0, torch.zeros(1, 2, 3, 4))
