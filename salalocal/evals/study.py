"""A study: tasks in, one record for each on disk, an interrupted run goes on; for every evaluation that takes long.

A results folder holds `study.json`, which says what is measured, and `records.jsonl`, one line for each finished task.
A line is synced before the next task begins, so a kill loses one task; a torn last line is dropped. The folder is
only written to when the first task begins, and what ends without a record leaves nothing behind.
"""

import errno
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from salalocal.checkpoint.folder_lock import only_one
from salalocal.durable import remove_strays, replace_file, sync_folder
from salalocal.errors import RequestError, StateError
from salalocal.prompt.visible import quoted_name

STUDY_FILE, RECORDS_FILE = "study.json", "records.jsonl"

Record = dict[str, Any]
OnTokens = Callable[[int], None]
"""Called with how many more tokens have been read."""


@dataclass(frozen=True)
class Task:
    """One thing to measure. `key` names it in the study, `label` on screen; `run` gives its record, plain data.

    Units: cost_tokens, about how many tokens it reads.
    """

    key: str
    label: str
    cost_tokens: int
    run: Callable[[OnTokens], Record]


@dataclass(frozen=True)
class StudyProgress:
    """How far a study is. Units: num_read tokens read since the start of this run; seconds since then.

    `share` is what is done of this run, by tokens; `num_right` of `num_done` tasks were right, None where that makes
    no sense.
    """

    label: str
    num_done: int
    num_tasks: int
    num_right: int | None
    num_read: int
    share: float
    elapsed_s: float


class Study:
    """The records of one study, open for more; see `open_study`."""

    def __init__(self, folder: Path, identity: Record, records: dict[str, Record]) -> None:
        self.folder = folder
        self.identity = identity
        self.records = records
        self._is_begun = False

    def run(self, tasks: Sequence[Task], on_progress: Callable[[StudyProgress], None]) -> list[Record]:
        """Run what is not done yet; gives back the records of all tasks, in their order."""
        meter = _Meter(tasks, self.records, on_progress)
        for task in tasks:
            if task.key not in self.records:
                self._begin()
                meter.begin(task)
                started_s = time.monotonic()
                record = task.run(meter.add)
                self._append({"key": task.key, **record, "elapsed_s": round(time.monotonic() - started_s, 3)})
                meter.end(task, self.records[task.key])
        return [self.records[task.key] for task in tasks]

    def _begin(self) -> None:
        """Write down what is measured; records of before that are not to be kept go."""
        if self._is_begun:
            return
        text = json.dumps(self.identity, indent=2) + "\n"
        with _naming_write_errors(self.folder):
            if not self.records:
                (self.folder / RECORDS_FILE).unlink(missing_ok=True)
            replace_file(self.folder / STUDY_FILE, lambda file: file.write(text.encode()))
            sync_folder(self.folder)
        self._is_begun = True

    def _append(self, record: Record) -> None:
        line = json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
        with _naming_write_errors(self.folder), (self.folder / RECORDS_FILE).open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self.records[record["key"]] = record


@contextmanager
def open_study(folder: Path, identity: Record, is_fresh: bool = False) -> Iterator[Study]:
    """Begin a study in a folder, or go on with it; nobody else can while the context is open.

    `identity` is all that decides the records; `is_fresh` forgets those that are there, once the first task begins.
    Raises: RequestError if another study is in the folder; BusyError if another process is at it; StateError for
    records that are damaged or a folder that cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"{quoted_name(str(folder), 160)} is not a folder", "name another --out")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    with _naming_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with only_one(folder, "measures into it"):
        with _naming_write_errors(folder):
            remove_strays(folder)
        known = _known_identity(folder)
        if known is not None and not is_fresh:
            _check_identity(folder, known, identity)
        study = Study(folder, identity, {} if is_fresh else _read_records(folder / RECORDS_FILE))
        try:
            yield study
        finally:
            _take_back_empty(folder, made)


def identity_name(identity: Record) -> str:
    """A short name for a study, equal for equal identities."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return f"{identity['evaluation']}-{digest[:12]}"


class _Meter:
    """Counts what is read and done, and reports it."""

    def __init__(
        self, tasks: Sequence[Task], records: Mapping[str, Record], on_progress: Callable[[StudyProgress], None]
    ) -> None:
        done = [records[task.key] for task in tasks if task.key in records]
        self._on_progress = on_progress
        self._num_tasks = len(tasks)
        self._num_done = len(done)
        self._num_right = sum(bool(record.get("right")) for record in done)
        self._total_cost = max(1, sum(task.cost_tokens for task in tasks if task.key not in records))
        self._done_cost = self._num_read = self._task_read = 0
        self._task: Task | None = None
        self._has_marks = all("right" in record for record in done)
        self._started_s = time.monotonic()

    def begin(self, task: Task) -> None:
        self._task, self._task_read = task, 0

    def add(self, num_tokens: int) -> None:
        self._num_read += num_tokens
        self._task_read += num_tokens
        self._report()

    def end(self, task: Task, record: Record) -> None:
        self._num_done += 1
        self._has_marks = "right" in record
        self._num_right += bool(record.get("right"))
        self._done_cost += task.cost_tokens
        self._task_read = 0
        self._report()

    def _report(self) -> None:
        task = self._task
        if task is None:
            return
        cost = self._done_cost + min(self._task_read, task.cost_tokens)
        self._on_progress(
            StudyProgress(
                label=task.label,
                num_done=self._num_done,
                num_tasks=self._num_tasks,
                num_right=self._num_right if self._has_marks else None,
                num_read=self._num_read,
                share=cost / self._total_cost,
                elapsed_s=time.monotonic() - self._started_s,
            )
        )


def _take_back_empty(folder: Path, made: Sequence[Path]) -> None:
    """Without a record, remove the study's files and the folders that were made for it, the innermost first."""
    records = folder / RECORDS_FILE
    with suppress(OSError):  # what stays is in nobody's way, and an error on its way out says more
        if not records.exists() or records.stat().st_size == 0:
            for path in (records, folder / STUDY_FILE):
                path.unlink(missing_ok=True)
            for path in made:
                path.rmdir()


def _known_identity(folder: Path) -> Record | None:
    """What the folder says is measured in it; None for an empty one."""
    path = folder / STUDY_FILE
    if not path.exists():
        if any(folder.iterdir()):
            raise RequestError(f"{quoted_name(str(folder), 160)} holds other files", "name another --out")
        return None
    try:
        known = json.loads(path.read_bytes())
    except ValueError as error:
        raise _damaged(path) from error
    if not isinstance(known, dict):
        raise _damaged(path)
    return known


def _check_identity(folder: Path, known: Record, identity: Record) -> None:
    given = json.loads(json.dumps(identity))  # as it comes back from the file: lists for tuples
    if known != given:
        names = sorted(name for name in {*known, *given} if known.get(name) != given.get(name))
        raise RequestError(
            f"{quoted_name(str(folder), 160)} holds another study: it differs in {', '.join(names)[:80]}",
            "name another --out, or begin anew with --fresh",
        )


def _read_records(path: Path) -> dict[str, Record]:
    """The finished records; what a kill left of a last line is cut off the file."""
    if not path.exists():
        return {}
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(path, len(whole))
    try:
        records = [json.loads(line) for line in whole.decode("utf-8", "surrogatepass").split("\n")[:-1]]
        return {record["key"]: record for record in records}
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path) from error


def _damaged(path: Path) -> StateError:
    hint = "begin anew with --fresh" if path.name == RECORDS_FILE else "name another --out"
    return StateError(f"{quoted_name(str(path), 160)} is damaged", hint)


@contextmanager
def _naming_write_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        hint = "name an --out in a folder that you may write to"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = "make room and run the command again: it goes on where it stopped"
        name = quoted_name(str(folder), 160)
        raise StateError(f"{name}: cannot write: {error.strerror or error}", hint) from error
