"""The output gate of both mixers.

    y = x * round(sigmoid(gate))        round: to the dtype of gate

Shapes: x, gate [...] of one dtype. Source: specification, sections 5 and 6 (the released modelling code).
"""

import torch
from torch import Tensor


def sigmoid_gate_definition(x: Tensor, gate: Tensor) -> Tensor:
    """The formula, operation by operation, the exponential in fp32 (float64 stays float64)."""
    wide = gate.to(torch.promote_types(gate.dtype, torch.float32))
    return x * (1 / (1 + torch.exp(-wide))).to(gate.dtype)


def sigmoid_gate_reference(x: Tensor, gate: Tensor) -> Tensor:
    """The same with torch's own sigmoid: what a CPU runs."""
    return x * torch.sigmoid(gate)


def sigmoid_gate(x: Tensor, gate: Tensor) -> Tensor:
    """What the model calls."""
    return sigmoid_gate_reference(x, gate)
