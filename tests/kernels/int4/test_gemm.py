"""The int4 GEMM that unpacks in registers: the bits of the scratch route in int8, torch's accuracy in bf16."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from salalocal.errors import BackendError
from salalocal.kernels.int4 import gemm as module
from salalocal.kernels.int4.activations_by_row import QuantizedRows, quantize_rows, split_rows
from salalocal.kernels.int4.gemm import (
    MAX_SPLITS,
    SplitWorkspace,
    int4_gemm,
    int4_gemm_definition,
    int4_gemm_reference,
    int4_gemm_triton,
    new_split_workspace,
    num_splits,
)
from salalocal.kernels.int4.gemm_launch import GemmLaunch
from salalocal.kernels.int4.int8_gemm import Residual, int8_gemm_reference
from salalocal.kernels.int4.scratch import Int4Weight, decode_bf16_reference, int4_weight

CPU = torch.device("cpu")
SETTINGS = {
    "pointers": GemmLaunch(16, 32, num_stages=2),
    "copy engine": GemmLaunch(16, 32, num_stages=2, has_tma=True),
    "two groups a step": GemmLaunch(32, 32, depth=256, num_stages=2),
    "split": GemmLaunch(16, 32, num_stages=2, programs=64),
}


def random_int4(num_out: int, num_in: int, group_size: int, generator: torch.Generator) -> Int4Weight:
    words = torch.randint(-(2**31), 2**31, (num_out, num_in // 8), generator=generator).to(torch.int32)
    scales = torch.rand(num_out, num_in // group_size, generator=generator) * 0.01 + 0.01
    return int4_weight(words, scales.bfloat16(), group_size)


def relative_error(value: Tensor, exact: Tensor) -> float:
    return float((value.double() - exact.double()).norm() / exact.double().norm())


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def workspace() -> SplitWorkspace:
    workspace = new_split_workspace(CPU)
    workspace.partials.fill_(0x7FC00000)  # NaN, for what is read before it is written
    return workspace


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(("group_size", "has_residual"), [(128, True), (64, False)])
def test_int8_math_makes_the_bits_of_the_scratch_route(
    generator: torch.Generator, workspace: SplitWorkspace, setting: str, group_size: int, has_residual: bool
) -> None:
    weight = random_int4(40, 1024, group_size, generator)
    x = quantize_rows(torch.randn(17, 1024, generator=generator))
    residual = Residual(torch.randn(17, 40, generator=generator).bfloat16(), 0.25) if has_residual else None
    expected = int4_gemm_reference(x, weight, torch.empty(17, 40, dtype=torch.bfloat16), residual)
    assert torch.allclose(expected.double(), int4_gemm_definition(x, weight, residual), rtol=2**-8, atol=1e-6)
    guarded = torch.full((19, 56), torch.nan, dtype=torch.bfloat16)
    int4_gemm_triton(x, weight, guarded[1:-1, 8:48], workspace, residual, SETTINGS[setting])
    assert torch.equal(guarded[1:-1, 8:48], expected)
    guarded[1:-1, 8:48] = torch.nan
    assert guarded.isnan().all()
    assert workspace.counters.eq(0).all()
    assert workspace.partials.ne(0x7FC00000).any() == (setting == "split")
    assert torch.equal(int4_gemm(x, weight, torch.empty_like(expected), workspace, residual), expected)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(("group_size", "has_residual"), [(128, False), (32, True)])
def test_bf16_math_is_as_exact_as_torch(
    generator: torch.Generator, workspace: SplitWorkspace, setting: str, group_size: int, has_residual: bool
) -> None:
    weight = random_int4(40, 512, group_size, generator)
    x = torch.randn(17, 512, generator=generator).bfloat16()
    residual = Residual(torch.randn(17, 40, generator=generator).bfloat16(), 0.25) if has_residual else None
    exact = int4_gemm_definition(split_rows(x), weight, residual)
    plain = x @ decode_bf16_reference(weight).t()
    plain = plain if residual is None else residual.values + residual.factor * plain
    y = torch.full((17, 40), torch.nan, dtype=torch.bfloat16)
    int4_gemm_triton(split_rows(x), weight, y, workspace, residual, SETTINGS[setting])
    assert relative_error(y, exact) < 2 * relative_error(plain, exact)
    reference = int4_gemm_reference(split_rows(x), weight, torch.empty_like(y), residual)
    assert relative_error(reference, exact) < 2 * relative_error(plain, exact)


def test_the_order_of_partial_sums_is_fixed(generator: torch.Generator, workspace: SplitWorkspace) -> None:
    weight = random_int4(32, 2048, 128, generator)
    x = split_rows(torch.randn(3, 2048, generator=generator).bfloat16())
    runs = [int4_gemm_triton(x, weight, torch.empty(3, 32), workspace, None, SETTINGS["split"]) for _ in range(2)]
    assert torch.equal(*runs)


def test_decoded_weights_give_the_same_product(generator: torch.Generator, workspace: SplitWorkspace) -> None:
    weight = random_int4(32, 256, 64, generator)
    x = quantize_rows(torch.randn(5, 256, generator=generator))
    w8 = module.decode_int8_reference(weight)
    scratch = int8_gemm_reference(x, w8, weight.row_scales, torch.empty(5, 32), None)
    assert torch.equal(int4_gemm_triton(x, weight, torch.empty(5, 32), workspace), scratch)


COMPILE = """
import sys
sys.path[:0] = ["tests", "tests/kernels/configurations"]
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from int4_gemm import GemmLaunch, int4_case

case = int4_case(sys.argv[1], GemmLaunch(64, 64, num_stages=3), 128, False, False, (90,))
names = case.kernel.arg_names
source = ASTSource(
    fn=case.kernel,
    signature={name: "constexpr" if name in case.constants else case.types[name] for name in names},
    constexprs={(names.index(name),): value for name, value in case.constants.items()},
    attrs={(names.index(name),): [["tt.divisibility", 16]] for name in case.divisible},
)
print(triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "num_stages": 3}).asm["ptx"])
"""


@pytest.mark.parametrize("math", ["int8", "bf16"])
def test_no_product_runs_on_while_the_next_turn_writes_its_registers(math: str) -> None:
    # wgmma reads unpacked weights from registers until it is waited for; what was not gave wrong sums on an H100.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, math],
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[3],
    )
    assert done.returncode == 0, done.stderr[-2000:]
    events = re.findall(r"wgmma\.mma_async|wgmma\.wait_group\.sync\.aligned 0|\n\t@?!?%?\w*\s*bra\b", done.stdout)
    kinds = ["wait" if "wait" in one else "product" if "wgmma" in one else "branch" for one in events]
    assert "product" in kinds
    last = len(kinds) - 1 - kinds[::-1].index("product")
    assert kinds[last + 1] == "wait", kinds


def test_splits_keep_a_card_busy_and_leave_none_idle() -> None:
    launch = GemmLaunch(16, 64, programs=4)
    assert num_splits(512, 32, launch, 132) == 1  # enough tiles
    assert num_splits(64, 32, launch, 132) == 8  # 528 programs wanted
    assert num_splits(1, 10, launch, 132) == 2  # no fewer than four steps each
    assert num_splits(1, 1024, launch, 132) == MAX_SPLITS
    assert num_splits(5_000, 1024, GemmLaunch(16, 64, programs=99_999), 132) == 1  # no counters for so many tiles
    for num_tiles in (1, 3, 64, 100):
        for num_steps in (1, 7, 32, 128):
            splits = num_splits(num_tiles, num_steps, launch, 132)
            assert (splits - 1) * -(-num_steps // splits) < num_steps
            assert splits * num_tiles * 16 * 64 <= module._PARTIAL_SUMS


def test_activations_and_groups_without_a_kernel_are_refused(
    generator: torch.Generator, workspace: SplitWorkspace
) -> None:
    weight = random_int4(16, 256, 32, generator)
    x = torch.randn(2, 256, generator=generator)
    out = torch.empty(2, 16)
    with pytest.raises(BackendError, match="groups of 32"):
        int4_gemm_triton(quantize_rows(x), weight, out, workspace)
    with pytest.raises(BackendError, match="float32"):
        int4_gemm_triton(x, weight, out, workspace)
    eight = int4_weight(torch.zeros(16, 64, dtype=torch.int32), torch.ones(16, 2).bfloat16(), 128, bits=8)
    with pytest.raises(BackendError, match="8-bit"):
        int4_gemm_triton(quantize_rows(x), eight, out, workspace)
    with pytest.raises(ValueError, match="out"):
        int4_gemm_triton(x.bfloat16(), weight, torch.empty(3, 16), workspace)
    empty = QuantizedRows(torch.empty(0, 256, dtype=torch.int8), torch.empty(0))
    assert int4_gemm_triton(empty, random_int4(16, 256, 64, generator), out[:0], workspace).shape == (0, 16)
