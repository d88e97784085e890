"""What a repository of the hub holds: a hub id and a revision go in, a commit and checked entries of the files that
make a model go out; for the pull.

The list, every config.json and every index are read, held to their hashes and checked before a file of weights is
asked for: a repository that is no SALA model, or has no safetensors, is told in a second.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from salalocal.checkpoint.folder import MAX_INDEX_BYTES, shard_names
from salalocal.checkpoint.hub_cache import is_commit, is_config_name, is_wanted_name, is_weights_name
from salalocal.checkpoint.hub_client import HubClient
from salalocal.checkpoint.names import CONFIG_FILE, MAX_CONFIG_BYTES
from salalocal.checkpoint.strict_json import one_line, parse_object
from salalocal.errors import CheckpointError, HubError
from salalocal.model.config import SalaConfig

MAX_FILE_BYTES = 2**46
MAX_TEXT_BYTES = 64 * 2**20  # a file without weights

_WHERE = "is HF_ENDPOINT right? it should be https://huggingface.co or a mirror of it"
_HINT = "report it to the owner of the model, or name another --revision"
_HEX = frozenset("0123456789abcdef")


@dataclass(frozen=True)
class RemoteFile:
    """A file as the hub lists it. `digest` names its bytes: sha256 of a large one, git's sha1 of a small one."""

    name: str
    num_bytes: int
    digest: str

    def new_hash(self) -> "hashlib._Hash":
        """A hash whose digest of the whole file should be `digest`."""
        if len(self.digest) == 64:
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % self.num_bytes, usedforsecurity=False)


@dataclass(frozen=True)
class Listing:
    """A commit, the files that a model here is made of, and the names of what is left where it is."""

    hub_id: str
    commit: str
    files: tuple[RemoteFile, ...]
    left_out: tuple[str, ...]
    config: SalaConfig

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.num_bytes for file in self.files)


def read_listing(client: HubClient, hub_id: str, revision: str) -> Listing:
    """Ask the hub for a revision. Raises: HubError, CheckpointError for what is no model that runs here."""
    data = client.get(client.revision_url(hub_id, revision), hub_id)
    try:
        reply = parse_object(data, f"{hub_id}: the hub's list")
    except CheckpointError as error:
        raise HubError(error.message, _WHERE) from error
    commit = reply.get("sha")
    if not isinstance(commit, str) or not is_commit(commit):
        raise HubError(f"{hub_id}: the hub names no commit", _WHERE)
    if is_commit(revision) and commit != revision:
        raise HubError(f"{hub_id}: asked for commit {revision[:12]}, the hub gives {commit[:12]}", _HINT)
    listed, names = _entries(reply.get("siblings"), hub_id)
    config, weights = _weights(client, hub_id, commit, listed)
    files = [file for name, file in listed.items() if not is_weights_name(name) or name in weights]
    kept = {file.name for file in files}
    left_out = tuple(sorted(name for name in names if name not in kept))
    return Listing(hub_id, commit, tuple(sorted(files, key=lambda file: file.name)), left_out, config)


def _entries(siblings: object, hub_id: str) -> tuple[dict[str, RemoteFile], list[str]]:
    """The files of wanted names, and all names."""
    if not isinstance(siblings, list):
        raise HubError(f"{hub_id}: the hub lists no files", _WHERE)
    found: dict[str, RemoteFile] = {}
    names: list[str] = []
    for entry in siblings:
        name = entry.get("rfilename") if isinstance(entry, dict) else None
        if not isinstance(name, str):
            raise HubError(f"{hub_id}: the hub lists a file without a name", _WHERE)
        names.append(name)
        if is_wanted_name(name):
            if name in found:
                raise HubError(f"{hub_id}: the hub lists '{name}' twice", _HINT)
            found[name] = _entry(name, entry, hub_id)
    if len({name.casefold() for name in found}) < len(found):
        raise HubError(f"{hub_id}: file names that differ in upper and lower case only", _HINT)
    return found, names


def _entry(name: str, entry: Mapping[str, object], hub_id: str) -> RemoteFile:
    large = entry.get("lfs")
    if isinstance(large, dict):
        size, digest, length = large.get("size"), large.get("sha256"), 64
    else:
        size, digest, length = entry.get("size"), entry.get("blobId"), 40
    limit = MAX_FILE_BYTES if is_weights_name(name) else MAX_TEXT_BYTES
    if type(size) is not int or not 0 <= size <= limit:
        raise HubError(f"{hub_id}: '{name}' has {one_line(size, 30)} bytes, the limit is {limit:,}", _HINT)
    if not isinstance(digest, str) or len(digest) != length or not _HEX.issuperset(digest):
        raise HubError(f"{hub_id}: the hub gives no hash for '{name}'", _HINT)
    return RemoteFile(name, size, digest)


def _weights(
    client: HubClient, hub_id: str, commit: str, listed: Mapping[str, RemoteFile]
) -> tuple[SalaConfig, set[str]]:
    """The default shape, and the files of weights that any variant names."""
    if CONFIG_FILE not in listed:
        raise CheckpointError(f"{hub_id}: no {CONFIG_FILE}, so no model", "name a model such as openbmb/MiniCPM-SALA")
    configs: dict[str, SalaConfig] = {}
    weights: set[str] = set()
    for name in filter(is_config_name, listed):
        where = f"{hub_id}: {name}"
        config = parse_object(_read(client, hub_id, commit, listed[name], MAX_CONFIG_BYTES), where)
        try:
            configs[name] = SalaConfig.from_hf(config)
        except CheckpointError as error:
            raise CheckpointError(f"{where}: {error.message}", error.hint) from error
        weights.update(_weights_of_variant(client, hub_id, commit, listed, name[len("config") : -len(".json")]))
    return configs[CONFIG_FILE], weights


def _weights_of_variant(
    client: HubClient, hub_id: str, commit: str, listed: Mapping[str, RemoteFile], suffix: str
) -> set[str]:
    single, index = f"model{suffix}.safetensors", f"model.safetensors.index{suffix}.json"
    if single in listed:
        return {single}
    if index not in listed:
        raise CheckpointError(f"{hub_id}: no {single} and no {index}", "only safetensors are fetched, never pickles")
    where = f"{hub_id}: {index}"
    names = shard_names(parse_object(_read(client, hub_id, commit, listed[index], MAX_INDEX_BYTES), where), where)
    missing = [name for name in names if name not in listed]
    if missing:
        raise CheckpointError(f"{where} names '{missing[0]}', which is not there ({len(missing):,} missing)", _HINT)
    return set(names)


def _read(client: HubClient, hub_id: str, commit: str, file: RemoteFile, max_bytes: int) -> bytes:
    """A small file, in memory. Raises: HubError if it is not what the list says."""
    if file.num_bytes > max_bytes:
        raise HubError(f"{hub_id}: '{file.name}' has {file.num_bytes:,} bytes, the limit is {max_bytes:,}", _HINT)
    data = client.get(client.file_url(hub_id, commit, file.name), f"{hub_id}: {file.name}", file.num_bytes)
    digest = file.new_hash()
    digest.update(data)
    if digest.hexdigest() != file.digest:
        raise HubError(f"{hub_id}: '{file.name}' is not what the hub's list says (its hash differs)", "try again later")
    return data
