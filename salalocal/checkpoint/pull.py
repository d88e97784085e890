"""A model from the hub into the Hugging Face cache: a hub id goes in, a whole, checked snapshot comes out; for
`session/pulling`.

Files are fetched by a few threads; each counts once its hash is right. `config.json` gets its name last and the branch
leads to the new commit after that: a pull that stops anywhere leaves the model of before, or none, never half of one.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

from salalocal.checkpoint.folder import read_headers
from salalocal.checkpoint.folder_lock import only_one
from salalocal.checkpoint.hub_cache import (
    CachedRepository,
    free_bytes,
    is_config_name,
    is_digest,
    is_wanted_name,
)
from salalocal.checkpoint.hub_client import HubClient, StoppedError
from salalocal.checkpoint.hub_listing import Listing, RemoteFile
from salalocal.checkpoint.names import CONFIG_FILE, MAX_CONFIG_BYTES
from salalocal.checkpoint.strict_json import one_line, read_json_file
from salalocal.checkpoint.transfer import Transfer, has_digest
from salalocal.errors import CheckpointError, HubError, SalaLocalError
from salalocal.model.config import SalaConfig

NUM_THREADS = 4

_SPARE_BYTES = 64 * 2**20  # what a disk should have left
_SHOW_EVERY_S = 0.1
_RATE_OVER_S = 10.0
_RATE_AFTER_S = 2.0
_LEAVE_AFTER_S = 1.0

WAITING, CHECKING, FETCHING, DONE = "waiting", "checking", "fetching", "done"


@dataclass(frozen=True)
class FileState:
    """A file before a pull. Units: bytes that lie on the disk already, all of them or a part."""

    file: RemoteFile
    num_here_bytes: int


@dataclass(frozen=True)
class PullPlan:
    """What a pull will do: which files, how much of them is here, and the room on the disk."""

    listing: Listing
    revision: str
    repository: CachedRepository
    files: tuple[FileState, ...]
    free_bytes: int

    @property
    def fetch_bytes(self) -> int:
        """Bytes that are still to come."""
        return sum(state.file.num_bytes - state.num_here_bytes for state in self.files)

    def check_room(self) -> None:
        """Raises CheckpointError if the disk cannot hold what is to come."""
        needed = self.fetch_bytes + _SPARE_BYTES
        if self.fetch_bytes and needed > self.free_bytes:
            raise CheckpointError(
                f"{self.listing.hub_id} needs {needed / 2**30:.2f} GiB more, {self.free_bytes / 2**30:.2f} GiB are "
                f"free for {one_line(self.repository.folder.parent, 120)}",
                "make room, or let HF_HOME name a folder on a larger disk",
            )


@dataclass(frozen=True)
class FileProgress:
    """How far one file is. `note` says why it waits for the hub, if it does. Units: bytes per second as below."""

    name: str
    phase: str
    num_bytes: int
    total_bytes: int
    note: str = ""
    bytes_per_s: float = 0.0

    @property
    def left_s(self) -> float | None:
        """Seconds until it is whole, None if that cannot be said."""
        return (self.total_bytes - self.num_bytes) / self.bytes_per_s if self.bytes_per_s else None


@dataclass(frozen=True)
class PullProgress:
    """How far a pull is. Units: bytes per second over the last ten seconds; `left_s` None while nothing comes."""

    files: tuple[FileProgress, ...]
    bytes_per_s: float
    left_s: float | None
    elapsed_s: float

    @property
    def num_bytes(self) -> int:
        """Bytes on the disk."""
        return sum(file.num_bytes for file in self.files)

    @property
    def total_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.total_bytes for file in self.files)


def plan_pull(listing: Listing, revision: str) -> PullPlan:
    """See what is here already. Writes nothing. Raises: HubError."""
    repository = CachedRepository.of(listing.hub_id)
    states = tuple(FileState(file, _here_bytes(repository, listing.commit, file)) for file in listing.files)
    return PullPlan(listing, revision, repository, states, free_bytes(repository.folder))


def run_pull(plan: PullPlan, client: HubClient, on_progress: Callable[[PullProgress], None]) -> None:
    """Bring the model; what is here already is checked, too.

    Raises: HubError, CheckpointError for a disk that is full or cannot be written, BusyError.
    """
    plan.check_room()
    repository, commit = plan.repository, plan.listing.commit
    with _naming_write_errors(plan):
        repository.prepare(commit)
        with only_one(repository.folder, "pulls it"):
            repository.remove_strays(commit)
            _Crew(plan, client).run(on_progress)
            ordered = sorted(plan.listing.files, key=lambda file: (file.name == CONFIG_FILE, is_config_name(file.name)))
            for file in ordered:
                repository.link(commit, file.name, file.digest)
            repository.set_ref(plan.revision, commit)
            repository.remove_beginnings()


def check_pulled(hub_id: str, revision: str, on_progress: Callable[[PullProgress], None]) -> Listing:
    """Read a model that is in the cache from end to end and hold every file to the hash that names its blob.

    Raises: HubError if it is not here; CheckpointError naming a file that is damaged or missing; OSError.
    """
    listing = _listing_of_disk(hub_id, revision)
    repository = CachedRepository.of(hub_id)
    started_s = time.monotonic()
    states = [FileProgress(file.name, WAITING, 0, file.num_bytes) for file in listing.files]

    def show(number: int, phase: str, have: int) -> None:
        states[number] = replace(states[number], phase=phase, num_bytes=have)
        elapsed_s = time.monotonic() - started_s
        progress = PullProgress(tuple(states), 0.0, None, elapsed_s)
        rate = progress.num_bytes / max(elapsed_s, 1e-9)
        left_s = (progress.total_bytes - progress.num_bytes) / rate if rate else None
        on_progress(replace(progress, bytes_per_s=rate, left_s=left_s))

    for number, file in enumerate(listing.files):
        path = repository.file(listing.commit, file.name)
        if not has_digest(path, file, partial(show, number, CHECKING), threading.Event()):
            raise CheckpointError(
                f"{one_line(path, 200)}: damaged, its hash is not the one it had", f"salalocal pull {hub_id}"
            )
        show(number, DONE, file.num_bytes)
    return listing


def _listing_of_disk(hub_id: str, revision: str) -> Listing:
    """What a snapshot on the disk holds, with the digests that name its blobs."""
    repository = CachedRepository.of(hub_id)
    folder = repository.model_folder(revision)
    if folder is None:
        raise HubError(f"{hub_id}: revision {revision} is not on this machine", f"salalocal pull {hub_id}")
    config = SalaConfig.from_hf(read_json_file(folder / CONFIG_FILE, MAX_CONFIG_BYTES))
    read_headers(folder)  # every file that the index names is there, and as long as its header says
    files = [
        RemoteFile(path.name, path.stat().st_size, path.readlink().name)
        for path in sorted(folder.iterdir())
        if path.is_symlink() and path.is_file() and is_wanted_name(path.name) and is_digest(path.readlink().name)
    ]
    return Listing(hub_id, folder.name, tuple(files), (), config)


class _Crew:
    """Threads that take one file after the other; the caller's thread shows how far they are."""

    def __init__(self, plan: PullPlan, client: HubClient) -> None:
        self._plan = plan
        self._client = client
        self._states = [FileProgress(state.file.name, WAITING, 0, state.file.num_bytes) for state in plan.files]
        self._todo = deque(sorted(range(len(plan.files)), key=lambda i: plan.files[i].file.num_bytes))
        self._stop = threading.Event()
        self._errors: list[BaseException] = []
        self._fetched_bytes = [0] * len(plan.files)

    def run(self, on_progress: Callable[[PullProgress], None]) -> None:
        """Work until all is done. Raises: the first error of a thread."""
        # Daemons, since one that waits for a byte cannot be woken and must not keep a stopped program alive.
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(NUM_THREADS)]
        meters = _Meters(len(self._states))
        try:
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                on_progress(self._progress(meters))
                _join(threads, _SHOW_EVERY_S)
        finally:
            self._stop.set()
            _join(threads, _LEAVE_AFTER_S)
        if self._errors:
            raise self._errors[0]
        on_progress(self._progress(meters))

    def _work(self) -> None:
        try:
            while not self._stop.is_set():
                try:
                    number = self._todo.popleft()
                except IndexError:
                    return
                self._bring(number)
        except StoppedError:
            return
        except BaseException as error:  # it is raised again where the pull was called
            self._errors.append(error)
            self._stop.set()

    def _bring(self, number: int) -> None:
        plan, file = self._plan, self._plan.files[number].file
        held = plan.repository.holder(plan.listing.commit, file.name, file.digest)
        if held is not None:
            if has_digest(held, file, lambda have: self._set(number, CHECKING, have), self._stop):
                self._set(number, DONE, file.num_bytes)
                return
            held.unlink()
        begin = self._plan.files[number].num_here_bytes if held is None else 0

        def on_bytes(have: int) -> None:
            self._fetched_bytes[number] = max(0, have - begin)
            self._set(number, FETCHING, have)

        def on_wait(reason: str) -> None:
            self._set(number, FETCHING, self._states[number].num_bytes, reason)

        self._set(number, CHECKING, 0)
        Transfer(self._client, plan.repository, plan.listing.commit, file).run(on_bytes, self._stop, on_wait)
        self._set(number, DONE, file.num_bytes)

    def _set(self, number: int, phase: str, num_bytes: int, note: str = "") -> None:
        total = self._plan.files[number].file.num_bytes
        self._states[number] = FileProgress(self._states[number].name, phase, num_bytes, total, note)

    def _progress(self, meters: "_Meters") -> PullProgress:
        *rates, rate = meters.rates(self._fetched_bytes)
        files = tuple(replace(state, bytes_per_s=rate) for state, rate in zip(self._states, rates, strict=True))
        left = sum(file.total_bytes - file.num_bytes for file in files)
        is_early = meters.elapsed_s < _RATE_AFTER_S  # a rate over less says nothing
        return PullProgress(files, rate, None if is_early or not rate else left / rate, meters.elapsed_s)


class _Meters:
    """Bytes per second over the last seconds, of many files."""

    def __init__(self, num_files: int) -> None:
        self._started_s = time.monotonic()
        self._marks: deque[tuple[float, list[int]]] = deque([(self._started_s, [0] * (num_files + 1))])

    @property
    def elapsed_s(self) -> float:
        """Seconds since it was made."""
        return time.monotonic() - self._started_s

    def rates(self, num_bytes: list[int]) -> list[float]:
        """Note a count for each, and give the rates, each since it began; the last one is that of all together."""
        now_s = time.monotonic()
        self._marks.append((now_s, [*num_bytes, sum(num_bytes)]))
        while now_s - self._marks[0][0] > _RATE_OVER_S:
            self._marks.popleft()
        return [self._rate(number, now_s) for number in range(len(num_bytes) + 1)]

    def _rate(self, number: int, now_s: float) -> float:
        began = next((mark for mark in self._marks if mark[1][number]), self._marks[-1])
        passed_s = now_s - began[0]
        return max(0, self._marks[-1][1][number] - began[1][number]) / passed_s if passed_s > 0 else 0.0


def _here_bytes(repository: CachedRepository, commit: str, file: RemoteFile) -> int:
    held = repository.holder(commit, file.name, file.digest)
    if held is not None:
        return file.num_bytes if held.stat().st_size == file.num_bytes else 0
    partial = repository.partial(file.digest)
    if partial.is_symlink() or not partial.is_file():
        return 0
    num_bytes = partial.stat().st_size
    return num_bytes if num_bytes <= file.num_bytes else 0


def _join(threads: Sequence[threading.Thread], for_s: float) -> None:
    until_s = time.monotonic() + for_s
    for thread in threads:
        thread.join(max(0.0, until_s - time.monotonic()))


@contextmanager
def _naming_write_errors(plan: PullPlan) -> Iterator[None]:
    try:
        yield
    except SalaLocalError:
        raise
    except OSError as error:
        raise CheckpointError(
            f"{one_line(plan.repository.folder, 160)}: cannot write: {error.strerror or error}",
            "make room or set HF_HOME, and give the command again: it goes on from here",
        ) from error
