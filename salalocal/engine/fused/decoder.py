"""An answer token by token on a GPU: a state and a first token go in, the tokens after it come out; for Generation.

Without guesses the device works one step ahead: while a token is looked at, the step that feeds it runs already. A step
in vain changes nothing that counts, see `step`. With guesses a step may bring several tokens, and the next one waits
for them. The state is lent to the decoder meanwhile, and settled before anybody else reads it; it holds the decoder, so
the decoder holds it by a weak reference.
"""

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from salalocal.engine.fused.model import FusedModel
from salalocal.engine.fused.step import Step, StepState, TokenChoice, commit, new_ring
from salalocal.engine.picks import Picks, first_picking
from salalocal.engine.prompt_lookup import PromptLookup
from salalocal.engine.sampling import Sampler
from salalocal.errors import NumericError, StateError
from salalocal.kernels.host_memory import wait_for_card
from salalocal.kernels.lightning_decode import MAX_STEPS
from salalocal.kernels.pick_ring import PickRing
from salalocal.model.mixers.sparse import SparseState
from salalocal.model.state import ModelState

# Room for so many tokens is made at a time; what follows is captured anew.
ROOM_TOKENS = 4096
# Rows of a step that checks guesses: up to 8 cost little more than one, see benchmarks/LOG.md.
GUESS_ROWS = 8


@dataclass
class GuessStats:
    """How guessing went: steps taken, tokens guessed, and guesses that were right."""

    num_steps: int = 0
    num_guessed: int = 0
    num_right: int = 0


class Decoder:
    """Feeds tokens into a state and draws the next ones, at most `max_tokens`, with the sampler's random numbers."""

    def __init__(
        self,
        model: FusedModel,
        state: ModelState,
        sampler: Sampler,
        max_tokens: int,
        lookup: PromptLookup | None = None,
    ) -> None:
        self._model, self._state, self._sampler = model, weakref.proxy(state), sampler
        self._left = max_tokens
        self._lookup = lookup
        self._run: _Run | None = None
        self._first_picking = first_picking(model.model.config, state)
        self._first = self._end = state.num_tokens
        self._ring: PickRing | None = None
        self.stats = GuessStats()

    def next_token(self, token: int) -> int:
        """Feed `token`, the last one drawn, and draw the one behind it.

        The state then holds `token` too. Raises: NumericError if logits are NaN or infinite; the state must then be
        dropped.
        """
        with torch.inference_mode():
            if self._run is None or self._run.is_full:
                self._state.check_whole()  # settles first
                self._run = self._new_run(token)
                self._state.lend(self._settle)
            self._left -= 1
            if self._lookup is None:
                drawn = self._run.next_token()
            else:
                self._lookup.push(token)
                drawn = self._run.next_token_guessing(self._lookup, self.stats)
            self._end += 1
            return drawn

    def picks(self) -> Picks:
        """What the last rows picked, those that did; waits for the device."""
        if self._ring is None:
            return Picks.none(self._model.model.config)
        # A step that ran ahead, or guessed, may have written behind the last row.
        first = max(self._first, self._first_picking, self._end - (len(self._ring) - MAX_STEPS))
        positions = torch.arange(first, max(first, self._end))
        rows = (positions % len(self._ring)).to(self._ring.blocks.device)
        with torch.inference_mode():
            return Picks(self._ring.blocks[rows].cpu(), self._ring.weights[rows].float().cpu(), positions)

    def _new_run(self, token: int) -> "_Run":
        if self._ring is None:
            self._ring = new_ring(self._model.model.config, self._model.model.device)
        run = _Run(self._model, self._state, token, self._sampler, min(self._left, ROOM_TOKENS), self._ring)
        # A step that ran ahead uses what goes back with it, and torch waits for the stream of the capture alone.
        weakref.finalize(run, wait_for_card).atexit = False
        return run

    def _settle(self) -> None:
        if self._run is not None and self._run.is_under_way:
            self._state.lend(self._settle)  # whoever asks next is refused as well
            raise StateError(
                "an answer was interrupted in the middle of a step, and its state with it",
                "go on from a fork made before the answer",
            )
        run, self._run = self._run, None
        if run is not None:
            with torch.inference_mode():
                run.end()
            del run
            if self._model.model.device.type == "cuda":
                torch.cuda.empty_cache()  # the memory of a graph that is gone comes back in no other way


class _Run:
    """Steps over a reserved room of some tokens, until it is full or the state is wanted back.

    `state` is a weak reference.
    """

    def __init__(
        self, model: FusedModel, state: ModelState, token: int, sampler: Sampler, room: int, ring: PickRing
    ) -> None:
        self._model, self._state, self._room = model, state, room
        self._steps = StepState.begin(model.model.config, state, token, room + MAX_STEPS, ring)
        self._tensors = self._steps.tensors
        choose = TokenChoice(model.head, sampler, state.num_tokens + 1, room + MAX_STEPS, ring.blocks.device)
        self._step = Step(model, self._steps, choose)
        self._guessing_step = Step(model, self._steps, choose, GUESS_ROWS)
        self._launched, self._taken = 0, 0
        self._landed = [_Landing(self._tensors.report) for _ in range(2)]
        # Tokens of the last step: how many are taken, and those that are not.
        self._taken_of_step, self._drawn = 0, list[int]()
        self.is_under_way = False

    @property
    def is_full(self) -> bool:
        return self._taken == self._room

    def next_token(self) -> int:
        """The next token; the step behind it is on its way."""
        self.is_under_way = True
        while self._launched < min(self._taken + 2, self._room):
            self._step.launch()
            self._landed[self._launched % 2].take()
            self._launched += 1
        self._drawn = self._landed[self._taken % 2].wait()
        self._taken_of_step = 0
        return self._take()

    def next_token_guessing(self, lookup: PromptLookup, stats: GuessStats) -> int:
        """The next token, of the last step or of a new one that checks guesses."""
        self.is_under_way = True
        if not self._drawn:
            guesses = lookup.guess(GUESS_ROWS - 1)
            if guesses:
                self._tensors.fed[1 : 1 + len(guesses)].copy_(torch.tensor(guesses))
            (self._guessing_step if guesses else self._step).launch()
            self._landed[0].take()
            self._drawn = self._landed[0].wait()
            self._launched += len(self._drawn)
            self._taken_of_step = 0
            # Rows behind the guesses hold what earlier steps left there, which may be right too.
            num_right = min(len(self._drawn) - 1, len(guesses))
            if guesses:
                lookup.learn(num_right)
            stats.num_steps += 1
            stats.num_guessed += len(guesses)
            stats.num_right += num_right
        return self._take()

    def end(self) -> None:
        """Bring the lightning matrices up to what was taken: a step ahead has done so already."""
        for layer in self._state.layers:
            if isinstance(layer, SparseState):
                layer.release()
                layer.picked = None  # only the ring knows the newest row's
        is_ahead = self._launched > self._taken and not self._drawn
        if self._taken and not is_ahead:
            self._tensors.count.fill_(self._taken_of_step)
            commit(self._model, self._steps)

    def _take(self) -> int:
        token = self._drawn.pop(0)
        if token < 0:
            raise NumericError(
                "logits: some numbers are NaN or infinite",
                "nothing of this step was kept; check the model's files, or try another dtype",
            )
        self._taken_of_step += 1
        self._taken += 1
        self._state.num_tokens += 1
        for layer in self._state.layers:
            layer.extend(1)
        self.is_under_way = False
        return token


class _Landing:
    """The tokens of a step on their way to the host."""

    def __init__(self, source: Tensor) -> None:
        self._source = source
        self._host = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
        self._event = torch.cuda.Event() if source.is_cuda else None  # type: ignore[no-untyped-call]

    def take(self) -> None:
        self._host.copy_(self._source, non_blocking=True)
        if self._event is not None:
            self._event.record()

    def wait(self) -> list[int]:
        """The token behind every accepted row."""
        if self._event is not None:
            self._event.synchronize()
        count = int(self._host[0])
        return [int(token) for token in self._host[1 : 1 + count]]
