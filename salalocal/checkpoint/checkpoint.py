"""An opened model folder: a path comes in, a checked config and lazily read tensors go out; for the engine and the
quantizer.

Opening reads `config.json`, the index and the headers only. Reading a tensor is explicit. No pickle, no `.bin`, no
remote code.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from salalocal.checkpoint.folder import ModelFolder, read_headers
from salalocal.checkpoint.header import TensorEntry
from salalocal.checkpoint.names import (
    CONFIG_FILE,
    MAX_CONFIG_BYTES,
    WEIGHT_DTYPES,
    TensorSpec,
    expected_tensors,
    ignored_tensors,
)
from salalocal.checkpoint.shard import TORCH_DTYPES, Shard
from salalocal.checkpoint.strict_json import one_line, read_json_file
from salalocal.errors import CheckpointError
from salalocal.model.config import SalaConfig

_PROBLEM_CHARACTERS = 215  # what problems of tensors may take of an error line of 300
_SAMPLE_BYTES = 1024


@dataclass(frozen=True)
class TensorProblems:
    """How a folder's tensors differ from what its config asks for; the three tuples name all of them."""

    unknown: tuple[str, ...]
    missing: tuple[str, ...]
    misshapen: tuple[str, ...]

    def __str__(self) -> str:
        kinds = {"missing": self.missing, "unknown": self.unknown, "misshapen": self.misshapen}
        found = {kind: names for kind, names in kinds.items() if names}
        limit = _PROBLEM_CHARACTERS // max(1, len(found)) - len("9,999 misshapen:  and 9,999 more; ")
        return "; ".join(f"{len(names):,} {kind}: {_first_few(names, limit)}" for kind, names in found.items())

    def __bool__(self) -> bool:
        return bool(self.unknown or self.missing or self.misshapen)


class Checkpoint:
    """A model folder of Hugging Face layout; made by `open`."""

    def __init__(
        self, folder: ModelFolder, config_dict: Mapping[str, Any], config: SalaConfig, shards: list[Shard]
    ) -> None:
        self.folder = folder
        self.config = config
        self.config_dict = config_dict
        self._shards = shards
        self._shard_of = {name: shard for shard in shards for name in shard.header.entries}

    @classmethod
    def open(cls, place: str | Path | ModelFolder) -> "Checkpoint":
        """Opens a model folder: checks config, index and headers, reads no weights.

        Raises: CheckpointError with the file and the reason.
        """
        folder = ModelFolder.of(place)
        config_dict = read_json_file(folder.file(CONFIG_FILE), MAX_CONFIG_BYTES)
        try:
            config = SalaConfig.from_hf(config_dict)
        except CheckpointError as error:
            raise CheckpointError(f"{one_line(folder, 160)}: {error.message}", error.hint) from error
        headers = read_headers(folder)
        return cls(folder, MappingProxyType(config_dict), config, [Shard(header) for header in headers])

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Every stored tensor, file by file in the order of the bytes."""
        return tuple(self._shard_of)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.end - entry.start for entry in self._entries().values())

    @property
    def weights_dtype(self) -> torch.dtype:
        """The dtype in which most bytes of the weights are stored."""
        num_bytes: Counter[str] = Counter()
        for entry in self._entries().values():
            if entry.dtype in WEIGHT_DTYPES:
                num_bytes[entry.dtype] += entry.end - entry.start
        if not num_bytes:
            raise CheckpointError(f"{one_line(self.folder, 160)}: no tensor is stored as {', '.join(WEIGHT_DTYPES)}")
        return TORCH_DTYPES[max(WEIGHT_DTYPES, key=lambda dtype: num_bytes[dtype])]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over config, tensor table, file sizes and 1 KiB from the middle of each tensor.

        The samples tell apart two fine-tunes of one shape without reading the whole; it is no proof of integrity.
        """
        digest = hashlib.sha256(json.dumps(dict(self.config_dict), sort_keys=True).encode())
        for shard in sorted(self._shards, key=lambda shard: shard.header.path.name):
            digest.update(f"\n{shard.header.path.name!r} {shard.header.identity.num_bytes}".encode())
            for name, sample in shard.samples(_SAMPLE_BYTES):
                entry = shard.header.entries[name]
                digest.update(f"\n{name!r} {entry.dtype} {entry.shape} {entry.start} {entry.end} ".encode())
                digest.update(sample)
        return digest.hexdigest()

    def tensor(self, name: str) -> Tensor:
        """Reads one tensor: on the CPU, memory-mapped, in its stored dtype.

        Raises: KeyError for a name that is not stored; CheckpointError if the file has changed meanwhile.
        """
        return self._shard_of[name].tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a stored tensor. Raises: KeyError for a name that is not stored."""
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of a tensor. Raises: KeyError for a name that is not stored."""
        return TORCH_DTYPES[self._entry(name).dtype]

    def problems(self, expected: Mapping[str, TensorSpec] | None = None) -> TensorProblems:
        """Compares the stored tensors with what is expected: None for what the config asks for, unquantized."""
        entries = self._entries()
        if expected is None:
            expected = {name: TensorSpec(shape) for name, shape in expected_tensors(self.config).items()}
        ignored = ignored_tensors(self.config, tuple(entries))
        shaped = {name: TensorSpec(shape) for name, shape in ignored.items() if shape is not None}
        misshapen = []
        for name, spec in {**expected, **shaped}.items():
            entry = entries.get(name)
            if entry is None:
                continue
            if entry.shape != spec.shape:
                misshapen.append(f"{name} {_shown_shape(entry.shape)}, not {_shown_shape(spec.shape)}")
            elif entry.dtype not in spec.dtypes:
                misshapen.append(f"{name} {entry.dtype}, not {'/'.join(spec.dtypes)}")
        return TensorProblems(
            unknown=tuple(name for name in entries if name not in expected and name not in ignored),
            missing=tuple(name for name in expected if name not in entries),
            misshapen=tuple(misshapen),
        )

    def validate(self, expected: Mapping[str, TensorSpec] | None = None) -> None:
        """Checks that this is a whole model: one in bf16, fp16 or fp32, or one that holds the `expected` tensors.

        What a quantized folder should hold is known by its weight format, not here: `quant.weight_layout` says it.
        Raises: CheckpointError that names unknown, missing and misshapen tensors, or the quantization.
        """
        if expected is None and self.config.quantization_config is not None:
            method = one_line(self.config.quantization_config.get("quant_method", "unknown"), 30)
            raise CheckpointError(
                f"{one_line(self.folder, 160)}: quantized ({method}), needed are bf16, fp16 or fp32 weights",
                "use the model's unquantized folder",
            )
        problems = self.problems(expected)
        if problems:
            raise CheckpointError(f"{one_line(self.folder, 50)}: tensors do not fit config.json: {problems}")

    def _entry(self, name: str) -> TensorEntry:
        return self._shard_of[name].header.entries[name]

    def _entries(self) -> dict[str, TensorEntry]:
        return {name: shard.header.entries[name] for name, shard in self._shard_of.items()}


def _first_few(names: tuple[str, ...], limit: int) -> str:
    """As many names as fit into `limit` characters, but at least one."""
    shown = one_line(names[0], limit)
    for count, name in enumerate(names[1:], 1):
        longer = f"{shown}, {one_line(name)}"
        if len(longer) > limit:
            return f"{shown} and {len(names) - count:,} more"
        shown = longer
    return shown


def _shown_shape(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"
