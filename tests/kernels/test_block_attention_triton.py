"""The attention kernel over picked blocks against the definition in float64, and the unions that it walks."""

import math
import random
from dataclasses import fields

import pytest
import torch
from torch import Tensor

import salalocal.kernels.block_attention as attention_room
from salalocal.errors import BackendError
from salalocal.kernels.block_attention import (
    KeyValues,
    block_attention,
    block_attention_definition,
    block_attention_reference,
    block_attention_triton,
    decode,
)
from salalocal.kernels.block_attention.decode import block_attention_decode
from salalocal.kernels.block_attention.prefill import merge_blocks
from salalocal.kernels.gate import sigmoid_gate_reference
from salalocal.kernels.kv_cache import quantize_tokens_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK, DIM, GROUPS, HEADS, SCALE = 16, 16, 2, 4, 0.3


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each costs the interpreter the same; some must have more than one block, and some none."""
    monkeypatch.setattr(decode, "LAUNCH", {80: decode.DecodeLaunch(programs=18, parts=9, num_warps=4)})


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


def to_device(cached: KeyValues) -> KeyValues:
    return KeyValues(*(None if x is None else x.to(DEVICE) for x in (getattr(cached, f.name) for f in fields(cached))))


def attend(q: Tensor, cached: KeyValues, picks: Tensor, first: int) -> Tensor:
    """The kernel of many rows."""
    return block_attention_triton(q.to(DEVICE), to_device(cached), picks.to(DEVICE), first, BLOCK, SCALE).cpu()


def attend_few(q: Tensor, cached: KeyValues, picks: Tensor, first: int, gate: Tensor | None = None) -> Tensor:
    """The kernels of a step."""
    position = torch.tensor([first], device=DEVICE)
    gate = None if gate is None else gate.to(DEVICE)
    return block_attention_decode(q.to(DEVICE), to_device(cached), picks.to(DEVICE), position, BLOCK, SCALE, gate).cpu()


def in_8_bits(k: Tensor, v: Tensor, room: int = 0) -> KeyValues:
    """Codes and scales, poisoned behind the last token."""
    cached = []
    for x in (k, v):
        codes, scales = quantize_tokens_reference(x)
        behind = (
            torch.full((1, room, *codes.shape[2:]), -128, dtype=torch.int8),
            torch.full((1, room, GROUPS), math.nan),
        )
        cached.append((torch.cat([codes, behind[0]], 1), torch.cat([scales, behind[1].bfloat16()], 1)))
    return KeyValues(cached[0][0], cached[1][0], cached[0][1], cached[1][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(("num_tokens", "num_rows"), [(333, 9), (64, 64), (65, 6), (7, 7)])
def test_errs_no_more_than_torch(num_tokens: int, num_rows: int, dtype: torch.dtype, seed: int) -> None:
    q, k, v, picks = draw(seed, num_tokens, num_rows, dtype)
    first = num_tokens - num_rows
    exact = block_attention_definition(q.double(), k.double(), v.double(), picks, first, BLOCK, SCALE)
    found = attend(q, KeyValues(k, v), picks, first)
    plain = block_attention_reference(q, k, v, picks, first, BLOCK, SCALE)
    error, plain_error = ((x.double() - exact).norm() / exact.norm() for x in (found, plain))
    weights_rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    assert error < 2 * plain_error + weights_rounding + 1e-6


def test_strides_and_memory_around_the_output(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, picks = (x.to(DEVICE) for x in draw(seed, 100, 5, torch.float32))
    expected = block_attention_triton(q, KeyValues(k, v), picks, 95, BLOCK, SCALE)
    memory = torch.full((q.numel() + 128,), math.nan, device=DEVICE)
    monkeypatch.setattr(torch, "empty_like", lambda x: memory[64:-64].view(x.shape))
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    found = block_attention_triton(strided[0], KeyValues(*strided[1:]), picks, 95, BLOCK, SCALE)
    assert torch.equal(found, expected)
    assert memory[:64].isnan().all() and memory[-64:].isnan().all()


def test_huge_scores_neither_overflow_nor_spread(seed: int) -> None:
    q, k, v, picks = draw(seed, 100, 5, torch.float32)
    q, k = q.round(), k.round()  # whole numbers: scores are equal or far apart, never apart by a rounding
    found = attend(1e4 * q, KeyValues(k, v), picks, 95)
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
        block_attention_triton(q, KeyValues(k, k), torch.zeros(1, 1, 1, 4, dtype=torch.int64), 0, block, SCALE)


def test_shapes_that_do_not_fit_are_refused() -> None:
    q, k = torch.zeros(1, 2, 2, 16), torch.zeros(1, 1, 1, 16)
    with pytest.raises(ValueError, match="only 1 keys"):
        block_attention_triton(q, KeyValues(k, k), torch.zeros(1, 2, 1, 4, dtype=torch.int64), 0, 16, SCALE)


@pytest.mark.parametrize("is_quantized", [False, True], ids=["bf16", "int8"])
@pytest.mark.parametrize(("num_tokens", "num_rows"), [(333, 1), (321, 5), (16, 16), (3, 2)])
def test_decode_errs_no_more_than_torch(num_tokens: int, num_rows: int, is_quantized: bool, seed: int) -> None:
    q, k, v, picks = draw(seed, num_tokens, num_rows, torch.bfloat16)
    first = num_tokens - num_rows
    if is_quantized:
        cached = in_8_bits(k, v, room=40)
        wide = cached.widened(torch.float32)
        k, v = wide.keys[:, :num_tokens], wide.values[:, :num_tokens]
    else:
        room = torch.full((1, 40, GROUPS, DIM), math.nan, dtype=k.dtype)  # of a cache that is not full
        cached = KeyValues(torch.cat([k, room], 1), torch.cat([v, room], 1))
    exact = block_attention_definition(q.double(), k.double(), v.double(), picks, first, BLOCK, SCALE)
    found = attend_few(q, cached, picks, first)
    plain = block_attention_reference(q, k, v, picks, first, BLOCK, SCALE)
    error, plain_error = ((x.double() - exact).norm() / exact.norm() for x in (found, plain))
    assert error < 2 * plain_error + torch.finfo(torch.bfloat16).eps / 2


@pytest.mark.parametrize(("num_tokens", "num_rows"), [(333, 9), (64, 64)])
def test_8_bits_are_dequantized_on_the_way(num_tokens: int, num_rows: int, seed: int) -> None:
    q, k, v, picks = draw(seed, num_tokens, num_rows, torch.bfloat16)
    first = num_tokens - num_rows
    cached = in_8_bits(k, v)
    wide = cached.widened(torch.float64)
    exact = block_attention_definition(q.double(), wide.keys, wide.values, picks, first, BLOCK, SCALE)
    found = attend(q, cached, picks, first)
    plain = block_attention_reference(q, wide.keys.float(), wide.values.float(), picks, first, BLOCK, SCALE)
    error, plain_error = ((x.double() - exact).norm() / exact.norm() for x in (found, plain))
    assert error < 2 * plain_error + torch.finfo(torch.bfloat16).eps / 2


@pytest.mark.parametrize("num_rows", [1, 4])
def test_decode_gates_as_the_gate_does(num_rows: int, seed: int) -> None:
    q, k, v, picks = draw(seed, 200, num_rows, torch.bfloat16)
    stacked = 3 * torch.randn(num_rows, 7 + HEADS * GROUPS * DIM, generator=torch.Generator().manual_seed(seed))
    gate = stacked.bfloat16()[:, 7:]
    plain = attend_few(q, KeyValues(k, v), picks, 200 - num_rows)
    gated = attend_few(q, KeyValues(k, v), picks, 200 - num_rows, gate)
    expected = sigmoid_gate_reference(plain.flatten(2), gate[None]).view_as(plain)
    is_other = gated != expected  # by the last bit of a gate, where two exponentials round apart
    assert is_other.float().mean() < 0.01
    torch.testing.assert_close(gated, expected, rtol=2**-6, atol=0)


def test_what_the_kernels_do_not_take_is_the_references(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card: fp32, small heads, and whatever is to have a gradient."""
    monkeypatch.setattr(attention_room, "use_triton", lambda *tensors: True)
    q, k, v, picks = draw(seed, 40, 5, torch.float32)
    expected = block_attention_reference(q, k, v, picks, 35, BLOCK, SCALE)
    assert torch.equal(block_attention(q, KeyValues(k, v), picks, 35, BLOCK, SCALE), expected)
    halves = [x.bfloat16() for x in (q, k, v)]
    small = [x[..., :8] for x in halves]
    assert block_attention(small[0], KeyValues(*small[1:]), picks, 35, BLOCK, SCALE).shape == small[0].shape
    halves[0].requires_grad_()
    assert block_attention(halves[0], KeyValues(*halves[1:]), picks, 35, BLOCK, SCALE).requires_grad
    with torch.no_grad():
        assert not block_attention(halves[0], KeyValues(*halves[1:]), picks, 35, BLOCK, SCALE).requires_grad


def test_decode_refuses_more_rows_than_it_has_tiles_for() -> None:
    q, k = torch.zeros(1, 17, 2, 16), torch.zeros(1, 20, 1, 16)
    picks = torch.zeros(1, 17, 1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="1 to 16 rows"):
        block_attention_decode(q, KeyValues(k, k), picks, torch.tensor([3]), 16, SCALE)
    with pytest.raises(ValueError, match="gate is"):
        block_attention_decode(
            q[:, :2], KeyValues(k, k), picks[:, :2], torch.tensor([3]), 16, SCALE, torch.zeros(1, 32)
        )
