"""The files of a model folder: its path comes in, the checked headers of its safetensors go out; for Checkpoint and
plans. No torch here."""

from pathlib import Path

from salalocal.checkpoint.header import Header, read_header
from salalocal.checkpoint.names import INDEX_FILE, SINGLE_FILE
from salalocal.checkpoint.strict_json import one_line, read_json_file
from salalocal.errors import CheckpointError

MAX_INDEX_BYTES = 32 * 2**20
MAX_SHARDS = 4096


def stored_bytes(folder: Path) -> int:
    """Bytes of all tensors, from the headers alone. Raises: CheckpointError."""
    return sum(entry.end - entry.start for header in read_headers(folder) for entry in header.entries.values())


def read_headers(folder: Path) -> list[Header]:
    """The checked headers of all files with weights, one or as many as the index names. Raises: CheckpointError."""
    if (folder / SINGLE_FILE).exists():
        return [read_header(folder / SINGLE_FILE)]
    index_path = folder / INDEX_FILE
    if not index_path.exists():
        pickled = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
        reason = f"only pickled weights ({pickled[0]}), which are never loaded" if pickled else "no weights here"
        raise CheckpointError(
            f"{one_line(folder, 160)}: {reason}", f"a model folder holds {SINGLE_FILE}, or {INDEX_FILE} and its files"
        )
    weight_map = _weight_map(index_path)
    headers = [read_header(folder / file) for file in sorted(set(weight_map.values()))]
    _check_index(weight_map, headers, one_line(index_path, 160))
    return headers


def _weight_map(path: Path) -> dict[str, str]:
    where = one_line(path, 160)
    index = read_json_file(path, MAX_INDEX_BYTES)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{where}: weight_map should be an object that names a file for every tensor")
    files: set[object] = set()
    for file in weight_map.values():
        if not isinstance(file, str) or not _is_plain_shard_name(file):
            raise CheckpointError(f"{where}: '{one_line(file)}' is not a plain name of a .safetensors file")
        files.add(file)
    if len(files) > MAX_SHARDS:
        raise CheckpointError(f"{where}: {len(files):,} files, the limit is {MAX_SHARDS:,}")
    if len({str(file).casefold() for file in files}) < len(files):
        raise CheckpointError(f"{where}: file names that differ in upper and lower case only")
    return weight_map


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
