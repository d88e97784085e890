"""One safetensors file as tensors: a checked header comes in, memory-mapped tensors go out; for Checkpoint.

The mapping is private and copy-on-write: tensors can be written to without touching the file, and pages that are only
read belong to the file cache, not to the process. A tensor keeps its mapping alive; nothing needs closing.
"""

import math
import mmap
import os
import sys
from collections.abc import Iterator
from typing import BinaryIO

import torch
from torch import Tensor

from salalocal.checkpoint.header import FileIdentity, Header
from salalocal.checkpoint.strict_json import one_line, open_regular
from salalocal.errors import CheckpointError

TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip

# Without it Linux may refuse to map a file larger than its memory. Python names the flag from 3.13 on.
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000) if sys.platform == "linux" else 0


class Shard:
    """The tensors of one file; the file is mapped when the first of them is read."""

    def __init__(self, header: Header) -> None:
        self.header = header
        self._mapping: mmap.mmap | None = None

    def tensor(self, name: str) -> Tensor:
        """The tensor on the CPU, in the dtype of the file, without a copy (an unaligned one is copied).

        Raises: CheckpointError if the file was replaced or changed since its header was read.
        """
        entry = self.header.entries[name]
        dtype = TORCH_DTYPES[entry.dtype]
        if entry.start == entry.end:
            return torch.empty(entry.shape, dtype=dtype)
        mapping = self._mapped()
        if entry.start % dtype.itemsize:
            raw = torch.frombuffer(mapping, dtype=torch.uint8, count=entry.end - entry.start, offset=entry.start)
            return raw.clone().view(dtype).reshape(entry.shape)
        flat = torch.frombuffer(mapping, dtype=dtype, count=math.prod(entry.shape), offset=entry.start)
        return flat.reshape(entry.shape)

    def samples(self, num_bytes: int) -> Iterator[tuple[str, bytes]]:
        """Up to `num_bytes` from the middle of each tensor, by name, in the order of the file.

        Raises: CheckpointError if the file was replaced or changed since its header was read.
        """
        with self._opened() as file:
            if hasattr(os, "posix_fadvise"):  # no reading ahead: a mapped page would bring in many more
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            for name, entry in self.header.entries.items():
                start = max(entry.start, (entry.start + entry.end - num_bytes) // 2)
                file.seek(start)
                yield name, file.read(min(num_bytes, entry.end - start))

    def _mapped(self) -> mmap.mmap:
        if self._mapping is None:
            with self._opened() as file:
                try:
                    self._mapping = _map_privately(file.fileno())
                except OSError as error:
                    where = one_line(self.header.path, 160)
                    raise CheckpointError(f"{where}: cannot be mapped into memory: {error.strerror}") from error
        return self._mapping

    def _opened(self) -> BinaryIO:
        file = open_regular(self.header.path)
        if FileIdentity.of(file.fileno()) != self.header.identity:
            file.close()
            raise CheckpointError(f"{one_line(self.header.path, 160)}: changed since the model folder was opened")
        return file


def _map_privately(descriptor: int) -> mmap.mmap:
    if sys.platform == "win32":
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
    return mmap.mmap(descriptor, 0, flags=mmap.MAP_PRIVATE | _NO_RESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
