"""The attention kernel over picked blocks against the definition in float64, and the unions that it walks."""

import math
import random

import pytest
import torch
from torch import Tensor

from salalocal.errors import BackendError
from salalocal.kernels.block_attention import (
    block_attention_definition,
    block_attention_reference,
    block_attention_triton,
)
from salalocal.kernels.block_attention.decode import block_attention_decode
from salalocal.kernels.block_attention.prefill import merge_blocks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK, DIM, GROUPS, HEADS, SCALE = 16, 16, 2, 4, 0.3


def draw_picks(rng: random.Random, first: int, num_rows: int, num_picks: int) -> Tensor:
    """Ascending blocks up to each row's own, always there; some neighbours pick alike, short rows end in -1."""
    picks = torch.full((1, num_rows, GROUPS, num_picks), -1, dtype=torch.int64)
    for t in range(num_rows):
        own = (first + t) // BLOCK
        for g in range(GROUPS):
            others = rng.sample(range(own), min(own, rng.randint(num_picks - 3, num_picks - 1)))
            if t and rng.random() < 0.5:
                others = [x for x in picks[0, t - 1, g].tolist() if 0 <= x < own]
            row = sorted({*others[: num_picks - 1], own})
            picks[0, t, g, : len(row)] = torch.tensor(row)
    return picks


def draw(seed: int, num_tokens: int, num_rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, num_rows, HEADS * GROUPS, DIM), (1, num_tokens, GROUPS, DIM), (1, num_tokens, GROUPS, DIM)]
    q, k, v = (torch.randn(*shape, generator=generator).to(dtype) for shape in shapes)
    return q, k, v, draw_picks(random.Random(seed), num_tokens - num_rows, num_rows, 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(("num_tokens", "num_rows"), [(333, 9), (64, 64), (65, 6), (7, 7)])
def test_errs_no_more_than_torch(num_tokens: int, num_rows: int, dtype: torch.dtype, seed: int) -> None:
    q, k, v, picks = draw(seed, num_tokens, num_rows, dtype)
    first = num_tokens - num_rows
    exact = block_attention_definition(q.double(), k.double(), v.double(), picks, first, BLOCK, SCALE)
    found = block_attention_triton(*(x.to(DEVICE) for x in (q, k, v, picks)), first, BLOCK, SCALE).cpu()
    plain = block_attention_reference(q, k, v, picks, first, BLOCK, SCALE)
    error, plain_error = ((x.double() - exact).norm() / exact.norm() for x in (found, plain))
    weights_rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    assert error < 2 * plain_error + weights_rounding + 1e-6


def test_strides_and_memory_around_the_output(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, picks = (x.to(DEVICE) for x in draw(seed, 100, 5, torch.float32))
    expected = block_attention_triton(q, k, v, picks, 95, BLOCK, SCALE)
    memory = torch.full((q.numel() + 128,), math.nan, device=DEVICE)
    monkeypatch.setattr(torch, "empty_like", lambda x: memory[64:-64].view(x.shape))
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    found = block_attention_triton(*strided, picks, 95, BLOCK, SCALE)
    assert torch.equal(found, expected)
    assert memory[:64].isnan().all() and memory[-64:].isnan().all()


def test_huge_scores_neither_overflow_nor_spread(seed: int) -> None:
    q, k, v, picks = draw(seed, 100, 5, torch.float32)
    q, k = q.round(), k.round()  # whole numbers: scores are equal or far apart, never apart by a rounding
    found = block_attention_triton(*(x.to(DEVICE) for x in (1e4 * q, k, v, picks)), 95, BLOCK, SCALE).cpu()
    exact = block_attention_definition(1e4 * q.double(), k.double(), v.double(), picks, 95, BLOCK, SCALE)
    torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rows", [1, 2, 4, 8])
def test_unions_hold_every_row_once(rows: int, seed: int) -> None:
    picks = draw_picks(random.Random(seed), 200, 11, 6)
    union, counts = (x.cpu() for x in merge_blocks(picks.to(DEVICE), rows))
    assert union.shape[:2] == counts.shape == (GROUPS, -(-11 // rows))
    for g in range(GROUPS):
        for tile in range(counts.shape[1]):
            entries = union[g, tile, : counts[g, tile]]
            blocks = (entries >> 8).tolist()
            assert blocks == sorted(set(blocks))
            for row in range(rows):
                t = tile * rows + row
                expected = [x for x in picks[0, t, g].tolist() if x >= 0] if t < 11 else []
                assert [b for b, e in zip(blocks, entries.tolist(), strict=True) if e >> row & 1] == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float64}, "float64"),
        ({"dim": 8}, "head size 8"),
        ({"block": 48}, "block size is 48"),
    ],
)
def test_what_is_not_supported_is_named(change: dict[str, object], message: str) -> None:
    dtype, dim, block = (
        change.get(name, usual) for name, usual in (("dtype", torch.float32), ("dim", 16), ("block", 16))
    )
    q, k = torch.zeros(1, 1, 2, dim, dtype=dtype), torch.zeros(1, 1, 1, dim, dtype=dtype)
    with pytest.raises(BackendError, match=message):
        block_attention_triton(q, k, k, torch.zeros(1, 1, 1, 4, dtype=torch.int64), 0, block, SCALE)


def test_shapes_that_do_not_fit_are_refused() -> None:
    q, k = torch.zeros(1, 2, 2, 16), torch.zeros(1, 1, 1, 16)
    with pytest.raises(ValueError, match="only 1 keys"):
        block_attention_triton(q, k, k, torch.zeros(1, 2, 1, 4, dtype=torch.int64), 0, 16, SCALE)


@pytest.mark.parametrize(("num_tokens", "num_rows"), [(333, 1), (321, 5), (16, 16), (3, 2)])
def test_decode_errs_no_more_than_torch(num_tokens: int, num_rows: int, seed: int) -> None:
    q, k, v, picks = draw(seed, num_tokens, num_rows, torch.bfloat16)
    first = num_tokens - num_rows
    exact = block_attention_definition(q.double(), k.double(), v.double(), picks, first, BLOCK, SCALE)
    room = torch.full((1, 40, GROUPS, DIM), math.nan, dtype=k.dtype)  # of a cache that is not full
    tensors = (q, torch.cat([k, room], 1), torch.cat([v, room], 1), picks, torch.tensor([first]))
    found = block_attention_decode(*(x.to(DEVICE) for x in tensors), BLOCK, SCALE).cpu()
    plain = block_attention_reference(q, k, v, picks, first, BLOCK, SCALE)
    error, plain_error = ((x.double() - exact).norm() / exact.norm() for x in (found, plain))
    assert error < 2 * plain_error + torch.finfo(torch.bfloat16).eps / 2


def test_decode_refuses_more_rows_than_it_has_tiles_for() -> None:
    q, k = torch.zeros(1, 17, 2, 16), torch.zeros(1, 20, 1, 16)
    with pytest.raises(ValueError, match="1 to 16 rows"):
        block_attention_decode(q, k, k, torch.zeros(1, 17, 1, 4, dtype=torch.int64), torch.tensor([3]), 16, SCALE)
