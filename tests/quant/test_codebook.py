"""Weights as entries of a codebook: nearest entries, bitsandbytes' own bytes, double quantization, odd sizes."""

import json
from typing import Any

import pytest
import torch

from salalocal.errors import CheckpointError
from salalocal.quant.codebook import (
    CODEBOOKS,
    FP4,
    NF4,
    STATE_LEAF,
    CodebookLinear,
    CodebookScheme,
    CodebookWeight,
    from_bitsandbytes,
    read_state,
    round_to_codebook,
    to_bitsandbytes,
)

KINDS = [NF4, FP4]
SHAPES = [(37, 52), (24, 64), (3, 10), (1, 2), (96, 48)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_matrix(shape: tuple[int, int], seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Heavy tails, and a block of zeros."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) / (0.1 + torch.rand(shape, generator=generator))
    weight.view(-1)[:64] = 0
    return weight.to(dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_weight_gets_the_nearest_entry_of_its_block(seed: int, kind: str, shape: tuple[int, int]) -> None:
    weight = random_matrix(shape, seed)
    quantized = round_to_codebook(weight, CodebookScheme(kind), torch.float32)
    flat, meant = weight.flatten().double(), quantized.dequantize(torch.float32).flatten().double()
    for block, start in enumerate(range(0, flat.numel(), 64)):
        values = flat[start : start + 64]
        largest = values.abs().max()
        assert float(quantized.absmax[block]) == pytest.approx(float(largest), abs=1e-37)
        entries = torch.tensor(CODEBOOKS[kind], dtype=torch.float64) * largest
        least = (values[:, None] - entries).abs().amin(dim=1)
        error = (values - meant[start : start + 64]).abs()
        assert bool((error <= least + 1e-6 * largest).all())


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_of_rows_join_to_the_whole(seed: int, kind: str) -> None:
    weight, scheme = random_matrix((40, 52), seed), CodebookScheme(kind)
    assert scheme.row_multiple(52) == 16
    pieces = [round_to_codebook(rows, scheme, torch.float32) for rows in weight.split(16)]
    joined, whole = CodebookWeight.joined(pieces), round_to_codebook(weight, scheme, torch.float32)
    assert joined.shape == whole.shape == (40, 52)
    assert torch.equal(joined.codes, whole.codes) and torch.equal(joined.absmax, whole.absmax)


@pytest.mark.parametrize("kind", KINDS)
def test_the_linear_map_multiplies_with_what_the_codes_mean(seed: int, kind: str) -> None:
    weight = round_to_codebook(random_matrix((37, 52), seed), CodebookScheme(kind), torch.float32)
    linear = CodebookLinear(weight)
    x = torch.randn(2, 3, 52, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(linear(x), x @ weight.dequantize().T)
    assert set(linear.state_dict()) == {"codes", "absmax"} and not list(linear.parameters())
    assert weight.scheme.num_bytes(37, 52) == sum(buffer.nbytes for buffer in linear.buffers())


def nested(tensors: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    """Double quantization by hand: maxima as indices into a straight line, 256 of them to a scale."""
    absmax = tensors["weight.absmax"]
    offset = float(absmax.mean())
    line = torch.linspace(-1, 1, 256)
    scales = torch.stack([part.abs().max() for part in (absmax - offset).split(256)])
    places = ((absmax - offset) / scales.repeat_interleave(256)[: len(absmax)] * 127.5 + 127.5).round()
    state = json.loads(bytes(tensors[f"{STATE_LEAF}{kind}"].tolist()))
    state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
    return {
        **tensors,
        "weight.absmax": places.to(torch.uint8),
        "weight.nested_absmax": scales,
        "weight.nested_quant_map": line,
        f"{STATE_LEAF}{kind}": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(37, 52), (512, 64)], ids=str)
def test_stored_tensors_are_read_back(seed: int, kind: str, shape: tuple[int, int]) -> None:
    weight = round_to_codebook(random_matrix(shape, seed), CodebookScheme(kind), torch.float16)
    tensors = to_bitsandbytes(weight)
    back = from_bitsandbytes(tensors)
    assert torch.equal(back.dequantize(), weight.dequantize())
    assert (back.scheme, back.shape, back.dtype) == (weight.scheme, shape, torch.float16)
    doubled = from_bitsandbytes(nested(tensors, kind))
    assert torch.equal(doubled.codes, weight.codes)
    spread = float((weight.absmax - weight.absmax.mean()).abs().max())
    assert float((doubled.absmax - weight.absmax).abs().max()) < 1.001 * spread / 255 + 1e-6


STATE: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [2, 64]}
NESTED: dict[str, Any] = {**STATE, "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}


def as_tensor(state: Any) -> torch.Tensor:
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def test_states_of_both_kinds_are_read() -> None:
    assert read_state(NF4, as_tensor(STATE)).nesting is None
    nesting = read_state(NF4, as_tensor(NESTED)).nesting
    assert nesting is not None and (nesting.block_size, nesting.offset) == (256, 0.5)


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({**STATE, "quant_type": "fp4"}, "is not one of bitsandbytes' nf4"),
        ({**STATE, "blocksize": 65}, "is not one of"),
        ({**STATE, "blocksize": 64.0}, "is not one of"),
        ({**STATE, "blocksize": None}, "is not one of"),
        ({**STATE, "dtype": ["bfloat16"]}, "is not one of"),
        ({**STATE, "shape": 128}, "is not one of"),
        ({**NESTED, "nested_offset": "0.5"}, "double quantization is not understood"),
        ({**NESTED, "nested_offset": None}, "double quantization is not understood"),
        ({**NESTED, "nested_blocksize": 0}, "double quantization is not understood"),
        ({**NESTED, "nested_blocksize": True}, "double quantization is not understood"),
        ({**NESTED, "nested_dtype": "bfloat16"}, "double quantization is not understood"),
        ([1], "JSON should be an object"),
    ],
)
def test_states_that_bitsandbytes_would_not_write_are_refused(state: Any, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        read_state(NF4, as_tensor(state))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (torch.zeros(5000, dtype=torch.uint8), "up to 4,096 bytes"),
        (torch.zeros(5, dtype=torch.int32), "up to 4,096 bytes"),
        (torch.zeros(5, 1, dtype=torch.uint8), "up to 4,096 bytes"),
        (torch.full((5,), 255, dtype=torch.uint8), "not UTF-8"),
        (torch.tensor(list(b'{"nested_offset": 1e999}'), dtype=torch.uint8), "is not one of"),
    ],
)
def test_states_that_are_no_text_are_refused(data: torch.Tensor, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        read_state(NF4, data)


def test_another_codebook_is_refused(seed: int) -> None:
    tensors = to_bitsandbytes(round_to_codebook(random_matrix((3, 10), seed), CodebookScheme(NF4), torch.float32))
    tensors["weight.quant_map"] = tensors["weight.quant_map"] + 0.01
    with pytest.raises(CheckpointError, match="quant_map does not hold the 16 values of nf4"):
        from_bitsandbytes(tensors)


def test_shapes_and_sizes_that_make_no_sense_are_the_callers_bug() -> None:
    codes, absmax = torch.zeros(64, dtype=torch.uint8), torch.zeros(2)
    CodebookWeight(codes, absmax, CodebookScheme(NF4), (2, 64), torch.float32)
    for wrong in ((codes[1:], absmax), (codes, absmax[1:]), (codes.int(), absmax), (codes, absmax.double())):
        with pytest.raises(ValueError, match="needed are"):
            CodebookWeight(*wrong, CodebookScheme(NF4), (2, 64), torch.float32)
    with pytest.raises(ValueError, match="is odd"):
        round_to_codebook(torch.zeros(4, 3), CodebookScheme(NF4), torch.float32)
    for asked in (("af4", 64), (NF4, 48)):
        with pytest.raises(ValueError, match="known are"):
            CodebookScheme(*asked)


def their_dequantized(library: Any, packed: torch.Tensor, state: Any) -> torch.Tensor:
    """What bitsandbytes makes of a matrix, given to it as one long row: its kernel for AVX512 lets no block run over
    the end of a row and is wrong where one does."""
    shape = state.shape
    state.shape = torch.Size((1, shape.numel()))
    return library.dequantize_4bit(packed, state).view(shape)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bitsandbytes_writes_the_same_bytes_and_reads_the_same_numbers(
    seed: int, kind: str, dtype: torch.dtype
) -> None:
    library = pytest.importorskip("bitsandbytes.functional")
    for shape in SHAPES:
        for block_size in (64, 128):
            weight = random_matrix(shape, seed, dtype)
            packed, state = library.quantize_4bit(weight, blocksize=block_size, quant_type=kind)
            ours = round_to_codebook(weight, CodebookScheme(kind, block_size), dtype)
            theirs = {"weight": packed, **{f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}}
            found = to_bitsandbytes(ours)
            assert found.keys() == theirs.keys()
            for leaf, tensor in theirs.items():
                assert found[leaf].dtype == tensor.dtype and torch.equal(found[leaf], tensor), (leaf, shape)
            # Both multiply in float32 and round once, to the dtype that the matrix had.
            if shape[1] % block_size == 0:
                assert torch.equal(library.dequantize_4bit(packed, state), ours.dequantize(dtype))
            assert torch.equal(their_dequantized(library, packed, state), ours.dequantize(dtype)), shape


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bitsandbytes_double_quantization_means_the_same(seed: int, kind: str, dtype: torch.dtype) -> None:
    library = pytest.importorskip("bitsandbytes.functional")
    for shape in ((37, 52), (512, 64)):
        weight = random_matrix(shape, seed, dtype)
        packed, state = library.quantize_4bit(weight, quant_type=kind, compress_statistics=True)
        stored = {"weight": packed, **{f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}}
        assert stored["weight.absmax"].dtype == torch.uint8
        back = from_bitsandbytes(stored)
        assert torch.equal(their_dequantized(library, packed, state), back.dequantize(dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_bitsandbytes_restores_what_we_write(seed: int, kind: str) -> None:
    library = pytest.importorskip("bitsandbytes")
    ours = round_to_codebook(random_matrix((96, 128), seed, torch.bfloat16), CodebookScheme(kind), torch.bfloat16)
    tensors = to_bitsandbytes(ours)
    parameter = library.nn.Params4bit.from_prequantized(
        data=tensors.pop("weight"), quantized_stats=tensors, device="cpu"
    )
    found = library.functional.dequantize_4bit(parameter.data, parameter.quant_state)
    assert found.dtype == torch.bfloat16 and torch.equal(found, ours.dequantize(torch.bfloat16))
