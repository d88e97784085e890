"""Is this machine ready: nothing goes in, findings with their fixes come out; for `doctor`.

Every check stands for itself and says what it found in one line. Nothing is changed, nothing is downloaded.
"""

import csv
import os
import platform
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from salalocal import __version__
from salalocal.checkpoint.hub_cache import cache_folder, free_bytes
from salalocal.checkpoint.hub_client import HubClient, HubLimits
from salalocal.checkpoint.hub_listing import read_listing
from salalocal.device import device_memory
from salalocal.errors import SalaLocalError
from salalocal.session.plan import RELEASED_MODEL
from salalocal.session.usual_model import with_usual_model
from salalocal.settings import DEFAULT_ORIGIN, load_settings, models_folder, settings_path

OK, NOTE, PROBLEM = "ok", "note", "problem"
DEVICE_CODE, HUB_CODE, INPUT_CODE = 6, 5, 4

_NEEDED_DISK_BYTES = 26 * 10**9  # the released model in bf16, and a 4-bit copy
_NEEDED_MEMORY_BYTES = 6 * 10**9
_LEAST_CAPABILITY = (8, 0)
_LEAST_DRIVER = 580  # of the CUDA build that pip installs
_PACKAGES = ("torch", "triton", "bitsandbytes", "huggingface_hub", "tokenizers", "safetensors")
_QUICK = HubLimits(stall_s=5.0, tries=1)
_SMI_S = 10.0


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, how it is, and what to do about it. `exit_code` is that of a problem."""

    name: str
    status: str
    text: str
    fix: str | None = None
    exit_code: int = 0


@dataclass(frozen=True)
class CardUse:
    """A card as the driver sees it. Units: MiB."""

    name: str
    driver: str
    total_mib: int
    used_mib: int


def examine(is_offline: bool = False) -> Iterator[Finding]:
    """All findings, one after the other as they are made; `is_offline` leaves the hub alone."""
    yield Finding(
        "salalocal", OK, f"{__version__}, Python {platform.python_version()}, {platform.platform(terse=True)}"
    )
    yield from _packages()
    yield from _cards()
    yield from _memory()
    yield from _disks()
    yield _settings()
    yield _hub(is_offline)
    yield from _model()


def _packages() -> Iterator[Finding]:
    versions = {name: _version(name) for name in _PACKAGES}
    shown = ", ".join(f"{name} {version}" for name, version in versions.items() if version is not None)
    yield Finding("packages", OK, shown)
    if versions["triton"] is None and _version("triton-windows") is None and sys.platform in ("linux", "win32"):
        name = "triton" if sys.platform == "linux" else "triton-windows"
        yield Finding("triton", PROBLEM, "not installed: a card cannot be used", f"pip install {name}", DEVICE_CODE)
    if versions["bitsandbytes"] is None:
        yield Finding("bitsandbytes", NOTE, "not installed", "pip install bitsandbytes")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cards() -> Iterator[Finding]:
    import torch

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        is_usable = torch.cuda.is_available()
    seen = card_use()
    if not is_usable:
        yield _no_card(torch.version.cuda, seen, str(told[0].message) if told else "")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = (properties.major, properties.minor)
        memory = device_memory(torch.device("cuda", index))
        text = (
            f"{properties.name}, compute capability {capability[0]}.{capability[1]}, "
            f"{memory.free_bytes / 2**30:.1f} of {memory.total_bytes / 2**30:.1f} GiB free, CUDA {torch.version.cuda}"
        )
        if seen:
            text += f", driver {seen[0].driver}"
        if capability < _LEAST_CAPABILITY:
            fix = "an RTX 30 series card or newer; --device cpu works meanwhile"
            yield Finding(f"card {index}", PROBLEM, f"{text}: too old for the kernels", fix, DEVICE_CODE)
        elif memory.free_bytes < _NEEDED_MEMORY_BYTES:
            yield Finding(f"card {index}", NOTE, f"{text}: too little for the 9B model", _close_others())
        else:
            yield Finding(f"card {index}", OK, text)
    others = other_users()
    if others:
        yield Finding("card users", NOTE, f"other programs on the card: {'; '.join(others)}", _close_others())


def _close_others() -> str:
    return "close other programs on the card; nvidia-smi lists them"


def _no_card(built_for: str | None, seen: list[CardUse], reason: str) -> Finding:
    if not seen:
        text = "no NVIDIA card was found: models run on the CPU, which suits the built-in one"
        return Finding("card", NOTE, text, "if there is one: install its driver, so that nvidia-smi lists it")
    card = f"{seen[0].name} is there (driver {seen[0].driver}), but PyTorch cannot use it"
    if built_for is None:
        fix = "pip install --force-reinstall torch  # a CUDA build"
        return Finding("card", PROBLEM, f"{card}: this PyTorch is a CPU build", fix, DEVICE_CODE)
    major = seen[0].driver.partition(".")[0]
    if major.isdigit() and int(major) < _LEAST_DRIVER:
        fix = f"driver {_LEAST_DRIVER} or newer, or: pip install 'torch==2.10.*'"
        return Finding("card", PROBLEM, f"{card}: the driver is too old for CUDA {built_for}", fix, DEVICE_CODE)
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None:
        return Finding("card", PROBLEM, f"{card}", f"unset CUDA_VISIBLE_DEVICES, which is '{hidden}'", DEVICE_CODE)
    return Finding("card", PROBLEM, f"{card} ({reason[:120]})", "restart, or install the driver again", DEVICE_CODE)


def card_use() -> list[CardUse]:
    """The cards that the driver lists; none where there is no driver."""
    cards = []
    for row in _smi("--query-gpu=name,driver_version,memory.total,memory.used"):
        if len(row) == 4 and row[2].isdigit() and row[3].isdigit():
            cards.append(CardUse(row[0], row[1], int(row[2]), int(row[3])))
    return cards


def other_users() -> list[str]:
    """Other programs that hold memory of a card, with how much."""
    rows = _smi("--query-compute-apps=pid,process_name,used_memory")
    mine = str(os.getpid())
    return [
        f"{Path(row[1]).name or 'process'} (pid {row[0]}, {row[2]} MiB)"
        for row in rows
        if len(row) == 3 and row[0] != mine
    ]


def _smi(query: str) -> list[list[str]]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        done = subprocess.run(
            [program, query, "--format=csv,noheader,nounits"], capture_output=True, timeout=_SMI_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    if done.returncode:
        return []
    return list(csv.reader(done.stdout.decode("utf-8", "replace").splitlines(), skipinitialspace=True))


def _memory() -> Iterator[Finding]:
    import torch

    memory = device_memory(torch.device("cpu"))
    text = f"{memory.free_bytes / 2**30:.1f} of {memory.total_bytes / 2**30:.1f} GiB free"
    is_little = memory.free_bytes < 2 * 2**30
    yield Finding("memory", NOTE if is_little else OK, text, "close other programs" if is_little else None)


def _disks() -> Iterator[Finding]:
    for name, folder, change in (
        ("hub cache", cache_folder(), "let HF_HOME name a folder on a larger disk"),
        ("models", models_folder(), "make room, or give quantize an --out on a larger disk"),
    ):
        free = free_bytes(folder)
        text = f"{folder}: {free / 1e9:.1f} GB free"
        if free < _NEEDED_DISK_BYTES:
            wanted = f"{text}; the 9B model and its 4-bit copy take {_NEEDED_DISK_BYTES / 1e9:.0f}"
            yield Finding(name, NOTE, wanted, change)
        elif not _can_write(folder):
            yield Finding(name, PROBLEM, f"{folder}: cannot be written to", change, INPUT_CODE)
        else:
            yield Finding(name, OK, text)


def _can_write(folder: Path) -> bool:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return os.access(folder, os.W_OK)


def _settings() -> Finding:
    path = settings_path(os.environ)
    try:
        load_settings({})
    except SalaLocalError as error:
        return Finding("settings", PROBLEM, error.message, error.hint, 2)
    return Finding("settings", OK, f"{path}" if path.exists() else f"{path} (not there; defaults)")


def _hub(is_offline: bool) -> Finding:
    from huggingface_hub import constants, get_token

    login = "logged in" if get_token() else "not logged in, which public models do not need"
    if is_offline or constants.HF_HUB_OFFLINE:
        return Finding("hub", NOTE, f"not asked (offline); {login}", None if is_offline else "unset HF_HUB_OFFLINE")
    try:
        client = HubClient.of_this_machine(_QUICK)
        listing = read_listing(client, RELEASED_MODEL, "main")
    except SalaLocalError as error:
        return Finding("hub", PROBLEM, f"{constants.ENDPOINT}: {error.message}", error.hint, HUB_CODE)
    return Finding("hub", OK, f"{client.endpoint} has {RELEASED_MODEL}, {listing.num_bytes / 1e9:.1f} GB; {login}")


def _model() -> Iterator[Finding]:
    lines: list[str] = []
    try:
        settings = with_usual_model(load_settings({}), lines.append)
    except SalaLocalError as error:
        yield Finding("model", PROBLEM, error.message, error.hint, error.exit_code)
        return
    if not lines:
        reason = settings.origin("model").removeprefix(f"{DEFAULT_ORIGIN}: ")
        yield Finding("model", OK, f"chat takes {settings.model}: {reason}")
        return
    why, _, advice = lines[0].partition("; ")
    yield Finding("model", NOTE, f"chat takes {settings.model}: {why}", advice)


def worst_code(findings: list[Finding]) -> int:
    """The exit code of the first problem, 0 if there is none."""
    return next((finding.exit_code for finding in findings if finding.status == PROBLEM), 0)
