"""int8 activations: the kernels make the codes of the reference bit for bit, within half a step of the value."""

import pytest
import torch
from torch import Tensor

from salalocal.errors import BackendError
from salalocal.kernels.gated_norm import GatedNorm
from salalocal.kernels.int4 import activations_by_row as module
from salalocal.kernels.int4.activations_by_row import (
    QuantizedRows,
    from_split_order,
    gate_quantize_triton,
    gated_norm_quantize_rows,
    quantize_rows,
    quantize_rows_definition,
    quantize_rows_reference,
    quantize_rows_triton,
    rms_norm_quantize_rows,
    rms_norm_quantize_rows_triton,
    sigmoid_gate_quantize_rows,
    split_rows,
    split_rows_triton,
    swiglu_quantize,
    swiglu_quantize_triton,
    to_split_order,
)

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel does not write shows as NaN or as a code that cannot be."""

    def poisoned(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.full(shape, -128 if dtype == torch.int8 else torch.nan, dtype=dtype, device=device)

    monkeypatch.setattr(module.torch, "empty", poisoned)


def assert_equal(made: QuantizedRows, expected: QuantizedRows) -> None:
    assert torch.equal(made.codes, expected.codes)
    assert torch.allclose(made.scales, expected.scales, rtol=0, atol=0, equal_nan=True)


def test_split_order_puts_even_features_first(generator: torch.Generator) -> None:
    x = torch.arange(256)
    assert to_split_order(x).tolist() == [
        *range(0, 128, 2),
        *range(1, 128, 2),
        *range(128, 256, 2),
        *range(129, 256, 2),
    ]
    y = torch.randn(3, 5, 384, generator=generator)
    assert torch.equal(from_split_order(to_split_order(y)), y)
    assert torch.equal(split_rows_triton(y.bfloat16()), to_split_order(y.bfloat16()))
    assert torch.equal(split_rows(y), to_split_order(y))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 128), (5, 384), (2, 3, 256)])
def test_codes_are_those_of_the_reference_and_within_half_a_step(
    generator: torch.Generator, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    x = (torch.randn(*shape, generator=generator) * 3).to(dtype)
    reference, exact = quantize_rows_reference(x), quantize_rows_definition(x)
    assert_equal(quantize_rows_triton(x), reference)
    assert_equal(quantize_rows(x), reference)
    assert torch.allclose(reference.scales, exact.scales, rtol=1e-6)
    assert (reference.codes.int() - exact.codes.int()).abs().max() <= 1
    values = from_split_order(reference.codes).double() * reference.scales.double().unsqueeze(-1)
    assert ((values - x.double()).abs() <= reference.scales.double().unsqueeze(-1) * (0.5 + 1e-4)).all()
    assert reference.codes.abs().amax(dim=-1).eq(127).all()


def test_rows_may_begin_anywhere_and_gains_may_be_wider(generator: torch.Generator) -> None:
    x = torch.randn(4, 385, generator=generator).bfloat16()[:, 1:]  # no two of its features share an aligned word
    assert_equal(quantize_rows_triton(x), quantize_rows_reference(x))
    gain = torch.randn(384, generator=generator)
    made, expected = (
        rms_norm_quantize_rows_triton(x, gain.bfloat16(), 1e-6),
        rms_norm_quantize_rows(x, gain.bfloat16(), 1e-6),
    )
    assert (made.codes != expected.codes).float().mean() < 0.02
    wide = rms_norm_quantize_rows_triton(x.float(), gain.bfloat16(), 1e-6)
    expected = rms_norm_quantize_rows(x.float(), gain.bfloat16(), 1e-6)
    assert (wide.codes.int() - expected.codes.int()).abs().max() <= 1


def test_rows_of_zeros_are_zeros_and_damaged_rows_cannot_pass_for_numbers(generator: torch.Generator) -> None:
    x = torch.randn(5, 256, generator=generator).bfloat16()
    x[1], x[2, 7], x[3, 0], x[4, 255] = 0, torch.nan, torch.inf, -torch.inf
    reference = quantize_rows_reference(x)
    assert_equal(quantize_rows_triton(x), reference)
    assert reference.codes[1].eq(0).all() and reference.scales[1] == 0
    assert reference.scales[2:].isnan().all() and reference.scales[:2].isfinite().all()


def test_fp8_codes_are_within_a_step(generator: torch.Generator) -> None:
    # The interpreter loses a carry into the exponent; tests/gpu holds the kernel to the last bit.
    x = torch.randn(3, 256, generator=generator)
    made = quantize_rows_triton(x, torch.float8_e4m3fn)
    exact = quantize_rows_definition(x, torch.float8_e4m3fn)
    reference = quantize_rows_reference(x, torch.float8_e4m3fn)
    assert torch.allclose(reference.codes.float(), exact.codes.float(), rtol=1 / 8)
    assert made.codes.float().isclose(reference.codes.float()).float().mean() > 0.9
    assert torch.allclose(made.scales, exact.scales, rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_norm_on_the_way_is_the_norm_before(generator: torch.Generator, dtype: torch.dtype) -> None:
    wide = torch.randn(6, 512, generator=generator).to(dtype)
    x, weight = wide[:, 128:], torch.randn(384, generator=generator).to(dtype)  # rows that are not next to each other
    made, expected = rms_norm_quantize_rows_triton(x, weight, 1e-6), rms_norm_quantize_rows(x, weight, 1e-6)
    # 1 / sqrt differs in the last bit, which moves a rounding here and there.
    assert (made.codes.int() - expected.codes.int()).abs().max() <= 1
    assert (made.codes != expected.codes).float().mean() < 0.02
    assert torch.allclose(made.scales, expected.scales, rtol=1e-2 if dtype == torch.bfloat16 else 2e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_activation_on_the_way_is_the_activation_before(generator: torch.Generator, dtype: torch.dtype) -> None:
    both = torch.randn(2, 3, 512, generator=generator).to(dtype)
    gate, up = both[..., :256], both[..., 256:]
    made, expected = swiglu_quantize_triton(gate, up), swiglu_quantize(gate, up)
    assert made.codes.shape == (2, 3, 256)
    assert (made.codes.int() - expected.codes.int()).abs().max() <= 1
    assert (made.codes != expected.codes).float().mean() < 0.02
    assert torch.allclose(made.scales, expected.scales, rtol=1e-2 if dtype == torch.bfloat16 else 2e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_norm", (False, True), ids=("gate", "norm and gate"))
def test_the_gate_on_the_way_is_the_gate_before(generator: torch.Generator, dtype: torch.dtype, has_norm: bool) -> None:
    stacked = (2 * torch.randn(1, 5, 900, generator=generator)).to(dtype)
    x, gate = stacked[..., :384], stacked[..., 400:784]  # slices of a stacked projection
    weight = torch.rand(384, generator=generator).to(dtype)
    if has_norm:
        expected = gated_norm_quantize_rows(x, GatedNorm(weight=weight, gate=gate, eps=1e-6))
        made = gate_quantize_triton(x, gate, (weight, 1e-6))
    else:
        expected, made = sigmoid_gate_quantize_rows(x, gate), gate_quantize_triton(x, gate)
    assert made.codes.shape == (1, 5, 384) and made.scales.shape == (1, 5)
    assert (made.codes.int() - expected.codes.int()).abs().max() <= 1
    assert (made.codes != expected.codes).float().mean() < 0.02
    assert torch.allclose(made.scales, expected.scales, rtol=1e-2 if dtype == torch.bfloat16 else 2e-3)


def test_a_gate_that_is_no_number_shows(generator: torch.Generator) -> None:
    x, gate = torch.randn(3, 128, generator=generator).bfloat16(), torch.zeros(3, 128).bfloat16()
    gate[1, 5] = torch.nan
    for norm in (None, (torch.ones(128).bfloat16(), 1e-6)):
        assert gate_quantize_triton(x, gate, norm).scales.isnan().tolist() == [False, True, False]


def test_rows_that_cannot_be_quantized_are_refused() -> None:
    with pytest.raises(BackendError, match="200 features"):
        quantize_rows(torch.ones(2, 200))
    with pytest.raises(BackendError, match="65,664 features"):
        quantize_rows_triton(torch.ones(1, 65_664))
    with pytest.raises(ValueError, match="gate is"):
        swiglu_quantize_triton(torch.ones(2, 128), torch.ones(2, 256))
    with pytest.raises(ValueError, match="gate"):
        gate_quantize_triton(torch.ones(1, 128), torch.ones(2, 128))
