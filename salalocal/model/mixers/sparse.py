"""The sparse layer: softmax attention, dense while short and over picked blocks when long, and its state; for `sala`.

In: layer-normed hidden states and a `SparseState`. Out: the branch to add to the residual stream. No positions are
encoded and q, k are not normed. Source: specification, sections 5, 9 and 10.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from salalocal.kernels.block_attention import block_attention
from salalocal.kernels.block_topk import BlockGeometry, block_topk
from salalocal.kernels.dense_attention import dense_attention
from salalocal.kernels.gate import sigmoid_gate
from salalocal.kernels.pooled_keys import num_pooled, pooled_keys
from salalocal.model.config import SalaConfig, SparseConfig
from salalocal.model.layers import Device, LinearFactory
from salalocal.model.state import GrowingRows, KVCache, StateSpec, check_names


class SparseState:
    """The past of one sparse layer: keys, values, and the keys pooled over short and over long windows.

    Pooled keys are appended as soon as their window is complete and never change; `sparse_from` is the first position
    whose row picks blocks.
    """

    def __init__(
        self, cache: KVCache, fine: GrowingRows, coarse: GrowingRows, geometry: BlockGeometry, sparse_from: int
    ) -> None:
        self._cache = cache
        self._fine, self._coarse = fine, coarse
        self._geometry = geometry
        self.sparse_from = sparse_from

    @property
    def num_tokens(self) -> int:
        """How many tokens have keys and values here."""
        return self._cache.num_tokens

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return self._cache.nbytes + self._fine.nbytes + self._coarse.nbytes

    @property
    def keys(self) -> Tensor:
        """All keys as a view. Shapes: [B, N, H, D]."""
        return self._cache.keys

    @property
    def values(self) -> Tensor:
        """All values as a view. Shapes: [B, N, H, D]."""
        return self._cache.values

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
        self._cache.append(keys, values)
        geometry = self._geometry
        for pooled, kernel, stride in (
            (self._fine, geometry.kernel_size, geometry.kernel_stride),
            (self._coarse, geometry.coarse_kernel_size, geometry.coarse_kernel_stride),
        ):
            num_windows = num_pooled(self.num_tokens, kernel, stride)
            if num_windows > pooled.num_rows:
                with torch.no_grad():  # they only choose blocks, and a choice has no gradient
                    pooled.append(pooled_keys(self.keys.detach(), pooled.num_rows, num_windows, kernel, stride))

    def fork(self) -> "SparseState":
        """A second state that goes its own way, at no cost until both append."""
        return SparseState(self._cache.fork(), self._fine.fork(), self._coarse.fork(), self._geometry, self.sparse_from)

    def tensors(self) -> dict[str, Tensor]:
        """Views of the rows in use, named k, v, k1 and k2."""
        return {**self._cache.tensors(), "k1": self.k1, "k2": self.k2}

    def from_tensors(self, tensors: Mapping[str, Tensor], num_tokens: int) -> "SparseState":
        """A new state like this one that holds a copy of saved rows. Raises: StateError naming what does not fit."""
        check_names(tensors, ("k", "v", "k1", "k2"))
        geometry = self._geometry
        num_fine = num_pooled(num_tokens, geometry.kernel_size, geometry.kernel_stride)
        num_coarse = num_pooled(num_tokens, geometry.coarse_kernel_size, geometry.coarse_kernel_stride)
        return SparseState(
            self._cache.from_tensors({name: tensors[name] for name in ("k", "v")}, num_tokens),
            self._fine.with_rows("k1", tensors["k1"], num_fine),
            self._coarse.with_rows("k2", tensors["k2"], num_coarse),
            geometry,
            self.sparse_from,
        )


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
        return SparseState(
            KVCache(spec, heads, dim),
            GrowingRows(spec, heads, dim, num_fine),
            GrowingRows(spec, heads, dim, num_coarse),
            geometry,
            spec.sparse_from,
        )

    def forward(self, x: Tensor, state: SparseState) -> Tensor:
        """Take the next tokens. Shapes: x [B, T, hidden] -> [B, T, hidden]."""
        shape = self._shape
        first_position = state.num_tokens
        q = self.q_proj(x).unflatten(-1, (shape.num_attention_heads, shape.head_dim))
        k = self.k_proj(x).unflatten(-1, (shape.num_key_value_heads, shape.head_dim))
        v = self.v_proj(x).unflatten(-1, (shape.num_key_value_heads, shape.head_dim))
        state.append(k, v)
        attended = self._attend(q, state, first_position)
        y: Tensor = self.o_proj(sigmoid_gate(attended.flatten(2), self.o_gate(x)))
        return y

    def _attend(self, q: Tensor, state: SparseState, first_position: int) -> Tensor:
        """Attend densely below the switch and over picked blocks from there on. Shapes: q [B, T, Hq, D], as result."""
        geometry, scale = self._geometry, self._scale
        # A row whose blocks all fit in the budget picks them all, so it is dense on either side of the switch.
        num_dense = max(state.sparse_from, geometry.reach) - first_position
        num_dense = min(max(num_dense, 0), q.shape[1])
        parts = []
        if num_dense > 0:
            parts.append(dense_attention(q[:, :num_dense], state.keys, state.values, scale, first_position))
        if num_dense < q.shape[1]:
            rows, first_row = q[:, num_dense:], first_position + num_dense
            blocks = block_topk(rows, state.k1, state.k2, first_row, state.num_tokens, geometry, scale)
            parts.append(block_attention(rows, state.keys, state.values, blocks, first_row, geometry.block_size, scale))
        return torch.cat(parts, 1)


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
