"""GPTQ: equal to its definition, better than rounding on correlated inputs, the same by rows as in one."""

import pytest
import torch
from torch import Tensor

from salalocal.errors import NumericError
from salalocal.quant.gptq import make_feedback, round_with_feedback, squared_output_norms
from salalocal.quant.int4 import IntScheme
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
    found = round_with_feedback(weight, make_feedback(moments, 0.01), SCHEME, BFLOAT16)
    scales = search_scales(weight, SCHEME, BFLOAT16)
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
