"""A matrix by pieces is the matrix in one; its errors are those of its dequantized weights."""

import pytest
import torch
from torch import Tensor

from salalocal.quant import matrix
from salalocal.quant.gptq import make_feedback, round_with_feedback
from salalocal.quant.int4 import IntScheme
from salalocal.quant.matrix import Inputs, quantize_matrix
from salalocal.quant.rounding import round_to_nearest
from salalocal.quant.workers import Workers

SCHEME = IntScheme(4, 32)


def case(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(200, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    return torch.randn(50, 64, generator=generator).bfloat16(), (inputs.t() @ inputs).double() / 200


@pytest.mark.parametrize("kind", ["alone", "measured", "gptq"])
def test_pieces_make_the_whole(kind: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "_PIECE_WEIGHTS", {"cpu": 7 * 64})
    monkeypatch.setattr(matrix, "_PIECE_ROWS_WITH_FEEDBACK", {"cpu": 11})
    weight, moments = case(seed)
    feedback = make_feedback(moments) if kind == "gptq" else None
    inputs = None if kind == "alone" else Inputs(moments.float(), feedback)
    with Workers(2) as workers:
        found, errors = quantize_matrix(weight, SCHEME, torch.bfloat16, inputs, workers)
    if feedback is not None:
        expected = round_with_feedback(weight.float(), feedback, SCHEME, torch.bfloat16)
        assert (found.codes == expected.codes).float().mean() > 0.99  # sums of other shapes round differently
    else:
        expected = round_to_nearest(weight.float(), SCHEME, torch.bfloat16)
        assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scales, expected.scales)
    difference, wide = found.dequantize().double() - weight.double(), weight.double()
    assert errors.weights == pytest.approx(float(difference.norm() / wide.norm()), rel=1e-4)
    if inputs is None:
        assert errors.outputs is None
    else:
        lost, whole = (torch.trace(rows @ moments @ rows.t()) for rows in (difference, wide))
        assert errors.outputs == pytest.approx(float((lost / whole).sqrt()), rel=1e-3)


def test_zeros_have_no_error() -> None:
    with Workers(1) as workers:
        _, errors = quantize_matrix(torch.zeros(8, 64), SCHEME, torch.bfloat16, None, workers)
    assert errors.weights == 0
