"""Calibration: token ids run through a model block by block, stage by stage; for the quantizer.

In: sequences of ids, the embedding, and the weights of one block after the other. Out: the second moments of what the
linear maps read. A block has four stages, each read by maps of its own; those of one stage are quantized before the
inputs of the next are measured. The model runs twice, side by side: with weights quantized so far, and as it was, so
that later maps can make up for what earlier ones have lost. It is the true forward of long contexts: fp32, chunk by
chunk with a state, so that rows beyond `dense_len` choose blocks as they will when the model is used.

It runs where the weights are; hidden states wait on the host, page-locked for a CUDA device. Matrix products on CUDA
are TF32: 10 bits of an operand are kept, where the model in use keeps 7 of them (bf16), and TF32 moments are still
moments, those of inputs rounded so. The products of a chunk are added up in fp32, the chunks in float64.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from salalocal.errors import RequestError
from salalocal.model.config import SalaConfig
from salalocal.model.layers import DenseLinear
from salalocal.model.sala import SalaBlock, SwitchRule
from salalocal.model.state import StateSpec
from salalocal.quant.workers import Workers, matmul_precision

# The stages of a block, by a map that reads what is measured there.
MIXER_INPUT, MIXER_OUTPUT, MLP_INPUT, MLP_OUTPUT = STAGES = (
    "self_attn.q_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.down_proj",
)
# Which map's inputs stand for those of a map: maps of one name here read the same.
INPUT_OF = {
    "self_attn.q_proj": MIXER_INPUT,
    "self_attn.k_proj": MIXER_INPUT,
    "self_attn.v_proj": MIXER_INPUT,
    "self_attn.z_proj": MIXER_INPUT,
    "self_attn.o_gate": MIXER_INPUT,
    "self_attn.o_proj": MIXER_OUTPUT,
    "mlp.gate_proj": MLP_INPUT,
    "mlp.up_proj": MLP_INPUT,
    "mlp.down_proj": MLP_OUTPUT,
}

_CHUNK_TOKENS = 2048
# Random models of four layers and 256 features, error of hidden states on other text than that of the calibration, mean
# of nine: without a correction 0.536, at 2 to 32 tokens a feature; with it and 2, 4, 8, 16 here 0.533, 0.517, 0.510,
# 0.496. Text that repeats itself, as real text does, needs less restraint.
_TOKENS_PER_UNKNOWN = 8
# Moments are added up in lanes, and lanes in their order: as many as fit here, so the number of threads is no matter.
_LANES = 8
_LANE_BYTES = 2 * 2**30


@dataclass
class Streams:
    """The hidden states of all sequences between two blocks, on the host: as the weights quantized so far make them,
    and as the original ones do, where those are asked for.

    Shapes: [1, T, hidden] float32 each.
    """

    quantized: list[Tensor]
    original: list[Tensor] | None

    @property
    def tensors(self) -> list[Tensor]:
        """All of them, to be kept."""
        return [*self.quantized, *(self.original or [])]

    @classmethod
    def of(cls, tensors: list[Tensor], has_original: bool) -> "Streams":
        """What `tensors` gave."""
        if not has_original:
            return cls(tensors, None)
        half = len(tensors) // 2
        return cls(tensors[:half], tensors[half:])


def input_of(name: str) -> str:
    """Which map's inputs those of a matrix of the checkpoint are: `INPUT_OF`, or itself outside of the layers."""
    module = name.removesuffix(".weight")
    return INPUT_OF.get(".".join(module.split(".")[-2:]), module)


def embed(config: SalaConfig, table: Tensor, sequences: Iterable[Sequence[int]]) -> list[Tensor]:
    """What the first block reads, on the host. Shapes: table [vocab, hidden] -> [1, T, hidden] float32 per sequence.

    Raises: RequestError for an id that the model does not have.
    """
    hidden = []
    for sequence in sequences:
        if not all(0 <= token < config.vocab_size for token in sequence):
            raise RequestError("calibration ids that the model does not have", "use the model's own tokenizer")
        ids = torch.tensor(sequence, device=table.device)
        hidden.append(_on_host(table[ids][None].float() * config.scale_emb))
    _wait_for(table.device)
    return hidden


class BlockReader:
    """All sequences in one block, whose weights are quantized one after the other; the streams are brought along.

    `tensors`: those of the block as they were, by their names inside it, on the device to work on.
    """

    def __init__(
        self, config: SalaConfig, layer: int, tensors: Mapping[str, Tensor], streams: Streams, workers: Workers
    ) -> None:
        self._config, self._layer = config, layer
        self._original = {name: tensor.float() for name, tensor in tensors.items()}
        self._quantized = dict(self._original)
        self._streams = streams
        self._workers = workers
        self._device = next(iter(self._original.values())).device

    def replace(self, name: str, weight: Tensor) -> None:
        """Put a dequantized matrix in the place of the one that it was made of. Shapes: float32 [out, in]."""
        self._quantized[name] = weight

    def measure(self, stage: str) -> list[Tensor]:
        """What the maps of a stage read, every stage in front having been passed: the mean of x x^T over all tokens
        and, where there is an original stream, that of o x^T with its inputs o, drawn towards x x^T by `_trusted`.

        Shapes: float64 [in, in] each, where the weights are.
        """
        width = self._original[f"{stage}.weight"].shape[1]
        num_lanes = _num_lanes(self._device, (1 if self._streams.original is None else 2) * 8 * width**2)
        numbers = range(len(self._streams.quantized))
        lanes = [lane for lane in (numbers[first::num_lanes] for first in range(num_lanes)) if lane]
        with _fast_products(self._device):
            sums, *others = self._workers.map(partial(self._measure_lane, stage, width), lanes)
        for other in others:
            for total, part in zip(sums, other, strict=True):
                total += part
        num_tokens = sum(sequence.shape[1] for sequence in self._streams.quantized)
        moments, *crosses = (total.div_(num_tokens) for total in sums)
        return [moments, *(cross.lerp_(moments, 1 - _trusted(num_tokens, width)) for cross in crosses)]

    def advance(self, stage: str) -> None:
        """Pass a stage whose maps have been replaced: from `MIXER_OUTPUT` on the hidden states are those behind the
        mixer, after `MLP_OUTPUT` those behind the block."""
        if stage in (MIXER_OUTPUT, MLP_OUTPUT):
            self._pass(stage, self._quantized, self._streams.quantized)
            if self._streams.original is not None:
                self._pass(stage, self._original, self._streams.original)

    def _measure_lane(self, stage: str, width: int, lane: Sequence[int]) -> list[Tensor]:
        moments = torch.zeros(width, width, dtype=torch.float64, device=self._device)
        block = self._block(self._quantized)
        if self._streams.original is None:
            for number in lane:
                for _, x in self._inputs(stage, block, self._streams.quantized[number]):
                    moments += x[0].t() @ x[0]
            return [moments]
        cross, original_block = torch.zeros_like(moments), self._block(self._original)
        for number in lane:
            quantized = self._inputs(stage, block, self._streams.quantized[number])
            original = self._inputs(stage, original_block, self._streams.original[number])
            for (_, x), (_, o) in zip(quantized, original, strict=True):
                moments += x[0].t() @ x[0]
                cross += o[0].t() @ x[0]
        return [moments, cross]

    def _pass(self, stage: str, tensors: Mapping[str, Tensor], stream: list[Tensor]) -> None:
        block, weight = self._block(tensors), tensors[f"{stage}.weight"]
        with _fast_products(self._device):
            for number, hidden in enumerate(self._workers.map(partial(self._behind, stage, block, weight), stream)):
                stream[number] = hidden
        _wait_for(self._device)

    def _behind(self, stage: str, block: SalaBlock, weight: Tensor, hidden: Tensor) -> Tensor:
        scale = self._config.residual_scale
        parts = [chunk + functional.linear(x, weight) * scale for chunk, x in self._inputs(stage, block, hidden)]
        return _on_host(torch.cat(parts, dim=1))

    def _inputs(self, stage: str, block: SalaBlock, hidden: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The hidden states of one sequence chunk by chunk, and what the maps of the stage read of each."""
        hidden = hidden.to(self._device, non_blocking=True)
        state = block.self_attn.new_state(
            StateSpec(
                batch_size=1,
                capacity=hidden.shape[1] if stage == MIXER_OUTPUT else 0,
                sparse_from=SwitchRule.POSITION.sparse_from(self._config.sparse.dense_len),
                device=self._device,
                dtype=torch.float32,
            )
        )
        for chunk in torch.split(hidden, _CHUNK_TOKENS, dim=1):
            if stage in (MIXER_INPUT, MIXER_OUTPUT):
                normed = block.input_layernorm(chunk)
                yield chunk, normed if stage == MIXER_INPUT else block.self_attn(normed, state)
            else:
                normed = block.post_attention_layernorm(chunk)
                yield chunk, normed if stage == MLP_INPUT else block.mlp(normed)

    def _block(self, tensors: Mapping[str, Tensor]) -> SalaBlock:
        """The block without the maps at the end of its mixer and of its MLP: what they read comes out."""
        block = SalaBlock(self._config, self._layer, _linear_or_nothing, "meta", torch.float32)
        held = {name: tensor for name, tensor in tensors.items() if input_of(name) not in (MIXER_OUTPUT, MLP_OUTPUT)}
        block.load_state_dict(held, strict=True, assign=True)
        return block


def _linear_or_nothing(name: str, in_features: int, out_features: int) -> nn.Module:
    if input_of(name) in (MIXER_OUTPUT, MLP_OUTPUT):
        return nn.Identity()
    return DenseLinear(in_features, out_features, "meta", torch.float32)


def _trusted(num_tokens: int, width: int) -> float:
    """How much of a difference between o x^T and x x^T is taken for more than chance, from 0 to 1.

    A correction has `width` unknowns per output: on few tokens it would fit those and no others.
    """
    return num_tokens / (num_tokens + _TOKENS_PER_UNKNOWN * width)


def _num_lanes(device: torch.device, lane_bytes: int) -> int:
    return min(_LANES, max(1, _LANE_BYTES // lane_bytes)) if device.type == "cpu" else 1


def _on_host(tensor: Tensor) -> Tensor:
    """The tensor on the host; on its way there until `_wait_for`, so that the device need not wait for Python."""
    if tensor.device.type != "cuda":
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _fast_products(device: torch.device) -> AbstractContextManager[None]:
    return matmul_precision("high" if device.type == "cuda" else "highest")
