"""The header of a safetensors file: a path comes in, a checked table of tensors goes out; for Checkpoint. No torch
here.

Layout: 8 bytes little-endian header length n, n bytes of JSON {name: {dtype, shape, data_offsets}}, then the data.
Checked before anything is allocated: every tensor's range = shape x dtype, and the ranges fill the file without holes
or overlaps. Source: the safetensors format, huggingface/safetensors README.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path

from salalocal.checkpoint.strict_json import one_line, open_regular, parse_object
from salalocal.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
MAX_NAME_CHARACTERS = 1_024
MAX_RANK = 8
DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: dtype as spelled there, and its bytes [start, end) counted from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class FileIdentity:
    """What tells whether a path still leads to the file whose header was read."""

    device: int
    inode: int
    num_bytes: int
    modified_ns: int

    @classmethod
    def of(cls, descriptor: int) -> "FileIdentity":
        """The identity of an open file."""
        found = os.fstat(descriptor)
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


@dataclass(frozen=True)
class Header:
    """A checked header: tensors by name in the order of their bytes."""

    path: Path
    identity: FileIdentity
    entries: dict[str, TensorEntry]


def read_header(path: Path) -> Header:
    """Reads and checks the header of one safetensors file.

    Raises: CheckpointError with the file and the reason.
    """
    where = one_line(path, 160)
    with open_regular(path) as file:
        identity = FileIdentity.of(file.fileno())
        prefix = file.read(8)
        if len(prefix) < 8:
            raise CheckpointError(f"{where}: {len(prefix)} bytes, too short for a safetensors file")
        length = int.from_bytes(prefix, "little")
        if length > MAX_HEADER_BYTES:
            raise CheckpointError(f"{where}: header of {length:,} bytes, the limit is {MAX_HEADER_BYTES:,}")
        if length > identity.num_bytes - 8:
            raise CheckpointError(
                f"{where}: header of {length:,} bytes in a file of {identity.num_bytes:,}; truncated?"
            )
        data = file.read(length)
    if len(data) < length:
        raise CheckpointError(f"{where}: shrank while its header was read")
    table = parse_object(data, where)
    _check_metadata(table.pop("__metadata__", {}), where)
    entries = {name: _entry(name, value, 8 + length, where) for name, value in table.items()}
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)))
    _check_ranges(ordered, 8 + length, identity.num_bytes, where)
    return Header(path, identity, ordered)


def _check_metadata(value: object, where: str) -> None:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise CheckpointError(f"{where}: __metadata__ should hold strings only")


def _entry(name: str, value: object, data_start: int, where: str) -> TensorEntry:
    tensor = f"{where}: tensor '{one_line(name)}'"
    if len(name) > MAX_NAME_CHARACTERS:
        raise CheckpointError(f"{tensor}: name of {len(name):,} characters, the limit is {MAX_NAME_CHARACTERS:,}")
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{tensor}: should have dtype, shape and data_offsets, nothing else")
    dtype = value["dtype"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise CheckpointError(f"{tensor}: dtype '{one_line(dtype, 20)}' is not supported")
    shape = _numbers(value["shape"], f"{tensor}: shape")
    if len(shape) > MAX_RANK:
        raise CheckpointError(f"{tensor}: {len(shape)} dimensions, the limit is {MAX_RANK}")
    offsets = _numbers(value["data_offsets"], f"{tensor}: data_offsets")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{tensor}: data_offsets should be [start, end], start <= end")
    needed, given = math.prod(shape) * DTYPE_BYTES[dtype], offsets[1] - offsets[0]
    if needed != given:
        shown = one_line("x".join(map(str, shape)) or "scalar")
        raise CheckpointError(f"{tensor}: {shown} {dtype} takes {needed:,} bytes, data_offsets give {given:,}")
    return TensorEntry(dtype, shape, data_start + offsets[0], data_start + offsets[1])


def _numbers(value: object, what: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(number) is int and 0 <= number < 2**63 for number in value):
        raise CheckpointError(f"{what} should be a list of whole numbers from 0 to 2^63 - 1")
    return tuple(value)


def _check_ranges(ordered: dict[str, TensorEntry], data_start: int, file_bytes: int, where: str) -> None:
    position = data_start
    for name, entry in ordered.items():
        if entry.start != position:
            fault = "a hole" if entry.start > position else "an overlap"
            raise CheckpointError(
                f"{where}: {fault} of {abs(entry.start - position):,} bytes before tensor '{one_line(name)}'"
            )
        position = entry.end
    if position != file_bytes:
        fault = "truncated?" if position > file_bytes else "foreign bytes at the end?"
        raise CheckpointError(f"{where}: tensors end at byte {position:,}, the file at {file_bytes:,}; {fault}")
