"""The lightning layer: linear attention with a fixed decay per head, and the state it leaves behind; for `sala`.

In: layer-normed hidden states and a `LightningState`. Out: the branch to add to the residual stream. Source:
specification, section 6: norm, RoPE, recurrence, norm over all heads, gate, projection, in this order.
"""

from collections.abc import Mapping
from functools import cache, lru_cache

import torch
from torch import Tensor, nn

from salalocal.kernels.gate import sigmoid_gate
from salalocal.kernels.lightning import lightning, lightning_slopes
from salalocal.kernels.rotary import rotary_tables, rotated
from salalocal.model.config import SalaConfig
from salalocal.model.layers import Device, LinearFactory, RMSNorm
from salalocal.model.state import StateSpec, check_names, check_saved


class LightningState:
    """The past of one lightning layer: one fp32 matrix per head (float64 in a float64 model)."""

    def __init__(self, matrix: Tensor, num_tokens: int, is_shared: bool = False) -> None:
        self._matrix = matrix
        self._num_tokens = num_tokens
        self._is_shared = is_shared

    @property
    def num_tokens(self) -> int:
        """How many tokens have been folded in."""
        return self._num_tokens

    @property
    def matrix(self) -> Tensor:
        """The recurrent state. Shapes: [B, H, K, V]."""
        return self._matrix

    @property
    def nbytes(self) -> int:
        """Bytes of the matrix; a fork shares it until either takes in a token."""
        return self._matrix.nbytes

    def advance(self, matrix: Tensor, num_tokens: int) -> None:
        """Put the matrix after `num_tokens` more tokens in the place of the old one, which is not written to."""
        self._matrix, self._is_shared = matrix, False
        self._num_tokens += num_tokens

    def writable(self) -> Tensor:
        """The matrix for a kernel that advances it in place, a copy if a fork may share it. Shapes: [B, H, K, V]."""
        if self._is_shared:
            self._matrix, self._is_shared = self._matrix.clone(), False
        return self._matrix

    def extend(self, num_tokens: int) -> None:
        """Count tokens that a kernel folds into the writable matrix."""
        self._num_tokens += num_tokens

    def fork(self) -> "LightningState":
        """A second state that goes its own way, at no cost."""
        self._is_shared = True
        return LightningState(self._matrix, self._num_tokens, is_shared=True)

    def tensors(self) -> dict[str, Tensor]:
        """The matrix, named s."""
        return {"s": self._matrix}

    def from_tensors(self, tensors: Mapping[str, Tensor], num_tokens: int) -> "LightningState":
        """A new state like this one that holds a copy of a saved matrix. Raises: StateError when it does not fit."""
        check_names(tensors, ("s",))
        check_saved("s", tensors["s"], tuple(self._matrix.shape), self._matrix.dtype)
        return LightningState(tensors["s"].to(self._matrix.device, copy=True), num_tokens)


class LightningMixer(nn.Module):
    """One lightning layer; parameter names are those of the checkpoint."""

    def __init__(
        self, config: SalaConfig, name: str, linear: LinearFactory, device: Device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        shape = config.lightning
        width, kv_width = shape.num_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
        self.q_proj = linear(f"{name}.q_proj", config.hidden_size, width)
        self.k_proj = linear(f"{name}.k_proj", config.hidden_size, kv_width)
        self.v_proj = linear(f"{name}.v_proj", config.hidden_size, kv_width)
        self.z_proj = linear(f"{name}.z_proj", config.hidden_size, width)
        self.o_proj = linear(f"{name}.o_proj", width, config.hidden_size)
        self.q_norm = RMSNorm(shape.head_dim, config.rms_norm_eps, device, dtype)
        self.k_norm = RMSNorm(shape.head_dim, config.rms_norm_eps, device, dtype)
        self.o_norm = RMSNorm(width, config.rms_norm_eps, device, dtype)
        self._shape = shape
        self._rope_theta = config.rope_theta
        self._scale = shape.head_dim**-0.5

    def new_state(self, spec: StateSpec) -> LightningState:
        """An empty state: zeros."""
        shape = self._shape
        dtype = torch.promote_types(spec.dtype, torch.float32)
        sizes = (spec.batch_size, shape.num_heads, shape.head_dim, shape.head_dim)
        return LightningState(torch.zeros(sizes, device=spec.device, dtype=dtype), 0)

    def forward(self, x: Tensor, state: LightningState) -> Tensor:
        """Take the next tokens. Shapes: x [B, T, hidden] -> [B, T, hidden]."""
        shape = self._shape
        num_tokens = x.shape[1]
        q = self.q_proj(x).unflatten(-1, (shape.num_heads, shape.head_dim))
        k = self.k_proj(x).unflatten(-1, (shape.num_key_value_heads, shape.head_dim))
        v = self.v_proj(x).unflatten(-1, (shape.num_key_value_heads, shape.head_dim))
        wide = torch.promote_types(x.dtype, torch.float32)
        tables = _tables(state.num_tokens, num_tokens, shape.head_dim, self._rope_theta, wide, x.device)
        q, k = (rotated(y.to(wide), *tables).to(x.dtype) for y in (self.q_norm(q), self.k_norm(k)))
        if shape.num_key_value_heads != shape.num_heads:
            repeats = shape.num_heads // shape.num_key_value_heads
            k, v = k.repeat_interleave(repeats, dim=2), v.repeat_interleave(repeats, dim=2)
        slopes = _slopes(shape.num_heads, state.matrix.dtype, x.device)
        o, matrix = lightning(q, k, v, slopes, self._scale, state.matrix)
        state.advance(matrix, num_tokens)
        y: Tensor = self.o_proj(sigmoid_gate(self.o_norm(o.flatten(2).to(x.dtype)), self.z_proj(x)))
        return y


@lru_cache(maxsize=1)  # all layers turn the same tokens, one layer after the other
def _tables(
    first: int, num_tokens: int, head_dim: int, theta: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # made inside, they could not be used where gradients are wanted
        positions = torch.arange(first, first + num_tokens, device=device)
        return rotary_tables(positions, head_dim, theta, dtype)


@cache
def _slopes(num_heads: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return lightning_slopes(num_heads, dtype).to(device)
