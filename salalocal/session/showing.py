"""All about one model: a name goes in, its shape, its tensors by scheme, its licence, its card and what fits here come
out; for `show`."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from salalocal.checkpoint.checkpoint import Checkpoint
from salalocal.checkpoint.hub_cache import is_commit
from salalocal.device import device_memory, pick_device
from salalocal.engine.budget import MemoryPlan, longest_context, plan_memory
from salalocal.errors import CheckpointError
from salalocal.model.config import SalaConfig
from salalocal.quant import weight_layout
from salalocal.quant.codebook import CodebookScheme
from salalocal.quant.stored import Scheme
from salalocal.session.catalog import ModelEntry, find_entry, plan_options, read_card
from salalocal.settings import Settings

_CONTEXTS = (2**16, 2**18, 2**20)
_CARDS = ("README.md", "MODEL_CARD.md")
_LICENSES = ("LICENSE", "LICENSE.txt", "LICENSE.md")
_CARD_BYTES = 2**16
_LICENSE = re.compile(r"^license(?:_name)?:\s*[\"']?([A-Za-z0-9._ +-]{1,60}?)[\"']?\s*$", re.MULTILINE)


@dataclass(frozen=True)
class SchemeTotal:
    """All tensors that are stored alike. `scheme` is in words."""

    scheme: str
    num_tensors: int
    num_bytes: int
    kinds: tuple[str, ...]


@dataclass(frozen=True)
class ModelReport:
    """A model in full. Units: longest_tokens, the context that fits into the free memory of the device."""

    entry: ModelEntry
    config: SalaConfig
    commit: str | None
    schemes: tuple[SchemeTotal, ...]
    licence: str | None
    card: Mapping[str, Any] | None
    device: str
    free_bytes: int
    plans: tuple[MemoryPlan, ...]
    longest_tokens: int


def show_model(settings: Settings) -> ModelReport:
    """Look at a model without loading it. Raises: HubError, CheckpointError, RequestError, BackendError."""
    entry = find_entry(settings.model)
    if entry.config is None or entry.problem is not None:
        raise CheckpointError(f"{entry.name}: {entry.problem}", "salalocal ls shows all models")
    device = pick_device(settings.device)
    free_bytes = device_memory(device).free_bytes
    options = plan_options(entry, device.type == "cuda")
    snapshot = entry.folder.path.name
    return ModelReport(
        entry,
        entry.config,
        snapshot if is_commit(snapshot) else None,
        tuple(_schemes(Checkpoint.open(entry.folder))),
        _licence(entry.folder.path),
        read_card(entry.folder),
        str(device),
        free_bytes,
        tuple(plan_memory(entry.config, tokens, options) for tokens in _CONTEXTS),
        longest_context(entry.config, free_bytes, options),
    )


def _schemes(checkpoint: Checkpoint) -> list[SchemeTotal]:
    """What the folder stores, by how it is stored, the largest first."""
    layout = weight_layout(checkpoint)
    is_by_row = (checkpoint.config.quantization_config or {}).get("group_size") == -1
    counts: Counter[str] = Counter()
    num_bytes: Counter[str] = Counter()
    kinds: dict[str, dict[str, None]] = {}

    def add(scheme: str, module: str, size: int) -> None:
        counts[scheme] += 1
        num_bytes[scheme] += size
        kinds.setdefault(scheme, {})[module.rpartition(".")[2]] = None

    for name in layout.dense:
        dtype = str(checkpoint.dtype(name)).removeprefix("torch.")
        size = checkpoint.dtype(name).itemsize
        for length in checkpoint.shape(name):
            size *= length
        add(dtype, name.removesuffix(".weight"), size)
    for module, matrix in layout.matrices.items():
        add(_words(matrix.scheme, is_by_row), module, matrix.num_bytes)
    return [SchemeTotal(scheme, counts[scheme], size, tuple(kinds[scheme])) for scheme, size in num_bytes.most_common()]


def _words(scheme: Scheme, is_by_row: bool) -> str:
    if isinstance(scheme, CodebookScheme):
        return f"{scheme.kind}, blocks of {scheme.block_size}"
    groups = "one scale a row" if is_by_row else f"groups of {scheme.group_size}"
    return f"int{scheme.bits}, {groups}"


def _licence(folder: Path) -> str | None:
    """What the model card says, or the title of the licence file."""
    for name in _CARDS:
        front = _start_of(folder / name).partition("\n---")[0]
        match = _LICENSE.search(front) if front.startswith("---") else None
        if match is not None:
            return match[1]
    for name in _LICENSES:
        title = next((line.strip() for line in _start_of(folder / name).splitlines() if line.strip()), "")
        if title:
            return title[:60]
    return None


def _start_of(path: Path) -> str:
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return file.read(_CARD_BYTES).decode("utf-8", "replace")
