"""The folder of a quantization under way: finished steps in, a model folder out; for the quantizer.

It stands beside the place of the result, under its name with `.quantizing` behind. Every step is one shard under its
last name; `job.json` says which are done, with their sha256. A file is written under another name, synced and renamed,
so a kill at any moment costs the step in progress and nothing else. The finished folder is renamed as a whole.
Hidden states of a calibration are kept from time to time: those of later steps can be made again out of the shards.
"""

import errno
import hashlib
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from salalocal.checkpoint.folder_lock import only_one
from salalocal.checkpoint.names import CONFIG_FILE, INDEX_FILE
from salalocal.checkpoint.strict_json import one_line, read_json_file
from salalocal.durable import remove_strays, replace_file, sync_folder
from salalocal.errors import CheckpointError, RequestError

CARD_FILE = "quantization_card.json"
JOB_FILE = "job.json"

_FOLDER_SUFFIX = ".quantizing"
_MAX_JSON_BYTES = 64 * 2**20
_COMPANIONS = ("*.json", "*.jinja", "*.model", "*.txt", "*.py", "LICENSE*", "NOTICE*", "README*")
_NOT_COMPANIONS = (  # with those of other variants of the model
    CONFIG_FILE, INDEX_FILE, JOB_FILE, CARD_FILE, "config.*.json", "model.safetensors.index.*.json",
)  # fmt: skip

Record = dict[str, Any]


class Job:
    """An opened job; made by `open_job`."""

    def __init__(self, out: Path, identity: Record, num_steps: int, entries: list[Record]) -> None:
        self._entries = entries
        self._out = out
        self._folder = _folder_of(out)
        self._identity = identity
        self._num_steps = num_steps

    @property
    def records(self) -> list[Record]:
        """The record of every step that is done, in their order."""
        return [entry["record"] for entry in self._entries]

    @property
    def result_bytes(self) -> int:
        """Bytes of all tensors made so far."""
        return sum(num_bytes for entry in self._entries for num_bytes in entry["tensors"].values())

    def save_step(self, tensors: Mapping[str, Tensor], record: Record) -> None:
        """Store what a step has made. Raises: CheckpointError if it cannot be written."""
        step = len(self._entries)
        data = save(dict(tensors), {"format": "pt"})
        with _naming_write_errors(self._folder):
            _write(self._folder / self._shard_name(step), data)
            entry = {
                "record": record,
                "num_bytes": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
                "tensors": {name: tensor.nbytes for name, tensor in tensors.items()},
            }
            self._entries.append(entry)
            _write_json(self._folder / JOB_FILE, {"identity": self._identity, "steps": self._entries})

    def load_step(self, step: int) -> dict[str, Tensor]:
        """The tensors that a step has made. Raises: CheckpointError if the file is damaged or gone."""
        path = self._folder / self._shard_name(step)
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise _unreadable(path, str(error)) from error

    def save_hidden(self, hidden: Sequence[Tensor]) -> None:
        """Keep what the step after the last one done reads. Shapes: float32 on the host, any.

        Raises: CheckpointError if it cannot be written.
        """
        step = len(self._entries) - 1
        with _naming_write_errors(self._folder):
            replace_file(self._folder / _hidden_name(step), lambda file: _write_floats(file, hidden))
            for older in range(step):
                (self._folder / _hidden_name(older)).unlink(missing_ok=True)

    def load_hidden(self, shapes: Sequence[Sequence[int]]) -> tuple[int, list[Tensor]] | None:
        """The newest that were kept, of these shapes, and the step behind which they stand; None if there are none.

        Raises: CheckpointError if the file is of another size or cannot be read.
        """
        kept = [step for step in range(len(self._entries)) if (self._folder / _hidden_name(step)).exists()]
        if not kept:
            return None
        path = self._folder / _hidden_name(kept[-1])
        try:
            if path.stat().st_size != 4 * sum(map(math.prod, shapes)):
                raise _unreadable(path, "not of the size that it was written with")
            with path.open("rb") as file:
                return kept[-1], [_read_floats(file, shape) for shape in shapes]
        except OSError as error:
            raise _unreadable(path, str(error)) from error

    def finish(self, source: Path, config_dict: Mapping[str, Any], card: Record) -> Record:
        """Complete the folder, give it its name, and give back the card with the job's identity.

        Raises: CheckpointError if it cannot be written.
        """
        card = {"identity": self._identity, **card}
        with _naming_write_errors(self._folder):
            for path in _companions(source):
                _write(self._folder / path.name, path.read_bytes())
            _write_json(self._folder / INDEX_FILE, self._index())
            _write_json(self._folder / CARD_FILE, card)
            _write_json(self._folder / CONFIG_FILE, config_dict)
            for path in self._folder.glob(_hidden_name("*")):
                path.unlink(missing_ok=True)
            (self._folder / JOB_FILE).unlink(missing_ok=True)
            sync_folder(self._folder)
            _give_name(self._folder, self._out)
        return card

    def _index(self) -> Record:
        weight_map = {
            name: self._shard_name(step) for step, entry in enumerate(self._entries) for name in entry["tensors"]
        }
        return {"metadata": {"total_size": self.result_bytes}, "weight_map": weight_map}

    def _shard_name(self, step: int) -> str:
        return _shard_name(step, self._num_steps)


@contextmanager
def open_job(out: Path, identity: Record, num_steps: int) -> Iterator[Job]:
    """Begin a job for a result at `out`, or go on with it; nobody else can while the context is open.

    Raises: RequestError if something else stands at `out` or another job in its folder; BusyError if another process
    is at it; CheckpointError for a damaged folder or one that cannot be written.
    """
    folder = _folder_of(out)
    with _naming_write_errors(folder):
        if _is_taken(out):
            raise _exists(out)
        folder.mkdir(parents=True, exist_ok=True)
    with only_one(folder, "quantizes into it"):
        try:
            remove_strays(folder)
            yield Job(out, identity, num_steps, _done_steps(folder, identity, num_steps))
        finally:
            with suppress(OSError):
                folder.rmdir()  # if nothing was put into it


def check_place(out: Path) -> None:
    """Refuse a place where no result can come to stand, before anything is read; one with a card may hold the result.

    Raises: RequestError; CheckpointError if it cannot be looked at.
    """
    if out.name in ("", ".."):
        raise RequestError(f"--out {str(out)!r} does not name a folder to make", "--out small")
    with _naming_write_errors(out):
        if _is_taken(out) and not (out / CARD_FILE).is_file():
            raise _exists(out)


def finished_card(out: Path, identity: Record) -> Record | None:
    """The card of a result that this very job has left at `out`, if it has; finishes a job that lacks its name only.

    Raises: CheckpointError if the folder cannot be renamed.
    """
    folder = _folder_of(out)
    with _naming_write_errors(folder):
        if not (folder / JOB_FILE).exists() and _card(folder, identity) is not None and not out.exists():
            with only_one(folder, "quantizes into it"):
                _give_name(folder, out)
        return _card(out, identity)


def free_bytes(out: Path) -> int:
    """Free space where the result of a job will stand."""
    place = out.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def _is_taken(out: Path) -> bool:
    return out.exists() and (not out.is_dir() or any(out.iterdir()))


def _exists(out: Path) -> RequestError:
    return RequestError(f"{one_line(out, 160)} exists", "name another --out, or delete it")


def _folder_of(out: Path) -> Path:
    return out.with_name(out.name + _FOLDER_SUFFIX)


def _shard_name(step: int, num_steps: int) -> str:
    return f"model-{step + 1:05}-of-{num_steps:05}.safetensors"


def _hidden_name(step: int | str) -> str:
    return f"hidden-{step}.f32"


def _done_steps(folder: Path, identity: Record, num_steps: int) -> list[Record]:
    path = folder / JOB_FILE
    if not path.exists():
        return []
    job = read_json_file(path, _MAX_JSON_BYTES)
    if job.get("identity") != identity:
        raise RequestError(
            f"{one_line(folder, 160)}: an unfinished quantization of another model or with other options",
            "repeat it as it was begun, name another --out, or delete that folder",
        )
    steps = job.get("steps")
    if not isinstance(steps, list) or len(steps) > num_steps or not all(map(_is_entry, steps)):
        raise CheckpointError(f"{one_line(path, 160)}: damaged", "delete the folder and start again")
    for step, entry in enumerate(steps):
        shard = folder / _shard_name(step, num_steps)
        if not shard.is_file() or shard.stat().st_size != entry["num_bytes"] or _sha256(shard) != entry["sha256"]:
            raise CheckpointError(
                f"{one_line(shard, 160)}: not as it was written", f"delete {folder.name} and start again"
            )
    return steps


def _is_entry(value: object) -> bool:
    kinds = {"record": dict, "num_bytes": int, "sha256": str, "tensors": dict}
    return isinstance(value, dict) and all(isinstance(value.get(name), kind) for name, kind in kinds.items())


def _card(folder: Path, identity: Record) -> Record | None:
    if not ((folder / CARD_FILE).is_file() and (folder / CONFIG_FILE).is_file()):
        return None
    card = read_json_file(folder / CARD_FILE, _MAX_JSON_BYTES)
    return card if card.get("identity") == identity else None


def _companions(source: Path) -> list[Path]:
    """Tokenizer, template, legal files and the code that other engines need: what a quantized copy keeps."""
    found = {path for pattern in _COMPANIONS for path in source.glob(pattern) if path.is_file()}
    return sorted(path for path in found if not any(map(path.match, _NOT_COMPANIONS)))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unreadable(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{one_line(path, 160)}: cannot be read: {reason}", f"delete {path.parent.name} and start again"
    )


def _write_floats(file: BinaryIO, tensors: Iterable[Tensor]) -> None:
    for tensor in tensors:
        file.write(tensor.contiguous().numpy().data)


def _read_floats(file: BufferedReader, shape: Sequence[int]) -> Tensor:
    values = bytearray(4 * math.prod(shape))
    file.readinto(values)
    return torch.frombuffer(values, dtype=torch.float32).view(*shape)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    _write(path, (json.dumps(dict(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def _write(path: Path, data: bytes) -> None:
    replace_file(path, lambda file: file.write(data))


def _give_name(folder: Path, out: Path) -> None:
    if out.exists():
        out.rmdir()  # empty, or it would have been refused
    folder.rename(out)
    sync_folder(out.parent)


@contextmanager
def _naming_write_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        with suppress(OSError):
            remove_strays(folder)
        hint = "name an --out in a folder that you may write to"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = "make room and run the command again: it goes on where it stopped"
        raise CheckpointError(f"{one_line(folder, 160)}: cannot write: {error.strerror or error}", hint) from error
