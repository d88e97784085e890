"""One file from a hub to the disk: its entry in the list goes in, a blob that has its hash comes out; for the pull.

What has come lies beside the blob's place and is gone on with, after a broken connection as after a kill. The server's
tag of what it sends is kept too and sent back (If-Range), so bytes of two files are never joined. Only a file whose
whole content has the listed hash gets the blob's name.
"""

import os
import re
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from salalocal.checkpoint.hub_cache import CachedRepository, open_partial
from salalocal.checkpoint.hub_client import HubClient, PassingFailureError, Patience, Reply, StoppedError
from salalocal.checkpoint.hub_listing import RemoteFile
from salalocal.durable import replace_file, sync_folder
from salalocal.errors import HubError

_HASH_BYTES = 2**20
_MAX_TAG_CHARACTERS = 200
_MAX_RESTARTS = 1
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})")

OnBytes = Callable[[int], None]
"""Is told how many bytes of the file are on the disk."""


class _OtherContent(Exception):
    """What comes is not what came before, or not what was listed."""


class Transfer:
    """One file on its way; `run` brings it whole."""

    def __init__(self, client: HubClient, repository: CachedRepository, commit: str, file: RemoteFile) -> None:
        self._client = client
        self._repository = repository
        self._url = client.file_url(repository.hub_id, commit, file.name)
        self._file = file
        self._what = f"{repository.hub_id}: {file.name}"

    def run(self, on_bytes: OnBytes, stop: threading.Event, on_wait: Callable[[str], None]) -> None:
        """Fetch what is missing, check the hash of the whole, and name the blob. `on_wait` hears why it waits.

        Raises: HubError; OSError if the disk fails; StoppedError.
        """
        partial = self._repository.partial(self._file.digest)
        with open_partial(partial) as file:
            for _ in range(_MAX_RESTARTS + 1):
                try:
                    self._fill(file, on_bytes, stop, on_wait)
                    break
                except _OtherContent:
                    _empty(file)
            else:
                raise HubError(
                    f"{self._what}: what comes is not what the hub lists (its hash differs)",
                    "nothing of it is kept; try later, and report it if it stays so",
                )
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self._repository.blob(self._file.digest))
        sync_folder(partial.parent)
        self._validator.unlink(missing_ok=True)

    @property
    def _validator(self) -> Path:
        return self._repository.validator(self._file.digest)

    def _fill(self, file: BinaryIO, on_bytes: OnBytes, stop: threading.Event, on_wait: Callable[[str], None]) -> None:
        """Make the file whole. Raises: _OtherContent if its hash is wrong then, or cannot become right."""
        digest = self._file.new_hash()
        have = 0
        while piece := file.read(_HASH_BYTES):
            digest.update(piece)
            have += len(piece)
            _stop_if(stop)
        patience = Patience(self._client.limits, self._what, on_wait, stop)
        while have < self._file.num_bytes:
            on_bytes(have)
            before = have
            try:
                with self._ask(have) as reply:
                    if reply.status == 200 and have:  # the server has other bytes, or cannot begin in the middle
                        _empty(file)
                        digest, have, before = self._file.new_hash(), 0, 0
                    self._keep_tag(reply)
                    for piece in reply.pieces():
                        _stop_if(stop)
                        if have + len(piece) > self._file.num_bytes:
                            raise _OtherContent
                        file.write(piece)
                        digest.update(piece)
                        have += len(piece)
                        on_bytes(have)
                if have < self._file.num_bytes:
                    raise PassingFailureError(f"the connection broke at byte {have:,}")
            except PassingFailureError as failure:
                patience.brought(have - before)
                patience.pause(failure)
        if have > self._file.num_bytes or digest.hexdigest() != self._file.digest:
            raise _OtherContent

    def _ask(self, start: int) -> Reply:
        """A reply that brings the bytes from `start` on, or all of them."""
        headers = {}
        if start:
            headers["Range"] = f"bytes={start}-"
            if tag := self._kept_tag():
                headers["If-Range"] = tag
        reply = self._client.open(self._url, self._what, headers)
        try:
            self._check(reply, start)
        except BaseException:
            reply.__exit__()
            raise
        return reply

    def _check(self, reply: Reply, start: int) -> None:
        if reply.status == 416:
            raise _OtherContent
        is_digest = len(reply.linked_etag) == len(self._file.digest)
        if is_digest and reply.linked_etag != self._file.digest:
            raise _OtherContent
        rest = self._file.num_bytes - (start if reply.status == 206 else 0)
        if reply.content_bytes not in (None, rest):
            raise _OtherContent
        if reply.status == 206:
            match = _CONTENT_RANGE.fullmatch(reply.headers.get("Content-Range", ""))
            if match is None or (int(match[1]), int(match[3])) != (start, self._file.num_bytes):
                raise _OtherContent

    def _keep_tag(self, reply: Reply) -> None:
        """Remember what the server calls what it sends, if a later request can refer to it."""
        tag = reply.headers.get("ETag", "")
        is_strong = tag.startswith('"') and tag.isascii() and tag.isprintable() and len(tag) <= _MAX_TAG_CHARACTERS
        if reply.status == 200 and is_strong:
            replace_file(self._validator, lambda file: file.write(tag.encode()))
        elif reply.status == 200:
            self._validator.unlink(missing_ok=True)

    def _kept_tag(self) -> str:
        with suppress(OSError, UnicodeDecodeError):
            if self._validator.is_file() and not self._validator.is_symlink():
                tag = self._validator.read_bytes()[: _MAX_TAG_CHARACTERS + 1].decode("ascii")
                if tag.startswith('"') and tag.isprintable() and len(tag) <= _MAX_TAG_CHARACTERS:
                    return tag
        return ""


def has_digest(path: Path, file: RemoteFile, on_bytes: OnBytes, stop: threading.Event) -> bool:
    """Whether a file on the disk is the one that is listed. Raises: OSError; StoppedError."""
    if path.stat().st_size != file.num_bytes:
        return False
    digest, have = file.new_hash(), 0
    with path.open("rb") as opened:
        while piece := opened.read(_HASH_BYTES):
            digest.update(piece)
            have += len(piece)
            on_bytes(have)
            _stop_if(stop)
    return digest.hexdigest() == file.digest


def _empty(file: BinaryIO) -> None:
    file.seek(0)
    file.truncate()


def _stop_if(stop: threading.Event) -> None:
    if stop.is_set():
        raise StoppedError
