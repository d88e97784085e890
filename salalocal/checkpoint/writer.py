"""Writing a model folder: a config and a stream of tensors come in, sharded safetensors with an index go out; for
training and the quantizer.

Every file is written beside its place, synced and renamed; the folder is synced before and after `config.json`, which
comes last: a folder without it is no model, so a crash leaves the model of before (if none of its files was replaced
yet), no model, or the whole new one, never a mixture. The same input gives the same bytes.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from salalocal.checkpoint.names import CONFIG_FILE, INDEX_FILE, SINGLE_FILE
from salalocal.checkpoint.shard import TORCH_DTYPES
from salalocal.checkpoint.strict_json import one_line
from salalocal.durable import remove_strays, sync_folder, write_beside
from salalocal.errors import CheckpointError

DEFAULT_SHARD_BYTES = 2 * 2**30

_SPELLINGS = {dtype: name for name, dtype in TORCH_DTYPES.items()}
_ALIGNMENT = 8
_Tensors = list[tuple[str, Tensor]]


def write_checkpoint(
    folder: str | Path,
    config_dict: Mapping[str, Any],
    tensors: Iterable[tuple[str, Tensor]],
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Writes a model folder; files of other kinds that stand there (a tokenizer) stay.

    One shard gives `model.safetensors`, more give an index too. A tensor larger than `max_shard_bytes` gets a shard
    of its own. No more than one shard of tensors is held at a time.

    Raises: CheckpointError for a name that comes twice, a dtype that has no spelling, no tensors at all, or a failed
    write.
    """
    folder = Path(folder)
    pending: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_strays(folder)
        tables: list[dict[str, int]] = []
        for shard in _in_shards(tensors, max_shard_bytes):
            pending.append(write_beside(folder, partial(_write_shard, tensors=shard)))
            tables.append({name: tensor.nbytes for name, tensor in shard})
        _publish(folder, config_dict, tables, pending)
    except OSError as error:
        raise CheckpointError(f"{one_line(folder, 160)}: cannot write the model: {error.strerror or error}") from error
    finally:
        for path in pending:
            path.unlink(missing_ok=True)


def _in_shards(tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int) -> Iterator[_Tensors]:
    seen: set[str] = set()
    shard: _Tensors = []
    shard_bytes = 0
    for name, tensor in tensors:
        if name in seen:
            raise CheckpointError(f"tensor {name!r} comes twice")
        seen.add(name)
        if shard and shard_bytes + tensor.nbytes > max_shard_bytes:
            yield shard
            shard, shard_bytes = [], 0
        shard.append((name, tensor.detach()))
        shard_bytes += tensor.nbytes
    if not shard:
        raise CheckpointError("no tensors to write")
    yield shard


def _write_shard(file: BinaryIO, tensors: _Tensors) -> None:
    # Wide dtypes first, so that every tensor lies at a multiple of its element size and can be mapped.
    ordered = sorted(tensors, key=lambda item: -item[1].dtype.itemsize)
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, tensor in ordered:
        if tensor.dtype not in _SPELLINGS:
            raise CheckpointError(f"tensor {name!r}: {tensor.dtype} cannot be written to safetensors")
        end = position + tensor.nbytes
        table[name] = {"dtype": _SPELLINGS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    header = json.dumps(table, separators=(",", ":")).encode()
    header += b" " * (-len(header) % _ALIGNMENT)
    file.write(len(header).to_bytes(8, "little"))
    file.write(header)
    for _, tensor in ordered:
        flat = tensor.cpu().contiguous().reshape(-1)
        file.write(flat.view(torch.uint8).numpy().data)


def _publish(folder: Path, config_dict: Mapping[str, Any], tables: list[dict[str, int]], pending: list[Path]) -> None:
    names = _shard_names(len(tables))
    places = dict(zip(list(pending), names, strict=True))
    if len(names) > 1:
        index = {
            "metadata": {"total_size": sum(sum(table.values()) for table in tables)},
            "weight_map": {name: file for file, table in zip(names, tables, strict=True) for name in table},
        }
        pending.append(write_beside(folder, lambda file: file.write(_json_bytes(index))))
        places[pending[-1]] = INDEX_FILE
    pending.append(write_beside(folder, lambda file: file.write(_json_bytes(dict(config_dict)))))
    config = pending[-1]
    _remove_old_model(folder)
    for temporary, name in places.items():
        temporary.replace(folder / name)
    sync_folder(folder)
    config.replace(folder / CONFIG_FILE)
    sync_folder(folder)
    sync_folder(folder.parent)
    pending.clear()


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return [SINGLE_FILE]
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def _remove_old_model(folder: Path) -> None:
    """Takes away an older model, its config first: from there to the end the folder is no model."""
    old = [
        folder / CONFIG_FILE,
        folder / SINGLE_FILE,
        folder / INDEX_FILE,
        *sorted(folder.glob("model-*-of-*.safetensors")),
    ]
    if any(path.exists() for path in old):
        old[0].unlink(missing_ok=True)
        sync_folder(folder)
        for path in old[1:]:
            path.unlink(missing_ok=True)


def _json_bytes(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
