"""The int8 GEMM: the kernel makes the bits of the reference, which rounds the definition once."""

from typing import Any

import pytest
import torch

import salalocal.kernels.int4.int8_gemm as module
from salalocal.errors import BackendError
from salalocal.kernels.int4.activations_by_row import QuantizedRows, quantize_rows
from salalocal.kernels.int4.gemm_launch import GemmLaunch
from salalocal.kernels.int4.int8_gemm import (
    Residual,
    int8_gemm,
    int8_gemm_definition,
    int8_gemm_reference,
    int8_gemm_triton,
    int8_swiglu,
    int8_swiglu_definition,
    int8_swiglu_reference,
    int8_swiglu_triton,
)
from salalocal.kernels.swiglu import swiglu_definition

ROUNDING = {torch.bfloat16: 2**-8, torch.float32: 1e-6}


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def operands(generator: torch.Generator, m: int, n: int, k: int) -> tuple[QuantizedRows, torch.Tensor, torch.Tensor]:
    x = quantize_rows(torch.randn(m, k, generator=generator))
    w = torch.randint(-127, 128, (n, k), generator=generator).to(torch.int8)
    return x, w, torch.rand(n, generator=generator) * 0.01


LAUNCHES = {
    "pointers": GemmLaunch(16, 32, num_stages=2, span=2),
    "copy engine": GemmLaunch(16, 32, num_stages=2, has_tma=True, span=2),
    "walk": GemmLaunch(16, 32, num_stages=2, has_tma=True, span=2, walks=True, programs=3),
}

SHAPES = ((1, 40, 128), (33, 72, 384), (33, 80, 384))  # tiles walk where rows of outputs are aligned, so in the last


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_the_kernel_makes_the_bits_of_the_reference(
    generator: torch.Generator, shape: tuple[int, int, int], launch: str, has_residual: bool, dtype: torch.dtype
) -> None:
    m, n, _ = shape
    x, w, row_scales = operands(generator, *shape)
    residual = Residual(torch.randn(m, n, generator=generator).to(dtype), 0.25) if has_residual else None
    expected = int8_gemm_reference(x, w, row_scales, torch.empty(m, n, dtype=dtype), residual)
    exact = int8_gemm_definition(x, w, row_scales, residual)
    assert torch.allclose(expected.double(), exact, rtol=ROUNDING[dtype], atol=1e-6)
    guarded = torch.full((m + 2, n), torch.nan, dtype=dtype)
    int8_gemm_triton(x, w, row_scales, guarded[1:-1], residual, LAUNCHES[launch])
    assert torch.equal(guarded[1:-1], expected)
    assert guarded[0].isnan().all() and guarded[-1].isnan().all()
    assert torch.equal(int8_gemm(x, w, row_scales, torch.empty(m, n, dtype=dtype), residual), expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_gate_and_up_in_pairs_are_gated_on_the_way_out(
    generator: torch.Generator, shape: tuple[int, int, int], launch: str, dtype: torch.dtype
) -> None:
    m, n, _ = shape
    x, w, row_scales = operands(generator, m, 2 * n, shape[2])
    pairs = torch.stack((w[:n], w[n:]), dim=1).flatten(0, 1)
    products = int8_gemm_definition(x, w, row_scales).to(dtype)
    exact = swiglu_definition(products[:, :n], products[:, n:])
    assert torch.equal(int8_swiglu_definition(x, pairs, row_scales, dtype), exact)
    reference = int8_swiglu_reference(x, pairs, row_scales, torch.empty(m, n, dtype=dtype))
    bound = 2 * ROUNDING[dtype] if dtype == torch.bfloat16 else 1e-5  # exponentials of three makers
    # A gate far below zero that the reference rounds the other way makes a larger difference.
    assert torch.isclose(reference, exact, rtol=bound, atol=1e-6).float().mean() > 0.98
    assert torch.equal(int8_swiglu(x, pairs, row_scales, torch.empty(m, n, dtype=dtype)), reference)
    guarded = torch.full((m + 2, n + 16), torch.nan, dtype=dtype)
    int8_swiglu_triton(x, pairs, row_scales, guarded[1:-1, 8:-8], LAUNCHES[launch])
    made = guarded[1:-1, 8:-8].clone()
    assert torch.allclose(made, reference, rtol=bound, atol=1e-6)
    assert dtype != torch.bfloat16 or (made == reference).float().mean() > 0.9
    guarded[1:-1, 8:-8] = torch.nan
    assert guarded.isnan().all()


def test_rows_of_outputs_and_residuals_may_lie_apart(generator: torch.Generator) -> None:
    x, w, row_scales = operands(generator, 20, 40, 128)
    wide, stream = torch.full((20, 100), torch.nan), torch.randn(20, 64, generator=generator)
    expected = int8_gemm_reference(x, w, row_scales, torch.empty(20, 40), Residual(stream[:, 8:48], 0.5))
    launch = GemmLaunch(16, 32, num_stages=2)
    int8_gemm_triton(x, w, row_scales, wide[:, 30:70], Residual(stream[:, 8:48], 0.5), launch)
    assert torch.equal(wide[:, 30:70], expected)
    assert wide[:, :30].isnan().all() and wide[:, 70:].isnan().all()


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
    with pytest.raises(ValueError, match="not in pairs"):
        int8_swiglu_triton(x, w[:7], row_scales, torch.empty(4, 3))
    with pytest.raises(ValueError, match="out"):
        int8_swiglu_triton(x, w, row_scales, torch.empty(4, 8))
    ragged = QuantizedRows(x.codes[:, :64].contiguous(), x.scales)
    with pytest.raises(BackendError, match="blocks of 128"):
        int8_gemm_triton(ragged, w[:, :64].contiguous(), row_scales, torch.empty(4, 8))


@pytest.mark.parametrize(("stride", "residual_stride", "walks"), [(80, 96, True), (80, 72, False), (72, 80, False)])
def test_tiles_walk_where_rows_of_outputs_and_residual_are_aligned(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch, stride: int, residual_stride: int, walks: bool
) -> None:
    launched: list[bool] = []

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *_, **named: launched.append(named["WALKS"])

    monkeypatch.setattr(module, "_int8_gemm_kernel", Recorder())
    x, w, row_scales = operands(generator, 3, 40, 128)
    out, joined = torch.empty(3, stride)[:, :40], torch.empty(3, residual_stride)[:, :40]
    int8_gemm_triton(x, w, row_scales, out, Residual(joined, 1.0), LAUNCHES["walk"])
    assert launched == [walks]
