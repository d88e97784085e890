"""Gate and up in one product of few rows, whose outputs leave quantized for the next product; for the MLP of a step.

    y = round( silu(W_gate x) * (W_up x) )        out: y in groups, see `activations_by_group`        round: to bf16

A product that holds its activations (`stream`) can quantize what it gates itself, in groups of 32 features, if its
launch says so; behind any other it takes one more kernel, and groups of 128.
Shapes: x [M, K], M <= 16; weight [N, K], all gate rows before all up rows; values int8 [M, N / 2] in split order.
"""

import torch

from salalocal.kernels.backend import use_triton
from salalocal.kernels.int4.activations_by_group import (
    GroupedActivations,
    grouped_activations_triton,
    quantize_groups_definition,
    quantize_groups_reference,
)
from salalocal.kernels.int4.gemv.launch import Launch
from salalocal.kernels.int4.gemv.operation import (
    Activations,
    int4_gemv_definition,
    int4_gemv_reference,
    int4_gemv_triton,
    launch_of,
)
from salalocal.kernels.int4.gemv.product import SWIGLU, PackedMatrix, Scratch
from salalocal.kernels.int4.gemv.stream import GATED_GROUP, can_group


def gated_groups_definition(x: Activations, weight: PackedMatrix) -> GroupedActivations:
    """The formula, by float64 and group by group."""
    return quantize_groups_definition(int4_gemv_definition(x, weight, SWIGLU).bfloat16(), size=GATED_GROUP)


def gated_groups_reference(x: Activations, weight: PackedMatrix) -> GroupedActivations:
    """The same in fp32 and at once: what a CPU runs."""
    return quantize_groups_reference(int4_gemv_reference(x, weight, SWIGLU), size=GATED_GROUP)


def gated_groups_triton(
    x: Activations, weight: PackedMatrix, scratch: Scratch | None = None, launch: Launch | None = None
) -> GroupedActivations:
    """One launch where the product can, else two. Raises: as `int4_gemv_triton`."""
    launch = launch or launch_of(x, weight)
    num_rows = len(weight.words)
    if not can_group(num_rows, launch):
        return grouped_activations_triton(int4_gemv_triton(x, weight, SWIGLU, scratch=scratch, launch=launch))
    values = torch.empty(len(x.values), num_rows // 2, dtype=torch.int8, device=x.values.device)
    scales = torch.empty(len(x.values), num_rows // 2 // GATED_GROUP, dtype=torch.float32, device=x.values.device)
    gated = GroupedActivations(values, scales, is_split=True)
    int4_gemv_triton(x, weight, SWIGLU, launch=launch, gated=gated)
    return gated


def gated_groups(x: Activations, weight: PackedMatrix, scratch: Scratch | None = None) -> GroupedActivations:
    """What a step calls; `scratch` as for `int4_gemv_triton`."""
    if use_triton(x.values, weight.words):
        return gated_groups_triton(x, weight, scratch)
    return gated_groups_reference(x, weight)
