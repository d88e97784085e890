"""What a model remembers of the tokens it has read: one `LayerState` a layer; for mixers, the engine and sessions.

A state is only ever appended to. A lightning layer folds the past into one matrix that cannot be rewound, so nothing
is trimmed: fork before, drop after. A fork is cheap and leaves its original untouched.
"""

import hashlib
import json
import os
import tempfile
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from salalocal.durable import sync_folder
from salalocal.errors import StateError
from salalocal.kernels.host_memory import page_locked_empty, wait_for_card

_ROWS_AT_A_TIME = 64
_FORMAT = "salalocal-state-1"
_MAX_TOKENS = 2**31
_READ_AGAIN = "remove the file and read the documents again"


@dataclass(frozen=True, slots=True, kw_only=True)
class StateSpec:
    """What a mixer must know to make an empty state.

    Units: capacity in tokens, room made at once (a state grows by itself past it); rows p >= sparse_from are sparse.
    `is_int8`: keys and values are cached in 8 bits, in batches of one sequence. `is_kv_on_host`: they lie in
    page-locked host memory, where kernels of a card reach them; what is pooled stays on the card.
    """

    batch_size: int
    capacity: int
    sparse_from: int
    device: torch.device
    dtype: torch.dtype
    is_int8: bool = False
    is_kv_on_host: bool = False


class LayerState(Protocol):
    """What is asked of the state of one layer, of whatever kind."""

    @property
    def num_tokens(self) -> int:
        """How many tokens the state has taken in."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors it keeps alive; what it shares with a fork counts in both."""
        ...

    def extend(self, num_tokens: int) -> None:
        """Count tokens that a kernel has put into its tensors."""
        ...

    def fork(self) -> Self:
        """A second state that goes its own way; neither ever changes the other."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Its contents by name, to be saved; views, valid until the state is appended to."""
        ...

    def from_tensors(self, tensors: Mapping[str, Tensor], num_tokens: int) -> Self:
        """A new state like this one (sizes, dtype, device) that holds a copy of saved contents.

        Raises: StateError naming the tensor that is missing, unknown or does not fit.
        """
        ...


class _Buffer:
    """Room for rows, shared by forks; every holder owns the rows below its own length."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows  # [B, H, capacity, D]
        self.holders: weakref.WeakSet[GrowingRows] = weakref.WeakSet()


class GrowingRows:
    """A tensor that grows along its tokens, for keys, values and pooled keys.

    Forks share one buffer. The one that appends first writes on in place; one that lies behind another living holder
    of the same buffer copies its rows out first. Rows once appended are never written again.
    """

    def __init__(
        self, spec: StateSpec, num_heads: int, head_dim: int, capacity: int | None = None, is_on_host: bool = False
    ) -> None:
        self._shape = (spec.batch_size, num_heads, head_dim)
        self._device, self._dtype, self._is_on_host = spec.device, spec.dtype, is_on_host
        self._num_rows = 0
        self._num_claimed = 0
        self._buffer = _Buffer(self._allocate(spec.capacity if capacity is None else capacity))
        self._buffer.holders.add(self)

    @property
    def num_rows(self) -> int:
        """How many rows have been appended."""
        return self._num_rows

    @property
    def rows(self) -> Tensor:
        """All rows as a view. Shapes: [B, N, H, D] over storage [B, H, capacity, D]."""
        return self._buffer.rows[:, :, : self._num_rows].transpose(1, 2)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer, with the room not yet used."""
        return self._buffer.rows.nbytes

    @property
    def storage(self) -> Tensor:
        """The whole buffer, rows not yet used too. Shapes: [B, H, capacity, D]."""
        return self._buffer.rows

    def make_room(self, end: int) -> None:
        """See that rows up to `end` can be written in place, without harm to any fork; may move to another buffer."""
        capacity = self._buffer.rows.shape[2]
        others = (other for other in self._buffer.holders if other is not self)
        behind = any(max(other._num_rows, other._num_claimed) > self._num_rows for other in others)
        if end <= capacity and not behind:
            return
        grown = self._allocate(capacity if end <= capacity else max(end, capacity + capacity // 8))
        if self._is_on_host:
            wait_for_card()
        grown[:, :, : self._num_rows] = self._buffer.rows[:, :, : self._num_rows]
        # A holder that is ahead keeps the old buffer; otherwise everyone moves, so that nothing keeps it alive.
        moving = [self] if behind else list(self._buffer.holders)
        buffer = _Buffer(grown)
        for holder in moving:
            holder._move_to(buffer)

    def claim(self, end: int) -> None:
        """Make room for rows that a kernel will write one after the other; until `release` nobody else writes there."""
        self.make_room(end)
        self._num_claimed = end

    def release(self) -> None:
        """Give up what was claimed."""
        self._num_claimed = 0

    def extend(self, num_rows: int) -> None:
        """Take in rows that a kernel has written to `storage` behind the last one. Raises: ValueError without room."""
        if self._num_rows + num_rows > self._buffer.rows.shape[2]:
            raise ValueError(f"{num_rows} rows behind {self._num_rows} are more than there is room for")
        self._num_rows += num_rows

    def append(self, rows: Tensor) -> None:
        """Add rows at the end.

        Shapes: rows [B, T, H, D]. When a gradient is to flow through them they are joined into a new tensor instead.
        Raises: ValueError when the shape or the dtype is not the one of this cache.
        """
        batch, heads, dim = self._shape
        if rows.ndim != 4 or (rows.shape[0], rows.shape[2], rows.shape[3]) != self._shape or rows.dtype != self._dtype:
            raise ValueError(
                f"rows are {tuple(rows.shape)} {rows.dtype}, the cache takes {(batch, 'T', heads, dim)} {self._dtype}"
            )
        end = self._num_rows + rows.shape[1]
        if torch.is_grad_enabled() and (rows.requires_grad or self._buffer.rows.requires_grad):
            kept = self._buffer.rows[:, :, : self._num_rows]
            self._move_to(_Buffer(torch.cat((kept, rows.transpose(1, 2)), dim=2)))
        else:
            self.make_room(end)
            self._buffer.rows[:, :, self._num_rows : end] = rows.transpose(1, 2)
        self._num_rows = end

    def fork(self) -> "GrowingRows":
        """Another cache with the same rows, at no cost until both append."""
        other = object.__new__(GrowingRows)
        other._shape, other._device, other._dtype = self._shape, self._device, self._dtype
        other._is_on_host = self._is_on_host
        other._num_rows, other._num_claimed = self._num_rows, 0
        other._buffer = self._buffer
        self._buffer.holders.add(other)
        return other

    def with_rows(self, name: str, rows: Tensor, num_rows: int) -> "GrowingRows":
        """A new cache of this shape, with at least this room, that holds a copy of saved rows.

        Shapes: rows [B, num_rows, H, D]. Raises: StateError naming the tensor when it does not fit.
        """
        batch, heads, dim = self._shape
        check_saved(name, rows, (batch, num_rows, heads, dim), self._dtype)
        filled = self.fork()
        filled._num_rows = 0
        filled._move_to(_Buffer(self._allocate(max(num_rows, self._buffer.rows.shape[2]))))
        with torch.no_grad():
            filled.append(rows)
        return filled

    def _allocate(self, capacity: int) -> Tensor:
        # Whole groups of rows keep every head equally aligned, whatever room was asked for: the same sums, bit by bit.
        rounded = -(-capacity // _ROWS_AT_A_TIME) * _ROWS_AT_A_TIME
        batch, heads, dim = self._shape
        # Made inside inference mode, a buffer could not be written to outside of it.
        with torch.inference_mode(False):
            if self._is_on_host:
                return page_locked_empty((batch, heads, rounded, dim), self._dtype)
            return torch.empty(batch, heads, rounded, dim, device=self._device, dtype=self._dtype)

    def _move_to(self, buffer: _Buffer) -> None:
        self._buffer.holders.discard(self)
        self._buffer = buffer
        buffer.holders.add(self)


class KVCache:
    """Keys and values of one attention layer; in 8 bits, with a scale a token and head, or in host memory, a kernel
    appends them."""

    def __init__(self, spec: StateSpec, num_heads: int, head_dim: int) -> None:
        def rows(dtype: torch.dtype, dim: int) -> GrowingRows:
            return GrowingRows(replace(spec, dtype=dtype), num_heads, dim, is_on_host=spec.is_kv_on_host)

        dtype = torch.int8 if spec.is_int8 else spec.dtype
        self._parts = {name: rows(dtype, head_dim) for name in ("k", "v")}
        if spec.is_int8:
            self._parts |= {name: rows(torch.bfloat16, 1) for name in ("k_scales", "v_scales")}

    @property
    def num_tokens(self) -> int:
        """How many tokens have keys and values here."""
        return self._parts["k"].num_rows

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(part.nbytes for part in self._parts.values())

    @property
    def is_int8(self) -> bool:
        """Whether it holds codes and scales."""
        return "k_scales" in self._parts

    @property
    def keys(self) -> Tensor:
        """All keys, or their codes, as a view. Shapes: [B, N, H, D]."""
        return self._parts["k"].rows

    @property
    def values(self) -> Tensor:
        """All values, or their codes, as a view. Shapes: [B, N, H, D]."""
        return self._parts["v"].rows

    @property
    def storage(self) -> dict[str, Tensor]:
        """The whole buffers, named as in `tensors`. Shapes: [B, H, capacity, D], of scales [B, H, capacity, 1]."""
        return {name: part.storage for name, part in self._parts.items()}

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add the keys and values of new tokens. Shapes: both [B, T, H, D]."""
        self._parts["k"].append(keys)
        self._parts["v"].append(values)

    def make_room(self, end: int) -> None:
        """See that tokens up to `end` can be written in place; see `GrowingRows`."""
        for part in self._parts.values():
            part.make_room(end)

    def claim(self, end: int) -> None:
        """Make room up to `end` that nobody else writes to; see `GrowingRows`."""
        for part in self._parts.values():
            part.claim(end)

    def release(self) -> None:
        """Give up what was claimed."""
        for part in self._parts.values():
            part.release()

    def extend(self, num_tokens: int) -> None:
        """Count tokens that a kernel has written to the storage."""
        for part in self._parts.values():
            part.extend(num_tokens)

    def fork(self) -> "KVCache":
        """Another cache with the same rows, at no cost until both append."""
        return self._with({name: part.fork() for name, part in self._parts.items()})

    def tensors(self) -> dict[str, Tensor]:
        """Views of the rows in use, named k and v, and k_scales and v_scales if there are."""
        return {name: part.rows for name, part in self._parts.items()}

    def from_tensors(self, tensors: Mapping[str, Tensor], num_tokens: int) -> "KVCache":
        """A new cache like this one that holds a copy of saved rows. Raises: StateError naming what does not fit."""
        check_names(tensors, tuple(self._parts))
        return self._with({name: part.with_rows(name, tensors[name], num_tokens) for name, part in self._parts.items()})

    @staticmethod
    def _with(parts: "dict[str, GrowingRows]") -> "KVCache":
        cache = object.__new__(KVCache)
        cache._parts = parts
        return cache


class ModelState:
    """What a whole model remembers: one state per layer, all at the same position."""

    def __init__(
        self, layers: tuple[LayerState, ...], *, num_tokens: int, sparse_from: int, config_digest: str
    ) -> None:
        self.layers = layers
        self.num_tokens = num_tokens
        self.sparse_from = sparse_from
        self.config_digest = config_digest
        self._settle: Callable[[], None] | None = None

    def lend(self, settle: Callable[[], None]) -> None:
        """Let a decoder work on the tensors; before anyone else uses this state, `settle` brings it up to date."""
        self._settle = settle

    def settle(self) -> None:
        """Take back what was lent, if anything; everything that reads the state calls it first."""
        settle, self._settle = self._settle, None
        if settle is not None:
            settle()

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors it keeps alive; what it shares with a fork counts in both."""
        return sum(layer.nbytes for layer in self.layers)

    def fork(self) -> "ModelState":
        """A second state that goes its own way; neither ever changes the other."""
        self.settle()
        return self._with(tuple(layer.fork() for layer in self.layers), self.num_tokens)

    def check_whole(self) -> None:
        """Raise StateError if an interrupted call has left some layers ahead of others."""
        self.settle()
        for number, layer in enumerate(self.layers):
            if layer.num_tokens != self.num_tokens:
                raise StateError(
                    f"the state is half way: layer {number} holds {layer.num_tokens} tokens, the model "
                    f"{self.num_tokens}",
                    "an interrupted call left it so; go on from a fork made before that call",
                )

    def save(self, path: Path, metadata: Mapping[str, str] | None = None) -> None:
        """Write the state to one safetensors file, beside and renamed, readable by its owner alone.

        `metadata` is the caller's own and comes back from `load`. Raises: StateError when it cannot be written or is
        half way; an older file of that name is then untouched.
        """
        self.check_whole()
        wait_for_card()  # what it has written to host memory is read by the CPU
        tensors = {
            f"layers.{number}.{name}": tensor.detach().to("cpu").contiguous()
            for number, layer in enumerate(self.layers)
            for name, tensor in layer.tensors().items()
        }
        header = {
            "format": _FORMAT,
            "config": self.config_digest,
            "num_tokens": str(self.num_tokens),
            "sparse_from": str(self.sparse_from),
            "metadata": json.dumps(dict(metadata or {}), sort_keys=True),
        }
        header["sha256"] = _content_hash(header, tensors)
        try:
            _write_durably(Path(path), tensors, header)
        except (OSError, SafetensorError) as error:
            raise StateError(f"the state could not be saved to {path}: {error}") from error

    @classmethod
    def load(cls, path: Path, like: "ModelState") -> "tuple[ModelState, dict[str, str]]":
        """Read a saved state back, with the caller's metadata; the next logits are equal bit by bit.

        `like` is any state of the model that is to use it, such as an empty one; it is not changed.
        Raises: StateError when the file is missing, damaged, or of another model, dtype or switch rule.
        """
        try:
            with safe_open(path, framework="pt") as file:
                header = dict(file.metadata() or {})
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError) as error:
            raise StateError(f"the saved state {path} cannot be read: {error}", _READ_AGAIN) from error
        found_hash = header.pop("sha256", "")
        if header.get("format") != _FORMAT or found_hash != _content_hash(header, tensors):
            raise StateError(f"the saved state {path} is damaged or of another version", _READ_AGAIN)
        try:
            config_digest, metadata = header["config"], _metadata(header["metadata"])
            num_tokens, sparse_from = int(header["num_tokens"]), int(header["sparse_from"])
        except (KeyError, ValueError, RecursionError) as error:
            raise StateError(f"the saved state {path} has a damaged header: {error!r}", _READ_AGAIN) from error
        if config_digest != like.config_digest:
            raise StateError(f"the saved state {path} belongs to another model", _READ_AGAIN)
        if sparse_from != like.sparse_from or not 0 <= num_tokens < _MAX_TOKENS:
            raise StateError(
                f"the saved state {path} holds {num_tokens} tokens, the first sparse row is {sparse_from}, in this "
                f"run {like.sparse_from}",
                _READ_AGAIN,
            )
        layers = []
        for number, layer in enumerate(like.layers):
            prefix = f"layers.{number}."
            own = {name: tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}
            layers.append(layer.from_tensors({name.removeprefix(prefix): own[name] for name in own}, num_tokens))
        if tensors:
            raise StateError(f"the saved state {path} holds unknown tensors: {sorted(tensors)[:3]}", _READ_AGAIN)
        return like._with(tuple(layers), num_tokens), metadata

    def _with(self, layers: tuple[LayerState, ...], num_tokens: int) -> "ModelState":
        return ModelState(layers, num_tokens=num_tokens, sparse_from=self.sparse_from, config_digest=self.config_digest)


def _metadata(text: str) -> dict[str, str]:
    metadata = json.loads(text)
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("metadata is no table of texts")
    return metadata


def _content_hash(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """A hash over everything a file says, so that no flipped bit goes unseen."""
    content = hashlib.sha256(json.dumps(dict(header), sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        content.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        content.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return content.hexdigest()


def _write_durably(path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    # mkstemp makes the file with mode 0600 and under a name of its own, so that two writers never meet.
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    try:
        save_file(tensors, name, header)
        _sync_file(Path(name))
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def _sync_file(path: Path) -> None:
    handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_names(tensors: Mapping[str, Tensor], expected: tuple[str, ...]) -> None:
    """Raise StateError unless a saved layer holds exactly these tensors."""
    if set(tensors) != set(expected):
        raise StateError(
            f"saved state: a layer holds {sorted(tensors)}, this model needs {sorted(expected)}",
            "the file belongs to another model; read the documents again",
        )


def check_saved(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raise StateError unless a saved tensor has this shape and dtype."""
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise StateError(
            f"saved state: tensor {name} is {tuple(tensor.shape)} {tensor.dtype}, needed is {shape} {dtype}",
            "the file belongs to another model or to a run in another dtype; read the documents again",
        )
