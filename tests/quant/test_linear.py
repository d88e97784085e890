"""The quantized linear map: the numbers of the dense one, whichever module computes it, and one copy of the weights."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_cases import random_tensors, small_config
from quantized_cases import gptq_record, quantized_tensors, random_weight, written_quantized
from torch.nn import functional

from salalocal.checkpoint.checkpoint import Checkpoint
from salalocal.kernels.cpu_int4_matmul import max_kernel_rows
from salalocal.kernels.int4.linear import int4_linear, new_workspace
from salalocal.kernels.int4.route import Math
from salalocal.model.layers import DenseLinear
from salalocal.quant import weight_layout
from salalocal.quant.codebook import CodebookLinear, CodebookScheme, round_to_codebook
from salalocal.quant.int4 import IntScheme, IntWeight
from salalocal.quant.layout import WeightLayout
from salalocal.quant.linear import (
    CpuInt4Linear,
    KernelLinear,
    QuantizedLinear,
    QuantizedLinearFactory,
    make_linear,
    quantized_bytes,
)

needs_kernel = pytest.mark.skipif(max_kernel_rows() == 0, reason="torch's int4 kernel is slow on this processor")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", [IntScheme(4, 64), IntScheme(4, 48), IntScheme(8, 64)], ids=str)
@pytest.mark.parametrize("rows", [1, 9, 257])
def test_it_multiplies_with_what_the_codes_mean(seed: int, dtype: torch.dtype, scheme: IntScheme, rows: int) -> None:
    weight = random_weight(64, 128, scheme, seed)
    linear = make_linear(weight.packed(), dtype)
    x = torch.randn(1, rows, 128, generator=torch.Generator().manual_seed(seed)).to(dtype)
    y = linear(x)
    exact = functional.linear(x.double(), weight.dequantize(torch.float64))
    assert y.shape == (1, rows, 64) and y.dtype == dtype
    rounds = dtype == torch.bfloat16 or isinstance(linear, CpuInt4Linear)
    assert (y.double() - exact).norm() / exact.norm() < (4e-3 if rounds else 1e-6)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_cpu_four_bits_are_held_once_in_the_order_of_the_kernel(dtype: torch.dtype) -> None:
    weight = random_weight(64, 128, IntScheme(4, 64), 1).packed()
    linear = make_linear(weight, dtype)
    assert isinstance(linear, CpuInt4Linear) and not list(linear.parameters())
    assert sum(buffer.nbytes for buffer in linear.buffers()) == weight.words.nbytes + 2 * weight.scales.nbytes


def test_other_weights_are_held_as_they_are_stored() -> None:
    for weight, dtype in (
        (random_weight(32, 128, IntScheme(8, 64), 1), torch.float32),
        (random_weight(64, 128, IntScheme(4, 64), 1), torch.float16),
        (random_weight(32, 128, IntScheme(4, 64), 1, act_order=True), torch.bfloat16),
    ):
        linear = make_linear(weight.packed(), dtype)
        assert isinstance(linear, QuantizedLinear) and not list(linear.parameters())
        assert set(linear.state_dict()) == {"words", "scales"} | (
            {"group_index"} if weight.group_index is not None else set()
        )


def test_a_codebook_gets_its_own_module(seed: int) -> None:
    dense = torch.randn(32, 128, generator=torch.Generator().manual_seed(seed))
    weight = round_to_codebook(dense, CodebookScheme("nf4", 64), torch.bfloat16)
    linear = make_linear(weight, torch.float32)
    assert isinstance(linear, CodebookLinear)
    torch.testing.assert_close(linear(torch.eye(128)).T, weight.dequantize())


@pytest.mark.parametrize("bits", [4, 8])
def test_the_module_of_the_kernels_holds_the_weights_once_and_multiplies_anywhere(seed: int, bits: int) -> None:
    weight = random_weight(64, 256, IntScheme(bits, 128), seed).packed()
    linear = KernelLinear(weight, "bf16", new_workspace(torch.device("cpu"), 64 * 256, "bf16"))
    assert linear.words is weight.words and set(linear.state_dict()) == {"words", "scales"}
    extra = sum(buffer.nbytes for buffer in linear.buffers()) - weight.words.nbytes - weight.scales.nbytes
    assert extra == 64 * 8
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(seed)).bfloat16()
    assert torch.equal(linear(x), QuantizedLinear(weight)(x))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("math", ["bf16", "int8"])
@pytest.mark.parametrize("rows", [1, 3, 9, 40])
def test_stacked_maps_give_the_outputs_of_each(seed: int, bits: int, math: Math, rows: int) -> None:
    workspace = new_workspace(torch.device("cpu"), 96 * 256, math)
    weights = [weight_with_exact_sums(n, bits, seed + n).packed() for n in (64, 24, 8)]
    maps = [KernelLinear(weight, math, workspace) for weight in weights]
    x = rows_with_exact_sums(seed, rows)
    apart = [int4_linear(x, one, one.folded, math, workspace) for one in maps]
    stacked = KernelLinear.stack(maps)
    assert torch.equal(int4_linear(x, stacked, stacked.folded, math, workspace), torch.cat(apart, dim=-1))
    base = stacked.words.untyped_storage().data_ptr()
    for one, weight, y in zip(maps, weights, apart, strict=True):
        assert torch.equal(one.words, weight.words) and one.words.untyped_storage().data_ptr() == base
        assert torch.equal(int4_linear(x, one, one.folded, math, workspace), y)


def test_maps_of_other_formats_are_not_stacked(seed: int) -> None:
    workspace = new_workspace(torch.device("cpu"), 64 * 256, "bf16")
    schemes = (IntScheme(4, 128), IntScheme(8, 128), IntScheme(4, 64))
    first, *others = [KernelLinear(random_weight(8, 256, one, seed).packed(), "bf16", workspace) for one in schemes]
    for other in others:
        with pytest.raises(ValueError, match="different formats"):
            KernelLinear.stack([first, other])


def test_a_matrix_without_a_kernel_is_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    factory = QuantizedLinearFactory(down_projections(tmp_path), torch.device("cpu"), torch.float32)
    with caplog.at_level(logging.WARNING, logger="salalocal"):
        for name in ("one", "another"):
            factory._tell_once(name, "act-order")
        factory._tell_once("third", "groups of 16")
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "no GPU kernel for one and matrices like it, which are slow",
        "no GPU kernel for third and matrices like it, which are slow",
    ]


def test_the_factory_makes_what_the_folder_holds(tmp_path: Path) -> None:
    layout = down_projections(tmp_path)
    factory = QuantizedLinearFactory(layout, torch.device("cpu"), torch.float32)
    assert isinstance(factory("model.layers.1.mlp.down_proj", 80, 48), QuantizedLinear)
    dense = factory("model.layers.1.mlp.up_proj", 48, 80)
    assert isinstance(dense, DenseLinear) and dense.weight.is_meta and dense.weight.shape == (80, 48)
    loaded = [factory(name, *reversed(matrix.shape)) for name, matrix in layout.matrices.items()]
    assert 0 < sum(buffer.nbytes for linear in loaded for buffer in linear.buffers()) <= quantized_bytes(layout)


def rows_with_exact_sums(seed: int, num_rows: int) -> torch.Tensor:
    """Small whole numbers, with one in every group of 128 that makes the scale of int8 codes 1: sums in fp32 are exact,
    so the order in which a CPU adds, which goes by the width, does not show."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-7, 8, (num_rows, 256), generator=generator)
    x[:, ::128] = 127
    return x.bfloat16()


def weight_with_exact_sums(num_out: int, bits: int, seed: int) -> IntWeight:
    """With powers of two as scales."""
    weight = random_weight(num_out, 256, IntScheme(bits, 128), seed)
    powers = torch.randint(-2, 3, weight.scales.shape, generator=torch.Generator().manual_seed(seed))
    return replace(weight, scales=torch.exp2(powers.float()).to(weight.scales.dtype))


def down_projections(tmp_path: Path) -> WeightLayout:
    """A small folder whose down projections alone are quantized."""

    def choose(name: str) -> IntScheme | None:
        return IntScheme(4, 16) if name.endswith("down_proj.weight") else None

    config = small_config()
    stored, _ = quantized_tensors(random_tensors(config, 1), choose)
    return weight_layout(Checkpoint.open(written_quantized(tmp_path, config, stored, gptq_record(IntScheme(4, 16)))))
