"""The gated activation of the MLP.

    y = round(silu(gate)) * up        silu(a) = a * sigmoid(a); round: to the dtype of gate

Shapes: gate, up [...] of one dtype. Source: specification, section 4 (the released modelling code).
"""

import torch
from torch import Tensor
from torch.nn import functional


def swiglu_definition(gate: Tensor, up: Tensor) -> Tensor:
    """The formula, operation by operation, the exponential in fp32 (float64 stays float64)."""
    wide = gate.to(torch.promote_types(gate.dtype, torch.float32))
    return (wide / (1 + torch.exp(-wide))).to(gate.dtype) * up


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The same with torch's fused silu: what a CPU runs."""
    return functional.silu(gate).mul_(up)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """What the model calls."""
    return swiglu_reference(gate, up)
