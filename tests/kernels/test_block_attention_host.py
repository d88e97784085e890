"""Attention by way of copies gives the bits of attention to the blocks where they lie, however rows are grouped."""

import random

import pytest
import torch
from torch import Tensor

import salalocal.kernels.block_attention as attention_room
from salalocal.errors import BackendError
from salalocal.kernels.block_attention import KeyValues, block_attention_reference, block_attention_triton, decode, host
from salalocal.kernels.kv_cache import quantize_tokens_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK, DIM, GROUPS, HEADS, PICKS, SCALE = 16, 16, 2, 4, 7, 0.3


def draw_picks(seed: int, first: int, num_rows: int) -> Tensor:
    """Ascending blocks up to each row's own, always there; some neighbours pick alike, short rows end in -1."""
    rng, picks = random.Random(seed), torch.full((1, num_rows, GROUPS, PICKS), -1)
    for t in range(num_rows):
        own = (first + t) // BLOCK
        for g in range(GROUPS):
            others = rng.sample(range(own), min(own, rng.randint(PICKS - 3, PICKS - 1)))
            if t and rng.random() < 0.7:
                others = [x for x in picks[0, t - 1, g].tolist() if 0 <= x < own]
            row = sorted({*others[: PICKS - 1], own})
            picks[0, t, g, : len(row)] = torch.tensor(row)
    return picks.to(DEVICE)


def draw(seed: int, num_tokens: int, num_rows: int, dtype: torch.dtype) -> tuple[Tensor, KeyValues, Tensor]:
    """Queries, a cache and picks."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, num_rows, HEADS * GROUPS, DIM), (1, num_tokens, GROUPS, DIM), (1, num_tokens, GROUPS, DIM)]
    q, k, v = (torch.randn(*shape, generator=generator).to(DEVICE, dtype) for shape in shapes)
    return q, KeyValues(k, v), draw_picks(seed, num_tokens - num_rows, num_rows)


def in_8_bits(cached: KeyValues) -> KeyValues:
    """Codes and scales."""
    (keys, key_scales), (values, value_scales) = map(quantize_tokens_reference, (cached.keys, cached.values))
    return KeyValues(keys, values, key_scales, value_scales)


def attend(q: Tensor, cached: KeyValues, picks: Tensor, first: int) -> Tensor:
    return block_attention_triton(q, cached, picks, first, BLOCK, SCALE)


@pytest.mark.parametrize(
    ("num_tokens", "num_rows", "is_quantized", "most_copies"),
    [(333, 9, False, 16), (333, 9, True, 40), (20, 20, True, 4096)],
)
def test_copies_give_the_same_bits(
    num_tokens: int,
    num_rows: int,
    is_quantized: bool,
    most_copies: int,
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(host, "MOST_COPIES", most_copies)
    q, cached, picks = draw(seed, num_tokens, num_rows, torch.bfloat16)
    cached, first = in_8_bits(cached) if is_quantized else cached, num_tokens - num_rows
    expected, widths = attend(q, cached, picks, first), []

    def watched(rows: Tensor, copies: KeyValues, renamed: Tensor, position: int) -> Tensor:
        assert copies.keys.shape[1] <= most_copies * BLOCK
        assert copies.keys.shape[1] >= position + rows.shape[1] and int(renamed.max()) * BLOCK < copies.keys.shape[1]
        widths.append(rows.shape[1])
        return attend(rows, copies, renamed, position)

    assert torch.equal(host.host_block_attention(q, cached, picks, first, BLOCK, watched), expected)
    assert sum(widths) == num_rows and (len(widths) == 1 or most_copies < 4096)


@pytest.mark.parametrize("num_rows", [2, 17])
def test_the_operation_goes_by_copies_for_many_rows_alone(
    num_rows: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, cached, picks = draw(seed, 60, num_rows, torch.bfloat16)
    monkeypatch.setattr(decode, "LAUNCH", {80: decode.DecodeLaunch(programs=4, parts=2, num_warps=4)})
    monkeypatch.setattr(attention_room, "use_triton", lambda *tensors: True)
    expected = attention_room.block_attention(q, cached, picks, 60 - num_rows, BLOCK, SCALE)
    calls, direct = [], host.host_block_attention
    monkeypatch.setattr(attention_room, "is_on_host", lambda cached, q: True)
    monkeypatch.setattr(attention_room, "host_block_attention", lambda *given: calls.append(1) or direct(*given))
    found = attention_room.block_attention(q, cached, picks, 60 - num_rows, BLOCK, SCALE)
    assert torch.equal(found, expected) and len(calls) == (num_rows > 16)
    monkeypatch.setattr(attention_room, "use_triton", lambda *tensors: False)
    with pytest.raises(BackendError, match="read by kernels alone"):
        attention_room.block_attention(q, cached, picks, 60 - num_rows, BLOCK, SCALE)


def test_groups_are_as_large_as_the_room(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that pick alike stay together; rows that pick apart do not."""
    monkeypatch.setattr(host, "MOST_COPIES", 24)
    alike = draw_picks(seed, 640, 1).expand(1, 16, GROUPS, PICKS)
    apart = torch.stack([torch.arange(PICKS).expand(GROUPS, PICKS) + PICKS * (row % 5) for row in range(16)])[None]
    for picks, widths in ((alike, [16]), (apart, [2] * 8)):
        grouping = host._grouped(picks[0], 640, 41, BLOCK)
        assert grouping.rows == widths[0] and len(grouping.is_picked) == len(widths)
        for group, is_picked in enumerate(grouping.is_picked):
            rows = picks[0, group * grouping.rows : (group + 1) * grouping.rows]
            for head in range(GROUPS):
                expected = sorted({int(x) for x in rows[:, head].flatten() if x >= 0})
                assert is_picked[head, :41].nonzero().flatten().tolist() == expected


@pytest.mark.parametrize("most_copies", [16, 40, 4096])
def test_the_reference_agrees_by_way_of_copies(seed: int, most_copies: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copies and their numbers alone, for one or two rows at a time, for some, for all."""
    monkeypatch.setattr(host, "MOST_COPIES", most_copies)
    q, cached, picks = draw(seed, 333, 37, torch.float32)
    expected = block_attention_reference(q, cached.keys, cached.values, picks, 296, BLOCK, SCALE)

    def plain(rows: Tensor, copies: KeyValues, renamed: Tensor, position: int) -> Tensor:
        return block_attention_reference(rows, copies.keys, copies.values, renamed, position, BLOCK, SCALE)

    found = host.host_block_attention(q, cached, picks, 296, BLOCK, plain)
    assert found.isfinite().all()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_rows_that_pick_more_than_there_is_room_for(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "MOST_COPIES", 8)
    q, cached, picks = draw(seed, 333, 37, torch.bfloat16)
    with pytest.raises(BackendError, match="7 blocks picked by a row, at most 6"):
        host.host_block_attention(q, cached, picks, 296, BLOCK, attend)
