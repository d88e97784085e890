"""The sparse layer: softmax attention, dense while short and over picked blocks when long, and its state; for `sala`.

In: layer-normed hidden states and a `SparseState`. Out: the branch to add to the residual stream. No positions are
encoded and q, k are not normed. Source: specification, sections 5, 9 and 10.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from salalocal.kernels.block_attention import block_attention
from salalocal.kernels.block_topk import BlockGeometry, block_topk
from salalocal.kernels.dense_attention import dense_attention
from salalocal.kernels.gate import sigmoid_gate
from salalocal.kernels.kv_cache import RECENT_TOKENS, CacheRows, KeyValues, append_tokens
from salalocal.kernels.pooled_keys import num_pooled, pooled_keys
from salalocal.model.config import SalaConfig, SparseConfig
from salalocal.model.layers import Device, LinearFactory
from salalocal.model.state import GrowingRows, KVCache, StateSpec, check_names, check_saved


@dataclass(frozen=True, eq=False, slots=True)
class PickedRow:
    """What a row picked, and by which queries. Shapes: blocks integers [B, 1, Hkv, budget]; queries [B, 1, Hq, D]."""

    blocks: Tensor
    queries: Tensor


class SparseState:
    """The past of one sparse layer: keys, values, and the keys pooled over short and over long windows.

    Pooled keys are appended as soon as their window is complete and never change; `sparse_from` is the first position
    whose row picks blocks. With keys in 8 bits the last ones are kept unquantized too, in a ring, for windows to come.
    `picked` says what the newest row picked; None if it read everything, or if that is not known.
    """

    def __init__(
        self,
        cache: KVCache,
        pooled: tuple[GrowingRows, GrowingRows],
        recent: Tensor | None,
        geometry: BlockGeometry,
        sparse_from: int,
    ) -> None:
        self._cache = cache
        self._fine, self._coarse = pooled
        self._recent = recent
        self._geometry = geometry
        self.sparse_from = sparse_from
        self.picked: PickedRow | None = None

    @property
    def num_tokens(self) -> int:
        """How many tokens have keys and values here."""
        return self._cache.num_tokens

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        ring = 0 if self._recent is None else self._recent.nbytes
        return self._cache.nbytes + self._fine.nbytes + self._coarse.nbytes + ring

    @property
    def key_values(self) -> KeyValues:
        """All keys and values as views. Shapes: [B, N, H, D]."""
        parts = self._cache.tensors()
        if not self._cache.is_int8:
            return KeyValues(parts["k"], parts["v"])
        return KeyValues(parts["k"], parts["v"], parts["k_scales"][..., 0], parts["v_scales"][..., 0])

    @property
    def k1(self) -> Tensor:
        """Keys pooled over `kernel_size` tokens, as a view. Shapes: [B, N1, H, D]."""
        return self._fine.rows

    @property
    def k2(self) -> Tensor:
        """Keys pooled over four times as many, as a view. Shapes: [B, N2, H, D]."""
        return self._coarse.rows

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add the keys and values of new tokens and the pooled keys that they complete. Shapes: both [B, T, H, D]."""
        if self._cache.is_int8:
            position = torch.tensor([self.num_tokens], device=keys.device)
            append_tokens(self.room_for(keys.shape[1]), keys[0], values[0], position, self._geometry)
            self.extend(keys.shape[1])
            return
        self._cache.append(keys, values)
        for pooled, kernel, stride in self._windows:
            num_windows = num_pooled(self.num_tokens, kernel, stride)
            if num_windows > pooled.num_rows:
                with torch.no_grad():  # they only choose blocks, and a choice has no gradient
                    keys = self._cache.keys.detach()
                    pooled.append(pooled_keys(keys, pooled.num_rows, num_windows, kernel, stride))

    def room_for(self, num_tokens: int) -> CacheRows:
        """The buffers, with room for so many more tokens, for a kernel that appends them. Batches of one sequence."""
        end = self.num_tokens + num_tokens
        self._cache.make_room(end)
        for pooled, kernel, stride in self._windows:
            pooled.make_room(num_pooled(end, kernel, stride))
        parts = {name: part[0] for name, part in self._cache.storage.items()}
        key_scales, value_scales = (parts[name][..., 0] if name in parts else None for name in ("k_scales", "v_scales"))
        recent = None if self._recent is None else self._recent[0]
        k1, k2 = self._fine.storage[0], self._coarse.storage[0]
        return CacheRows(parts["k"], parts["v"], key_scales, value_scales, k1, k2, recent)

    def claim(self, num_tokens: int) -> CacheRows:
        """As `room_for`, for steps that write through these addresses until `release`: forks keep off them."""
        end = self.num_tokens + num_tokens
        self._cache.claim(end)
        for pooled, kernel, stride in self._windows:
            pooled.claim(num_pooled(end, kernel, stride))
        return self.room_for(num_tokens)

    def release(self) -> None:
        """Give up what was claimed."""
        self._cache.release()
        for pooled, _, _ in self._windows:
            pooled.release()

    def extend(self, num_tokens: int) -> None:
        """Count tokens that a kernel has appended to the buffers of `room_for`."""
        self._cache.extend(num_tokens)
        for pooled, kernel, stride in self._windows:
            pooled.extend(num_pooled(self.num_tokens, kernel, stride) - pooled.num_rows)

    def fork(self) -> "SparseState":
        """A second state that goes its own way, at no cost until both append but for the ring, which is copied."""
        pooled = (self._fine.fork(), self._coarse.fork())
        other = self._with(self._cache.fork(), pooled, None if self._recent is None else self._recent.clone())
        other.picked = self.picked
        return other

    def tensors(self) -> dict[str, Tensor]:
        """Views of the rows in use, named k, v, k1 and k2; with keys in 8 bits k_scales, v_scales and recent too."""
        ring = {} if self._recent is None else {"recent": self._recent}
        return {**self._cache.tensors(), "k1": self.k1, "k2": self.k2, **ring}

    def from_tensors(self, tensors: Mapping[str, Tensor], num_tokens: int) -> "SparseState":
        """A new state like this one that holds a copy of saved rows. Raises: StateError naming what does not fit."""
        check_names(tensors, tuple(self.tensors()))
        counts = [num_pooled(num_tokens, kernel, stride) for _, kernel, stride in self._windows]
        cached = {name: tensors[name] for name in self._cache.tensors()}
        pooled = (
            self._fine.with_rows("k1", tensors["k1"], counts[0]),
            self._coarse.with_rows("k2", tensors["k2"], counts[1]),
        )
        recent = None
        if self._recent is not None:
            check_saved("recent", tensors["recent"], tuple(self._recent.shape), self._recent.dtype)
            recent = tensors["recent"].to(self._recent.device, copy=True)
        return self._with(self._cache.from_tensors(cached, num_tokens), pooled, recent)

    @property
    def _windows(self) -> tuple[tuple[GrowingRows, int, int], tuple[GrowingRows, int, int]]:
        geometry = self._geometry
        return (
            (self._fine, geometry.kernel_size, geometry.kernel_stride),
            (self._coarse, geometry.coarse_kernel_size, geometry.coarse_kernel_stride),
        )

    def _with(self, cache: KVCache, pooled: tuple[GrowingRows, GrowingRows], recent: Tensor | None) -> "SparseState":
        return SparseState(cache, pooled, recent, self._geometry, self.sparse_from)


class SparseMixer(nn.Module):
    """One sparse layer; parameter names are those of the checkpoint."""

    def __init__(
        self, config: SalaConfig, name: str, linear: LinearFactory, device: Device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        shape = config.sparse
        width, kv_width = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
        self.q_proj = linear(f"{name}.q_proj", config.hidden_size, width)
        self.k_proj = linear(f"{name}.k_proj", config.hidden_size, kv_width)
        self.v_proj = linear(f"{name}.v_proj", config.hidden_size, kv_width)
        self.o_gate = linear(f"{name}.o_gate", config.hidden_size, width)
        self.o_proj = linear(f"{name}.o_proj", width, config.hidden_size)
        self._shape = shape
        self._geometry = block_geometry(shape)
        self._scale = shape.head_dim**-0.5

    def new_state(self, spec: StateSpec) -> SparseState:
        """An empty state."""
        heads, dim, geometry = self._shape.num_key_value_heads, self._shape.head_dim, self._geometry
        num_fine = num_pooled(spec.capacity, geometry.kernel_size, geometry.kernel_stride)
        num_coarse = num_pooled(spec.capacity, geometry.coarse_kernel_size, geometry.coarse_kernel_stride)
        pooled = (GrowingRows(spec, heads, dim, num_fine), GrowingRows(spec, heads, dim, num_coarse))
        recent = None
        if spec.is_int8:
            recent = torch.zeros(spec.batch_size, RECENT_TOKENS, heads, dim, device=spec.device, dtype=spec.dtype)
        return SparseState(KVCache(spec, heads, dim), pooled, recent, geometry, spec.sparse_from)

    def forward(self, x: Tensor, state: SparseState) -> Tensor:
        """Take the next tokens. Shapes: x [B, T, hidden] -> [B, T, hidden]."""
        shape = self._shape
        first_position = state.num_tokens
        q = self.q_proj(x).unflatten(-1, (shape.num_attention_heads, shape.head_dim))
        k = self.k_proj(x).unflatten(-1, (shape.num_key_value_heads, shape.head_dim))
        v = self.v_proj(x).unflatten(-1, (shape.num_key_value_heads, shape.head_dim))
        state.append(k, v)
        attended = attend(q, state, first_position, self._geometry, self._scale)
        y: Tensor = self.o_proj(sigmoid_gate(attended.flatten(2), self.o_gate(x)))
        return y


def attend(q: Tensor, state: SparseState, first_position: int, geometry: BlockGeometry, scale: float) -> Tensor:
    """Attend densely below the switch and over picked blocks from there on; the state holds the rows' own keys already.

    Shapes: q [B, T, Hq, D], as result.
    """
    # A row whose blocks all fit in the budget picks them all, so it is dense on either side of the switch.
    num_dense = max(state.sparse_from, geometry.reach) - first_position
    num_dense = min(max(num_dense, 0), q.shape[1])
    parts = []
    state.picked = None
    if num_dense > 0:
        seen = state.key_values.first(first_position + num_dense).beside(q)
        parts.append(dense_attention(q[:, :num_dense], seen.keys, seen.values, scale, first_position))
    if num_dense < q.shape[1]:
        rows, first_row = q[:, num_dense:], first_position + num_dense
        blocks = block_topk(rows, state.k1, state.k2, first_row, state.num_tokens, geometry, scale)
        state.picked = PickedRow(blocks[:, -1:].clone(), rows[:, -1:].clone())
        parts.append(block_attention(rows, state.key_values, blocks, first_row, geometry.block_size, scale))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def block_geometry(shape: SparseConfig) -> BlockGeometry:
    """The sizes of the block choice out of the layer's config."""
    return BlockGeometry(
        kernel_size=shape.kernel_size,
        kernel_stride=shape.kernel_stride,
        block_size=shape.block_size,
        init_blocks=shape.init_blocks,
        window_size=shape.window_size,
        topk=shape.topk,
    )
