"""An answer token by token on a GPU: a state and a first token go in, the tokens after it come out; for Generation.

The device works one step ahead: while a token is looked at, the step that feeds it runs already. A step in vain changes
nothing that counts, see `step`. The state is lent to the decoder meanwhile, and settled before anybody else reads it.
"""

import torch
from torch import Tensor

from salalocal.engine.fused.model import FusedModel
from salalocal.engine.fused.step import Step, StepState, TokenChoice, commit
from salalocal.engine.sampling import Sampler
from salalocal.errors import NumericError
from salalocal.model.state import ModelState

# Room for so many tokens is made at a time; what follows is captured anew.
ROOM_TOKENS = 4096


class Decoder:
    """Feeds tokens into a state and draws the next ones, at most `max_tokens`, with the sampler's random numbers."""

    def __init__(self, model: FusedModel, state: ModelState, sampler: Sampler, max_tokens: int) -> None:
        self._model, self._state, self._sampler = model, state, sampler
        self._left = max_tokens
        self._run: _Run | None = None

    def next_token(self, token: int) -> int:
        """Feed `token`, the last one drawn, and draw the one behind it.

        The state then holds `token` too. Raises: NumericError if logits are NaN or infinite; the state must then be
        dropped.
        """
        with torch.inference_mode():
            if self._run is None or self._run.is_full:
                self._state.settle()
                self._run = _Run(self._model, self._state, token, self._sampler, min(self._left, ROOM_TOKENS))
                self._state.lend(self._settle)
            self._left -= 1
            return self._run.next_token()

    def _settle(self) -> None:
        run, self._run = self._run, None
        if run is not None:
            with torch.inference_mode():
                run.end()


class _Run:
    """Steps over a reserved room of some tokens, until it is full or the state is wanted back."""

    def __init__(self, model: FusedModel, state: ModelState, token: int, sampler: Sampler, room: int) -> None:
        self._model, self._state, self._room = model, state, room
        self._tensors = StepState.begin(state, token, room, model.model.device)
        self._step = Step(model, self._tensors, TokenChoice(sampler, room, model.model.device))
        self._launched, self._taken = 0, 0
        self._landed = [_Landing(self._tensors.chosen) for _ in range(2)]

    @property
    def is_full(self) -> bool:
        return self._taken == self._room

    def next_token(self) -> int:
        while self._launched < min(self._taken + 2, self._room):
            self._step.launch()
            self._landed[self._launched % 2].take()
            self._launched += 1
        token = self._landed[self._taken % 2].wait()
        if token < 0:
            raise NumericError(
                "logits: some numbers are NaN or infinite",
                "nothing of this step was kept; check the model's files, or try another dtype",
            )
        self._taken += 1
        self._state.num_tokens += 1
        for layer in self._state.layers:
            layer.extend(1)
        return token

    def end(self) -> None:
        """Bring the lightning matrices up to what was taken: a step ahead has done so already."""
        if 0 < self._launched == self._taken:
            commit(self._model, self._tensors)


class _Landing:
    """One token on its way to the host."""

    def __init__(self, source: Tensor) -> None:
        self._source = source
        self._host = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
        self._event = torch.cuda.Event() if source.is_cuda else None  # type: ignore[no-untyped-call]

    def take(self) -> None:
        self._host.copy_(self._source, non_blocking=True)
        if self._event is not None:
            self._event.record()

    def wait(self) -> int:
        if self._event is not None:
            self._event.synchronize()
        return int(self._host[0])
