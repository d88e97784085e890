"""One step of an answer: 1 to 16 tokens through all layers, in one CUDA graph; for `decoder`.

The device alone knows where the answer stands: `position` is that of the first row, and the step moves it on by the
rows that were accepted. A lightning layer keeps the rows of a step apart until the next one, which folds in as many as
were accepted: so drafts can be refused, and a step that ran ahead for nothing has changed no state.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from salalocal.engine.fused.head import Head
from salalocal.engine.fused.layers import (
    FusedLightning,
    LayerMemory,
    LightningMemory,
    Place,
    new_lightning_memory,
    new_sparse_memory,
)
from salalocal.engine.fused.model import FusedModel
from salalocal.engine.picks import RING_ROWS, picks_shape
from salalocal.engine.sampling import Sampler
from salalocal.kernels.block_topk import num_picks
from salalocal.kernels.lightning_decode import MAX_STEPS
from salalocal.kernels.pick_ring import PickRing, StepPicks, keep_picks, new_pick_ring
from salalocal.kernels.sampling import draw_tokens, new_sampling_tensors, sample_tokens
from salalocal.kernels.step_end import StepTensors, end_step
from salalocal.model.config import SalaConfig
from salalocal.model.mixers.lightning import LightningState
from salalocal.model.mixers.sparse import SparseState, block_geometry
from salalocal.model.state import ModelState


class TokenChoice:
    """A sampler's settings and its random numbers for the positions from `first` on, on the device."""

    def __init__(self, head: Head, sampler: Sampler, first: int, num_tokens: int, device: torch.device) -> None:
        params = sampler.params
        self._head, self._params = head, params
        self.sampling = new_sampling_tensors(device, num_tokens, MAX_STEPS)
        if params.temperature > 0:
            self.sampling.temperature.fill_(params.temperature)
            self.sampling.top_k.fill_(params.top_k)
            self.sampling.top_p.fill_(params.top_p)
            self.sampling.min_p.fill_(params.min_p)
            self.sampling.uniforms.copy_(sampler.uniforms(first, num_tokens))

    def __call__(self, hidden: Tensor) -> Tensor:
        """The token behind every row; `sampling.is_damaged` says if a logit was NaN or infinite.

        Shapes: hidden [R, hidden], behind the last norm -> int64 [R].
        """
        params = self._params
        if params.temperature == 0:
            return self._head.greedy(hidden, self.sampling)
        if params.top_k == 0 and params.top_p == 1:
            return draw_tokens(self._head.logits(hidden), self.sampling)
        return sample_tokens(self._head.logits(hidden), self.sampling, most=params.top_k)


@dataclass(frozen=True, eq=False)
class StepState:
    """What steps read and write, at addresses that stay.

    `tensors.parity` says which half of the pending rows of every lightning layer holds those of the last step, and
    `count` how many of them were accepted. Shapes: picks [sparse layers, 16, Hkv, S], what the rows picked, which the
    ring keeps, see `kernels.pick_ring`.
    """

    tensors: StepTensors
    picks: StepPicks
    ring: PickRing
    memories: list[LayerMemory]

    @classmethod
    def begin(cls, config: SalaConfig, state: ModelState, token: int, num_tokens: int, ring: PickRing) -> "StepState":
        """Before the first step after `state`, which will feed `token`; room for `num_tokens` tokens."""
        device = ring.blocks.device
        most_picks = num_picks(block_geometry(config.sparse), state.sparse_from)
        _, num_layers, num_heads, _ = ring.blocks.shape
        blocks = torch.empty(num_layers, MAX_STEPS, num_heads, most_picks, dtype=torch.int64, device=device)
        picks = StepPicks(blocks, torch.empty(blocks.shape, dtype=torch.float32, device=device))
        count = torch.zeros(1, dtype=torch.int32, device=device)
        parity = torch.zeros_like(count)
        tensors = StepTensors(
            fed=torch.full((MAX_STEPS,), token, device=device),
            position=torch.tensor([state.num_tokens], device=device),
            count=count,
            parity=parity,
            report=torch.zeros(1 + MAX_STEPS, dtype=torch.int64, device=device),
        )
        return cls(tensors, picks, ring, _memories(state, num_tokens, picks, (count, parity)))


def new_ring(config: SalaConfig, device: torch.device) -> PickRing:
    """Room for the picks of an answer's last rows."""
    return new_pick_ring((RING_ROWS, *picks_shape(config)), device)


def _memories(
    state: ModelState, num_tokens: int, picks: StepPicks, counters: tuple[Tensor, Tensor]
) -> list[LayerMemory]:
    of_layer = (
        StepPicks(blocks[None], weights[None]) for blocks, weights in zip(picks.blocks, picks.weights, strict=True)
    )
    memories: list[LayerMemory] = []
    for layer in state.layers:
        if isinstance(layer, SparseState):
            memories.append(new_sparse_memory(layer, num_tokens, next(of_layer)))
        else:
            assert isinstance(layer, LightningState)
            memories.append(new_lightning_memory(layer, *counters))
    return memories


class Step:
    """A step of a fixed number of rows, first as it is, then as a graph.

    Row 0 is the token drawn last, the others guess what comes behind it. As many are accepted as the drawn tokens bear
    out, and the token behind the last of them is the next step's first.
    """

    def __init__(self, model: FusedModel, state: StepState, choose: TokenChoice, num_rows: int = 1) -> None:
        self._model, self._state, self._choose = model, state, choose
        self._num_rows = num_rows
        self._graph: torch.cuda.CUDAGraph | None = None
        self._has_run = False

    def launch(self) -> None:
        """Run it once more. Nothing waits for the device."""
        # The first run compiles and loads kernels, which a capture must not.
        device = self._state.tensors.position.device
        if not self._has_run or device.type != "cuda":
            self._run()
            self._has_run = True
            return
        if self._graph is None:
            self._graph = _captured(self._run, device)
        self._graph.replay()

    def _run(self) -> None:
        state, tensors = self._state, self._state.tensors
        place = Place(tensors.position)
        hidden = self._model.embedded(tensors.fed[: self._num_rows])
        for (mixer, mlp), memory in zip(self._model.layers, state.memories, strict=True):
            hidden = mlp(mixer.step(hidden, memory, place))
        found = self._choose(self._model.normed(hidden))
        keep_picks(state.ring, state.picks.first(self._num_rows), tensors.position)
        end_step(found, self._choose.sampling, tensors)


def commit(model: FusedModel, state: StepState) -> None:
    """Fold the accepted rows of the last step into the lightning matrices, where no further step will."""
    for (mixer, _), memory in zip(model.layers, state.memories, strict=True):
        if isinstance(mixer, FusedLightning):
            assert isinstance(memory, LightningMemory)
            mixer.commit(memory)


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures: cuBLAS keeps memory to work in, some 32 MB, for every stream that it has ever seen."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _captured(run: Callable[[], None], device: torch.device) -> torch.cuda.CUDAGraph:
    # Not `torch.cuda.graph`, which empties the allocator's cache before every capture.
    graph, stream = torch.cuda.CUDAGraph(), _capture_stream(device)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            run()
        except BaseException:
            with suppress(RuntimeError):  # of a capture that failed; what made it fail is the error to see
                graph.capture_end()
            raise
        graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph
