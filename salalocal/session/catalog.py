"""The models on this machine: nothing goes in, entries with size, weights and the context that fits come out; for `ls`,
`show`, `rm`, shell completion and the choice of the usual model.

Three places are looked at: the package, the folder that `quantize` writes to, and the Hugging Face cache. Reads configs
and headers only; no torch, but in `with_contexts`.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from salalocal.checkpoint.folder import ModelFolder, stored_bytes
from salalocal.checkpoint.folder_lock import only_one
from salalocal.checkpoint.hub import BUILTIN, find_model, split_revision
from salalocal.checkpoint.hub_cache import CachedRepository, cached_repositories, is_hub_id
from salalocal.checkpoint.names import CONFIG_FILE, MAX_CONFIG_BYTES
from salalocal.checkpoint.strict_json import one_line, read_json_file
from salalocal.durable import sync_folder
from salalocal.engine.budget import (
    CacheFormat,
    PlanOptions,
    StoredWeights,
    WeightFormat,
    longest_context,
    why_no_kernels,
)
from salalocal.errors import CheckpointError, HubError, RequestError
from salalocal.model.config import SalaConfig
from salalocal.settings import models_folder

PACKAGE, MADE_HERE, HUB = "built in", "made here", "hub"
CARD_FILE = "quantization_card.json"
WEIGHTS = {"bfloat16": WeightFormat.BF16, "float16": WeightFormat.FP16, "float32": WeightFormat.FP32}

_UNFINISHED = ".quantizing"
_REMOVING = ".removing-"
_MAX_CARD_BYTES = 64 * 2**20


@dataclass(frozen=True)
class ModelEntry:
    """One model on this machine. `name` is what --model takes. Units: bytes of all its files; a time of change.

    `weights` and `config` are None for what is no whole model; `problem` says why. `longest_tokens` None: not asked.
    """

    name: str
    place: str
    folder: ModelFolder
    num_bytes: int
    changed_s: float
    config: SalaConfig | None = None
    weights: str | None = None
    method: str | None = None
    weight_bytes: int = 0
    longest_tokens: int | None = None
    problem: str | None = None


def list_models() -> list[ModelEntry]:
    """Every SALA model on this machine: the built-in one, those made here, those of the hub's cache."""
    return [*_builtin(), *_made_here(), *_of_hub()]


def model_names() -> list[str]:
    """The names of all models, quickly: for shell completion."""
    made = models_folder()
    names = [path.name for path in sorted(made.iterdir()) if _is_shown(path)] if made.is_dir() else []
    return [BUILTIN, *names, *(repository.hub_id for repository in cached_repositories() if _is_sala(repository))]


def with_contexts(entries: list[ModelEntry], free_bytes: int, is_cuda: bool) -> list[ModelEntry]:
    """The same entries with the longest context that fits into so much memory."""
    found = []
    for entry in entries:
        if entry.config is None or entry.weights is None:
            found.append(entry)
            continue
        tokens = longest_context(entry.config, free_bytes, plan_options(entry, is_cuda))
        found.append(replace(entry, longest_tokens=tokens))
    return found


def plan_options(entry: ModelEntry, is_cuda: bool) -> PlanOptions:
    """What a plan for a model counts with: its own weights, and the usual cache."""
    weights = WeightFormat(entry.weights)
    cache = CacheFormat.FP32 if weights is WeightFormat.FP32 else CacheFormat.BF16
    has_kernels = entry.config is not None and not why_no_kernels(entry.config)
    stored = StoredWeights(weights, entry.weight_bytes)
    return PlanOptions(weights, cache, is_cuda=is_cuda, stored=stored, has_kernels=has_kernels)


def find_entry(name: str) -> ModelEntry:
    """The entry of a model by its name. Raises: HubError if there is none."""
    for entry in list_models():
        if entry.name == name:
            return entry
    folder = find_model(name)
    return _read(ModelEntry(name, "folder", folder, _files_bytes(folder.path), _changed_s(folder.path)))


def find_kept(name: str) -> ModelEntry:
    """The entry of a model that can be deleted. Raises: RequestError if there is none of this name."""
    found = next((entry for entry in list_models() if entry.name == name), None)
    if found is None:
        raise RequestError(f"no model '{one_line(name, 120)}' is kept here", "salalocal ls shows what is")
    if found.place == PACKAGE:
        raise RequestError(f"{found.name} came with salalocal", "pip uninstall salalocal takes it away")
    return found


def remove_model(entry: ModelEntry) -> None:
    """Delete a model; the name is gone at once, the bytes after it.

    Raises: BusyError if it is being made; CheckpointError if the disk refuses.
    """
    folder = _kept_folder(entry)
    beside = folder.with_name(f"{_REMOVING}{folder.name}")
    try:
        with only_one(folder, "works in it"):
            if beside.exists():
                shutil.rmtree(beside)
            folder.rename(beside)
            sync_folder(folder.parent)
            shutil.rmtree(beside)
    except OSError as error:
        raise CheckpointError(f"{one_line(folder, 160)}: cannot be removed: {error.strerror or error}") from error


def read_card(folder: ModelFolder) -> dict[str, Any] | None:
    """The quantization card of a model, None if there is none or it cannot be read."""
    path = folder.path / CARD_FILE
    if folder.variant is not None or not path.is_file():
        return None
    try:
        return read_json_file(path, _MAX_CARD_BYTES)
    except CheckpointError:
        return None


def made_of(entry: ModelEntry, hub_id: str) -> bool:
    """Whether `quantize` made this model out of a model of the hub, by the name that it gives."""
    return entry.place == MADE_HERE and entry.config is not None and entry.name.startswith(f"{_plain(hub_id)}-")


def _builtin() -> Iterator[ModelEntry]:
    try:
        folder = find_model(BUILTIN)
    except HubError:
        return
    for variant in (None, *folder.variants):
        name = BUILTIN if variant is None else f"{BUILTIN}:{variant}"
        entry = _read(ModelEntry(name, PACKAGE, ModelFolder(folder.path, variant), 0, _changed_s(folder.path)))
        yield replace(entry, num_bytes=entry.weight_bytes)  # variants share files


def _made_here() -> Iterator[ModelEntry]:
    root = models_folder()
    if not root.is_dir():
        return
    for path in sorted(root.iterdir()):
        if _is_shown(path):
            yield _read(ModelEntry(path.name, MADE_HERE, ModelFolder(path), _files_bytes(path), _changed_s(path)))
        elif path.is_dir() and path.name.endswith(_UNFINISHED):
            problem = "unfinished; the same quantize command goes on with it"
            yield ModelEntry(
                path.name, MADE_HERE, ModelFolder(path), _files_bytes(path), _changed_s(path), problem=problem
            )


def _of_hub() -> Iterator[ModelEntry]:
    for repository in cached_repositories():
        num_bytes, changed_s = _files_bytes(repository.folder), _changed_s(repository.folder)
        folder = repository.model_folder()
        if folder is not None and _is_sala(repository):
            entry = ModelEntry(repository.hub_id, HUB, ModelFolder(folder), num_bytes, changed_s)
            yield _read(entry)
        elif folder is None and repository.is_partly_pulled():
            problem = f"unfinished; salalocal pull {repository.hub_id} goes on with it"
            yield ModelEntry(
                repository.hub_id, HUB, ModelFolder(repository.folder), num_bytes, changed_s, problem=problem
            )


def _read(entry: ModelEntry) -> ModelEntry:
    """The entry with what its files say, or with what is wrong with them."""
    try:
        config = SalaConfig.from_hf(read_json_file(entry.folder.file(CONFIG_FILE), MAX_CONFIG_BYTES))
        weight_bytes = stored_bytes(entry.folder)
        record = config.quantization_config
        weights = WEIGHTS[config.dtype] if record is None else WeightFormat.of_record(record)
    except CheckpointError as error:
        return replace(entry, problem=error.message)
    method = None
    if record is not None:
        options = ((read_card(entry.folder) or {}).get("identity") or {}).get("options") or {}
        method = str(options.get("method") or record.get("quant_method"))
    return replace(
        entry, config=config, weights=weights.value, method=method, weight_bytes=weight_bytes,
        changed_s=_changed_s(entry.folder.file(CONFIG_FILE)),
    )  # fmt: skip


def _is_sala(repository: CachedRepository) -> bool:
    folder = repository.model_folder()
    if folder is None:
        return False
    try:
        return read_json_file(folder / CONFIG_FILE, MAX_CONFIG_BYTES).get("model_type") == "minicpm_sala"
    except CheckpointError:
        return False


def _is_shown(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith(".") and (path / CONFIG_FILE).is_file()


def _kept_folder(entry: ModelEntry) -> Path:
    if entry.place == MADE_HERE:
        return entry.folder.path
    return CachedRepository.of(split_revision(entry.name)[0]).folder


def _plain(hub_id: str) -> str:
    return hub_id.replace("/", "--") if is_hub_id(hub_id) else hub_id


def _files_bytes(folder: Path) -> int:
    """Bytes of the files in a folder, links not counted."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def _changed_s(path: Path) -> float:
    return path.stat().st_mtime
