"""What reading and writing cannot do without: a shape comes in, FLOP and bytes of stretches of tokens go out; for the
share of the roofline and for projections.

Everything is counted once, as the definition of the model needs it, whatever the kernels really do: a product of an
[M, K] with a [K, N] matrix is 2 M K N FLOP; weights are read once for a chunk and once for a token drawn; of the cache,
what the rows must see. What is elementwise (norms, rotations, gates) and what never leaves the chip counts nothing.
So a share of 100 % cannot be had, and a kernel that does needless work gains nothing by it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Protocol

from salalocal.checkpoint.names import EMBEDDING, HEAD, expected_tensors
from salalocal.model.config import LIGHTNING, SPARSE, SalaConfig

_COARSE = 4  # the second pooling of keys: windows and strides four times those of the first
_STATE_BYTES = 4  # lightning states are fp32


@dataclass(frozen=True)
class Work:
    """FLOP of linear maps, FLOP between tokens (attention of all kinds), and bytes of memory read and written."""

    linear_flops: float = 0.0
    attention_flops: float = 0.0
    num_bytes: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.linear_flops + other.linear_flops,
            self.attention_flops + other.attention_flops,
            self.num_bytes + other.num_bytes,
        )


class Cost(Protocol):
    """What a model's shape says about work."""

    def read(self, start: int, end: int) -> Work:
        """Reading tokens start .. end - 1 as one chunk."""

    def step(self, position: int) -> Work:
        """Drawing one token behind `position` others: the layers for one row, and the logits."""


@dataclass(frozen=True)
class SalaCost:
    """Work of a SALA model.

    `tensor_bytes`: bytes as loaded of every tensor that `expected_tensors` names, scales of packed ones included.
    Units: bytes of one number in the KV cache, scales included, and of one in the pooled keys.
    """

    config: SalaConfig
    tensor_bytes: Mapping[str, int]
    cache_item_bytes: float = 2.0
    pooled_item_bytes: float = 2.0

    @property
    def model_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(self.tensor_bytes.values())

    def read(self, start: int, end: int) -> Work:
        """One chunk; the logits of its last row alone are nothing beside it."""
        config, num_tokens = self.config, end - start
        sparse, lightning = config.sparse, config.lightning
        num_sparse, num_lightning = config.mixer_types.count(SPARSE), config.mixer_types.count(LIGHTNING)
        score = 2 * sparse.num_attention_heads * sparse.head_dim  # FLOP of one row with one key
        attended = 2 * self._attended(start, end) + self._scored(start, end)  # scores and sums; then the choice
        recurrence = 4 * lightning.num_heads * lightning.head_dim**2  # k^T v into the state, q out of it
        key_width = sparse.num_key_value_heads * sparse.head_dim
        row_bytes = 2 * key_width * self.cache_item_bytes  # a key and a value
        return Work(
            linear_flops=2.0 * self._linear_parameters * num_tokens,
            attention_flops=float(num_sparse * score * attended + num_lightning * recurrence * num_tokens),
            num_bytes=self._layer_bytes
            + self._embedded_bytes(num_tokens)
            + self._state_bytes
            + num_sparse * row_bytes * (num_tokens + self._seen(end - 1))
            + num_sparse * key_width * self.pooled_item_bytes * self._windows(end),
        )

    def step(self, position: int) -> Work:
        """The same for one row, and the output matrix."""
        config = self.config
        row = self.read(position, position + 1)
        head = EMBEDDING if config.tie_word_embeddings else HEAD
        logits = Work(2.0 * config.vocab_size * config.hidden_size, 0.0, float(self.tensor_bytes[head]))
        return row + logits

    @property
    def _linear_parameters(self) -> int:
        shapes = expected_tensors(self.config).items()
        return sum(prod(shape) for name, shape in shapes if len(shape) == 2 and name not in (EMBEDDING, HEAD))

    @property
    def _layer_bytes(self) -> float:
        return float(sum(size for name, size in self.tensor_bytes.items() if name not in (EMBEDDING, HEAD)))

    def _embedded_bytes(self, num_tokens: int) -> float:
        return num_tokens * self.tensor_bytes[EMBEDDING] / self.config.vocab_size

    @property
    def _state_bytes(self) -> float:
        """Every lightning state, read and written back."""
        heads, num_layers = self.config.lightning, self.config.mixer_types.count(LIGHTNING)
        return 2.0 * num_layers * heads.num_heads * heads.head_dim**2 * _STATE_BYTES

    @property
    def _switch(self) -> int:
        """The first row that sees less than all before it: of those that choose, the first with more than it takes."""
        return max(self.config.sparse.dense_len - 1, self._budget * self.config.sparse.block_size)

    @property
    def _budget(self) -> int:
        return self.config.sparse.topk + self.config.sparse.window_size // self.config.sparse.block_size

    def _seen(self, position: int) -> int:
        """Keys that the row at `position` attends to: all, or those of its blocks, the last of which is its own."""
        size = self.config.sparse.block_size
        return position + 1 if position < self._switch else (self._budget - 1) * size + position % size + 1

    def _attended(self, start: int, end: int) -> int:
        """The sum of `_seen` over rows."""
        size, switch = self.config.sparse.block_size, self._switch

        def dense(rows: int) -> int:
            return rows * (rows + 1) // 2

        def picked(rows: int) -> int:
            whole, left = divmod(rows, size)
            return rows * (self._budget - 1) * size + whole * dense(size) + dense(left)

        return (
            dense(min(end, switch)) - dense(min(start, switch)) + picked(max(end, switch)) - picked(max(start, switch))
        )

    def _windows(self, num_tokens: int) -> int:
        """Pooled keys of both kinds that a row behind so many tokens scores; none if it need not choose."""
        if num_tokens <= self._switch:
            return 0
        return sum(max(0, (num_tokens - kernel) // stride + 1) for kernel, stride in self._poolings)

    def _scored(self, start: int, end: int) -> int:
        """The sum of `_windows` over rows."""

        def up_to(rows: int, kernel: int, stride: int) -> int:
            steps = max(0, rows - kernel + 1)  # row kernel - 1 is the first with a whole window
            whole, left = divmod(steps, stride)
            return stride * whole * (whole - 1) // 2 + whole * left + steps

        first, last = max(start, self._switch), max(end, self._switch)
        return sum(up_to(last, *pooling) - up_to(first, *pooling) for pooling in self._poolings)

    @property
    def _poolings(self) -> tuple[tuple[int, int], tuple[int, int]]:
        size, stride = self.config.sparse.kernel_size, self.config.sparse.kernel_stride
        return (size, stride), (_COARSE * size, _COARSE * stride)


@dataclass(frozen=True)
class DenseShape:
    """A decoder with full attention in every layer and a gated MLP, as Qwen3 has them."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def layer_parameters(self) -> int:
        """Of the linear maps of one layer."""
        attention = self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        return attention + 3 * self.hidden_size * self.intermediate_size

    @property
    def num_parameters(self) -> int:
        """Of all matrices, embedding and output apart, and all norms."""
        norms = self.num_layers * (2 * self.hidden_size + 2 * self.head_dim) + self.hidden_size
        return self.num_layers * self.layer_parameters + 2 * self.vocab_size * self.hidden_size + norms

    def cache_bytes(self, num_tokens: int, item_bytes: int) -> int:
        """Keys and values of so many tokens."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * item_bytes * num_tokens


QWEN3_8B = DenseShape(
    vocab_size=151_936,
    hidden_size=4096,
    intermediate_size=12_288,
    num_layers=36,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
)


def dense_shape_like(config: SalaConfig) -> DenseShape:
    """Full attention in the sizes of a SALA model: what a baseline is where eight billion parameters are too many."""
    sparse = config.sparse
    return DenseShape(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=sparse.num_attention_heads,
        num_kv_heads=sparse.num_key_value_heads,
        head_dim=sparse.head_dim,
    )


@dataclass(frozen=True)
class DenseCost:
    """Work of a dense model. Units: item_bytes, of one weight or one number in the cache."""

    shape: DenseShape
    item_bytes: int

    def read(self, start: int, end: int) -> Work:
        """Every row with every key up to its own."""
        shape, num_tokens = self.shape, end - start
        pairs = (end * (end + 1) - start * (start + 1)) // 2
        return Work(
            linear_flops=2.0 * shape.num_layers * shape.layer_parameters * num_tokens,
            attention_flops=4.0 * shape.num_layers * shape.num_heads * shape.head_dim * pairs,
            num_bytes=float(
                shape.num_layers * shape.layer_parameters * self.item_bytes
                + num_tokens * shape.hidden_size * self.item_bytes
                + shape.cache_bytes(num_tokens + end, self.item_bytes)
            ),
        )

    def step(self, position: int) -> Work:
        """The same for one row, and the output matrix."""
        head = self.shape.vocab_size * self.shape.hidden_size
        return self.read(position, position + 1) + Work(2.0 * head, 0.0, float(head * self.item_bytes))
