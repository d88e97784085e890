"""Where models of the hub lie on disk: a hub id and a digest or a name go in, paths in the Hugging Face cache come out;
for the pull, for `hub` and for lists of models.

    models--ORG--NAME/blobs/DIGEST                      the bytes, named by their sha256 (large files) or git's sha1
    models--ORG--NAME/snapshots/COMMIT/FILE             a link to a blob
    models--ORG--NAME/refs/REVISION                     the commit that a branch or tag leads to

Every path that has a remote name in it is built here, out of names that have passed `is_wanted_name` or a pattern.
"""

import errno
import os
import re
import secrets
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from salalocal.checkpoint.names import CONFIG_FILE
from salalocal.checkpoint.strict_json import one_line
from salalocal.durable import TEMPORARY, remove_strays, replace_file, sync_folder
from salalocal.errors import CheckpointError, HubError

DEFAULT_REVISION = "main"

_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?"
_HUB_ID = re.compile(rf"{_PART}/{_PART}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_DIGEST = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")
_REVISION = re.compile(
    r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?(?:/[A-Za-z0-9](?:[A-Za-z0-9._-]{0,60}[A-Za-z0-9])?){0,4}"
)
_SAFETENSORS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,114}\.safetensors")
_VARIANT = r"(?:\.[A-Za-z0-9][A-Za-z0-9_-]{0,31})?"
_CONFIG = re.compile(rf"config{_VARIANT}\.json")
_INDEX = re.compile(rf"model\.safetensors\.index{_VARIANT}\.json")
_NAMED = frozenset(
    {
        "generation_config.json", "quantize_config.json", "quantization_config.json", "quantization_card.json",
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
        "merges.txt", "chat_template.jinja", "chat_template.json", "README.md", "MODEL_CARD.md", "LICENSE",
        "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt",
    }
)  # fmt: skip
_DEVICES = frozenset({"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(10))})
_FOLDER = re.compile(r"models--(.+?)--(.+)")
_PARTIAL = ".salalocal-partial"
_VALIDATOR = ".salalocal-etag"
_MAX_REF_BYTES = 256


def is_hub_id(name: str) -> bool:
    """Whether a text is a hub id ORG/NAME: two plain names, no `..` or `--` in them, no path of any kind."""
    return _HUB_ID.fullmatch(name) is not None and ".." not in name and "--" not in name


def is_revision(text: str) -> bool:
    """Whether a text can name a branch, a tag or a commit, and no path outside of `refs`."""
    return _REVISION.fullmatch(text) is not None and ".." not in text and not text.endswith(".lock")


def is_commit(text: str) -> bool:
    """Whether a text is the full name of a commit."""
    return _COMMIT.fullmatch(text) is not None


def is_digest(text: str) -> bool:
    """Whether a text names bytes: a sha256, or a sha1 of git."""
    return _DIGEST.fullmatch(text) is not None


def is_wanted_name(name: str) -> bool:
    """Whether a file of a repository is one that a model here is made of: safetensors, or JSON or text by name.

    Never code, never a pickle, nothing in folders.
    """
    if name.partition(".")[0].lower() in _DEVICES:  # Windows would open the device
        return False
    return is_weights_name(name) or is_config_name(name) or _INDEX.fullmatch(name) is not None or name in _NAMED


def is_weights_name(name: str) -> bool:
    """Whether a name is a plain one of a safetensors file."""
    return _SAFETENSORS.fullmatch(name) is not None and ".." not in name


def is_config_name(name: str) -> bool:
    """Whether a name is that of a config.json, of whichever variant."""
    return _CONFIG.fullmatch(name) is not None


@dataclass(frozen=True)
class CachedRepository:
    """One model in the Hugging Face cache, whether it is there or not."""

    hub_id: str
    folder: Path

    @classmethod
    def of(cls, hub_id: str) -> "CachedRepository":
        """The place of a model in the cache of this machine. Raises: HubError for what is no hub id."""
        if not is_hub_id(hub_id):
            raise HubError(
                f"'{one_line(hub_id)}' is not a hub id", "a hub id is ORG/NAME, such as openbmb/MiniCPM-SALA"
            )
        return cls(hub_id, cache_folder() / f"models--{hub_id.replace('/', '--')}")

    def blob(self, digest: str) -> Path:
        """Where the bytes of this digest lie, once they are whole."""
        return self._inside("blobs", digest, _DIGEST)

    def partial(self, digest: str) -> Path:
        """Where they grow."""
        return self.blob(digest).with_name(digest + _PARTIAL)

    def validator(self, digest: str) -> Path:
        """Where the tag stands that a server gave to what has grown so far."""
        return self.blob(digest).with_name(digest + _VALIDATOR)

    def snapshot(self, commit: str) -> Path:
        """The folder of a commit."""
        return self._inside("snapshots", commit, _COMMIT)

    def file(self, commit: str, name: str) -> Path:
        """Where a file of a commit is found. Raises: HubError for a name that no model here has."""
        if not is_wanted_name(name):
            raise HubError(f"'{one_line(name)}' is not a file of a model", "report it to the owner of the model")
        return self.snapshot(commit) / name

    def commit_of(self, revision: str) -> str | None:
        """The commit that a revision leads to on this disk, None if it is not known here."""
        if is_commit(revision):
            return revision
        try:
            path = self._ref(revision)
            with path.open("rb") as file:
                commit = file.read(_MAX_REF_BYTES).decode("ascii", "replace").strip()
        except (OSError, HubError):
            return None
        return commit if is_commit(commit) else None

    def model_folder(self, revision: str = DEFAULT_REVISION) -> Path | None:
        """The folder of a revision, if a model is there."""
        commit = self.commit_of(revision)
        if commit is None:
            return None
        folder = self.snapshot(commit)
        return folder if (folder / CONFIG_FILE).is_file() else None

    def prepare(self, commit: str) -> None:
        """Make the folders that a pull writes to. Raises: CheckpointError if one is a link; OSError."""
        cache_folder().mkdir(parents=True, exist_ok=True)
        for folder in (self.folder, *(self.folder / name for name in ("blobs", "refs", "snapshots"))):
            _make_folder(folder)
        _make_folder(self.snapshot(commit))

    def remove_beginnings(self) -> None:
        """Take away what is not whole, such as files of an older commit, once a pull has ended. Raises: OSError."""
        for ending in (_PARTIAL, _VALIDATOR):
            for path in (self.folder / "blobs").glob(f"*{ending}"):
                path.unlink(missing_ok=True)

    def remove_strays(self, commit: str) -> None:
        """Take away what a killed pull left; only while no other one is at work. Raises: OSError."""
        for folder in (self.folder / "blobs", self.folder / "refs", self.snapshot(commit)):
            remove_strays(folder)

    def link(self, commit: str, name: str, digest: str) -> None:
        """Let a name of a commit lead to a blob; where there can be no links, the blob takes it. Raises: OSError."""
        place, blob = self.file(commit, name), self.blob(digest)
        if place.is_symlink() and blob.exists() and place.resolve() == blob.resolve():
            return
        beside = place.with_name(f"{TEMPORARY}{secrets.token_hex(8)}")
        try:
            beside.symlink_to(Path("..", "..", "blobs", digest))
        except OSError as error:
            if not (os.name == "nt" or error.errno in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP)):
                raise
            blob.replace(place)
        else:
            beside.replace(place)
        sync_folder(place.parent)

    def holder(self, commit: str, name: str, digest: str) -> Path | None:
        """The file that should hold these bytes, if there is one: the blob, or the name where there are no links."""
        place = self.file(commit, name)
        if self.blob(digest).is_file() and not self.blob(digest).is_symlink():
            return self.blob(digest)
        return place if place.is_file() and not place.is_symlink() else None

    def set_ref(self, revision: str, commit: str) -> None:
        """Let a branch or tag lead to a commit. Raises: OSError."""
        if is_commit(revision):
            return
        path = self._ref(revision)
        for folder in reversed(path.relative_to(self.folder).parents[:-1]):
            _make_folder(self.folder / folder)
        replace_file(path, lambda file: file.write(commit.encode()))

    def is_partly_pulled(self) -> bool:
        """Whether a pull has begun here and left a file that is not whole."""
        return any((self.folder / "blobs").glob(f"*{_PARTIAL}"))

    def _ref(self, revision: str) -> Path:
        if not is_revision(revision):
            raise HubError(f"'{one_line(revision)}' is no revision", "name a branch, a tag or a commit")
        return self.folder / "refs" / revision

    def _inside(self, folder: str, name: str, pattern: re.Pattern[str]) -> Path:
        if pattern.fullmatch(name) is None:
            raise HubError(f"'{one_line(name)}' is no digest", "report it to the owner of the model")
        return self.folder / folder / name


def cache_folder() -> Path:
    """The Hugging Face cache of this machine, as huggingface_hub finds it (not created here)."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def cached_repositories() -> list[CachedRepository]:
    """All models in the cache, in the order of their names."""
    found = []
    with suppress(OSError):
        for folder in sorted(cache_folder().iterdir()):
            match = _FOLDER.fullmatch(folder.name)
            if match is not None and is_hub_id(f"{match[1]}/{match[2]}") and folder.is_dir():
                found.append(CachedRepository(f"{match[1]}/{match[2]}", folder))
    return found


def open_partial(path: Path) -> BinaryIO:
    """A file to go on with or to begin; what is no regular file in its place is taken away. Raises: OSError."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    if path.is_symlink() or (path.exists() and not path.is_file()):
        path.unlink()
    return os.fdopen(os.open(path, flags, 0o666), "r+b")


def free_bytes(folder: Path) -> int:
    """Room on the disk that a folder lies on, or will lie on."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _make_folder(folder: Path) -> None:
    with suppress(FileExistsError):
        folder.mkdir()
        sync_folder(folder.parent)
    if folder.is_symlink() or not folder.is_dir():
        raise CheckpointError(
            f"{one_line(folder, 160)}: not a folder of its own (a link, or a file)", "take it away, or set HF_HOME"
        )
