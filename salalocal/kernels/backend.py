"""Triton or its absence: every kernel file takes `triton` and `tl` from here and asks `use_triton` once per call.

Where Triton is not installed the names are stand-ins, so that kernel files can be imported and their plain torch forms
used. SALALOCAL_KERNELS=reference turns the kernels off for a process, to compare.
"""

import os
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from salalocal.errors import BackendError

__all__ = [
    "HAS_INLINE_ASM",
    "HAS_TRITON",
    "KERNELS_VARIABLE",
    "OLDEST_CAPABILITY",
    "PDL_CAPABILITY",
    "compute_capability",
    "dependent_launch",
    "entry_of_card",
    "num_multiprocessors",
    "on_first_compile",
    "tl",
    "triton",
    "use_triton",
]

_Entry = TypeVar("_Entry")

# From this capability on, a kernel may start while the one before it still ends (programmatic dependent launch).
PDL_CAPABILITY = 90
OLDEST_CAPABILITY = 80  # what kernels are written for; a launch without a card takes its settings


class _Absent:
    """Stands for a module that is not installed: gives itself for every name, and decorated functions as they are."""

    def __getattr__(self, name: str) -> "_Absent":
        return self

    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        return arguments[0] if arguments and callable(arguments[0]) else self


try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:
    triton = tl = _Absent()
    HAS_TRITON = False

# Triton's interpreter knows no inline assembly: kernels that have some keep a plain path beside it.
HAS_INLINE_ASM = HAS_TRITON and os.environ.get("TRITON_INTERPRET") != "1"

KERNELS_VARIABLE = "SALALOCAL_KERNELS"


def use_triton(*tensors: Tensor) -> bool:
    """Whether an operation on these tensors is the kernel's to do: all on a CUDA device, and Triton is there.

    Raises: BackendError for a value of SALALOCAL_KERNELS that is not known.
    """
    return HAS_TRITON and all(tensor.is_cuda for tensor in tensors) and not _wants_reference()


@cache
def compute_capability(device: torch.device) -> int:
    """Compute capability of a card as a number, such as 90 or 120; the oldest known for a CPU (the interpreter)."""
    if device.type != "cuda":
        return OLDEST_CAPABILITY
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def dependent_launch(device: torch.device) -> dict[str, Any]:
    """Launch settings of a kernel that may start before the one ahead of it ends, where the card can do that."""
    if compute_capability(device) < PDL_CAPABILITY:
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}


@cache
def num_multiprocessors(device: torch.device) -> int:
    """How many blocks of a kernel run side by side at least; 1 for a CPU (the interpreter)."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def entry_of_card(table: Mapping[int, _Entry], capability: int) -> _Entry:
    """What a table by oldest compute capability holds for a card. Raises: BackendError for one older than all of it."""
    known = [oldest for oldest in table if oldest <= capability]
    if not known:
        raise BackendError(
            f"compute capability {capability} is older than {min(table)}", "use SALALOCAL_KERNELS=reference"
        )
    return table[max(known)]


@cache
def _wants_reference() -> bool:
    value = os.environ.get(KERNELS_VARIABLE, "")
    if value not in ("", "triton", "reference"):
        raise BackendError(f"{KERNELS_VARIABLE}={value[:40]!r} is not known", "use triton or reference")
    return value == "reference"


def on_first_compile(notice: Callable[[], object]) -> None:
    """Call `notice` once, when a kernel was compiled that Triton's cache on disk did not hold: more will follow."""
    if not HAS_TRITON:
        return

    def listen(*, cache_hit: bool, **_: Any) -> None:
        if not cache_hit:
            triton.knobs.compilation.listener = None
            notice()

    triton.knobs.compilation.listener = listen
