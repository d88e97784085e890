"""The block choice of a captured step in room for more than a million tokens, at the released sizes."""

import random

import pytest
import torch
from torch import Tensor

from salalocal.kernels.block_topk import (
    BlockGeometry,
    PickRecord,
    block_topk_decode,
    block_topk_reference,
    decode_choice,
)
from salalocal.kernels.block_topk.decode_choice import ChoiceLaunch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GEOMETRY = BlockGeometry(kernel_size=32, kernel_stride=16, block_size=64, init_blocks=1, window_size=2048, topk=64)
SCALE = 128**-0.5
ROOM = 2**20 + 4096


def draw(seed: int, num_rows: int, num_kinds: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """q, k1 and k2 in bf16; of few kinds of keys, so that scores tie, if given."""
    generator = torch.Generator("cuda").manual_seed(seed)
    q, k1, k2 = (
        torch.randn(1, *shape, generator=generator, device="cuda").bfloat16()
        for shape in ((num_rows, 32, 128), (ROOM // 16 - 1, 2, 128), (ROOM // 64 - 1, 2, 128))
    )
    if num_kinds is not None:
        k1 = k1[:, torch.randint(num_kinds, (k1.shape[1],), generator=generator, device="cuda")]
    return 4 * q, k1, k2


@pytest.mark.parametrize("num_rows", [1, 5, 16])
@pytest.mark.parametrize("num_kinds", [None, 40])
def test_shortlists_lose_nothing(
    num_rows: int, num_kinds: int | None, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captured once, at positions on both sides of the limits of parts: what one search of all blocks picks."""
    q, k1, k2 = draw(seed, num_rows, num_kinds)
    position = torch.zeros(1, dtype=torch.int64, device="cuda")
    shape = (1, num_rows, 2, GEOMETRY.budget)
    record = PickRecord(torch.zeros(shape, dtype=torch.int64, device="cuda"), torch.zeros(shape, device="cuda"))
    assert record.weights is not None

    def step() -> None:
        block_topk_decode(q, k1, k2, position, GEOMETRY, SCALE, record=record)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    part_blocks = decode_choice.LAUNCH[80].part_blocks
    monkeypatch.setattr(decode_choice, "LAUNCH", {80: ChoiceLaunch(2**15, part_blocks, 16)})
    num_parts = ROOM // 64 // part_blocks
    limits = [(part_blocks * part + 32) * 64 for part in (1, 2, random.Random(seed).randrange(3, num_parts))]
    for first in (5_000, 6_200, *(limit + off for limit in limits for off in (-65, 0, 64)), ROOM - 64):
        position.fill_(first)
        record.picks.fill_(-7)
        record.weights.fill_(7)
        graph.replay()
        found = record.picks.clone(), record.weights.clone()
        record.picks.fill_(-7)
        record.weights.fill_(7)
        step()
        assert torch.equal(found[0], record.picks) and torch.equal(found[1], record.weights), first
    exact = block_topk_reference(q.double(), k1.double(), k2.double(), first, first + num_rows, GEOMETRY, SCALE)
    assert num_kinds or (found[0] != exact).float().mean() < 5e-3
