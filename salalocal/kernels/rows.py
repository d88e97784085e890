"""What kernels over rows share: a tensor as rows of channels, and when a kernel takes them instead of torch.

Rows may lie apart, as slices of a stacked projection do; channels are adjacent.
"""

import torch
from torch import Tensor

from salalocal.errors import BackendError
from salalocal.kernels.backend import triton, use_triton

ROW_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_CHANNELS = 32_768  # of a row that one program holds in registers
_VALUES_A_WARP = 512  # 16 values a thread: two loads of 16 bytes in flight


def needs_gradient(*tensors: Tensor) -> bool:
    """Whether autograd will want to go back through an operation on these; the kernels have no backward."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def are_for_kernel(*tensors: Tensor) -> bool:
    """Whether a kernel takes these: on a card, of one 16-bit or 32-bit dtype, and nothing to differentiate."""
    is_known = tensors[0].dtype in ROW_DTYPES and all(tensor.dtype == tensors[0].dtype for tensor in tensors)
    return is_known and use_triton(*tensors) and not needs_gradient(*tensors)


def rows_of(x: Tensor) -> Tensor:
    """The rows of x as a matrix, a view if its axes allow. Raises: BackendError unless channels are adjacent."""
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(-1) != 1 and rows.shape[-1] > 1:
        raise BackendError(f"the kernel takes adjacent channels, not strides {x.stride()} of {tuple(x.shape)}")
    return rows


def check_width(x: Tensor) -> int:
    """The power of two that holds a row. Raises: BackendError for rows that one program cannot hold."""
    if x.shape[-1] > MAX_CHANNELS or x.dtype not in ROW_DTYPES:
        raise BackendError(f"the kernel takes rows of at most {MAX_CHANNELS} channels, not {tuple(x.shape)} {x.dtype}")
    return int(triton.next_power_of_2(x.shape[-1]))


def num_warps_for(num_values: int) -> int:
    """Warps of a program that holds so many values."""
    return min(max(num_values // _VALUES_A_WARP, 1), 16)
