"""Calibration: token ids run through a model block by block; for the quantizer.

In: sequences of ids, the embedding, and the weights of one block after the other, those in front already quantized.
Out: the second moments of what every linear map reads. It is the true forward of long contexts: fp32, chunk by chunk
with a state, so that rows beyond `dense_len` choose blocks as they will when the model is used.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from salalocal.errors import RequestError
from salalocal.model.config import SalaConfig
from salalocal.model.layers import DenseLinear
from salalocal.model.sala import SalaBlock, SwitchRule
from salalocal.model.state import StateSpec
from salalocal.quant.workers import Workers

DEFAULT_SEQUENCE_TOKENS = 16_384
MIN_SEQUENCE_TOKENS = 32

# Which map's inputs stand for those of a map: maps of one name here read the same.
INPUT_OF = {
    "self_attn.q_proj": "self_attn.q_proj",
    "self_attn.k_proj": "self_attn.q_proj",
    "self_attn.v_proj": "self_attn.q_proj",
    "self_attn.z_proj": "self_attn.q_proj",
    "self_attn.o_gate": "self_attn.q_proj",
    "self_attn.o_proj": "self_attn.o_proj",
    "mlp.gate_proj": "mlp.gate_proj",
    "mlp.up_proj": "mlp.gate_proj",
    "mlp.down_proj": "mlp.down_proj",
}

_CHUNK_TOKENS = 2048

Moments = dict[str, Tensor]


class BlockWeights(NamedTuple):
    """The float32 tensors of one block by their names inside it, with what else makes it run."""

    config: SalaConfig
    layer: int
    tensors: Mapping[str, Tensor]


def cut_sequences(ids: Sequence[int], num_tokens: int = DEFAULT_SEQUENCE_TOKENS) -> list[tuple[int, ...]]:
    """Cut a text's ids into sequences of at most `num_tokens`; a last one of a few tokens is dropped.

    Raises: RequestError if nothing is left.
    """
    pieces = [tuple(ids[start : start + num_tokens]) for start in range(0, len(ids), num_tokens)]
    kept = [piece for piece in pieces if len(piece) >= MIN_SEQUENCE_TOKENS]
    if not kept:
        raise RequestError(
            f"{len(ids)} tokens of calibration text, at least {MIN_SEQUENCE_TOKENS} are needed",
            "give a longer text, such as a folder of documents or source code",
        )
    return kept


def embed(config: SalaConfig, table: Tensor, sequences: Iterable[Sequence[int]]) -> list[Tensor]:
    """What the first block reads. Shapes: table [vocab, hidden] -> one [1, T, hidden] float32 per sequence.

    Raises: RequestError for an id that the model does not have.
    """
    hidden = []
    for sequence in sequences:
        if not all(0 <= token < config.vocab_size for token in sequence):
            raise RequestError("calibration ids that the model does not have", "use the model's own tokenizer")
        hidden.append(table[torch.tensor(sequence)][None].float() * config.scale_emb)
    return hidden


def advance(weights: BlockWeights, hidden: Sequence[Tensor], workers: Workers) -> list[Tensor]:
    """What the next block reads: every sequence after this block. Shapes: as `hidden`."""
    return list(workers.map(partial(_after_block, weights, _Linears()), hidden))


def input_moments(weights: BlockWeights, hidden: Sequence[Tensor], workers: Workers) -> Moments:
    """The mean of x x^T over all tokens, for the maps that `INPUT_OF` points to.

    Shapes: hidden [1, T, hidden] each -> float64 [in, in] each.
    """
    sums: Moments = {}
    for part in workers.map(partial(_moments_of, weights), hidden):
        for name, moments in part.items():
            sums[name] = sums[name].add_(moments) if name in sums else moments
    num_tokens = sum(sequence.shape[1] for sequence in hidden)
    return {name: total.div_(num_tokens) for name, total in sums.items()}


class _Linears:
    """Makes the linear maps of a block; watched ones add up the moments of their inputs."""

    def __init__(self, watched: Moments | None = None) -> None:
        self._watched = watched

    def __call__(self, name: str, in_features: int, out_features: int) -> nn.Module:
        leaf = ".".join(name.split(".")[-2:])
        if self._watched is None or INPUT_OF[leaf] != leaf:
            return DenseLinear(in_features, out_features, "meta", torch.float32)
        self._watched[leaf] = torch.zeros(in_features, in_features, dtype=torch.float64)
        return _WatchedLinear(in_features, out_features, self._watched[leaf])


class _WatchedLinear(DenseLinear):
    def __init__(self, in_features: int, out_features: int, moments: Tensor) -> None:
        super().__init__(in_features, out_features, "meta", torch.float32)
        self._moments = moments

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        self._moments += rows.t() @ rows
        return super().forward(x)


def _moments_of(weights: BlockWeights, hidden: Tensor) -> Moments:
    moments: Moments = {}
    _after_block(weights, _Linears(moments), hidden)
    return moments


def _after_block(weights: BlockWeights, linears: _Linears, hidden: Tensor) -> Tensor:
    num_tokens = hidden.shape[1]
    block = SalaBlock(weights.config, weights.layer, linears, "meta", torch.float32)
    block.load_state_dict(weights.tensors, strict=True, assign=True)
    sparse_from = SwitchRule.POSITION.sparse_from(weights.config.sparse.dense_len)
    state = block.self_attn.new_state(
        StateSpec(
            batch_size=1,
            capacity=num_tokens,
            sparse_from=sparse_from,
            device=torch.device("cpu"),
            dtype=torch.float32,
        )
    )
    chunks = [hidden[:, start : start + _CHUNK_TOKENS] for start in range(0, num_tokens, _CHUNK_TOKENS)]
    return torch.cat([block(chunk, state) for chunk in chunks], dim=1)
