"""The rule and the routes: every route computes its formula, and int8 gives the same bits on all of its own."""

from typing import get_args

import pytest
import torch

from salalocal.errors import BackendError
from salalocal.kernels.int4 import route as module
from salalocal.kernels.int4.activations_by_row import quantize_rows
from salalocal.kernels.int4.int8_gemm import Residual
from salalocal.kernels.int4.route import (
    FUSED_ROWS,
    Int4Scratch,
    Math,
    Route,
    choose,
    int4_matmul,
    int4_swiglu,
    new_scratch,
    prepare,
)
from salalocal.kernels.int4.scratch import Int4Weight, decode_bf16_reference, int4_weight
from salalocal.kernels.swiglu import swiglu

CPU = torch.device("cpu")
BOUNDS: dict[Route, float] = {
    "fused_int8": 0.015,
    "scratch_int8": 0.015,
    "fused_bf16": 0.006,
    "scratch_bf16": 0.006,
    "scratch_fp8": 0.06,
}


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def weight(generator: torch.Generator) -> Int4Weight:
    words = torch.randint(-(2**31), 2**31, (48, 32), generator=generator).to(torch.int32)
    return int4_weight(words, (torch.rand(48, 2, generator=generator) * 0.01 + 0.01).bfloat16(), 128)


@pytest.fixture
def scratch() -> Int4Scratch:
    return new_scratch(CPU, 48 * 256, "bf16")


@pytest.mark.parametrize("route", get_args(Route))
@pytest.mark.parametrize("has_residual", [False, True])
def test_every_route_computes_the_product(
    generator: torch.Generator, weight: Int4Weight, scratch: Int4Scratch, route: Route, has_residual: bool
) -> None:
    x = torch.randn(17, 256, generator=generator).bfloat16()
    residual = Residual(torch.randn(17, 48, generator=generator).bfloat16(), 0.25) if has_residual else None
    exact = x.double() @ decode_bf16_reference(weight).double().t()
    exact = exact if residual is None else residual.values.double() + 0.25 * exact
    scratch.weights.fill_(255)  # NaN in bf16 and in fp8
    out = torch.full((17, 48), torch.nan, dtype=torch.bfloat16)
    assert int4_matmul(prepare(x, route), weight, route, scratch, out, residual) is out
    assert (out.double() - exact).norm() / exact.norm() < BOUNDS[route]


def test_both_int8_routes_give_the_same_bits(
    generator: torch.Generator, weight: Int4Weight, scratch: Int4Scratch
) -> None:
    x = prepare(torch.randn(9, 256, generator=generator).bfloat16(), "fused_int8")
    routes: tuple[Route, ...] = ("fused_int8", "scratch_int8")
    made = [int4_matmul(x, weight, route, scratch, torch.empty(9, 48).bfloat16()) for route in routes]
    assert torch.equal(*made)


@pytest.mark.parametrize("route", ["scratch_int8", "scratch_bf16", "scratch_fp8"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("has_residual", [False, True])
def test_a_small_scratch_is_filled_more_than_once(
    monkeypatch: pytest.MonkeyPatch, generator: torch.Generator, route: Route, bits: int, has_residual: bool
) -> None:
    monkeypatch.setattr(module, "_COLUMN_STEP", 8)
    words = torch.randint(-(2**31), 2**31, (40, 8 * bits), generator=generator).to(torch.int32)
    weight = int4_weight(words, (torch.rand(40, 4, generator=generator) * 0.01 + 0.01).bfloat16(), 64, bits)
    x = prepare(torch.randn(9, 256, generator=generator).bfloat16(), route)
    joined = torch.randn(9, 64, generator=generator).bfloat16()[:, 8:48]
    residual = Residual(joined, 0.25) if has_residual else None
    whole, small = new_scratch(CPU, 40 * 256, "bf16"), new_scratch(CPU, 17 * 256, "bf16")
    wide = torch.full((9, 64), torch.nan).bfloat16()
    expected = int4_matmul(x, weight, route, whole, torch.empty(9, 40).bfloat16(), residual)
    made = int4_matmul(x, weight, route, small, wide[:, 8:48], residual)
    # Sums of floats that nearly cancel differ by the order they are added in.
    close = {"rtol": 2**-7, "atol": 2**-7 * float(expected.double().std())}
    assert torch.equal(made, expected) if route == "scratch_int8" else torch.allclose(made, expected, **close)
    assert wide[:, :8].isnan().all() and wide[:, 48:].isnan().all()


@pytest.mark.parametrize("num_rows_held", [64, 25])
@pytest.mark.parametrize("bits", [4, 8])
def test_swiglu_is_the_product_and_then_the_activation(
    monkeypatch: pytest.MonkeyPatch, generator: torch.Generator, num_rows_held: int, bits: int
) -> None:
    monkeypatch.setattr(module, "_COLUMN_STEP", 8)
    words = torch.randint(-(2**31), 2**31, (64, 8 * bits), generator=generator).to(torch.int32)
    weight = int4_weight(words, (torch.rand(64, 4, generator=generator) * 0.01 + 0.01).bfloat16(), 64, bits)
    x = quantize_rows(torch.randn(9, 256, generator=generator).bfloat16())
    scratch = new_scratch(CPU, num_rows_held * 256, "int8")
    both = int4_matmul(x, weight, "scratch_int8", scratch, torch.empty(9, 64).bfloat16())
    wide = torch.full((9, 48), torch.nan).bfloat16()
    int4_swiglu(x, weight, scratch, wide[:, 8:40])
    assert torch.equal(wide[:, 8:40], swiglu(both[:, :32], both[:, 32:]))
    assert wide[:, :8].isnan().all() and wide[:, 40:].isnan().all()


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 120])
@pytest.mark.parametrize("math", get_args(Math))
def test_few_rows_unpack_in_registers_and_many_go_by_the_scratch(capability: int, math: Math) -> None:
    if math == "fp8" and capability < 89:
        with pytest.raises(BackendError, match="fp8"):
            choose(1, 128, math, capability)
        return
    limit = FUSED_ROWS[max(known for known in FUSED_ROWS if known <= capability)][math]
    assert choose(16, 128, math, capability) == ("fused_int8" if math == "int8" else "fused_bf16")
    assert choose(limit, 128, math, capability).startswith("fused")
    assert choose(limit + 1, 128, math, capability) == choose(17, 128, math, capability, bits=8) == f"scratch_{math}"
    if math == "int8":
        assert choose(16, 32, math, capability) == "scratch_int8"


def test_what_does_not_fit_is_refused(generator: torch.Generator, weight: Int4Weight, scratch: Int4Scratch) -> None:
    x, out = torch.randn(4, 256, generator=generator).bfloat16(), torch.empty(4, 48).bfloat16()
    with pytest.raises(ValueError, match="does not take"):
        int4_matmul(x, weight, "scratch_int8", scratch, out)
    with pytest.raises(ValueError, match="does not take"):
        int4_matmul(prepare(x, "fused_int8"), weight, "fused_bf16", scratch, out)
    with pytest.raises(ValueError, match="scratch has"):
        int4_matmul(x, weight, "scratch_bf16", new_scratch(CPU, 100, "int8"), out)
    assert new_scratch(torch.device("meta"), 2**40, "bf16").weights.numel() == module.MAX_SCRATCH_BYTES
    with pytest.raises(BackendError, match="capability 75"):
        choose(16, 128, "int8", 75)
    assert module.new_scratch(CPU, 100, "int8").weights.numel() == 100
