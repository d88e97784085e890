"""Activations as the products of a few rows take them: in groups of 128 features quantized to int8, and with the even
features of a row before its odd ones; for the linear maps of a decode step.

    scale[g] = max |x[g]| / 127        code = round(x / scale[g])        x ~ scale[g] * code

A word of packed weights holds 8 codes; its even ones and its odd ones are taken out with one mask each, so activations
in split order meet them without a shuffle. Here a row is split as a whole, in `activations_by_row` each block of it.
Norm and quantization are one kernel, since each alone is all launch. Groups are smaller where the product that makes
the activations quantizes them too, see `gemv.gated`.
Shapes: x [..., K], K a multiple of 128; values [M, K], M the product of the other axes; scales fp32 [M, K / 128].
A NaN or an infinity in a group makes its scale NaN, so that it shows in whatever is computed from it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from salalocal.errors import BackendError
from salalocal.kernels.backend import dependent_launch, tl, triton, use_triton
from salalocal.kernels.norm import rms_norm_definition, rms_norm_reference

ACTIVATION_GROUP = 128
_GROUP = tl.constexpr(ACTIVATION_GROUP)
_LARGEST_CODE = 127.0
MAX_NORM_FEATURES = 16384


@dataclass(frozen=True, eq=False)
class GroupedActivations:
    """Rows of activations, ready to be multiplied with packed weights.

    Shapes: values [M, K], int8 with `scales` fp32 [M, K / group], or floats with None. `is_split`: the even features
    stand before the odd ones, as 4-bit weights need it; else they are in order, as 8-bit weights need it.
    """

    values: Tensor
    scales: Tensor | None
    is_split: bool

    @property
    def group(self) -> int:
        """Features that share a scale; 128 where there are none."""
        return ACTIVATION_GROUP if self.scales is None else self.values.shape[1] // self.scales.shape[1]

    def floats(self, dtype: torch.dtype) -> Tensor:
        """The numbers in their order. Shapes: [M, K] of `dtype`."""
        rows = self.values.to(dtype)
        if self.is_split:
            rows = rows.unflatten(1, (2, -1)).transpose(1, 2).flatten(1)
        return rows if self.scales is None else rows * self.scales.to(dtype).repeat_interleave(self.group, dim=1)


@dataclass(frozen=True, eq=False)
class RawActivations:
    """Rows that a product norms, if `norm` (weight [K], eps) is given, and quantizes in groups itself.

    Shapes: values bf16 [M, K].
    """

    values: Tensor
    norm: tuple[Tensor, float] | None = None

    def grouped(self, is_split: bool) -> GroupedActivations:
        """The same for a product that does not: one more kernel on a GPU."""
        if self.norm is None:
            return quantize_groups(self.values, is_split)
        return rms_norm_quantize_groups(self.values, *self.norm, is_split)


def split_order(x: Tensor) -> Tensor:
    """The even features of every row, then the odd ones. Shapes: [..., K] -> [..., K]."""
    return torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1)


def quantize_groups_definition(x: Tensor, is_split: bool = True, size: int = ACTIVATION_GROUP) -> GroupedActivations:
    """The formula, group by group of `size` features."""
    rows = x.reshape(-1, x.shape[-1]).float()
    codes, scales = torch.empty_like(rows, dtype=torch.int8), rows.new_empty(len(rows), x.shape[-1] // size)
    for g, start in enumerate(range(0, rows.shape[1], size)):
        group = rows[:, start : start + size]
        largest = group.abs().amax(dim=1)
        step = torch.where(largest > 0, torch.full_like(largest, _LARGEST_CODE) / largest, 0.0)
        codes[:, start : start + size] = _int8(group * step[:, None])
        scales[:, g] = largest / _LARGEST_CODE + (group * 0).sum(dim=1)
    return GroupedActivations(split_order(codes) if is_split else codes, scales, is_split)


def quantize_groups_reference(x: Tensor, is_split: bool = True, size: int = ACTIVATION_GROUP) -> GroupedActivations:
    """The same for all groups at once: what a CPU runs."""
    groups = x.reshape(-1, x.shape[-1] // size, size).float()
    largest = groups.abs().amax(dim=-1)
    step = torch.where(largest > 0, torch.full_like(largest, _LARGEST_CODE) / largest, 0.0)
    codes = _int8(groups * step[..., None]).flatten(1)
    scales = largest / _LARGEST_CODE + (groups * 0).sum(dim=-1)
    return GroupedActivations(split_order(codes) if is_split else codes, scales, is_split)


@triton.jit
def _grouped_activations_kernel(
    x_ptr,
    weight_ptr,
    values_ptr,
    scales_ptr,
    row_stride,
    eps,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    NORM: tl.constexpr,
    QUANTIZE: tl.constexpr,
    SPLIT: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program: GROUPS groups of a row. With NORM it holds the whole row."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    groups = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    columns = groups[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :]
    # By the group: Triton sees that neighbours share it, and loads them at once.
    inside = (groups < K // _GROUP)[:, None]
    x = tl.load(x_ptr + row * row_stride + columns, mask=inside, other=0.0)
    wide = x.to(tl.float32)
    if NORM:
        mean_square = tl.sum(tl.sum(wide * wide, axis=1), axis=0) / K
        normed = (wide * tl.rsqrt(mean_square + eps)).to(x.dtype)
        weight = tl.load(weight_ptr + columns, mask=inside, other=0.0)
        wide = (normed.to(tl.float32) * weight.to(tl.float32)).to(x.dtype).to(tl.float32)
    if QUANTIZE:
        largest = tl.max(tl.abs(wide), axis=1)
        step = tl.where(largest > 0, tl.div_rn(tl.full([GROUPS], 127.0, tl.float32), largest), 0.0)
        # Adding 1.5 * 2^23 rounds to the nearest even integer, as torch.round does.
        rounded = (wide * step[:, None] + 12582912.0) - 12582912.0
        values = tl.minimum(tl.maximum(rounded, -127.0), 127.0).to(tl.int8)
        scale = tl.div_rn(largest, tl.full([GROUPS], 127.0, tl.float32)) + tl.sum(wide * 0.0, axis=1)
        tl.store(scales_ptr + row * (K // _GROUP) + groups, scale, mask=groups < K // _GROUP)
    else:
        values = wide.to(values_ptr.dtype.element_ty)
    if SPLIT:
        even, odd = tl.split(tl.reshape(values, [GROUPS, _GROUP // 2, 2]))
        halves = groups[:, None] * (_GROUP // 2) + tl.arange(0, _GROUP // 2)[None, :]
        first = values_ptr + row * K + halves
        tl.store(first, even, mask=inside)
        tl.store(first + K // 2, odd, mask=inside)
    else:
        tl.store(values_ptr + row * K + columns, values, mask=inside)


# Groups of 128 that one program takes, and its warps: without a norm, and with one, which needs the whole row.
GROUPS_PER_PROGRAM = 4
NUM_WARPS = 4
NORM_WARPS = 16


def grouped_activations_triton(
    x: Tensor, norm: tuple[Tensor, float] | None = None, quantize: bool = True, is_split: bool = True
) -> GroupedActivations:
    """Norms the rows first if given (weight, eps); quantizes and splits as told.

    Raises: BackendError if the features do not fill groups, or a normed row is too long for one program.
    """
    num_features = x.shape[-1]
    rows = x.reshape(-1, num_features)
    if num_features % ACTIVATION_GROUP or (norm is not None and num_features > MAX_NORM_FEATURES):
        raise BackendError(
            f"activations of {num_features:,} features: needed are groups of {ACTIVATION_GROUP}, "
            f"with a norm at most {MAX_NORM_FEATURES:,}"
        )
    if rows.stride(-1) != 1 or (norm is not None and (norm[0].shape != (num_features,) or norm[0].stride(-1) != 1)):
        raise ValueError(f"activations with strides {rows.stride()}, norm weight {norm and tuple(norm[0].shape)}")
    num_groups = num_features // ACTIVATION_GROUP
    values = torch.empty(rows.shape, dtype=torch.int8 if quantize else x.dtype, device=x.device)
    scales = torch.empty(len(rows), num_groups, dtype=torch.float32, device=x.device) if quantize else None
    groups = triton.next_power_of_2(num_groups) if norm is not None else min(num_groups, GROUPS_PER_PROGRAM)
    groups = triton.next_power_of_2(groups)
    _grouped_activations_kernel[(len(rows), triton.cdiv(num_groups, groups))](
        rows,
        norm[0] if norm is not None else rows,
        values,
        scales if scales is not None else rows,
        rows.stride(0),
        norm[1] if norm is not None else 0.0,
        K=num_features,
        GROUPS=groups,
        NORM=norm is not None,
        QUANTIZE=quantize,
        SPLIT=is_split,
        num_warps=NORM_WARPS if norm is not None and groups >= 16 else NUM_WARPS,
        **dependent_launch(x.device),
    )
    return GroupedActivations(values, scales, is_split)


def quantize_groups(x: Tensor, is_split: bool = True) -> GroupedActivations:
    """For a decode step where the producer is not a norm."""
    if use_triton(x):
        return grouped_activations_triton(x, is_split=is_split)
    return quantize_groups_reference(x, is_split)


def rms_norm_quantize_groups_definition(
    x: Tensor, weight: Tensor, eps: float, is_split: bool = True
) -> GroupedActivations:
    """The norm, rounded as `kernels.norm` says, and then the formula above."""
    return quantize_groups_definition(rms_norm_definition(x, weight, eps), is_split)


def rms_norm_quantize_groups_reference(
    x: Tensor, weight: Tensor, eps: float, is_split: bool = True
) -> GroupedActivations:
    """The same with the fast forms of both: what a CPU runs."""
    return quantize_groups_reference(rms_norm_reference(x, weight, eps), is_split)


def rms_norm_quantize_groups(x: Tensor, weight: Tensor, eps: float, is_split: bool = True) -> GroupedActivations:
    """The norm and the groups in one kernel, for a decode step before a linear map."""
    if use_triton(x, weight):
        return grouped_activations_triton(x, (weight, eps), is_split=is_split)
    return rms_norm_quantize_groups_reference(x, weight, eps, is_split)


def float_activations(x: Tensor, norm: tuple[Tensor, float] | None = None) -> GroupedActivations:
    """Activations in their own dtype, normed if (weight, eps) is given, in split order: for 16-bit math."""
    if use_triton(x):
        return grouped_activations_triton(x, norm, quantize=False)
    rows = x if norm is None else rms_norm_reference(x, *norm)
    return GroupedActivations(split_order(rows.reshape(-1, x.shape[-1])), None, is_split=True)


def _int8(scaled: Tensor) -> Tensor:
    """Rounded to whole numbers, ties to even; what is no number becomes 0 and shows in the scale."""
    return scaled.round().nan_to_num(0.0, 0.0, 0.0).clamp(-_LARGEST_CODE, _LARGEST_CODE).to(torch.int8)
