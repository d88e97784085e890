"""Appending to a KV cache: the kernel writes what the reference writes, the reference what the formula says."""

import math
import random
from collections.abc import Callable
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from salalocal.errors import BackendError
from salalocal.kernels.block_topk import BlockGeometry
from salalocal.kernels.kv_cache import (
    RECENT_TOKENS,
    CacheRows,
    KeyValues,
    append_tokens_definition,
    append_tokens_reference,
    append_tokens_triton,
    quantize_tokens_definition,
    quantize_tokens_reference,
)
from salalocal.kernels.pooled_keys import num_pooled, pooled_keys_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GEOMETRY = BlockGeometry(kernel_size=32, kernel_stride=16, block_size=64, init_blocks=1, window_size=64, topk=4)
HEADS, DIM, GUARD = 2, 16, 5
Append = Callable[[CacheRows, Tensor, Tensor, Tensor, BlockGeometry], None]


def empty_rows(capacity: int, is_quantized: bool, device: str = DEVICE) -> CacheRows:
    """Buffers full of NaN or of a code that no rounding gives, with a little room behind."""
    num_fine, num_coarse = num_pooled(capacity, 32, 16) + GUARD, num_pooled(capacity, 128, 64) + GUARD

    def poisoned(*shape: int) -> Tensor:
        return torch.full(shape, math.nan, dtype=torch.bfloat16, device=device)

    pooled = {"k1": poisoned(HEADS, num_fine, DIM), "k2": poisoned(HEADS, num_coarse, DIM)}
    if not is_quantized:
        k, v = poisoned(HEADS, capacity, DIM), poisoned(HEADS, capacity, DIM)
        return CacheRows(keys=k, values=v, key_scales=None, value_scales=None, recent=None, **pooled)
    codes = torch.full((2, HEADS, capacity, DIM), -128, dtype=torch.int8, device=device)
    scales = poisoned(2, HEADS, capacity)
    return CacheRows(*codes, *scales, recent=poisoned(RECENT_TOKENS, HEADS, DIM), **pooled)


def draw(seed: int, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Keys and values [T, H, D] in bf16, as slices of one projection's output."""
    generator = torch.Generator().manual_seed(seed)
    stacked = torch.randn(num_tokens, 3, HEADS, DIM, generator=generator).bfloat16().to(DEVICE)
    return stacked[:, 1], stacked[:, 2]


def run(append: Append, rows: CacheRows, k: Tensor, v: Tensor, steps: list[tuple[int, int]]) -> None:
    """Calls with tokens first .. last - 1 each."""
    for first, last in steps:
        append(rows, k[first:last], v[first:last], torch.tensor([first], device=rows.keys.device), GEOMETRY)


def assert_same(found: CacheRows, expected: CacheRows) -> None:
    for field in fields(CacheRows):
        one, other = getattr(found, field.name), getattr(expected, field.name)
        assert (one is None) == (other is None)
        if one is not None:
            one, other = one.cpu(), other.cpu()
            assert ((one == other) | ((one != one) & (other != other))).all(), field.name


def random_steps(rng: random.Random, num_tokens: int) -> list[tuple[int, int]]:
    """A prompt, then steps of 1 to 16 tokens, some of which begin inside the one before."""
    at = rng.choice([1, 100, 127, 130, 200])
    steps = [(0, at)]
    while at < num_tokens:
        first = at - rng.choice([0, 0, rng.randrange(steps[-1][1] - steps[-1][0])]) if len(steps) > 1 else at
        at = min(num_tokens, first + rng.choice([1, 3, 16, 16]))
        steps.append((first, at))
    return steps


@pytest.mark.parametrize("is_quantized", [False, True], ids=["bf16", "int8"])
@pytest.mark.parametrize("num_tokens", [1, 31, 128, 300, 519])
def test_one_call_writes_what_the_formula_says(num_tokens: int, is_quantized: bool, seed: int) -> None:
    k, v = draw(seed, num_tokens)
    found, expected, plain = (empty_rows(num_tokens + GUARD, is_quantized) for _ in range(3))
    run(append_tokens_triton, found, k, v, [(0, num_tokens)])
    run(append_tokens_reference, plain, k, v, [(0, num_tokens)])
    run(append_tokens_definition, expected, k, v, [(0, num_tokens)])
    assert_same(found, plain)
    for name in ("keys", "values", "key_scales", "value_scales"):
        if getattr(plain, name) is not None:
            assert torch.equal(getattr(plain, name)[:, :num_tokens], getattr(expected, name)[:, :num_tokens]), name
    for one, other in ((plain.k1, expected.k1), (plain.k2, expected.k2)):
        torch.testing.assert_close(one, other, rtol=2**-7, atol=1e-6, equal_nan=True)  # one rounding to bf16


@pytest.mark.parametrize("is_quantized", [False, True], ids=["bf16", "int8"])
def test_any_steps_with_rejected_drafts_write_what_one_call_writes(is_quantized: bool, seed: int) -> None:
    k, v = draw(seed, 290)
    whole = empty_rows(290 + GUARD, is_quantized)
    run(append_tokens_reference, whole, k, v, [(0, 290)])
    steps = random_steps(random.Random(seed), 290)
    for append in (append_tokens_triton, append_tokens_reference):
        rows = empty_rows(290 + GUARD, is_quantized)
        for (first, last), following in zip(steps, [*steps[1:], (290, 290)], strict=True):
            kept = min(following[0], last)  # tokens behind it are drafts, which come out otherwise than the text
            drafts = [x[first:last].clone() for x in (k, v)]
            for x in drafts:
                x[kept - first :] += 1
            append(rows, *drafts, torch.tensor([first], device=DEVICE), GEOMETRY)
        assert_same(rows, whole)


def test_means_are_those_of_the_pooled_keys(seed: int) -> None:
    k, v = draw(seed, 400)
    for is_quantized in (False, True):
        rows = empty_rows(400 + GUARD, is_quantized)
        run(append_tokens_triton, rows, k, v, [(0, 130), (130, 131), (131, 400)])
        for found, size, stride in ((rows.k1, 32, 16), (rows.k2, 128, 64)):
            count = num_pooled(400, size, stride)
            assert torch.equal(
                found[:, :count].transpose(0, 1), pooled_keys_reference(k[None], 0, count, size, stride)[0]
            )
            assert found[:, count:].isnan().all()


def test_scales_are_rounded_up_and_codes_stay_in_range(seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(500, DIM) * torch.logspace(-30, 30, 500)[:, None]
    x[7] = 0
    codes, scales = quantize_tokens_reference(x)
    assert (scales.double() * 127 >= x.double().abs().amax(-1)).all()
    assert (scales.double() * 127 <= x.double().abs().amax(-1) * (1 + 2**-7)).all()
    error = (codes.double() * scales.double()[:, None] - x.double()).abs().amax(-1)
    assert (error <= 0.5001 * scales.double()).all() and not codes[7].any() and codes.min() > -128
    exact = quantize_tokens_definition(x)
    assert torch.equal(scales, exact[1]) and (codes.int() - exact[0].int()).abs().max() <= 1
    exact = quantize_tokens_definition(
        x.bfloat16()
    )  # quotients of half precisions are no nearer to a tie than fp32 sees
    found = quantize_tokens_reference(x.bfloat16())
    assert torch.equal(found[0], exact[0]) and torch.equal(found[1], exact[1])


@pytest.mark.parametrize("damage", [math.nan, math.inf])
def test_tokens_that_are_no_numbers_show_in_their_scale(damage: float, seed: int) -> None:
    k, v = draw(seed, 5)
    k[2, 1, 3] = damage
    found, expected = empty_rows(9, True), empty_rows(9, True)
    run(append_tokens_triton, found, k, v, [(0, 5)])
    run(append_tokens_reference, expected, k, v, [(0, 5)])
    assert_same(found, expected)
    assert found.key_scales is not None and found.key_scales[1, 2].isnan() and not found.key_scales[0, :5].isnan().any()


def test_views_for_attention_have_tokens_before_heads(seed: int) -> None:
    k, v = draw(seed, 20)
    rows = empty_rows(20, True)
    run(append_tokens_triton, rows, k, v, [(0, 20)])
    wide = rows.key_values.widened(torch.float32)
    assert wide.keys.shape == (1, 20, HEADS, DIM) and wide.key_scales is None
    for found, exact in ((wide.keys[0], k), (wide.values[0], v)):
        assert (found - exact.float()).abs().max() < exact.float().abs().max() / 250
    plain = KeyValues(k[None], v[None])
    assert plain.widened(torch.float32) is plain
    few = rows.key_values.first(7)
    assert few.key_scales is not None and few.keys.shape[1] == few.key_scales.shape[1] == 7
    assert torch.equal(few.widened(torch.float32).values, wide.values[:, :7])


def test_what_does_not_fit_is_refused(seed: int) -> None:
    k, v = draw(seed, 4)
    rows = empty_rows(9, False)
    position = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="do not fit"):
        append_tokens_triton(rows, k[:, :1], v[:, :1], position, GEOMETRY)
    with pytest.raises(ValueError, match="to no other"):
        append_tokens_reference(replace(rows, recent=empty_rows(9, True).recent), k, v, position, GEOMETRY)
    with pytest.raises(ValueError, match="dense"):
        append_tokens_reference(
            replace(rows, k1=rows.k1.transpose(0, 1).contiguous().transpose(0, 1)), k, v, position, GEOMETRY
        )
    odd = BlockGeometry(kernel_size=12, kernel_stride=4, block_size=16, init_blocks=1, window_size=32, topk=6)
    with pytest.raises(BackendError, match="kernel_size is 12"):
        append_tokens_triton(rows, k, v, position, odd)
    with pytest.raises(ValueError, match="missing"):
        KeyValues(torch.zeros(1, 2, 1, 4, dtype=torch.int8), torch.zeros(1, 2, 1, 4, dtype=torch.int8))


@pytest.mark.parametrize("is_quantized", [False, True], ids=["bf16", "int8"])
def test_keys_and_values_are_copied_to_where_queries_are(is_quantized: bool, seed: int) -> None:
    rows, (k, v) = empty_rows(200, is_quantized), draw(seed, 170)
    run(append_tokens_reference, rows, k, v, [(0, 170)])
    cached = rows.key_values.first(170)
    here = cached.beside(k[None])
    assert here is cached or is_quantized
    blocks = torch.arange(3, device=DEVICE).expand(HEADS, -1)
    copies = cached.gathered(blocks, 64)
    for name in ("keys", "values", "key_scales", "value_scales"):
        copy, original = getattr(copies, name), getattr(cached, name)
        assert (copy is None) == (original is None)
        if original is not None:
            assert copy.shape[1] == 192 and torch.equal(copy[:, :170], original) and not copy[:, 170:].any()
            assert copy.untyped_storage().data_ptr() != original.untyped_storage().data_ptr()
    # What lies elsewhere is gathered whole, then widened: a device of another name stands for it.
    other = torch.device("cpu", 0) if DEVICE == "cpu" else torch.device("cuda")
    query = SimpleNamespace(device=other, dtype=torch.bfloat16)
    assert query.device != cached.keys.device
    elsewhere, wide = cached.beside(query), cached.widened(torch.bfloat16)  # type: ignore[arg-type]
    assert torch.equal(elsewhere.keys, wide.keys) and torch.equal(elsewhere.values, wide.values)
    assert elsewhere.keys.untyped_storage().data_ptr() != cached.keys.untyped_storage().data_ptr()
