"""Host memory that a card reads and writes by its address: a shape comes in, a page-locked tensor goes out; for the
embedding table of small cards, and for caches larger than the card.

Kernels take such a tensor like one of their own; torch's operations take it as the CPU tensor that it is, and know
nothing of kernels under way: see `wait_for_card`. The pages are locked where they are, and as many as were asked for:
torch's own pinned memory comes in powers of two.
"""

import ctypes
import mmap
import weakref
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from salalocal.errors import MemoryBudgetError

_PORTABLE = 1  # cudaHostRegisterPortable: locked for every card of the process


def page_locked_empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor of zeros or of anything else in page-locked host memory, dense; the pages are free again with it.

    Raises: MemoryBudgetError when the system does not give or lock so many pages.
    """
    num_bytes = prod(shape) * dtype.itemsize
    if num_bytes == 0:
        return torch.empty(tuple(shape), dtype=dtype)
    try:
        pages = (ctypes.c_ubyte * num_bytes).from_buffer(mmap.mmap(-1, num_bytes))
    except (OSError, ValueError) as error:
        raise _refusal(num_bytes, str(error)) from error
    _lock(pages, num_bytes)
    return torch.frombuffer(pages, dtype=dtype).view(tuple(shape))


def wait_for_card() -> None:
    """Let kernels under way end, before the CPU reads or moves what they read or write."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _lock(pages: "ctypes.Array[ctypes.c_ubyte]", num_bytes: int) -> None:
    runtime, address = torch.cuda.cudart(), ctypes.addressof(pages)
    code = int(runtime.cudaHostRegister(address, num_bytes, _PORTABLE))
    if code != 0:
        raise _refusal(num_bytes, str(runtime.cudaGetErrorString(runtime.cudaError(code))))
    # Called before the pages go, and not at the end of the process, when the driver may be gone already.
    weakref.finalize(pages, _unlock, address).atexit = False


def _unlock(address: int) -> None:
    wait_for_card()
    torch.cuda.cudart().cudaHostUnregister(address)


def _refusal(num_bytes: int, why: str) -> MemoryBudgetError:
    return MemoryBudgetError(
        f"{num_bytes / 2**30:.2f} GiB of host memory cannot be locked for the card: {why}",
        "close programs that use memory, or ask for a shorter context",
    )
