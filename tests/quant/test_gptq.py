"""GPTQ: equal to its definition, better than rounding on correlated inputs, the same by rows as in one; with original
inputs known, closer to the original outputs."""

import pytest
import torch
from torch import Tensor

from salalocal.errors import NumericError
from salalocal.kernels.column_walk import column_walk
from salalocal.quant import gptq
from salalocal.quant.gptq import make_feedback, round_with_feedback, squared_output_norms
from salalocal.quant.int4 import IntScheme, IntWeight
from salalocal.quant.rounding import round_to_nearest, search_scales

SCHEME = IntScheme(4, 16)
BFLOAT16 = torch.bfloat16


def case(num_out: int, num_in: int, num_tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """Weights, and the moments of correlated inputs of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(num_in, num_in, generator=generator, dtype=torch.float64)
    sizes = torch.rand(num_in, generator=generator, dtype=torch.float64) ** 2
    inputs = torch.randn(num_tokens, num_in, generator=generator, dtype=torch.float64) @ (torch.eye(num_in) + mix / 4)
    inputs *= sizes
    return torch.randn(num_out, num_in, generator=generator), inputs.t() @ inputs / num_tokens


def by_definition(weight: Tensor, moments: Tensor, scales: Tensor, damping: float) -> Tensor:
    """Column by column, with a fresh inverse over the columns left each time; float64 codes."""
    weight = weight.double()
    damped = moments + damping * moments.diagonal().mean() * torch.eye(len(moments), dtype=torch.float64)
    left = torch.argsort(moments.diagonal(), descending=True, stable=True).tolist()
    codes = torch.zeros_like(weight)
    while left:
        column, *left_after = left
        inverse = torch.linalg.inv(damped[left][:, left])
        scale = scales.double()[:, column // SCHEME.group_size]
        codes[:, column] = torch.round(weight[:, column] / scale).clamp(-8, 7) + 8
        error = weight[:, column] - (codes[:, column] - 8) * scale
        weight[:, left_after] -= torch.outer(error, inverse[0, 1:] / inverse[0, 0])
        left = left_after
    return codes


@pytest.mark.parametrize("num_in", [48, 320])  # within one stretch of columns, and over several
def test_it_is_its_definition(num_in: int, seed: int) -> None:
    weight, moments = case(7, num_in, 4 * num_in, seed)
    feedback = make_feedback(moments, 0.01)
    found = round_with_feedback(weight, feedback, SCHEME, BFLOAT16)
    scales = search_scales(weight, SCHEME, BFLOAT16, feedback.costs)
    expected = by_definition(weight, moments, scales, 0.01)
    assert torch.equal(found.scales, scales)
    # A weight close to the middle between two codes may fall either way in float32, and what follows with it.
    assert (found.codes == expected).double().mean() > 0.97


def test_outputs_err_less_than_by_rounding(seed: int) -> None:
    weight, moments = case(32, 128, 600, seed)
    errors = []
    for quantized in (
        round_with_feedback(weight, make_feedback(moments), SCHEME, BFLOAT16),
        round_to_nearest(weight, SCHEME, BFLOAT16),
    ):
        lost, whole = squared_output_norms(weight, quantized, moments.float())
        difference = (quantized.dequantize() - weight).double()
        assert lost == pytest.approx(float(torch.trace(difference @ moments @ difference.t())), rel=1e-3)
        assert whole == pytest.approx(float(torch.trace(weight.double() @ moments @ weight.double().t())), rel=1e-3)
        errors.append(lost)
    assert errors[0] < 0.75 * errors[1]


def test_independent_inputs_of_one_size_give_plain_rounding(seed: int) -> None:
    weight = case(9, 64, 1, seed)[0]
    for moments in (3.0 * torch.eye(64, dtype=torch.float64), torch.zeros(64, 64, dtype=torch.float64)):
        found = round_with_feedback(weight, make_feedback(moments), SCHEME, BFLOAT16)
        assert torch.equal(found.codes, round_to_nearest(weight, SCHEME, BFLOAT16).codes)


def test_the_factor_is_that_of_the_inverse(seed: int) -> None:
    moments = case(1, 40, 200, seed)[1]
    feedback = make_feedback(moments, 0.02)
    damped = (moments + 0.02 * moments.diagonal().mean() * torch.eye(40, dtype=torch.float64))[feedback.order]
    factor = feedback.factor.double()
    assert torch.equal(factor.triu(), factor) and (factor.diagonal() > 0).all()
    assert torch.allclose(
        factor.t() @ factor @ damped[:, feedback.order], torch.eye(40, dtype=torch.float64), atol=1e-3
    )


def test_it_does_not_matter_how_many_columns_are_solved_at_once(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    moments = case(1, 40, 200, seed)[1]
    cross = moments @ case(1, 40, 200, seed + 1)[1]
    whole = make_feedback(moments, cross=cross)
    monkeypatch.setattr(gptq, "_SOLVED_AT_ONCE", 16)
    parts = make_feedback(moments, cross=cross)
    assert whole.drift is not None and parts.drift is not None
    assert torch.allclose(whole.factor, parts.factor, rtol=1e-5) and torch.allclose(whole.drift, parts.drift, rtol=1e-5)


def test_costs_are_what_the_walk_pays(seed: int) -> None:
    moments = case(1, 40, 200, seed)[1]
    feedback = make_feedback(moments, 0.01)
    moments += 0.01 * moments.diagonal().mean() * torch.eye(40, dtype=torch.float64)
    for place, column in enumerate(feedback.order.tolist()):
        later = feedback.order[place + 1 :]
        inside = moments[later][:, later]
        left = moments[column, column] - moments[column, later] @ torch.linalg.solve(inside, moments[later, column])
        assert float(feedback.costs[column]) == pytest.approx(float(left), rel=1e-3)


def test_a_few_large_inputs_are_spared_by_the_scales(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    chi = torch.randn(4, 64, 128, generator=generator).square().mean(0)
    weight = torch.randn(64, 128, generator=generator) / chi.sqrt()
    inputs = torch.randn(1000, 128, generator=generator, dtype=torch.float64)
    inputs[:, ::40] *= 20
    moments = inputs.t() @ inputs / 1000
    feedback, scheme = make_feedback(moments), IntScheme(4, 64)
    lost = squared_output_norms(weight, round_with_feedback(weight, feedback, scheme, BFLOAT16), moments.float())[0]
    codes_alone = search_scales(weight, scheme, BFLOAT16)
    columns = column_walk(weight[:, feedback.order], feedback.factor, codes_alone.float()[:, feedback.order // 64], 4)[
        0
    ]
    unordered = torch.empty_like(columns)
    unordered[:, feedback.order] = columns
    plain = squared_output_norms(weight, IntWeight(unordered, codes_alone, 4, 64), moments.float())[0]
    assert lost < 0.9 * plain


def drifted_case(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights, original inputs, what they have become, and the moments of the latter."""
    generator = torch.Generator().manual_seed(seed)
    weight, mix = torch.randn(48, 64, generator=generator), torch.randn(64, 64, generator=generator)
    original = torch.randn(2000, 64, generator=generator) @ mix
    lost = (
        torch.randn(64, 64, generator=generator) * 0.02
    )  # an error that goes with the input, as that of a map in front
    inputs = original + original @ lost + 0.05 * torch.randn(2000, 64, generator=generator)
    return weight, original, inputs, inputs.double().t() @ inputs.double() / 2000


def test_known_original_inputs_bring_the_original_outputs_closer(seed: int) -> None:
    weight, original, inputs, moments = drifted_case(seed)
    cross = original.double().t() @ inputs.double() / 2000
    errors = []
    for known in (cross, None):
        found = round_with_feedback(weight, make_feedback(moments, cross=known), SCHEME, BFLOAT16)
        errors.append(float((inputs @ found.dequantize().t() - original @ weight.t()).square().mean()))
    assert errors[0] < 0.8 * errors[1]


def test_the_target_is_the_least_squares_one(seed: int) -> None:
    weight, original, inputs, moments = drifted_case(seed)
    drift = make_feedback(moments, 1e-9, original.double().t() @ inputs.double() / 2000).drift
    assert drift is not None
    expected = torch.linalg.lstsq(inputs.double(), original.double() @ weight.double().t()).solution.t()
    assert torch.allclose((weight + weight @ drift).double(), expected, atol=1e-3)


def test_inputs_that_did_not_change_change_nothing(seed: int) -> None:
    weight, moments = case(12, 64, 300, seed)
    found = round_with_feedback(weight, make_feedback(moments, cross=moments), SCHEME, BFLOAT16)
    assert torch.equal(found.codes, round_with_feedback(weight, make_feedback(moments), SCHEME, BFLOAT16).codes)


def test_rows_do_not_depend_on_each_other_nor_change_their_source(seed: int) -> None:
    weight, moments = case(12, 64, 300, seed)
    before, feedback = weight.clone(), make_feedback(moments)
    whole = round_with_feedback(weight, feedback, SCHEME, BFLOAT16).codes
    assert torch.equal(weight, before)
    assert torch.equal(whole[5:7], round_with_feedback(weight[5:7], feedback, SCHEME, BFLOAT16).codes)


def test_few_tokens_and_silent_inputs_can_be_factorized(seed: int) -> None:
    weight, moments = case(8, 96, 5, seed)
    moments[40:50] = 0
    moments[:, 40:50] = 0
    found = round_with_feedback(weight, make_feedback(moments, 1e-12), SCHEME, BFLOAT16)
    lost = squared_output_norms(weight, found, moments.float())[0]
    plain = squared_output_norms(weight, round_to_nearest(weight, SCHEME, BFLOAT16), moments.float())[0]
    assert found.dequantize().isfinite().all() and lost < plain


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_inputs_that_are_no_numbers_are_an_error(bad: float) -> None:
    moments = torch.eye(16, dtype=torch.float64)
    moments[3, 3] = bad
    with pytest.raises(NumericError, match="NaN or infinity"):
        make_feedback(moments)


def test_moments_that_are_none_are_an_error() -> None:
    moments = torch.eye(4, dtype=torch.float64)
    moments[0, 1] = moments[1, 0] = 1000.0
    with pytest.raises(NumericError, match="factorized"):
        make_feedback(moments)
