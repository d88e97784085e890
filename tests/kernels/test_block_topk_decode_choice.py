"""The picks of a step by given scores, in one launch and in two, against a sort."""

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from salalocal.errors import BackendError
from salalocal.kernels.block_topk import BlockGeometry, decode_choice
from salalocal.kernels.block_topk.decode_choice import ChoiceLaunch, choose_by_scores, room_for_scores

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BLOCK, LOCAL, FREE = 16, 2, 4
GEOMETRY = BlockGeometry(kernel_size=8, kernel_stride=4, block_size=16, init_blocks=1, window_size=32, topk=6)
NONE_AHEAD = BlockGeometry(kernel_size=8, kernel_stride=4, block_size=16, init_blocks=0, window_size=32, topk=5)
PART = 16
LAUNCHES = {
    "whole": ChoiceLaunch(whole_blocks=256, part_blocks=PART, thread_scores=16),
    "parts": ChoiceLaunch(whole_blocks=16, part_blocks=PART, thread_scores=16),
}
LOWEST = -3.0e38


@pytest.fixture(params=LAUNCHES)
def launch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ChoiceLaunch:
    """How it is launched, with memory that starts as no numbers and as blocks that are not there."""
    empty = torch.empty

    def poisoned(*size: Any, **kind: Any) -> Tensor:
        memory: Tensor = empty(*size, **kind)
        return memory.fill_(math.nan if memory.is_floating_point() else 123_456_789)

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(decode_choice, "LAUNCH", {80: LAUNCHES[request.param]})
    return LAUNCHES[request.param]


def picked(scores: Tensor, own: int, width: int, init: int) -> tuple[list[int], list[float]]:
    """By a stable sort: the picks of a row whose own block this is, and their weights."""
    free = range(init, own - LOCAL)
    kept = sorted(sorted(free, key=lambda block: -float(scores[block]))[:FREE])
    blocks = [*range(init), *kept, *range(own - LOCAL, own + 1)]
    weights = [float(scores[block]) if block in free else -math.inf for block in blocks]
    return blocks + [-1] * (width - len(blocks)), weights + [-math.inf] * (width - len(blocks))


def check(
    score_row: Callable[[int], Tensor],
    own: int,
    num_rows: int,
    room: int,
    sparse_from: int = 0,
    geometry: BlockGeometry = GEOMETRY,
) -> None:
    """Rows from the last but one of a block on, with two KV heads; `score_row(n)` gives n scores."""
    first = own * BLOCK + BLOCK - 2
    last = (first + num_rows - 1) // BLOCK - LOCAL
    capacity = room_for_scores(max(room, last), DEVICE)
    starts, ends = (torch.full((num_rows + 2, 2, capacity), math.nan) for _ in range(2))
    best = torch.stack([torch.stack([score_row(last) for _ in range(2)]) for _ in range(num_rows)])
    by_end = torch.rand(best.shape) < 0.5
    by_end[..., 0] = False
    starts[:num_rows, :, :last] = best.where(~by_end, LOWEST)
    ends[:num_rows, :, :last] = best.where(by_end, LOWEST)
    ends[:, :, 0] = math.nan  # before the first block is none
    width = max(geometry.budget, -(-sparse_from // BLOCK)) + 1
    picks = torch.full((1, num_rows + 2, 4, width + 3), -7, device=DEVICE)
    weights = torch.full(picks.shape, math.nan, device=DEVICE)
    inner = (slice(None), slice(1, num_rows + 1), slice(1, 3), slice(width))
    arguments = (starts.to(DEVICE), ends.to(DEVICE), torch.tensor([first], device=DEVICE))
    choose_by_scores(*arguments, picks[inner], weights[inner], geometry, sparse_from)
    alone = torch.full_like(picks, -7)
    choose_by_scores(*arguments, alone[inner], None, geometry, sparse_from)
    assert torch.equal(alone, picks)
    for row in range(num_rows):
        position = first + row
        for group in range(2):
            found = picks[inner][0, row, group].tolist(), weights[inner][0, row, group].tolist()
            if position < max(sparse_from, geometry.reach):
                every = list(range(position // BLOCK + 1))
                assert found[0] == every + [-1] * (width - len(every))
                assert all(math.isnan(weight) for weight in found[1])
            else:
                assert found == picked(best[row, group], position // BLOCK, width, geometry.init_blocks), (row, group)
    picks[inner], weights[inner] = -7, math.nan
    assert (picks == -7).all() and weights.isnan().all()


def normal(num_scores: int) -> Tensor:
    return 3 * torch.randn(num_scores) - 10


@pytest.mark.usefixtures("launch")
@pytest.mark.parametrize("end", [FREE + 2, PART - 1, PART, PART + 1, 2 * PART, 2 * PART + 1, 5 * PART - 3])
def test_picks_the_largest_around_the_limits_of_parts(end: int, seed: int) -> None:
    torch.manual_seed(seed)
    check(normal, end + LOCAL, 3, room=90)


@pytest.mark.usefixtures("launch")
def test_any_number_of_rows(seed: int) -> None:
    torch.manual_seed(seed)
    for num_rows in (random.Random(seed).randrange(2, 16), 16):
        check(normal, 20 + seed % 20, num_rows, room=48)


def test_parts_smaller_than_a_shortlist(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_choice, "LAUNCH", {80: ChoiceLaunch(whole_blocks=16, part_blocks=2, thread_scores=16)})
    torch.manual_seed(seed)
    check(normal, 26 + seed % 2, 2, room=30)


@pytest.mark.usefixtures("launch")
@pytest.mark.parametrize("num_kinds", [1, 2, 5])
def test_ties_go_to_the_lower_blocks(num_kinds: int, seed: int) -> None:
    torch.manual_seed(seed)
    kinds = normal(num_kinds)
    check(lambda n: kinds[torch.randint(num_kinds, (n,))], 50, 3, room=64)


@pytest.mark.usefixtures("launch")
def test_neighbours_that_share_a_score(seed: int) -> None:
    torch.manual_seed(seed)
    check(lambda n: normal(n // 2 + 1).repeat_interleave(2)[:n], 61, 4, room=64)


@pytest.mark.usefixtures("launch")
@pytest.mark.parametrize("at", [0, 1, 3])
def test_one_part_that_dominates(at: int, seed: int) -> None:
    torch.manual_seed(seed)

    def scores(n: int) -> Tensor:
        row = normal(n)
        row[at * PART : (at + 1) * PART] += 1000
        return row

    check(scores, 4 * PART - 2, 2, room=64)


@pytest.mark.usefixtures("launch")
@pytest.mark.parametrize("sign", [-1, 1], ids=["falling", "rising"])
def test_scores_in_order(sign: int) -> None:
    check(lambda n: sign * torch.linspace(-20, 5, n), 57, 2, room=64)


@pytest.mark.usefixtures("launch")
def test_scores_from_end_to_end_of_their_range(seed: int) -> None:
    """Their highest bit tells them apart, the lowest does, and those below every number stand beside them."""
    torch.manual_seed(seed)

    def scores(n: int) -> Tensor:
        kinds = torch.tensor([LOWEST, LOWEST, -1e30, -1.0, -1.0000001, 0.0, 1e-38, 1.0, 1.0000001, 3e38])
        return kinds[torch.randint(len(kinds), (n,))]

    check(scores, 55, 4, room=64)
    check(lambda n: torch.full((n,), LOWEST), 55, 1, room=64)


@pytest.mark.usefixtures("launch")
def test_without_forced_blocks_ahead_the_first_can_be_picked(seed: int) -> None:
    torch.manual_seed(seed)
    check(lambda n: normal(n).sort(descending=True).values, 30, 2, room=40, geometry=NONE_AHEAD)
    check(normal, 30, 2, room=40, geometry=NONE_AHEAD)


@pytest.mark.usefixtures("launch")
@pytest.mark.parametrize(("own", "sparse_from"), [(3, 0), (7, 0), (20, 339), (20, 400)])
def test_rows_below_the_switch_pick_every_block(own: int, sparse_from: int, seed: int) -> None:
    """All of them, or those ahead of a row in the midst of the step."""
    torch.manual_seed(seed)
    check(normal, own, 6, room=64, sparse_from=sparse_from)


def test_the_room_follows_the_launch(launch: ChoiceLaunch) -> None:
    for num_blocks in (1, 5, 16, 17, 33, 1000):
        room = room_for_scores(num_blocks, DEVICE)
        assert room >= num_blocks and (room <= launch.whole_blocks or room % launch.part_blocks == 0)


def test_more_blocks_than_can_be_counted_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match="200,000 blocks"):
        room_for_scores(200_000, DEVICE)
    monkeypatch.setattr(decode_choice, "LAUNCH", {80: ChoiceLaunch(16, 4, 16)})
    scores = torch.zeros(1, 1, 65_536, device=DEVICE)
    picks = torch.zeros(1, 1, 1, GEOMETRY.budget, dtype=torch.int64, device=DEVICE)
    with pytest.raises(BackendError, match="65,536 blocks"):
        choose_by_scores(scores, scores, torch.zeros(1, dtype=torch.int64), picks, None, GEOMETRY, 0)
