"""Torch's int4 kernel for CPUs: as exact as bf16 activations can be, for any cut of the rows, and left alone where it
is wrong, coarse or slow. On a processor with AVX512 the path of those with AVX2 runs in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from quantized_cases import random_weight
from torch.nn import functional

from salalocal.kernels import cpu_int4_matmul as module
from salalocal.kernels.cpu_int4_matmul import cpu_int4_matmul, has_cpu_int4, max_kernel_rows, to_cpu_int4
from salalocal.kernels.packed_matmul import packed_matmul_definition
from salalocal.quant.int4 import IntScheme, PackedWeight

needs_kernel = pytest.mark.skipif(max_kernel_rows() == 0, reason="torch's int4 kernel is slow on this processor")


def relative_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    return float((value.double() - exact.double()).norm() / exact.double().norm())


def parts(weight: PackedWeight) -> tuple[torch.Tensor, torch.Tensor, int, int, torch.Tensor | None]:
    return weight.words, weight.scales, weight.bits, weight.group_size, weight.group_index


def check_product(seed: int, group_size: int, num_out: int, dtype: torch.dtype) -> None:
    """The product over any number of rows has the error of one whose inputs, weights and outputs are in bf16."""
    weight = random_weight(num_out, 512, IntScheme(4, group_size), seed)
    packed = weight.packed()
    assert has_cpu_int4(*parts(packed), dtype)
    kernel_weight = to_cpu_int4(packed.words, packed.scales)
    x = torch.randn(2, 300, 512, generator=torch.Generator().manual_seed(seed)).to(dtype)
    exact = packed_matmul_definition(x.double(), *parts(packed))
    rounded = functional.linear(x.bfloat16().double(), weight.dequantize(torch.bfloat16).double()).bfloat16()
    for cut in (slice(None), (slice(None), slice(1)), (0, slice(33)), (0, 0)):
        y = cpu_int4_matmul(x[cut], *kernel_weight)
        assert y.shape == exact[cut].shape and y.dtype == dtype
        assert relative_error(y, exact[cut]) < 1.2 * relative_error(rounded[cut], exact[cut]) + 1e-6


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("group_size", "num_out"), [(32, 192), (64, 128), (128, 64), (256, 64)])
def test_the_product_is_as_exact_as_bfloat16_activations_allow(
    seed: int, group_size: int, num_out: int, dtype: torch.dtype
) -> None:
    check_product(seed, group_size, num_out, dtype)


@needs_kernel
@pytest.mark.parametrize("is_bf16", [False, True], ids=["fp32", "bf16"])
def test_many_rows_go_through_tiles(seed: int, is_bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "max_kernel_rows", lambda: 32)
    monkeypatch.setattr(module, "_has_bf16_matmul", lambda: is_bf16)
    monkeypatch.setattr(module, "TILE_WEIGHTS", 130 * 512)  # tiles of 128 output features, the last one of 64
    check_product(seed, 128, 320, torch.float32)


@pytest.mark.parametrize(
    ("width", "is_bf16", "rows"),
    [("AVX512", False, module.ALL_ROWS), ("AVX512", True, 128), ("AVX2", False, 32), ("DEFAULT", False, 0)],
)
def test_the_rule_goes_by_the_processor(width: str, is_bf16: bool, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: width)
    monkeypatch.setattr(module, "_has_bf16_matmul", lambda: is_bf16)
    assert max_kernel_rows() == rows


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="the tests above have shown it")
def test_the_same_in_the_order_of_avx2(seed: int) -> None:
    case = f"{__name__.rpartition('.')[2]}.py::test_many_rows_go_through_tiles"
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "avx2", "SALALOCAL_TEST_SEED": str(seed)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{Path(__file__).parent}/{case}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout


@pytest.mark.parametrize(
    ("shape", "scheme", "act_order", "scale_dtype", "dtype"),
    [
        ((64, 256), IntScheme(8, 128), False, torch.bfloat16, torch.bfloat16),
        ((64, 256), IntScheme(4, 16), False, torch.bfloat16, torch.bfloat16),
        ((64, 96), IntScheme(4, 64), False, torch.bfloat16, torch.bfloat16),
        ((48, 256), IntScheme(4, 128), False, torch.bfloat16, torch.bfloat16),
        ((64, 256), IntScheme(4, 128), True, torch.bfloat16, torch.bfloat16),
        ((64, 256), IntScheme(4, 128), False, torch.float16, torch.float32),
        ((64, 256), IntScheme(4, 128), False, torch.bfloat16, torch.float16),
        ((64, 256), IntScheme(4, 128), False, torch.bfloat16, torch.float64),
    ],
    ids=str,
)
def test_the_kernel_is_left_alone_where_it_is_wrong_or_coarse(
    shape: tuple[int, int], scheme: IntScheme, act_order: bool, scale_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    weight = random_weight(*shape, scheme, 1, act_order, scale_dtype)
    assert not has_cpu_int4(*parts(weight.packed()), dtype)


def test_the_kernel_is_left_alone_where_it_was_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "NO AVX")
    packed = random_weight(64, 256, IntScheme(4, 128), 1).packed()
    assert not has_cpu_int4(*parts(packed), torch.bfloat16)
