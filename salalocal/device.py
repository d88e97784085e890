"""Where a model runs: a device name comes in, a torch device and its memory figures go out; for all rooms above."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from salalocal.errors import BackendError, RequestError

if sys.platform == "linux":
    # Segments that grow: chunks of other sizes than before find room in what is free already. Read when CUDA starts.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

_NEVER = 2**60  # cgroup files use huge numbers for "no limit"
_OWN_GROUPS = Path("/proc/self/cgroup")
_CGROUPS = (  # versions 2 and 1: folder, controller, file of the limit, of the use, prefix of names in memory.stat
    (Path("/sys/fs/cgroup"), "", "memory.max", "memory.current", ""),
    (Path("/sys/fs/cgroup/memory"), "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
)


@dataclass(frozen=True)
class DeviceMemory:
    """Memory of a device as this process may use it; on a CPU that is the machine's, or the container's if smaller."""

    total_bytes: int
    free_bytes: int


def pick_device(name: str | None = None) -> torch.device:
    """The device of that name (`cpu`, `cuda`, `cuda:1`), or the best one here if no name is given.

    A card that is named becomes the current one of this thread: kernels launch there, wherever their tensors are.
    Raises: RequestError for a name of another form, BackendError for a device that is not here.
    """
    if name is None or name == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (":" in name and not (number.isascii() and number.isdigit() and len(number) < 4)):
        raise RequestError(f"device {name[:40]!r} is not known", "use cpu, cuda, or cuda:N")
    if kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise BackendError(f"device {name!r}: no CUDA device can be used here", "use --device cpu, or check the driver")
    index = int(number) if number else torch.cuda.current_device()
    if index >= torch.cuda.device_count():
        raise BackendError(f"device {name!r}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def device_memory(device: torch.device) -> DeviceMemory:
    """Total and free bytes of a device at this moment."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        index = torch.cuda.current_device() if device.index is None else device.index
        allowed = int(total * torch.cuda.get_per_process_memory_fraction(index))  # all, unless the process is capped
        return DeviceMemory(allowed, max(0, min(free, allowed - torch.cuda.memory_reserved(device))))
    if sys.platform == "win32":
        return _windows_memory()
    machine = _machine_memory()
    limit, used = _container_memory()
    total = min(machine.total_bytes, limit)
    return DeviceMemory(total, max(0, min(machine.free_bytes, limit - used)))


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory in use so far: tensors on a CUDA device; on a CPU the process, with file pages it has mapped."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would also count the process that started this one
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(peak.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _machine_memory() -> DeviceMemory:
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = (line.split() for line in meminfo.read_text().splitlines())
        figures = {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines}
        return DeviceMemory(figures["MemTotal"], figures.get("MemAvailable", figures["MemFree"]))
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return DeviceMemory(total, total)  # no portable figure of what is free


def _container_memory() -> tuple[int, int]:
    """Limit and use of this process's control group, or of the one above it that leaves less, without file pages that
    can be dropped."""
    found = [(_NEVER, 0)]
    for root, controller, limit_file, use_file, prefix in _CGROUPS:
        for group in _own_groups(root, controller):
            try:
                limit = int((group / limit_file).read_text())  # "max" is no number: no limit
                used = int((group / use_file).read_text())
                stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                droppable = int(stat[f"{prefix}active_file"]) + int(stat[f"{prefix}inactive_file"])
            except (OSError, ValueError, KeyError):
                continue
            found.append((min(limit, _NEVER), max(0, used - droppable)))
    return min(found, key=lambda group: group[0] - group[1])


def _own_groups(root: Path, controller: str) -> list[Path]:
    """The folder of this process's group of a controller, and those above it; the root alone if it is not known."""
    try:
        lines = [line.split(":", 2) for line in _OWN_GROUPS.read_text().splitlines()]
    except OSError:
        return [root]
    own = next((path for _, names, path in lines if controller in names.split(",")), "/")
    group = Path(os.path.normpath(root / own.lstrip("/")))
    return [folder for folder in (group, *group.parents) if folder.is_relative_to(root)] or [root]


def _windows_memory() -> DeviceMemory:
    import ctypes

    class MemoryStatus(ctypes.Structure):
        _fields_ = (
            ("length", ctypes.c_ulong),
            ("load", ctypes.c_ulong),
            *((name, ctypes.c_ulonglong) for name in ("total", "free", "c", "d", "e", "f", "g")),
        )

    status = MemoryStatus(length=ctypes.sizeof(MemoryStatus))
    ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))  # type: ignore[attr-defined,unused-ignore]
    return DeviceMemory(status.total, status.free)
