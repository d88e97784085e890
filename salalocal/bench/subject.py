"""What a walk measures: a model that reads and draws tokens on one growing state; here, a SALA model behind an Engine.

A subject waits for its device before it returns, so that wall time is what a caller waits for. Tokens are random: speed
does not depend on them.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from salalocal.bench.ceilings import wait_for
from salalocal.bench.work import Cost
from salalocal.engine.engine import Engine
from salalocal.engine.sampling_params import SamplingParams
from salalocal.model.config import SalaConfig
from salalocal.model.state import ModelState

OnTokens = Callable[[int], None]
"""Called while tokens are read, with how many of this call's are."""

WARM_UP_TOKENS = 4
"""Tokens that a warm-up draws; a state has room for so many at least."""


@dataclass(frozen=True)
class SubjectFacts:
    """What a subject is. Units: chunk_size in tokens; `model_bytes` are all weights as loaded.

    `math` is what linear maps are multiplied in when many rows are read: int8, or floats. `planned_bytes`: what `plan`
    says that the deepest depth takes, None where nobody asked it.
    """

    name: str
    description: str
    num_parameters: int
    model_bytes: int
    dtype: str
    math: str
    cache: str
    chunk_size: int
    planned_bytes: int | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Drawn:
    """Seconds: to the first token behind a read; for the second one, which pays for what an answer sets up, such as a
    CUDA graph; and of each run of further ones."""

    first_s: float
    setup_s: float
    runs_s: tuple[float, ...]


class Subject(Protocol):
    """A model to walk with; `begin` makes the state that all the rest works on."""

    @property
    def facts(self) -> SubjectFacts: ...

    @property
    def cost(self) -> Cost: ...

    @property
    def device(self) -> torch.device: ...

    def begin(self, capacity: int) -> None:
        """An empty state with room for so many tokens, in the place of the one before.

        Raises: MemoryBudgetError, torch.OutOfMemoryError.
        """

    def warm_up(self, depths: Sequence[int]) -> None:
        """Do everything once that a walk to these depths will do, on the state that was begun, which it uses up."""

    def read(self, num_tokens: int, on_tokens: OnTokens) -> None:
        """Read so many more tokens."""

    def draw(self, num_tokens: int, num_runs: int, is_last: bool) -> Drawn:
        """Draw two tokens, then `num_runs` times `num_tokens` more. What was read stays as it was, unless `is_last`."""


class EngineSubject:
    """A SALA model behind an Engine, through the calls that a session makes."""

    def __init__(self, engine: Engine, facts: SubjectFacts, cost: Cost) -> None:
        self.facts, self.cost, self.device = facts, cost, engine.device
        self._engine = engine
        self._generator = torch.Generator().manual_seed(0)
        self._state: ModelState | None = None
        self._logits: Tensor | None = None
        self._capacity = 0

    @property
    def config(self) -> SalaConfig:
        """The shape of the model."""
        return self._engine.model.config

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self._engine.model.dtype

    def warm_up(self, depths: Sequence[int]) -> None:
        """Past the switch of the sparse layers on a card, where kernels are compiled; one chunk on a CPU. It stops at
        the first depth, whose last chunk may be a short one, of which there are kernels too, and draws there as well.

        On a card one more chunk is read at the end, into an empty state as the walk's first one: what it allocates
        stays at hand.
        """
        enough, is_card = self.facts.chunk_size, self.device.type == "cuda"
        if is_card:
            enough += self._engine.model.config.sparse.dense_len + self.facts.chunk_size
        first, last = min(depths[0], enough), min(depths[-1], enough)
        self.read(first, lambda tokens: None)
        if last > first:
            self.draw(WARM_UP_TOKENS - 2, 1, False)
            self.read(last - first, lambda tokens: None)
        self.draw(WARM_UP_TOKENS - 2, 1, True)
        if is_card:
            self.begin(self._capacity)
            self.read(min(first, self.facts.chunk_size), lambda tokens: None)

    def begin(self, capacity: int) -> None:
        """An empty state with room for so many tokens; the old one goes first, so that its memory is taken again."""
        self._state = self._logits = None
        self._state, self._capacity = self._engine.new_state(capacity), capacity

    def read(self, num_tokens: int, on_tokens: OnTokens) -> None:
        """Prefill so many random tokens."""
        if self._state is None:
            raise ValueError("read before begin")
        vocab_size = self._engine.model.config.vocab_size
        ids = torch.randint(0, vocab_size, (num_tokens,), generator=self._generator)
        self._logits = self._engine.prefill(ids, self._state, lambda done, total: on_tokens(done))
        wait_for(self.device)

    def draw(self, num_tokens: int, num_runs: int, is_last: bool) -> Drawn:
        """Draw from a fork, or from the state itself where nothing comes after."""
        if self._state is None or self._logits is None:
            raise ValueError("draw before read")
        state = self._state if is_last else self._state.fork()
        params = SamplingParams(max_tokens=2 + num_runs * num_tokens, is_loop_guarded=False)
        started_s = time.perf_counter()
        tokens = self._engine.generate(state, self._logits, params)
        next(tokens)
        first_s = time.perf_counter() - started_s
        started_s = time.perf_counter()
        next(tokens)
        setup_s = time.perf_counter() - started_s
        runs_s = []
        for _ in range(num_runs):
            started_s = time.perf_counter()
            for _ in range(num_tokens):
                next(tokens)
            wait_for(self.device)
            runs_s.append(time.perf_counter() - started_s)
        return Drawn(first_s, setup_s, tuple(runs_s))
