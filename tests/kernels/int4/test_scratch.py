"""Decoding packed weights into a scratch: kernel = reference = definition, and how little int8 rounding adds."""

from pathlib import Path

import pytest
import torch

from salalocal.errors import BackendError
from salalocal.kernels.int4 import scratch as module
from salalocal.kernels.int4.activations_by_row import from_split_order
from salalocal.kernels.int4.scratch import (
    Int4Weight,
    decode_bf16,
    decode_bf16_reference,
    decode_bf16_triton,
    decode_fp8,
    decode_fp8_reference,
    decode_fp8_triton,
    decode_int8,
    decode_int8_definition,
    decode_int8_reference,
    decode_int8_triton,
    folded_factors,
    fp8_scales,
    int4_weight,
)
from salalocal.kernels.packed_matmul import dequantize_rows
from salalocal.kernels.packing import pack_codes


def random_int4(
    num_out: int, num_in: int, group_size: int, seed: int, dtype: torch.dtype = torch.bfloat16, bits: int = 4
) -> Int4Weight:
    """Codes of every value, scales within a factor of two, a row of zeros and a negative scale."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(-(2**31), 2**31, (num_out, num_in * bits // 32), generator=generator).to(torch.int32)
    scales = torch.rand(num_out, num_in // group_size, generator=generator) * 0.01 + 0.01
    scales[1], scales[2, 0] = 0, -0.015
    return int4_weight(words, scales.to(dtype), group_size, bits)


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("shape", [(9, 128), (24, 640)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_int8_weights_are_the_definition_to_the_last_bit(
    seed: int, group_size: int, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = random_int4(*shape, group_size, seed, dtype)
    exact = decode_int8_definition(weight)
    assert torch.equal(decode_int8_reference(weight), exact)
    guarded = torch.full((shape[0] + 2, shape[1]), -128, dtype=torch.int8)
    assert torch.equal(decode_int8_triton(weight, guarded[1:-1]), exact)
    assert guarded[0].eq(-128).all() and guarded[-1].eq(-128).all()
    assert torch.equal(decode_int8(weight, torch.empty(shape, dtype=torch.int8)), exact)
    assert exact.abs().max() <= 127 and exact[1].eq(0).all() and weight.row_scales[1] == 0


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_eight_bits_get_one_scale_a_row(seed: int, group_size: int) -> None:
    weight = random_int4(9, 640, group_size, seed, bits=8)
    assert weight.shape == (9, 640)
    exact, reference = decode_int8_definition(weight), decode_int8_reference(weight)
    differences = (
        reference.int() - exact.int()
    ).abs()  # where a group has half the scale of its row, halves are common
    assert differences.max() <= 1 and differences.float().mean() < 1e-2
    guarded = torch.full((11, 640), -77, dtype=torch.int8)
    assert torch.equal(decode_int8_triton(weight, guarded[1:-1]), reference)
    assert guarded[0].eq(-77).all() and guarded[-1].eq(-77).all()
    assert torch.equal(decode_int8(weight, torch.empty(9, 640, dtype=torch.int8)), reference)
    values = from_split_order(reference).double() * weight.row_scales.double().unsqueeze(1)
    plain = dequantize_rows(weight.words, weight.scales, 8, group_size, None, torch.float64)
    assert (values - plain).abs().amax(dim=1).le(0.5001 * weight.row_scales).all()
    assert values[1].eq(0).all() and plain[0].abs().max() > 100 * weight.row_scales[0]


def test_fp8_of_eight_bits_is_within_a_step(seed: int) -> None:
    weight = random_int4(9, 256, 64, seed, bits=8)
    values = from_split_order(decode_fp8_reference(weight)).double() * fp8_scales(weight).double().unsqueeze(1)
    exact = dequantize_rows(weight.words, weight.scales, 8, 64, None, torch.float64)
    assert torch.allclose(values, exact, rtol=1 / 15, atol=float(weight.row_scales.max()) * 1e-2)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_bf16_weights_are_the_dequantized_ones(seed: int, group_size: int, bits: int) -> None:
    weight = random_int4(9, 640, group_size, seed, bits=bits)
    expected = dequantize_rows(weight.words, weight.scales, bits, group_size, None, torch.bfloat16)
    assert torch.equal(decode_bf16_reference(weight), expected)
    guarded = torch.full((11, 640), torch.nan, dtype=torch.bfloat16)
    assert torch.equal(decode_bf16_triton(weight, guarded[1:-1]), expected)
    assert guarded[0].isnan().all() and guarded[-1].isnan().all()
    assert torch.equal(decode_bf16(weight, torch.empty(9, 640, dtype=torch.bfloat16)), expected)


def test_fp8_weights_are_within_a_step(seed: int) -> None:
    # The interpreter loses a carry into the exponent; tests/gpu holds the kernel to the last bit.
    weight = random_int4(9, 256, 64, seed)
    reference = decode_fp8_reference(weight)
    made = decode_fp8_triton(weight, torch.empty(9, 256, dtype=torch.float8_e4m3fn))
    assert made.float().isclose(reference.float()).float().mean() > 0.9
    assert torch.equal(decode_fp8(weight, torch.empty_like(made)).float(), reference.float())
    values = from_split_order(reference).double() * fp8_scales(weight).double().unsqueeze(1)
    exact = dequantize_rows(weight.words, weight.scales, 4, 64, None, torch.float64)
    assert torch.allclose(values, exact, rtol=1 / 15, atol=1e-12)


def test_int8_rounding_adds_little_to_the_error_of_int4(seed: int) -> None:
    """Weights rounded to 4 bits with scales of their groups: what folding adds is under 2 % of that error's energy."""
    generator = torch.Generator().manual_seed(seed)
    original = torch.randn(64, 1024, generator=generator)
    groups = original.view(64, 8, 128)
    scales = (groups.abs().amax(dim=-1) / 7.5).bfloat16()
    codes = (groups / scales.float().unsqueeze(-1)).round().clamp(-8, 7).reshape(64, 1024) + 8
    weight = int4_weight(pack_codes(codes.to(torch.uint8), 4), scales, 128)
    int4 = dequantize_rows(weight.words, weight.scales, 4, 128, None, torch.float64)
    int8 = from_split_order(decode_int8_reference(weight)).double() * weight.row_scales.double().unsqueeze(1)
    before, added = (int4 - original).square().sum(), (int8 - int4).square().sum()
    print(f"adds {float(added / before):.2%} of the error energy of int4")
    assert added < 0.02 * before
    assert (int8 - int4).abs().amax(dim=1).le(weight.row_scales).all()


def test_the_assembly_computes_the_formula() -> None:
    """The words of the inline assembly, run here as integers for every code beside every factor."""
    code, factor = torch.arange(16).view(-1, 1, 1), torch.arange(-254, 255).view(1, -1, 1)
    lower = torch.arange(16).view(1, 1, -1)  # what stands in the other half and may lend
    mask = 2**32 - 1
    tail = ((136 - factor * 128) * 65537) & mask
    raised = ((lower | code << 16) * ((factor * 16) & mask) + tail) & mask
    unraised = ((lower << 4 | code << 20) * (factor & mask) + tail) & mask
    for word in (raised, unraised):
        for half, nibble in ((word >> 24, code), ((word >> 8) & 255, lower)):
            signed = torch.where(half > 127, half - 256, half)
            assert torch.equal(signed, (((nibble - 8) * factor + 8) >> 4).expand_as(signed))
    source = Path(module.__file__).read_text()
    assert "(136 - factors * 128) * 65537" in source and "0x7351" in source


def test_factors_fit_nine_bits(seed: int) -> None:
    factors = folded_factors(random_int4(24, 1024, 64, seed))
    assert factors.abs().amax(dim=1)[2:].eq(254).all() and factors.min() < 0


def test_shapes_that_no_kernel_takes_are_refused(seed: int) -> None:
    words = torch.zeros(8, 20, dtype=torch.int32)
    with pytest.raises(BackendError, match="groups of 32"):
        int4_weight(words, torch.ones(8, 5).bfloat16(), 32)  # 160 features
    with pytest.raises(BackendError, match="groups of 16"):
        int4_weight(torch.zeros(8, 16, dtype=torch.int32), torch.ones(8, 8).bfloat16(), 16)
    with pytest.raises(ValueError, match="scales are"):
        int4_weight(torch.zeros(8, 16, dtype=torch.int32), torch.ones(8, 2).bfloat16(), 128)
    with pytest.raises(ValueError, match="scratch is"):
        decode_int8_triton(random_int4(8, 128, 128, seed), torch.empty(8, 256, dtype=torch.int8))
