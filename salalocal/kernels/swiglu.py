"""The gated activation of the MLP.

    y = round(silu(gate)) * up        silu(a) = a * sigmoid(a); round: to the dtype of gate

Shapes: gate, up [...] of one dtype. Source: specification, section 4 (the released modelling code).
"""

import torch
from torch import Tensor
from torch.nn import functional

from salalocal.kernels.gate import gated_rows_triton
from salalocal.kernels.rows import are_for_kernel


def swiglu_definition(gate: Tensor, up: Tensor) -> Tensor:
    """The formula, operation by operation, the exponential in fp32 (float64 stays float64)."""
    wide = gate.to(torch.promote_types(gate.dtype, torch.float32))
    return (wide / (1 + torch.exp(-wide))).to(gate.dtype) * up


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The same with torch's fused silu: what a CPU runs."""
    return functional.silu(gate).mul_(up)


def swiglu_triton(gate: Tensor, up: Tensor) -> Tensor:
    """Launch the kernel; rows may lie apart, as the halves of one product do; the result is contiguous.

    Raises: ValueError for different shapes or dtypes; BackendError for channels that lie apart.
    """
    return gated_rows_triton(gate, up, is_swiglu=True)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """What the model calls; gradients and float64 take the reference."""
    if are_for_kernel(gate, up):
        return swiglu_triton(gate, up)
    return swiglu_reference(gate, up)
