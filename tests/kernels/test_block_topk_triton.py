"""The kernel of the block choice against the reference in float64: random and adversarial inputs, edges of blocks."""

import dataclasses
import math
import random

import pytest
import torch
from torch import Tensor

import salalocal.kernels.block_topk as room_of_choice
from salalocal.errors import BackendError
from salalocal.kernels.block_topk import (
    BlockGeometry,
    block_topk_reference,
    block_topk_triton,
    decode,
    decode_choice,
    pick_weights,
    prefill,
)
from salalocal.kernels.pooled_keys import num_pooled, pooled_keys_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GEOMETRY = BlockGeometry(kernel_size=8, kernel_stride=4, block_size=16, init_blocks=1, window_size=32, topk=6)
SCALE = 0.3


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows and keys at a time, so that small inputs have many tiles, and lists that fill and are cut."""
    launch = prefill.PrefillLaunch(
        tile_rows=16, tile_keys=16, segment_tiles=2, num_warps=4, num_stages=2, list_blocks=16
    )
    monkeypatch.setattr(prefill, "LAUNCH", {80: launch})
    slices = decode.DecodeLaunch(tile_keys=16, programs_per_core=6, num_warps=4, num_stages=2)
    monkeypatch.setattr(decode, "LAUNCH", {80: slices})
    parts = decode_choice.ChoiceLaunch(whole_blocks=16, part_blocks=16, thread_scores=16)
    monkeypatch.setattr(decode_choice, "LAUNCH", {80: parts})


def draw(seed: int, num_tokens: int, num_rows: int, heads: int = 4, groups: int = 2) -> tuple[Tensor, Tensor]:
    """Queries and keys in float64."""
    generator = torch.Generator().manual_seed(seed)
    q = 2 * torch.randn(1, num_rows, heads * groups, 16, generator=generator, dtype=torch.float64)
    return q, torch.randn(1, num_tokens, groups, 16, generator=generator, dtype=torch.float64)


def pooled(keys: Tensor, geometry: BlockGeometry = GEOMETRY) -> tuple[Tensor, Tensor]:
    sizes = [
        (geometry.kernel_size, geometry.kernel_stride),
        (geometry.coarse_kernel_size, geometry.coarse_kernel_stride),
    ]
    fine, coarse = (
        pooled_keys_reference(keys, 0, num_pooled(keys.shape[1], kernel, stride), kernel, stride)
        for kernel, stride in sizes
    )
    return fine, coarse


def choose(q: Tensor, keys: Tensor, dtype: torch.dtype, geometry: BlockGeometry = GEOMETRY) -> tuple[Tensor, Tensor]:
    """What the kernel picks, and what the reference picks in float64 from the same rounded inputs."""
    k1, k2 = pooled(keys.to(dtype), geometry)
    rows = q.to(dtype)
    first, num_tokens = keys.shape[1] - q.shape[1], keys.shape[1]
    found = block_topk_triton(*(x.to(DEVICE) for x in (rows, k1, k2)), first, num_tokens, geometry, SCALE).cpu()
    exact = block_topk_reference(rows.double(), k1.double(), k2.double(), first, num_tokens, geometry, SCALE)
    return found, exact


def num_different(found: Tensor, exact: Tensor) -> int:
    return int((found != exact).any(-1).sum())


@pytest.mark.parametrize(
    ("dtype", "past_block", "high", "has_tma"),
    [
        (torch.float32, 1, 1, False),
        (torch.bfloat16, 15, 2, False),
        (torch.bfloat16, 0, 1, True),
    ],
    ids=["fp32", "halves", "described"],
)
def test_picks_what_float64_picks(
    dtype: torch.dtype, past_block: int, high: int, has_tma: bool, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = dataclasses.replace(prefill.LAUNCH[80], tile_keys=16 * high, high=high, has_tma=has_tma)
    monkeypatch.setattr(prefill, "LAUNCH", {80: launch})
    q, keys = draw(seed, 16 * random.Random(seed).randrange(24, 32) + past_block, 5)
    found, exact = choose(q, keys, dtype)
    assert found.shape == exact.shape and found.dtype == exact.dtype
    assert num_different(found, exact) <= 1  # a margin below rounding may turn one row


def test_rows_around_the_reach(seed: int) -> None:
    """Rows whose blocks all fit pick them all, padded with -1; the first one beyond leaves one out."""
    reach = GEOMETRY.reach
    q, keys = draw(seed, reach + 5, 12)
    found, exact = choose(q, keys, torch.float32)
    assert num_different(found, exact) == 0
    assert found[0, 6].tolist() == [[*range(8)]] * 2 and (found[0, -1] >= 0).all()


def test_early_rows_are_padded(seed: int) -> None:
    q, keys = draw(seed, 20, 20)
    found, exact = choose(q, keys, torch.float32)
    assert torch.equal(found, exact) and found[0, 0, 0].tolist() == [0] + [-1] * 7


def test_equal_keys_go_to_the_lower_blocks(seed: int) -> None:
    q, keys = (x.round() for x in draw(seed, 500, 5))  # whole numbers: their products are exact in any order
    keys[:] = keys[:, :1]
    found, exact = choose(q, keys, torch.float32)
    assert torch.equal(found, exact)
    assert found[0, 0, 0].tolist()[:5] == [0, 1, 2, 3, 4]


def test_scores_that_rise_with_every_block_fill_the_lists_again_and_again(seed: int) -> None:
    q, keys = draw(seed, 700, 3)
    keys = torch.linspace(0.1, 3, 700, dtype=torch.float64)[None, :, None, None] * keys[:, :1].abs()
    found, exact = choose(q.abs(), keys, torch.float32)
    assert torch.equal(found, exact)
    own = (700 - 3) // 16
    assert found[0, 0, 0].tolist() == [0, *range(own - 6, own + 1)]


@pytest.mark.parametrize("strength", [1e2, 1e3])
def test_one_dominating_key_does_not_hide_the_others(strength: float, seed: int) -> None:
    q, keys = draw(seed, 400, 8)
    keys[:, random.Random(seed).randrange(400)] = strength
    found, exact = choose(q, keys, torch.float32)
    assert num_different(found, exact) <= 1


def test_a_planted_key_is_always_picked(seed: int) -> None:
    q, keys = draw(seed, 400, 4, heads=4, groups=1)
    for block in random.Random(seed).sample(range(1, 20), 2):
        planted = keys.clone()
        planted[:, 16 * block + 5 : 16 * block + 11, 0] = 3 * q.mean((1, 2))
        q_alike = q.mean((1, 2), keepdim=True) + 0.1 * q
        found, _ = choose(q_alike, planted, torch.bfloat16)
        assert (found == block).any(-1).all()


def test_values_that_are_no_numbers_give_valid_blocks(seed: int) -> None:
    q, keys = draw(seed, 400, 4)
    keys[:, 100] = math.nan
    keys[:, 200] = 1e30
    k1, k2 = pooled(keys.float())
    found = block_topk_triton(*(x.to(DEVICE) for x in (q.float(), k1, k2)), 396, 400, GEOMETRY, SCALE).cpu()
    for row in found[0].flatten(0, 1).tolist():
        assert row == sorted(set(row)) and row[0] == 0 and row[-3:] == [22, 23, 24]


def test_any_cut_into_calls_and_any_strides_pick_the_same(seed: int) -> None:
    q, keys = draw(seed, 260, 7)
    k1, k2 = (x.float().to(DEVICE) for x in pooled(keys))
    rows = q.float().to(DEVICE)
    whole = block_topk_triton(rows, k1, k2, 253, 260, GEOMETRY, SCALE)
    cut = 1 + seed % 6
    parts = [(0, cut), (cut, 7)]
    pieces = [block_topk_triton(rows[:, a:b], k1, k2, 253 + a, 253 + b, GEOMETRY, SCALE) for a, b in parts]
    assert torch.equal(torch.cat(pieces, 1), whole)
    wide = torch.full((1, 8, 9, 16), math.nan, device=DEVICE)
    wide[:, :, 1:8] = rows.transpose(1, 2)
    strided = [wide.transpose(1, 2)[:, 1:8], *(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k1, k2))]
    assert torch.equal(block_topk_triton(*strided, 253, 260, GEOMETRY, SCALE), whole)


def test_batches_are_independent(seed: int) -> None:
    draws = [draw(seed + i, 300, 3) for i in range(2)]
    q, keys = (torch.cat(parts) for parts in zip(*draws, strict=True))
    found, exact = choose(q, keys, torch.float32)
    assert num_different(found, exact) == 0


@pytest.mark.parametrize(
    ("kernel", "stride", "block", "window", "message"),
    [
        (16, 4, 16, 32, "not supported"),  # windows reach over two others
        (6, 3, 18, 36, "per block is 6"),
        (8, 4, 16, 0, "not supported"),  # a row's own block is the only local one
    ],
)
def test_geometry_that_is_not_supported_is_named(
    kernel: int, stride: int, block: int, window: int, message: str
) -> None:
    geometry = BlockGeometry(
        kernel_size=kernel, kernel_stride=stride, block_size=block, init_blocks=1, window_size=window, topk=6
    )
    q, keys = draw(0, 300, 2)
    with pytest.raises(BackendError, match=message):
        block_topk_triton(q.float(), *pooled(keys.float(), geometry), 298, 300, geometry, SCALE)


def test_dtype_that_is_not_supported_is_named() -> None:
    q, keys = draw(0, 300, 2)
    with pytest.raises(BackendError, match="float64"):
        block_topk_triton(q, *pooled(keys), 298, 300, GEOMETRY, SCALE)


@pytest.mark.parametrize(("num_tokens", "num_rows"), [(733, 1), (689, 4), (129, 3), (97, 2), (20, 5)])
def test_decode_picks_what_float64_picks_in_a_cache_with_room(num_tokens: int, num_rows: int, seed: int) -> None:
    q, keys = draw(seed, num_tokens, num_rows)
    k1, k2 = pooled(keys.float())
    exact = block_topk_reference(
        q.float().double(), k1.double(), k2.double(), num_tokens - num_rows, num_tokens, GEOMETRY, SCALE
    )
    room = torch.full((1, 37, 2, 16), math.nan)
    tensors = (q.float(), torch.cat([k1, room], 1), torch.cat([k2, room], 1), torch.tensor([num_tokens - num_rows]))
    found = decode.block_topk_decode(*(x.to(DEVICE) for x in tensors), GEOMETRY, SCALE).cpu()
    assert num_different(found, exact) <= 1


@pytest.mark.parametrize(
    ("first", "sparse_from"), [(0, 0), (0, 200), (124, 0), (125, 129), (185, 200), (197, 200), (200, 129)]
)
def test_decode_is_dense_below_the_switch_wherever_the_step_lies(first: int, sparse_from: int, seed: int) -> None:
    """The same launches for rows below the reach (128 tokens), below the switch, and across both."""
    num_rows = 6
    q, keys = draw(seed, first + num_rows, num_rows)
    k1, k2 = pooled(keys.float())
    exact = block_topk_reference(q.float().double(), k1.double(), k2.double(), first, first + num_rows, GEOMETRY, SCALE)
    room = torch.full((1, 60 - k1.shape[1], 2, 16), math.nan)  # of k1 to come: the same for every position
    tensors = (q.float(), torch.cat([k1, room], 1), torch.cat([k2, room], 1), torch.tensor([first]))
    found = decode.block_topk_decode(*(x.to(DEVICE) for x in tensors), GEOMETRY, SCALE, sparse_from).cpu()
    assert found.shape[-1] == (13 if sparse_from == 200 else 9 if sparse_from == 129 else GEOMETRY.budget)
    for t in range(num_rows):
        if first + t < sparse_from:
            every = list(range((first + t) // 16 + 1))
            expected = torch.tensor([every + [-1] * (found.shape[-1] - len(every))] * 2)
        else:
            expected = torch.nn.functional.pad(exact[0, t], (0, found.shape[-1] - GEOMETRY.budget), value=-1)
        assert torch.equal(found[0, t], expected), t


def test_decode_fills_its_room_to_the_last_block(seed: int) -> None:
    """Where scores have room for just the blocks that can be chosen, and the last window reaches behind them."""
    last = 17 + GEOMETRY.local_blocks - 1
    num_tokens = 16 * last + 3  # with 4 * last - 1 windows, as many as come before the row
    q, keys = draw(seed, num_tokens, 1)
    k1, k2 = pooled(keys.float())
    num_blocks = k1.shape[1] // 4 + 1 - GEOMETRY.local_blocks
    assert num_blocks == last - GEOMETRY.local_blocks == decode_choice.LAUNCH[80].room(num_blocks)
    exact = block_topk_reference(
        q.float().double(), k1.double(), k2.double(), num_tokens - 1, num_tokens, GEOMETRY, SCALE
    )
    tensors = (q.float(), k1, k2, torch.tensor([num_tokens - 1]))
    found = decode.block_topk_decode(*(x.to(DEVICE) for x in tensors), GEOMETRY, SCALE).cpu()
    assert num_different(found, exact) <= 1


@pytest.mark.parametrize("num_tokens", [1, 8, 23, 24, 31])
def test_decode_reads_no_coarse_key_where_there_is_none_yet(num_tokens: int, seed: int) -> None:
    """Below 32 tokens; numbers are divided towards zero, and the interpreter refuses what lies in no argument."""
    q, keys = draw(seed, num_tokens, 1)
    k1, k2 = pooled(torch.nn.functional.pad(keys.float(), (0, 0, 0, 0, 0, 31 - num_tokens)))
    assert k2.shape[1] == 0
    tensors = (q.float(), k1, k2, torch.tensor([num_tokens - 1]))
    found = decode.block_topk_decode(*(x.to(DEVICE) for x in tensors), GEOMETRY, SCALE).cpu()
    assert found[0, 0, 0].tolist() == [*range((num_tokens - 1) // 16 + 1), *[-1] * (7 - (num_tokens - 1) // 16)]


def test_one_head_a_group_still_fills_a_tile(seed: int) -> None:
    q, keys = draw(seed, 400, 9, heads=1)
    found, exact = choose(q, keys, torch.bfloat16)
    assert num_different(found, exact) <= 1


def test_what_the_kernels_do_not_take_is_the_references(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card: fp32 and small heads."""
    monkeypatch.setattr(room_of_choice, "use_triton", lambda *tensors: True)
    q, keys = draw(seed, 300, 3)
    for dtype, dim in ((torch.float32, 16), (torch.bfloat16, 8)):
        k1, k2 = pooled(keys.to(dtype)[..., :dim])
        arguments = (q.to(dtype)[..., :dim], k1, k2, 297, 300, GEOMETRY, SCALE)
        assert torch.equal(room_of_choice.block_topk(*arguments), block_topk_reference(*arguments))


def test_decode_gives_ties_to_the_lower_blocks(seed: int) -> None:
    q, keys = (x.round() for x in draw(seed, 500, 2))
    keys[:] = keys[:, :1]
    k1, k2 = pooled(keys.float())
    found = decode.block_topk_decode(
        *(x.to(DEVICE) for x in (q.float(), k1, k2, torch.tensor([498]))), GEOMETRY, SCALE
    ).cpu()
    assert found[0, 0, 0].tolist() == [0, 1, 2, 3, 4, 29, 30, 31]


def test_decode_records_picks_with_their_weights_and_nothing_else(seed: int) -> None:
    q, keys = draw(seed, 300, 3)
    k1, k2 = pooled(keys.float())
    tensors = [x.to(DEVICE) for x in (q.float(), k1, k2, torch.tensor([297]))]
    expected = decode.block_topk_decode(*tensors, GEOMETRY, SCALE)
    room = torch.full((1, 5, 4, GEOMETRY.budget + 3), -7, device=DEVICE)
    weights = torch.full(room.shape, math.nan, device=DEVICE)
    record = decode.PickRecord(room[:, 1:4, 1:3, : GEOMETRY.budget], weights[:, 1:4, 1:3, : GEOMETRY.budget])
    assert torch.equal(decode.block_topk_decode(*tensors, GEOMETRY, SCALE, record=record), expected)
    assert torch.equal(record.picks, expected)
    exact = pick_weights(q.double(), k1.double(), k2.double(), expected.cpu(), 297, GEOMETRY, SCALE)
    torch.testing.assert_close(record.weights.cpu().double(), exact, rtol=1e-4, atol=1e-4)
    assert record.weights is not None and torch.isinf(record.weights).sum() == 3 * 2 * (
        GEOMETRY.budget - GEOMETRY.free_blocks
    )
    record.picks.fill_(-7)
    record.weights.fill_(math.nan)
    assert (room == -7).all() and weights.isnan().all()
    with pytest.raises(ValueError, match="picks"):
        decode.block_topk_decode(*tensors, GEOMETRY, SCALE, record=decode.PickRecord(room, weights))


def test_weights_are_the_scores_of_the_definition(seed: int) -> None:
    q, keys = draw(seed, 300, 2)
    k1, k2 = pooled(keys)
    blocks = block_topk_reference(q, k1, k2, 298, 300, GEOMETRY, SCALE)
    weights = pick_weights(q, k1, k2, blocks, 298, GEOMETRY, SCALE)
    for row, group in ((0, 0), (0, 1), (1, 0), (1, 1)):
        heads, seen = q[0, row, 4 * group : 4 * group + 4], num_pooled(299 + row, 8, 4)
        z = SCALE * heads @ k1[0, :seen, group].T
        normaliser = (SCALE * heads @ k2[0, : num_pooled(299 + row, 32, 16), group].T).logsumexp(1, keepdim=True)
        score = (z - normaliser).exp().sum(0)
        for block, weight in zip(blocks[0, row, group].tolist(), weights[0, row, group].tolist(), strict=True):
            if 1 <= block < (298 + row) // 16 - 2:
                assert abs(2**weight - float(score[4 * block - 1 : 4 * block + 4].max())) < 1e-9
            else:
                assert weight == -math.inf
