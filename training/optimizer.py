"""Muon for the matrices and AdamW for the rest, as one object.

In: a model with gradients. Out: updated parameters. For: training/train.py.
Muon orthogonalises the momentum of each matrix by five Newton-Schulz steps; matrices of one shape are treated together.
"""

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
MOMENTUM, DECAY = 0.95, 0.02


@torch.no_grad()
def orthogonalised(stack: Tensor) -> Tensor:
    """Nearly orthogonal matrices with the same singular directions; stack [N, rows, columns]."""
    x = stack.bfloat16()
    is_tall = x.shape[1] > x.shape[2]
    if is_tall:
        x = x.transpose(1, 2)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(5):
        square = x @ x.transpose(1, 2)
        x = a * x + (b * square + c * square @ square) @ x
    return (x.transpose(1, 2) if is_tall else x).float()


class Optimizer:
    """`step(factor)` applies both rules with their learning rates times `factor`."""

    def __init__(self, model: nn.Module, matrix_rate: float = 0.02, other_rate: float = 3e-3):
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self.matrix_rate, self.other_rate = matrix_rate, other_rate
        groups: dict[torch.Size, list[nn.Parameter]] = {}
        for name, parameter in named:
            if parameter.dim() == 2 and "embed" not in name:
                groups.setdefault(parameter.shape, []).append(parameter)
        self.groups = list(groups.values())
        self.momenta = [torch.zeros(len(g), *g[0].shape, device=g[0].device) for g in self.groups]
        rest = [p for n, p in named if p.dim() < 2 or "embed" in n]
        fused = rest[0].is_cuda
        self.other = torch.optim.AdamW(rest, lr=other_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=fused)

    @torch.no_grad()
    def step(self, factor: float) -> None:
        for group, momentum in zip(self.groups, self.momenta, strict=True):
            gradient = torch.stack([p.grad for p in group])
            momentum.mul_(MOMENTUM).add_(gradient)
            update = orthogonalised(gradient + MOMENTUM * momentum)
            rows, columns = group[0].shape
            rate = self.matrix_rate * factor
            size = rate * max(1.0, rows / columns) ** 0.5
            torch._foreach_mul_(group, 1.0 - rate * DECAY)
            torch._foreach_add_(group, list(update.unbind(0)), alpha=-size)
        for settings in self.other.param_groups:
            settings["lr"] = self.other_rate * factor
        self.other.step()
