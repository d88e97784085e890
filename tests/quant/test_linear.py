"""The quantized linear map: the numbers of the dense one, whichever way it computes."""

from typing import Any

import pytest
import torch
from quantized_cases import random_weight
from torch.nn import functional

from salalocal.kernels.packed_matmul import MAX_CPU_INT4_ROWS, cpu_int4_matmul
from salalocal.quant import linear as linear_module
from salalocal.quant.int4 import IntScheme
from salalocal.quant.linear import QuantizedLinear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", [IntScheme(4, 64), IntScheme(4, 48), IntScheme(8, 64)], ids=str)
@pytest.mark.parametrize("rows", [1, 9, MAX_CPU_INT4_ROWS, MAX_CPU_INT4_ROWS + 1])
def test_it_multiplies_with_what_the_codes_mean(seed: int, dtype: torch.dtype, scheme: IntScheme, rows: int) -> None:
    weight = random_weight(32, 128, scheme, seed)
    linear = QuantizedLinear(weight.packed(), dtype)
    x = torch.randn(1, rows, 128, generator=torch.Generator().manual_seed(seed)).to(dtype)
    y = linear(x)
    exact = functional.linear(x.double(), weight.dequantize(torch.float64))
    assert y.shape == (1, rows, 32) and y.dtype == dtype
    assert (y.double() - exact).norm() / exact.norm() < (1e-6 if dtype == torch.float32 else 4e-3)


def test_the_second_order_of_weights_is_held_only_where_it_is_used() -> None:
    weight = random_weight(32, 128, IntScheme(4, 64), 1).packed()
    assert QuantizedLinear(weight, torch.float32).cpu_int4 is None
    linear = QuantizedLinear(weight, torch.bfloat16)
    assert linear.cpu_int4 is not None
    assert set(linear.state_dict()) == {"words", "scales"}
    ordered = QuantizedLinear(random_weight(32, 128, IntScheme(4, 64), 1, act_order=True).packed(), torch.bfloat16)
    assert ordered.cpu_int4 is None and set(ordered.state_dict()) == {"words", "scales", "group_index"}
    assert not list(linear.parameters())


def test_few_rows_go_through_the_kernel_for_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = QuantizedLinear(random_weight(32, 128, IntScheme(4, 64), 1).packed(), torch.bfloat16)
    taken: list[int] = []

    def counted(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        taken.append(x.shape[1])
        return cpu_int4_matmul(x, *rest)

    monkeypatch.setattr(linear_module, "cpu_int4_matmul", counted)
    for rows in (1, MAX_CPU_INT4_ROWS, MAX_CPU_INT4_ROWS + 1):
        linear(torch.ones(1, rows, 128, dtype=torch.bfloat16))
    assert taken == [1, MAX_CPU_INT4_ROWS]
