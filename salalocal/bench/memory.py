"""The memory that a measurement takes: peaks and caps; for `run`."""

import torch

from salalocal.device import device_memory, peak_memory_bytes
from salalocal.engine.budget import CUDA_DRIVER_BYTES
from salalocal.errors import RequestError

_CLEAR_REFS = "/proc/self/clear_refs"
_FORGET_PEAK = "5"


def forget_peak(device: torch.device) -> bool:
    """Count the peak from now on; False if this system cannot, and the peak so far goes on to count."""
    if device.type == "cuda":
        torch.cuda.init()  # type: ignore[no-untyped-call]  # an unused card has no statistics
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        with open(_CLEAR_REFS, "w") as file:  # noqa: PTH123 - a switch, not a file
            file.write(_FORGET_PEAK)
    except OSError:
        return False
    return True


def peak_bytes(device: torch.device) -> int:
    """The most memory held since: what torch reserved and a driver's share on a card, the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) + CUDA_DRIVER_BYTES
    return peak_memory_bytes(device)


def cap_memory(device: torch.device, num_bytes: int) -> None:
    """Hold this process to what a smaller card has, its driver's share included.

    Raises: RequestError where there is no card, or it is smaller than that.
    """
    if device.type != "cuda":
        raise RequestError("--memory-cap caps the memory of a card, and none is used", "leave it out")
    total = device_memory(device).total_bytes
    if not CUDA_DRIVER_BYTES < num_bytes <= total:
        raise RequestError(
            f"--memory-cap {num_bytes / 2**30:.2f} GiB: this card has {total / 2**30:.2f} GiB",
            "name less than it has, such as 8g",
        )
    torch.cuda.set_per_process_memory_fraction((num_bytes - CUDA_DRIVER_BYTES) / total, device)
