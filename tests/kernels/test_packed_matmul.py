"""Multiplying with packed weights: reference = definition, in every dtype, and torch's int4 kernel no worse than
torch's own linear."""

import pytest
import torch
from quantized_cases import random_weight
from torch.nn import functional

from salalocal.kernels import packed_matmul as module
from salalocal.kernels.packed_matmul import (
    cpu_int4_matmul,
    dequantize_rows,
    has_cpu_int4,
    packed_matmul,
    packed_matmul_definition,
    packed_matmul_reference,
    to_cpu_int4,
)
from salalocal.quant.int4 import IntScheme, PackedWeight

SCHEMES = [
    IntScheme(4, 128),
    IntScheme(4, 32),
    IntScheme(8, 32),
    IntScheme(4, 1000),
    IntScheme(4, 40),
    IntScheme(8, 96),
]
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def relative_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    return float((value.double() - exact.double()).norm() / exact.double().norm())


def parts(weight: PackedWeight) -> tuple[torch.Tensor, torch.Tensor, int, int, torch.Tensor | None]:
    return weight.words, weight.scales, weight.bits, weight.group_size, weight.group_index


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", [(1,), (2, 3), (65,)])
def test_the_reference_is_the_definition(
    seed: int,
    scheme: IntScheme,
    act_order: bool,
    dtype: torch.dtype,
    rows: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = random_weight(72, 256, scheme, seed, act_order)
    x = torch.randn(*rows, 256, generator=torch.Generator().manual_seed(seed)).to(dtype)
    packed = parts(weight.packed())
    exact = functional.linear(x.double(), weight.dequantize(torch.float64))
    assert relative_error(packed_matmul_definition(x.double(), *packed), exact) < 1e-13
    monkeypatch.setattr(module, "TILE_WEIGHTS", 20 * 256)  # tiles of 20, 20, 20 and 12 rows
    y = packed_matmul_reference(x, *packed)
    assert y.dtype == dtype and y.shape == (*rows, 72)
    assert relative_error(y, exact) < TOLERANCE[dtype]
    assert torch.equal(packed_matmul(x, *packed), y)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rows_are_dequantized_to_what_the_codes_mean(seed: int, dtype: torch.dtype) -> None:
    for scheme in SCHEMES:
        weight = random_weight(24, 256, scheme, seed, act_order=scheme.group_size == 32)
        assert torch.equal(dequantize_rows(*parts(weight.packed()), dtype), weight.dequantize(dtype))


@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
@pytest.mark.parametrize("rows", [(1,), (2, 16), (257,)])
def test_the_cpu_kernel_is_as_exact_as_a_bfloat16_product_can_be(
    seed: int, group_size: int, rows: tuple[int, ...]
) -> None:
    weight = random_weight(48, 256, IntScheme(4, group_size), seed)
    packed = weight.packed()
    assert has_cpu_int4(*parts(packed), torch.bfloat16)
    x = torch.randn(*rows, 256, generator=torch.Generator().manual_seed(seed)).bfloat16()
    y = cpu_int4_matmul(x, *to_cpu_int4(packed.words, packed.scales), group_size)
    exact = packed_matmul_definition(x.double(), *parts(packed))
    assert y.shape == (*rows, 48) and y.dtype == torch.bfloat16
    plain = relative_error(functional.linear(x, weight.dequantize(torch.bfloat16)), exact)
    assert relative_error(y, exact) < 2 * plain + 1e-3


@pytest.mark.parametrize(
    ("shape", "scheme", "act_order", "scale_dtype", "dtype"),
    [
        ((48, 256), IntScheme(8, 128), False, torch.bfloat16, torch.bfloat16),
        ((48, 256), IntScheme(4, 16), False, torch.bfloat16, torch.bfloat16),
        ((48, 96), IntScheme(4, 64), False, torch.bfloat16, torch.bfloat16),
        ((40, 256), IntScheme(4, 128), False, torch.bfloat16, torch.bfloat16),
        ((48, 256), IntScheme(4, 128), True, torch.bfloat16, torch.bfloat16),
        ((48, 256), IntScheme(4, 128), False, torch.float16, torch.bfloat16),
        ((48, 256), IntScheme(4, 128), False, torch.bfloat16, torch.float32),
    ],
    ids=str,
)
def test_the_cpu_kernel_is_left_alone_where_it_is_wrong_coarse_or_slow(
    shape: tuple[int, int], scheme: IntScheme, act_order: bool, scale_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    weight = random_weight(*shape, scheme, 1, act_order, scale_dtype)
    assert not has_cpu_int4(*parts(weight.packed()), dtype)
