"""The linear map with packed weights: every number of rows and kind of arithmetic meets the definition."""

import pytest
import torch
from quantized_cases import random_weight

from salalocal.kernels.int4.linear import Workspace, int4_linear, new_workspace, why_no_kernel
from salalocal.kernels.int4.route import Math
from salalocal.kernels.int4.scratch import Int4Weight, int4_weight
from salalocal.quant.int4 import IntScheme, PackedWeight

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def workspace() -> Workspace:
    return new_workspace(CPU, 64 * 256, "bf16")


def folded(weight: PackedWeight) -> Int4Weight:
    return int4_weight(weight.words, weight.scales, weight.group_size, weight.bits)


@pytest.mark.parametrize("rows", [0, 1, 16, 17, 600])
@pytest.mark.parametrize(("scheme", "math", "bound"), [
    (IntScheme(4, 128), "bf16", 4e-3),
    (IntScheme(4, 64), "int8", 2e-2),
    (IntScheme(8, 128), "bf16", 1e-2),
    (IntScheme(8, 64), "int8", 2e-2),
], ids=str)  # fmt: skip
def test_every_number_of_rows_gives_the_product(
    seed: int, workspace: Workspace, rows: int, scheme: IntScheme, math: Math, bound: float
) -> None:
    weight = random_weight(64, 256, scheme, seed)
    x = torch.randn(1, rows, 256, generator=torch.Generator().manual_seed(seed)).bfloat16()
    packed = weight.packed()
    y = int4_linear(x, packed, folded(packed), math, workspace)
    exact = x.double() @ weight.dequantize(torch.float64).t()
    assert y.shape == (1, rows, 64) and y.dtype == torch.bfloat16
    if rows:
        assert float((y.double() - exact).norm() / exact.norm()) < bound


def test_rows_may_be_a_slice(seed: int, workspace: Workspace) -> None:
    weight = random_weight(64, 256, IntScheme(4, 128), seed).packed()
    wide = torch.randn(3, 512, generator=torch.Generator().manual_seed(seed)).bfloat16()
    for math in ("bf16", "int8"):
        one, other = (int4_linear(x, weight, folded(weight), math, workspace)
                      for x in (wide[:, 128:384], wide[:, 128:384].contiguous()))  # fmt: skip
        assert torch.equal(one, other)


def test_what_has_no_kernel_is_told_in_words() -> None:
    def why(scheme: IntScheme, num_in: int = 256, act_order: bool = False, dtype: torch.dtype = torch.bfloat16) -> str:
        return why_no_kernel(random_weight(64, num_in, scheme, 1, act_order).packed(), dtype)

    assert why(IntScheme(4, 128)) == why(IntScheme(8, 32)) == ""
    assert "act-order" in why(IntScheme(4, 128), act_order=True)
    assert "groups of 16" in why(IntScheme(4, 16))
    assert "192 input features" in why(IntScheme(4, 64), num_in=192)
    assert "float32" in why(IntScheme(4, 128), dtype=torch.float32)
