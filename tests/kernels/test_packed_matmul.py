"""Multiplying with packed weights: reference = definition, in every dtype."""

import pytest
import torch
from quantized_cases import random_weight
from torch.nn import functional

from salalocal.kernels import packed_matmul as module
from salalocal.kernels.packed_matmul import (
    dequantize_rows,
    packed_matmul,
    packed_matmul_definition,
    packed_matmul_reference,
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
