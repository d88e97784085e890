"""The ring of picks: rows land by their position, whatever stands around them."""

import pytest
import torch

from salalocal.kernels.pick_ring import (
    PickRing,
    StepPicks,
    keep_picks,
    keep_picks_definition,
    keep_picks_reference,
    keep_picks_triton,
    new_pick_ring,
)

GUARD = 7_777.0


def draw(seed: int, *shape: int) -> StepPicks:
    generator = torch.Generator().manual_seed(seed)
    weights = 20 * torch.randn(shape, generator=generator)
    weights[weights > 20] = -torch.inf
    return StepPicks(torch.randint(-1, 2**15, shape, generator=generator), weights)


def guarded(dtype: torch.dtype) -> torch.Tensor:
    return torch.full((7, 3, 2, 6), GUARD).to(dtype)


@pytest.mark.parametrize("form", (keep_picks_reference, keep_picks_triton, keep_picks))
@pytest.mark.parametrize("dtype", (torch.int32, torch.int64))
@pytest.mark.parametrize(("num_rows", "first"), ((1, 0), (1, 12), (3, 4), (5, 2**22 - 2)))
def test_rows_land_by_their_position(form, dtype: torch.dtype, num_rows: int, first: int, seed: int) -> None:
    picks = draw(seed, 3, 16, 2, 11)
    rooms = [guarded(torch.int32), guarded(torch.float16)]
    ring, position = PickRing(rooms[0][1:6], rooms[1][1:6]), torch.tensor([first], dtype=dtype)
    expected = PickRing(ring.blocks.clone(), ring.weights.clone())
    rows = StepPicks(picks.blocks[:, 2 : 2 + num_rows], picks.weights[:, 2 : 2 + num_rows])  # strided
    keep_picks_definition(expected, rows, position)
    form(ring, rows, position)
    assert torch.equal(ring.blocks, expected.blocks) and torch.equal(ring.weights, expected.weights)
    for room in rooms:
        assert (room[[0, 6]].float() - GUARD).abs().max() < 4, "outside of the ring"
        assert ((room[1:6].float() - GUARD).abs() < 4).all(dim=(1, 2, 3)).sum() == 5 - num_rows
    assert torch.equal(ring.blocks[first % 5], rows.blocks[:, 0, :, :6].to(torch.int32))


@pytest.mark.parametrize("form", (keep_picks_reference, keep_picks_triton))
def test_a_row_stepped_over_again_is_overwritten(form) -> None:
    ring, position = new_pick_ring((4, 1, 1, 2), torch.device("cpu")), torch.tensor([2])
    ring.blocks.fill_(-1)
    form(ring, StepPicks(torch.tensor([[[[1, 1]], [[2, 2]], [[3, 3]]]]), torch.zeros(1, 3, 1, 2)), position)
    form(ring, StepPicks(torch.tensor([[[[5, 5]]]]), torch.ones(1, 1, 1, 2)), position + 1)
    assert ring.blocks[:, 0, 0, 0].tolist() == [3, -1, 1, 5]
    assert ring.weights[[0, 2, 3], 0, 0, 0].tolist() == [0, 0, 1]


@pytest.mark.parametrize("form", (keep_picks_reference, keep_picks_triton))
@pytest.mark.parametrize("shape", ((2, 1, 2, 4), (1, 5, 2, 4), (1, 1, 3, 4), (1, 1, 2, 3)))
def test_what_does_not_fit_is_refused(form, shape: tuple[int, ...]) -> None:
    ring = new_pick_ring((4, 1, 2, 4), torch.device("cpu"))
    with pytest.raises(ValueError, match="do not fit"):
        form(ring, StepPicks(torch.zeros(shape, dtype=torch.int64), torch.zeros(shape)), torch.tensor([0]))
    fitting = StepPicks(torch.zeros(1, 1, 2, 4, dtype=torch.int64), torch.zeros(1, 1, 2, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="do not fit"):
        form(ring, fitting, torch.tensor([0]))
