"""Activations in groups: kernel = reference = definition, exactly; what is no number shows."""

import pytest
import torch

from salalocal.errors import BackendError
from salalocal.kernels.int4.activations_by_group import (
    ACTIVATION_GROUP,
    GroupedActivations,
    float_activations,
    grouped_activations_triton,
    quantize_groups,
    quantize_groups_definition,
    quantize_groups_reference,
    rms_norm_quantize_groups,
    rms_norm_quantize_groups_definition,
    split_order,
)


def random_rows(seed: int, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def values_of(x: GroupedActivations) -> torch.Tensor:
    """The activations that codes and scales stand for, in order."""
    assert x.scales is not None
    rows = x.values.float()
    if x.is_split:
        rows = rows.unflatten(1, (2, -1)).transpose(1, 2).flatten(1)
    return rows * x.scales.repeat_interleave(ACTIVATION_GROUP, dim=1)


@pytest.mark.parametrize("is_split", [True, False])
@pytest.mark.parametrize(("dtype", "shape"), [(torch.bfloat16, (3, 768)), (torch.float32, (2, 1, 128))])
def test_kernel_reference_and_definition_give_the_same_codes(
    seed: int, is_split: bool, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    x = random_rows(seed, *shape, dtype=dtype)
    exact = quantize_groups_definition(x, is_split)
    for other in (quantize_groups(x, is_split), grouped_activations_triton(x, is_split=is_split)):
        assert other.scales is not None and exact.scales is not None
        assert torch.equal(other.values, exact.values) and torch.equal(other.scales, exact.scales)
    rows = x.reshape(-1, shape[-1]).float()
    limit = rows.abs().unflatten(1, (-1, ACTIVATION_GROUP)).amax(-1).repeat_interleave(ACTIVATION_GROUP, dim=1) / 254
    assert bool(((values_of(exact) - rows).abs() <= limit * 1.0001).all())


def test_norm_and_quantization_are_one_kernel(seed: int) -> None:
    x, weight = random_rows(seed, 3, 384) * 40, random_rows(seed + 1, 384).abs() + 0.5
    exact = rms_norm_quantize_groups_definition(x, weight, 1e-6)
    for other in (rms_norm_quantize_groups(x, weight, 1e-6), grouped_activations_triton(x, (weight, 1e-6))):
        assert other.scales is not None and exact.scales is not None
        assert torch.allclose(other.scales, exact.scales, rtol=1e-2)
        difference = (other.values.int() - exact.values.int()).abs()
        assert int(difference.max()) <= 1 and float(difference.float().mean()) < 0.02


def test_rows_may_be_a_slice_of_a_wider_matrix(seed: int) -> None:
    wide = random_rows(seed, 3, 512)
    narrow = wide[:, 128:384]
    exact = quantize_groups_definition(narrow.contiguous())
    assert torch.equal(grouped_activations_triton(narrow).values, exact.values)


def test_floats_are_normed_and_split_but_not_rounded_further(seed: int) -> None:
    x, weight = random_rows(seed, 2, 256), random_rows(seed + 1, 256)
    for norm in (None, (weight, 1e-5)):
        kernel, reference = grouped_activations_triton(x, norm, quantize=False), float_activations(x, norm)
        assert kernel.scales is None and kernel.values.dtype == torch.bfloat16
        # Both round twice, behind the factor and behind the gain: each may fall one step of bf16 apart.
        assert torch.allclose(kernel.values.float(), reference.values.float(), rtol=2**-6)
    assert torch.equal(float_activations(x).values, split_order(x))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_shows_in_its_scale_and_nowhere_else(bad: float) -> None:
    x = torch.ones(2, 256)
    x[1, 130] = bad
    x[0, :128] = 0
    for made in (quantize_groups_definition(x), quantize_groups_reference(x), grouped_activations_triton(x)):
        assert made.scales is not None
        assert made.scales.isnan().tolist() == [[False, False], [False, True]]
        assert float(made.scales[0, 0]) == 0 and int(made.values[0, :64].abs().max()) == 0


def test_features_that_fill_no_group_are_refused() -> None:
    with pytest.raises(BackendError, match="100 features"):
        grouped_activations_triton(torch.ones(1, 100))
    with pytest.raises(BackendError, match=r"32,768 features"):
        grouped_activations_triton(torch.ones(1, 32768), (torch.ones(32768), 1e-6))
