"""The int8 GEMM: the kernel makes the bits of the reference, which rounds the definition once."""

import pytest
import torch

from salalocal.errors import BackendError
from salalocal.kernels.int4.activations_by_row import QuantizedRows, quantize_rows
from salalocal.kernels.int4.gemm_launch import GemmLaunch
from salalocal.kernels.int4.int8_gemm import (
    Residual,
    int8_gemm,
    int8_gemm_definition,
    int8_gemm_reference,
    int8_gemm_triton,
)

ROUNDING = {torch.bfloat16: 2**-8, torch.float32: 1e-6}


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def operands(generator: torch.Generator, m: int, n: int, k: int) -> tuple[QuantizedRows, torch.Tensor, torch.Tensor]:
    x = quantize_rows(torch.randn(m, k, generator=generator))
    w = torch.randint(-127, 128, (n, k), generator=generator).to(torch.int8)
    return x, w, torch.rand(n, generator=generator) * 0.01


@pytest.mark.parametrize("shape", [(1, 40, 128), (33, 72, 384)])
@pytest.mark.parametrize("has_tma", [False, True])
@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_the_kernel_makes_the_bits_of_the_reference(
    generator: torch.Generator, shape: tuple[int, int, int], has_tma: bool, has_residual: bool, dtype: torch.dtype
) -> None:
    m, n, _ = shape
    x, w, row_scales = operands(generator, *shape)
    residual = Residual(torch.randn(m, n, generator=generator).to(dtype), 0.25) if has_residual else None
    expected = int8_gemm_reference(x, w, row_scales, torch.empty(m, n, dtype=dtype), residual)
    exact = int8_gemm_definition(x, w, row_scales, residual)
    assert torch.allclose(expected.double(), exact, rtol=ROUNDING[dtype], atol=1e-6)
    guarded = torch.full((m + 2, n), torch.nan, dtype=dtype)
    int8_gemm_triton(
        x, w, row_scales, guarded[1:-1], residual, GemmLaunch(16, 32, num_stages=2, has_tma=has_tma, span=2)
    )
    assert torch.equal(guarded[1:-1], expected)
    assert guarded[0].isnan().all() and guarded[-1].isnan().all()
    assert torch.equal(int8_gemm(x, w, row_scales, torch.empty(m, n, dtype=dtype), residual), expected)


def test_the_product_may_land_on_the_residual(generator: torch.Generator) -> None:
    x, w, row_scales = operands(generator, 20, 40, 128)
    stream = torch.randn(20, 40, generator=generator)
    expected = int8_gemm_reference(x, w, row_scales, torch.empty(20, 40), Residual(stream.clone(), 0.5))
    made = int8_gemm_triton(x, w, row_scales, stream, Residual(stream, 0.5), GemmLaunch(16, 32, num_stages=2))
    assert made is stream and torch.equal(stream, expected)


def test_a_damaged_row_stays_damaged_and_alone(generator: torch.Generator) -> None:
    values = torch.randn(3, 128, generator=generator)
    values[1, 5] = torch.nan
    w = torch.ones(16, 128, dtype=torch.int8)
    y = int8_gemm_triton(
        quantize_rows(values), w, torch.ones(16), torch.empty(3, 16), None, GemmLaunch(16, 16, num_stages=2)
    )
    assert y.isnan().any(dim=1).tolist() == [False, True, False]


def test_no_rows_are_no_work() -> None:
    x = quantize_rows(torch.ones(2, 128))
    empty = QuantizedRows(x.codes[:0], x.scales[:0])
    assert int8_gemm_triton(empty, torch.ones(8, 128, dtype=torch.int8), torch.ones(8), torch.empty(0, 8)).shape == (
        0,
        8,
    )


def test_shapes_that_do_not_belong_together_are_refused(generator: torch.Generator) -> None:
    x, w, row_scales = operands(generator, 4, 8, 128)
    with pytest.raises(ValueError, match="out"):
        int8_gemm_triton(x, w, row_scales, torch.empty(4, 9))
    with pytest.raises(ValueError, match="residual"):
        int8_gemm_triton(x, w, row_scales, torch.empty(4, 8), Residual(torch.empty(8, 4).t(), 1.0))
    ragged = QuantizedRows(x.codes[:, :64].contiguous(), x.scales)
    with pytest.raises(BackendError, match="blocks of 128"):
        int8_gemm_triton(ragged, w[:, :64].contiguous(), row_scales, torch.empty(4, 8))
