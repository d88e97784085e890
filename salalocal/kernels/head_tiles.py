"""What kernels that multiply tiles of heads ask of their operands; for `block_topk` and `block_attention`."""

from collections.abc import Mapping

import torch
from torch import Tensor

from salalocal.errors import BackendError
from salalocal.kernels.rows import ROW_DTYPES

FINEST_SIDE = 16  # what tl.dot takes at least
LARGEST_SIDE = 256
LOG2_E = 1.4426950408889634  # exponentials are powers of two


def fits_shared_memory(q: Tensor) -> bool:
    """Whether cards have the shared memory for queries of this dtype; the kernels' fp32 form is for the interpreter."""
    return q.dtype in (torch.bfloat16, torch.float16)


def check_head_tiles(operation: str, operands: Mapping[str, Tensor], sides: Mapping[str, int]) -> None:
    """Raises BackendError for a dtype of the first operand, last axes or sides of a tile that no kernel takes."""
    first = next(iter(operands.values()))
    if first.dtype not in ROW_DTYPES:
        raise BackendError(f"{operation} of {first.dtype}: one of bf16, fp16, fp32 is needed")
    for name, operand in operands.items():
        if operand.stride(-1) != 1:
            raise BackendError(f"{operation}: the last axis of {name} must be dense, not strides {operand.stride()}")
    for name, size in sides.items():
        if size & (size - 1) or size > LARGEST_SIDE:
            raise BackendError(f"{operation}: {name} is {size}, a power of two up to {LARGEST_SIDE} is needed")
