"""The rule and the routes: every route computes its formula, and int8 gives the same bits on all of its own."""

from typing import get_args

import pytest
import torch

from salalocal.errors import BackendError
from salalocal.kernels.int4 import route as module
from salalocal.kernels.int4.int8_gemm import Residual
from salalocal.kernels.int4.route import FUSED_ROWS, Int4Scratch, Math, Route, choose, int4_matmul, new_scratch, prepare
from salalocal.kernels.int4.scratch import Int4Weight, decode_bf16_reference, int4_weight

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
    assert choose(limit + 1, 128, math, capability) == f"scratch_{math}"
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
    with pytest.raises(BackendError, match="capability 75"):
        choose(16, 128, "int8", 75)
    assert module.new_scratch(CPU, 100, "int8").weights.numel() == 100
