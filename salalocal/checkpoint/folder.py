"""The files of a model folder: its path comes in, the checked headers of its safetensors go out; for Checkpoint and
plans. No torch here.

A folder may hold several forms of one model, as the hub has them: next to `config.json` and the weights that
`model.safetensors` or its index names stand `config.VARIANT.json` and `model.VARIANT.safetensors` or
`model.safetensors.index.VARIANT.json`. Variants may share files, so what is equal in them is stored once.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from salalocal.checkpoint.header import Header, read_header
from salalocal.checkpoint.names import CONFIG_FILE, INDEX_FILE, SINGLE_FILE
from salalocal.checkpoint.strict_json import one_line, read_json_file
from salalocal.errors import CheckpointError

MAX_INDEX_BYTES = 32 * 2**20
MAX_SHARDS = 4096

_VARIANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}")


@dataclass(frozen=True)
class ModelFolder:
    """A model folder, and which of its variants is meant: None for the one that `config.json` describes."""

    path: Path
    variant: str | None = None

    @classmethod
    def of(cls, place: "str | Path | ModelFolder") -> "ModelFolder":
        """A plain path means the folder's default variant."""
        return place if isinstance(place, ModelFolder) else cls(Path(place))

    def file(self, name: str) -> Path:
        """Where this variant's own file stands that a folder without variants calls `name`."""
        stem, _, kind = name.rpartition(".")
        return self.path / (name if self.variant is None else f"{stem}.{self.variant}.{kind}")

    @property
    def variants(self) -> tuple[str, ...]:
        """The names of all variants in the folder, the default one left out."""
        stem, _, kind = CONFIG_FILE.rpartition(".")
        names = (path.name[len(stem) + 1 : -len(kind) - 1] for path in self.path.glob(f"{stem}.*.{kind}"))
        return tuple(sorted(name for name in names if is_variant_name(name)))

    def __str__(self) -> str:
        return str(self.path) if self.variant is None else f"{self.path}:{self.variant}"


def is_variant_name(name: str) -> bool:
    """Whether a text can name a variant: letters, digits, dashes, no dot and no path of any kind."""
    return _VARIANT.fullmatch(name) is not None


def stored_bytes(place: Path | ModelFolder) -> int:
    """Bytes of all tensors, from the headers alone. Raises: CheckpointError."""
    return sum(entry.end - entry.start for header in read_headers(place) for entry in header.entries.values())


def read_headers(place: Path | ModelFolder) -> list[Header]:
    """The checked headers of all files with weights, one or as many as the index names. Raises: CheckpointError."""
    folder = ModelFolder.of(place)
    single_path, index_path = folder.file(SINGLE_FILE), folder.file(INDEX_FILE)
    if single_path.exists():
        return [read_header(single_path)]
    if not index_path.exists():
        pickled = sorted(path.name for path in folder.path.glob("pytorch_model*.bin"))
        reason = f"only pickled weights ({pickled[0]}), which are never loaded" if pickled else "no weights here"
        raise CheckpointError(
            f"{one_line(folder, 160)}: {reason}",
            f"a model folder holds {single_path.name}, or {index_path.name} and its files",
        )
    weight_map = _weight_map(index_path)
    headers = [read_header(folder.path / file) for file in sorted(set(weight_map.values()))]
    _check_index(weight_map, headers, one_line(index_path, 160))
    return headers


def _weight_map(path: Path) -> dict[str, str]:
    where = one_line(path, 160)
    index = read_json_file(path, MAX_INDEX_BYTES)
    shard_names(index, where)
    return dict(index["weight_map"])  # type: ignore[call-overload, no-any-return]


def shard_names(index: Mapping[str, object], where: str) -> list[str]:
    """The files that a parsed index names; `where` begins the error line.

    Raises: CheckpointError for what is no index, names that are not plain, too many, or alike but for their case.
    """
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{where}: weight_map should be an object that names a file for every tensor")
    files: set[str] = set()
    for file in weight_map.values():
        if not isinstance(file, str) or not _is_plain_shard_name(file):
            raise CheckpointError(f"{where}: '{one_line(file)}' is not a plain name of a .safetensors file")
        files.add(file)
    if len(files) > MAX_SHARDS:
        raise CheckpointError(f"{where}: {len(files):,} files, the limit is {MAX_SHARDS:,}")
    if len({file.casefold() for file in files}) < len(files):
        raise CheckpointError(f"{where}: file names that differ in upper and lower case only")
    return sorted(files)


def _is_plain_shard_name(name: str) -> bool:
    """Whether a name can only lead to a file right in the model folder, on every operating system."""
    plain = all(c.isascii() and (c.isalnum() or c in "._-") for c in name)
    return plain and name.endswith(".safetensors") and name[0].isalnum() and len(name) <= 128


def _check_index(weight_map: dict[str, str], headers: list[Header], where: str) -> None:
    listed = set(weight_map.items())
    stored = {(name, header.path.name) for header in headers for name in header.entries}
    for found, reason in ((listed - stored, "is listed but not stored"), (stored - listed, "is stored but not listed")):
        if found:
            name, file = min(found)
            more = f" ({len(found) - 1:,} more)" if len(found) > 1 else ""
            raise CheckpointError(f"{where}: tensor '{one_line(name)}' {reason} in {file}{more}")
