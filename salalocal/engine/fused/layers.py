"""The layers of the model, each in a few launches: the residual stream goes in and comes out; for `model` and `step`.

Every layer has two forms. `read` takes the many rows of a chunk and grows the layer's state; `step` takes the 1 to 16
rows of a step whose position only the device knows, so that it can stand in a CUDA graph.
Shapes: hidden [T, hidden] bf16, which `read` overwrites with its result. Source: specification, sections 4 to 6.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from salalocal.engine.fused.projection import Projection
from salalocal.engine.fused.rows import NormedRows, PlainRows, gated_norm_rows, gated_rows
from salalocal.kernels.block_attention import block_attention_decode
from salalocal.kernels.block_topk import PickRecord, block_topk_decode
from salalocal.kernels.gated_norm import GatedNorm
from salalocal.kernels.int4.int8_gemm import Residual
from salalocal.kernels.kv_cache import CacheRows, append_tokens
from salalocal.kernels.lightning import lightning_slopes
from salalocal.kernels.lightning_decode import (
    MAX_STEPS,
    Heads,
    PendingTokens,
    commit_pending,
    lightning_decays,
    speculative_step,
)
from salalocal.kernels.lightning_prefill import Recurrence, lightning_prefill_triton
from salalocal.kernels.pick_ring import StepPicks
from salalocal.kernels.qk_norm_rope import NormRope
from salalocal.model.config import SalaConfig
from salalocal.model.layers import Mlp, RMSNorm
from salalocal.model.mixers.lightning import LightningMixer, LightningState
from salalocal.model.mixers.sparse import SparseMixer, SparseState, attend, block_geometry
from salalocal.model.state import LayerState


@dataclass(frozen=True, eq=False)
class Place:
    """Where rows stand. Shapes: positions int64 [T] of all rows, [1] of the first in a step. `first`: on the host."""

    positions: Tensor
    first: int = 0


@dataclass(frozen=True, eq=False)
class SparseMemory:
    """The buffers of a sparse layer, and where a step's rows leave their picks, [1, 16, H, S].

    `sparse_from` is the first position whose row picks blocks.
    """

    cache: CacheRows
    sparse_from: int
    picks: StepPicks


@dataclass(frozen=True, eq=False)
class LightningMemory:
    """The matrix of a lightning layer without the last step's tokens, those tokens, and counters that stay zero."""

    matrix: Tensor
    pending: PendingTokens
    counters: Tensor


LayerMemory = SparseMemory | LightningMemory


class FusedLightning:
    """A lightning mixer."""

    def __init__(self, config: SalaConfig, mixer: LightningMixer, norm: RMSNorm) -> None:
        shape = config.lightning
        self._heads = (shape.num_heads, shape.head_dim)
        self._norm = norm
        self._in = Projection([mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.z_proj])
        self._out = Projection([mixer.o_proj])
        self._q_norm, self._k_norm, self._o_norm = mixer.q_norm, mixer.k_norm, mixer.o_norm
        self._theta, self._residual_scale = config.rope_theta, config.residual_scale
        self._scale = shape.head_dim**-0.5
        self._slopes = lightning_slopes(shape.num_heads, torch.float32).to(norm.weight.device)
        self._decays = lightning_decays(self._slopes)

    def read(self, hidden: Tensor, state: LayerState, place: Place) -> Tensor:
        assert isinstance(state, LightningState)
        q, k, v, z = self._in(NormedRows(hidden, self._norm.weight, self._norm.eps))
        q, k, v = (torch.unflatten(x, 1, self._heads)[None] for x in (q, k, v))
        recurrence = Recurrence(self._slopes, self._scale, state.matrix, self._norm_rope(place.positions))
        o, (matrix,) = lightning_prefill_triton(q, k, v, recurrence)
        state.advance(matrix, len(hidden))
        gated = gated_norm_rows(o[0].flatten(1), GatedNorm(weight=self._o_norm.weight, gate=z, eps=self._o_norm.eps))
        return self._out.join(gated, Residual(hidden, self._residual_scale))

    def step(self, hidden: Tensor, memory: LayerMemory, place: Place) -> Tensor:
        assert isinstance(memory, LightningMemory)
        q, k, v, z = self._in(NormedRows(hidden, self._norm.weight, self._norm.eps))
        q, k, v = (torch.unflatten(x, 1, self._heads)[None] for x in (q, k, v))
        heads = Heads(q, k, v, self._decays, self._scale, self._norm_rope(place.positions))
        gated_norm = GatedNorm(weight=self._o_norm.weight, gate=z, eps=self._o_norm.eps)
        y = speculative_step(heads, memory.matrix, memory.pending, gated_norm, memory.counters)
        return self._out.join(PlainRows(y[0]), Residual(hidden, self._residual_scale))

    def commit(self, memory: LightningMemory) -> None:
        """Fold the accepted rows of the last step into the matrix."""
        commit_pending(memory.matrix, memory.pending, self._decays)

    def _norm_rope(self, positions: Tensor) -> NormRope:
        q, k = self._q_norm, self._k_norm
        return NormRope(q_weight=q.weight, k_weight=k.weight, eps=q.eps, positions=positions, theta=self._theta)


class FusedSparse:
    """A sparse mixer."""

    def __init__(self, config: SalaConfig, mixer: SparseMixer, norm: RMSNorm) -> None:
        shape = config.sparse
        self._q_heads = (shape.num_attention_heads, shape.head_dim)
        self._kv_heads = (shape.num_key_value_heads, shape.head_dim)
        self._norm = norm
        self._in = Projection([mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.o_gate])
        self._out = Projection([mixer.o_proj])
        self._geometry = block_geometry(shape)
        self._scale, self._residual_scale = shape.head_dim**-0.5, config.residual_scale

    def read(self, hidden: Tensor, state: LayerState, place: Place) -> Tensor:
        assert isinstance(state, SparseState)
        q, k, v, gate = self._in(NormedRows(hidden, self._norm.weight, self._norm.eps))
        q = torch.unflatten(q, 1, self._q_heads)
        k, v = (torch.unflatten(x, 1, self._kv_heads) for x in (k, v))
        append_tokens(state.room_for(len(hidden)), k, v, place.positions[:1], self._geometry)
        state.extend(len(hidden))
        attended = attend(q[None], state, place.first, self._geometry, self._scale)
        gated = gated_rows(attended[0].flatten(1), gate)
        return self._out.join(gated, Residual(hidden, self._residual_scale))

    def step(self, hidden: Tensor, memory: LayerMemory, place: Place) -> Tensor:
        assert isinstance(memory, SparseMemory)
        q, k, v, gate = self._in(NormedRows(hidden, self._norm.weight, self._norm.eps))
        q = torch.unflatten(q, 1, self._q_heads)
        k, v = (torch.unflatten(x, 1, self._kv_heads) for x in (k, v))
        cache, geometry = memory.cache, self._geometry
        append_tokens(cache, k, v, place.positions, geometry)
        k1, k2 = cache.k1.transpose(0, 1)[None], cache.k2.transpose(0, 1)[None]
        left = memory.picks.first(len(hidden))
        record = PickRecord(left.blocks, left.weights)
        picks = block_topk_decode(q[None], k1, k2, place.positions, geometry, self._scale, memory.sparse_from, record)
        attended = block_attention_decode(
            q[None], cache.key_values, picks, place.positions, geometry.block_size, self._scale, gate
        )
        return self._out.join(PlainRows(attended[0].flatten(1)), Residual(hidden, self._residual_scale))


class FusedMlp:
    """The MLP of a layer."""

    def __init__(self, config: SalaConfig, mlp: Mlp, norm: RMSNorm) -> None:
        self._norm, self._residual_scale = norm, config.residual_scale
        self._in = Projection([mlp.gate_proj, mlp.up_proj])
        self._out = Projection([mlp.down_proj])

    def __call__(self, hidden: Tensor) -> Tensor:
        inner = self._in.swiglu(NormedRows(hidden, self._norm.weight, self._norm.eps), self._out)
        return self._out.join(inner, Residual(hidden, self._residual_scale))


def new_sparse_memory(state: SparseState, num_tokens: int, picks: StepPicks) -> SparseMemory:
    """The buffers of a sparse layer for steps over up to `num_tokens` more tokens."""
    return SparseMemory(state.claim(num_tokens), state.sparse_from, picks)


def new_lightning_memory(state: LightningState, count: Tensor, parity: Tensor) -> LightningMemory:
    """The tensors of a lightning layer for steps; count and parity as `StepState` says."""
    matrix = state.writable()
    _, num_heads, key_dim, value_dim = matrix.shape
    half = (2, MAX_STEPS, num_heads)
    keys = torch.zeros(*half, key_dim, dtype=torch.bfloat16, device=matrix.device)
    values = torch.zeros(*half, value_dim, dtype=torch.bfloat16, device=matrix.device)
    counters = torch.zeros(MAX_STEPS, dtype=torch.int32, device=matrix.device)
    return LightningMemory(matrix, PendingTokens(keys, values, count, parity), counters)
