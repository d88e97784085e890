"""Gate and up whose outputs leave quantized: kernel = reference = definition, in one launch and in two."""

import math
from dataclasses import replace

import pytest
import torch
from quantized_cases import random_weight

from salalocal.errors import BackendError
from salalocal.kernels.int4.activations_by_group import (
    GroupedActivations,
    RawActivations,
    quantize_groups_definition,
    quantize_groups_reference,
)
from salalocal.kernels.int4.gemv import gated as module
from salalocal.kernels.int4.gemv import int4_gemv_definition, int4_gemv_triton
from salalocal.kernels.int4.gemv.gated import (
    gated_groups,
    gated_groups_definition,
    gated_groups_reference,
    gated_groups_triton,
)
from salalocal.kernels.int4.gemv.launch import Launch, StreamLaunch, TileLaunch, WordLaunch
from salalocal.kernels.int4.gemv.stream import can_group
from salalocal.quant.int4 import IntScheme, PackedWeight

pytestmark = pytest.mark.usefixtures("poisoned")
NUM_FEATURES = 128
QUANTIZING = StreamLaunch(8, 16, 2, 1, quantizes=True)


def gate_and_up(seed: int, num_features: int = NUM_FEATURES) -> PackedWeight:
    return random_weight(2 * num_features, 256, IntScheme(4, 128), seed).packed()


def rows(seed: int, num_tokens: int) -> torch.Tensor:
    return torch.randn(num_tokens, 256, generator=torch.Generator().manual_seed(seed)).bfloat16()


def assert_alike(found: GroupedActivations, expected: GroupedActivations) -> None:
    """Codes of numbers that were rounded to bf16 on either side of a middle differ."""
    assert found.is_split and found.values.dtype == torch.int8 and found.group == expected.group
    assert found.values.shape == expected.values.shape
    error = (found.floats(torch.float32) - expected.floats(torch.float32)).norm() / expected.floats(
        torch.float32
    ).norm()
    assert float(error) < 5e-3
    assert (found.values == expected.values).double().mean() > 0.95


@pytest.mark.parametrize(
    "launch", [QUANTIZING, StreamLaunch(16, 32, 1, 3, quantizes=True), StreamLaunch(8, 32, 1, 9, 1, True)]
)
@pytest.mark.parametrize("num_tokens", [1, 3])
@pytest.mark.parametrize("form", ["raw", "normed", "grouped", "small groups"])
def test_one_launch_is_the_definition(seed: int, launch: StreamLaunch, num_tokens: int, form: str) -> None:
    weight, x = gate_and_up(seed), rows(seed, num_tokens)
    norm = (torch.rand(256, generator=torch.Generator().manual_seed(seed)).bfloat16(), 1e-6)
    given = {
        "raw": RawActivations(x),
        "normed": RawActivations(x, norm),
        "grouped": quantize_groups_definition(x),
        "small groups": quantize_groups_definition(x, size=32),
    }[form]
    exact = gated_groups_definition(given, weight)
    assert exact.group == 32
    assert_alike(gated_groups_reference(given, weight), exact)
    assert_alike(gated_groups(given, weight), exact)
    assert_alike(gated_groups_triton(given, weight, launch=launch), exact)


@pytest.mark.parametrize("launch", [WordLaunch(4, 16, 2), TileLaunch(32, 4, 2, 1), StreamLaunch(8, 16, 2, 1)], ids=str)
def test_other_forms_take_a_second_launch_and_larger_groups(seed: int, launch: Launch) -> None:
    weight, x = gate_and_up(seed), quantize_groups_definition(rows(seed, 2))
    assert not can_group(len(weight.words), launch)
    found = gated_groups_triton(x, weight, launch=launch)
    gated = int4_gemv_triton(x, weight, module.SWIGLU, launch=launch)
    assert found.group == 128
    assert_alike(found, quantize_groups_reference(gated))


def test_outputs_that_fill_no_group_take_a_second_launch() -> None:
    assert can_group(2 * 64, QUANTIZING)
    assert not can_group(2 * 48, QUANTIZING) and not can_group(2 * 64, replace(QUANTIZING, rows=128))


def test_a_number_that_is_none_shows_in_its_group_alone(seed: int) -> None:
    weight, x = gate_and_up(seed), rows(seed, 1)
    weight.scales[40] = math.nan  # the gate of an output of the second group
    found = gated_groups_triton(RawActivations(x), weight, launch=QUANTIZING)
    assert found.scales is not None and found.scales.isnan().tolist() == [[False, True, False, False]]


@pytest.mark.parametrize(
    ("scheme", "launch"),
    [
        (IntScheme(4, 128), WordLaunch(8, 16, 2)),
        (IntScheme(4, 32), WordLaunch(4, 4, 1)),
        (IntScheme(8, 128), WordLaunch(8, 16, 2)),
        (IntScheme(4, 128), StreamLaunch(8, 16, 2, 2)),
        (IntScheme(4, 32), StreamLaunch(8, 32, 1, 1)),
    ],
    ids=str,
)
@pytest.mark.parametrize("num_tokens", [1, 4])
def test_products_take_small_groups(seed: int, scheme: IntScheme, launch: Launch, num_tokens: int) -> None:
    weight = random_weight(40, 256, scheme, seed).packed()
    x = quantize_groups_definition(rows(seed, num_tokens), is_split=scheme.bits == 4, size=32)
    exact = int4_gemv_definition(x, weight)
    found = int4_gemv_triton(x, weight, dtype=torch.float32, launch=launch)
    assert float((found.double() - exact).norm() / exact.norm()) < 3e-6


def test_other_groups_are_refused(seed: int) -> None:
    weight, x = gate_and_up(seed), rows(seed, 1)
    with pytest.raises(BackendError, match="groups of 64"):
        int4_gemv_triton(quantize_groups_definition(x, size=64), weight)
    with pytest.raises(BackendError, match="groups of 32"):
        int4_gemv_triton(quantize_groups_definition(x, size=32), weight, launch=TileLaunch(32, 4, 2, 1))


@pytest.mark.parametrize("is_split", [False, True])
def test_floats_are_the_numbers_in_their_order(seed: int, is_split: bool) -> None:
    x = rows(seed, 3)
    grouped = quantize_groups_definition(x, is_split, 32)
    assert float((grouped.floats(torch.float32) - x.float()).norm() / x.float().norm()) < 1e-2
