"""The walk over columns: codes and errors of the formula, up to near ties, in every form."""

import pytest
import torch
from torch import Tensor

from salalocal.errors import BackendError
from salalocal.kernels.column_walk import (
    MAX_COLUMNS,
    column_walk,
    column_walk_definition,
    column_walk_reference,
    column_walk_triton,
)

FORMS = {"reference": column_walk_reference, "triton": column_walk_triton}


def case(seed: int, num_rows: int, num_columns: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, some of them clipped; a factor with a strong upper triangle; a scale per row and four columns."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(num_rows, num_columns, generator=generator)
    coupling = 0.3 * torch.randn(num_columns, num_columns, generator=generator).triu(1)
    factor = coupling + torch.diag(torch.rand(num_columns, generator=generator) + 0.5)
    scales = (torch.rand(num_rows, -(-num_columns // 4), generator=generator) + 0.5) * 2 / 2 ** (bits - 1)
    return weights, factor, scales.repeat_interleave(4, 1)[:, :num_columns].contiguous()


def agree_up_to_ties(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """A row may leave the formula where a weight lies between two codes; until then it is the same."""
    (codes, errors), (wanted_codes, wanted_errors) = found, expected
    assert codes.dtype == torch.uint8 and errors.dtype == torch.float32
    is_same = (codes.cpu() == wanted_codes).all(1)
    assert is_same.float().mean() > 0.9
    torch.testing.assert_close(errors.cpu().double()[is_same], wanted_errors[is_same], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("num_rows", "num_columns", "bits"), [(37, 16, 4), (16, 23, 4), (5, 8, 8), (1, 1, 4)])
def test_every_form_is_the_formula(form: str, num_rows: int, num_columns: int, bits: int, seed: int) -> None:
    inputs = case(seed, num_rows, num_columns, bits)
    expected = column_walk_definition(*inputs, bits)
    agree_up_to_ties(FORMS[form](*inputs, bits), expected)
    assert {0, 2**bits - 1} <= set(expected[0].flatten().tolist()) or num_columns < 16  # some are clipped


@pytest.mark.parametrize("form", FORMS)
def test_halves_go_to_even(form: str) -> None:
    block = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 6.5, -7.5, 7.5, 99.0, -99.0, 0.0]])
    codes, errors = FORMS[form](block, torch.eye(12), torch.ones_like(block), 4)
    assert codes.tolist() == [[8, 10, 10, 8, 6, 6, 14, 0, 15, 15, 0, 8]]
    assert errors[0, :3].tolist() == [0.5, -0.5, 0.5] and errors[0, 9].item() == 92


@pytest.mark.parametrize("form", FORMS)
def test_views_are_read_and_left_alone_and_nothing_else_is_written(
    form: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, factor, scales = case(seed, 20, 24, 4)
    wide = [torch.full((len(x), 40), float("nan")) for x in (weights, factor, scales)]
    views = [whole[:, 5:29] for whole in wide]
    for view, values in zip(views, (weights, factor, scales), strict=True):
        view.copy_(values)
    views[1].copy_(torch.where(torch.ones(24, 24).triu().bool(), factor, torch.nan))  # the lower triangle is not read
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *sizes, **options: real(*sizes, **options).fill_(77))
    found = FORMS[form](*views, 4)
    monkeypatch.undo()
    assert all(torch.equal(a, b) for a, b in zip(found, FORMS[form](weights, factor, scales, 4), strict=True))
    assert torch.equal(views[0], weights) and all(whole[:, :5].isnan().all() for whole in wide)


def test_what_does_not_fit_is_refused() -> None:
    block, factor = torch.zeros(2, 6), torch.eye(6)
    with pytest.raises(ValueError, match="scales"):
        column_walk(block, factor, torch.ones(2, 5), 4)
    with pytest.raises(ValueError, match="fp32"):
        column_walk(block.double(), factor, torch.ones(2, 6), 4)
    too_many = MAX_COLUMNS + 1
    with pytest.raises(BackendError, match="129 columns"):
        column_walk_triton(torch.zeros(2, too_many), torch.eye(too_many), torch.ones(2, too_many), 4)
