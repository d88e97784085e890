"""One step of an answer: 1 to 16 tokens through all layers, in one CUDA graph; for `decoder`.

The device alone knows where the answer stands: `position` is that of the first row, and the step moves it on by the
rows that were accepted. A lightning layer keeps the rows of a step apart until the next one, which folds in as many as
were accepted: so drafts can be refused, and a step that ran ahead for nothing has changed no state.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from salalocal.engine.fused.layers import (
    FusedLightning,
    LayerMemory,
    LightningMemory,
    Place,
    new_memory,
)
from salalocal.engine.fused.model import FusedModel
from salalocal.engine.sampling import Sampler
from salalocal.kernels.sampling import greedy_tokens, new_sampling_tensors, sample_tokens
from salalocal.model.state import ModelState


class TokenChoice:
    """A sampler's settings and its next random numbers, on the device."""

    def __init__(self, sampler: Sampler, num_tokens: int, device: torch.device) -> None:
        params = sampler.params
        self._is_greedy = params.temperature == 0
        self._sampling = new_sampling_tensors(device, num_tokens)
        if not self._is_greedy:
            self._sampling.temperature.fill_(params.temperature)
            self._sampling.top_k.fill_(params.top_k)
            self._sampling.top_p.fill_(params.top_p)
            self._sampling.min_p.fill_(params.min_p)
            self._sampling.uniforms.copy_(sampler.uniforms(num_tokens))

    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The token behind every row, and the same with -1 once a logit was NaN or infinite.

        Shapes: logits fp32 [R, V] -> int64 [R] each.
        """
        tokens = (greedy_tokens if self._is_greedy else sample_tokens)(logits, self._sampling)
        self._sampling.step.add_(1)
        return tokens, torch.where(self._sampling.is_damaged > 0, -1, tokens)


@dataclass(frozen=True, eq=False)
class StepState:
    """What a step reads and writes, at addresses that stay.

    Shapes: tokens int64 [T]; position int64 [1], of the first of them; count int32 [1], how many rows of the last step
    were accepted and parity int32 [1], which half of the pending rows holds them; chosen int64 [T].
    """

    tokens: Tensor
    position: Tensor
    count: Tensor
    parity: Tensor
    chosen: Tensor
    memories: list[LayerMemory]

    @classmethod
    def begin(cls, state: ModelState, token: int, num_tokens: int, device: torch.device) -> "StepState":
        """Before the first step after `state`, which will feed `token`; room for `num_tokens` tokens."""
        count = torch.zeros(1, dtype=torch.int32, device=device)
        parity = torch.zeros_like(count)
        return cls(
            tokens=torch.tensor([token], device=device),
            position=torch.tensor([state.num_tokens], device=device),
            count=count,
            parity=parity,
            chosen=torch.zeros(1, dtype=torch.int64, device=device),
            memories=[new_memory(layer, num_tokens, count, parity) for layer in state.layers],
        )


class Step:
    """A step of one row, first as it is, then as a graph."""

    def __init__(self, model: FusedModel, state: StepState, choose: TokenChoice) -> None:
        self._model, self._state, self._choose = model, state, choose
        self._graph: torch.cuda.CUDAGraph | None = None
        self._has_run = False

    def launch(self) -> None:
        """Run it once more: its token is fed, the one after it chosen. Nothing waits for the device."""
        # The first run compiles and loads kernels, which a capture must not.
        if not self._has_run or not self._state.position.is_cuda:
            self._run()
            self._has_run = True
            return
        if self._graph is None:
            self._graph = _captured(self._run)
        self._graph.replay()

    def _run(self) -> None:
        state = self._state
        place = Place(state.position)
        hidden = self._model.embedded(state.tokens)
        for (mixer, mlp), memory in zip(self._model.layers, state.memories, strict=True):
            hidden = mlp(mixer.step(hidden, memory, place))
        tokens, chosen = self._choose(self._model.model.logits(self._model.normed(hidden)))
        state.tokens.copy_(tokens)
        state.chosen.copy_(chosen)
        state.position.add_(1)
        state.count.fill_(1)
        state.parity.bitwise_xor_(1)


def commit(model: FusedModel, state: StepState) -> None:
    """Fold the accepted rows of the last step into the lightning matrices, where no further step will."""
    for (mixer, _), memory in zip(model.layers, state.memories, strict=True):
        if isinstance(mixer, FusedLightning):
            assert isinstance(memory, LightningMemory)
            mixer.commit(memory)


def _captured(run: Callable[[], None]) -> torch.cuda.CUDAGraph:
    # Not `torch.cuda.graph`, which empties the allocator's cache before every capture.
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            run()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph
