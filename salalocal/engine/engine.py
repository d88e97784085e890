"""The engine: token ids in, logits and token ids out, over explicit states; for sessions, evaluation and programs.

It knows no text, no files and no network. It owns the model, keeps no state of its own between calls, and must never
run two calls at once.
"""

import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from salalocal.device import device_memory
from salalocal.engine.fused.decoder import Decoder, GuessStats
from salalocal.engine.fused.model import FusedModel, why_not_fused
from salalocal.engine.picks import RING_ROWS, AnswerPicks, PickLog, Picks, first_picking, newest_picks
from salalocal.engine.prefill import CancelCheck, Forward, ProgressCallback, as_ids, read_chunks
from salalocal.engine.prompt_lookup import PromptLookup
from salalocal.engine.sampling import RepetitionGuard, Sampler, check_finite
from salalocal.engine.sampling_params import SamplingParams
from salalocal.errors import BackendError, MemoryBudgetError, RequestError
from salalocal.kernels.lightning_decode import MAX_STEPS
from salalocal.model.sala import SalaModel, SwitchRule
from salalocal.model.state import ModelState

_LOG = logging.getLogger(__name__)

EndReason = Literal["stop", "length", "repetition", "cancelled"]

_LOGIT_ROWS = 256  # rows of logits computed at once: 75 MB for a vocabulary of 73,448


@dataclass(frozen=True)
class EngineConfig:
    """How a model is run. Units: chunk_size in tokens, how many a prefill feeds at once.

    `is_cache_int8`: keys and values are cached in 8 bits. `is_guessing`: see `prompt_lookup`. `is_kv_on_host`: they lie
    in page-locked host memory, which only `engine.fused` reads.
    """

    chunk_size: int = 512
    is_cache_int8: bool = False
    is_guessing: bool = True
    is_kv_on_host: bool = False

    def __post_init__(self) -> None:
        if type(self.chunk_size) is not int or self.chunk_size < 1:
            raise RequestError(f"chunk_size should be a whole number of tokens from 1 on, is {self.chunk_size!r}")


class Engine:
    """Prefill, decoding and logits of one model.

    `forward` takes token ids and a state to hidden states: by fused kernels on a card, else module by module.
    """

    def __init__(self, model: SalaModel, config: EngineConfig | None = None) -> None:
        self.model = model.eval()
        self.config = config or EngineConfig()
        why = why_not_fused(model)
        if why and model.device.type == "cuda":
            _LOG.warning("the model runs module by module, which is slow: %s", why)
        if why and self.config.is_kv_on_host:
            raise BackendError(
                f"keys and values in host memory need the fused kernels: {why}", "leave out --kv-place host"
            )
        self._fused = None if why else FusedModel(model)
        self.forward: Forward = self._fused or model

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    def keep_head(self) -> None:
        """Give the memory of all layers back; from then on it can only turn hidden states into logits."""
        self.model.model.layers = nn.ModuleList()
        self._fused, self.forward = None, self.model
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def new_state(
        self, capacity: int = 0, switch: SwitchRule = SwitchRule.POSITION, prompt_tokens: int | None = None
    ) -> ModelState:
        """An empty state of one sequence.

        Units: capacity and prompt_tokens in tokens; room for `capacity` of them is made at once, more comes as needed.
        """
        if capacity and self._fused is not None:
            capacity += MAX_STEPS  # an answer's step may write so far ahead, and a cache that grows moves
        with torch.inference_mode():
            is_int8, is_kv_on_host = self.config.is_cache_int8, self.config.is_kv_on_host
            return self.model.new_state(1, capacity, switch, prompt_tokens, is_int8, is_kv_on_host)

    def prefill(
        self,
        ids: Sequence[int] | Tensor,
        state: ModelState,
        on_progress: ProgressCallback | None = None,
        is_cancelled: CancelCheck | None = None,
    ) -> Tensor | None:
        """Feeds a prompt into the state and returns the logits of its last token, or None if it was cancelled before.

        `is_cancelled` is asked before each chunk. After a cancel the state is good and holds `state.num_tokens` tokens;
        the rest of the ids can be fed later, through the very same chunks as without the pause.
        After any exception the state must be dropped: some of its layers may be ahead of the others.

        Shapes: ids [T] -> fp32 [V].
        Raises: RequestError for ids that make no sense; NumericError for NaN or infinity.
        """
        tokens = as_ids(ids, self.model.config.vocab_size, self.device)
        first_position, end = state.num_tokens, state.num_tokens + tokens.numel()
        last = None
        with torch.inference_mode():
            for hidden in read_chunks(self.forward, tokens, state, self.config.chunk_size, is_cancelled):
                last = hidden[:, -1:]
                if on_progress is not None:
                    on_progress(state.num_tokens - first_position, tokens.numel())
            if last is None or state.num_tokens < end:
                return None
            logits = self._last_logits(last)
        return logits.clone()  # outside of inference mode, so that a caller may change it

    def logits(
        self,
        ids: Sequence[int] | Tensor,
        chunk_size: int | None = None,
        switch: SwitchRule = SwitchRule.POSITION,
    ) -> Tensor:
        """The logits of every token of a text read from the start, in host memory, for evaluation.

        For texts whose logits are too large to keep, walk over `iter_logits`.

        Shapes: ids [T] -> fp32 [T, V] on the CPU. Units: chunk_size in tokens, the engine's own if not given.
        Raises: MemoryBudgetError if they do not fit into memory; else as `prefill`.
        """
        tokens = as_ids(ids, self.model.config.vocab_size, self.device)
        vocab_size = self.model.config.vocab_size
        needed, free = 4 * tokens.numel() * vocab_size, device_memory(torch.device("cpu")).free_bytes
        if needed > free:
            raise MemoryBudgetError(
                f"logits of {tokens.numel():,} tokens x {vocab_size:,} need {needed / 2**30:.1f} GiB, "
                f"{free / 2**30:.1f} GiB are free",
                "evaluate a shorter text, or walk over Engine.iter_logits",
            )
        result = torch.empty(tokens.numel(), vocab_size, dtype=torch.float32)
        start = 0
        for rows in self.iter_logits(tokens, chunk_size, switch):
            result[start : start + rows.shape[0]] = rows
            start += rows.shape[0]
        return result

    def iter_logits(
        self,
        ids: Sequence[int] | Tensor,
        chunk_size: int | None = None,
        switch: SwitchRule = SwitchRule.POSITION,
    ) -> Iterator[Tensor]:
        """The same logits as `logits`, some rows at a time and in order, on the model's device.

        Shapes: ids [T] -> fp32 [R, V] each, R <= 256.
        """
        config = self.config if chunk_size is None else replace(self.config, chunk_size=chunk_size)
        tokens = as_ids(ids, self.model.config.vocab_size, self.device)
        state = self.new_state(tokens.numel(), switch, tokens.numel())
        chunks = read_chunks(self.forward, tokens, state, config.chunk_size)
        while state.num_tokens < tokens.numel():
            with torch.inference_mode():  # not around a yield: the caller's own work must not fall under it
                hidden = next(chunks)
            for start in range(0, hidden.shape[1], _LOGIT_ROWS):
                with torch.inference_mode():
                    logits = self.model.logits(hidden[0, start : start + _LOGIT_ROWS])
                    check_finite(logits, "logits")
                yield logits

    def generate(
        self,
        state: ModelState,
        logits: Tensor,
        params: SamplingParams,
        stop_ids: Collection[int] = (),
        is_cancelled: CancelCheck | None = None,
        guess_from: Sequence[int] = (),
    ) -> "Generation":
        """Starts an answer after what the state holds; `logits` are those of its last token. See `Generation`.

        `guess_from`: the ids that the state holds, for guesses of what comes next; they change the speed alone. Guesses
        are made on cards, unless `EngineConfig.is_guessing` is off.
        """
        lookup = None
        if self._fused is not None and self.config.is_guessing and len(guess_from) > 0:
            lookup = PromptLookup(guess_from)
        return Generation(self, state, logits, params, frozenset(stop_ids), is_cancelled, lookup)

    def next_picks(self, ids: Sequence[int], state: ModelState) -> Picks:
        """What the last of these ids would pick, were they fed; the state stays as it is. None, if it reads everything.

        Cheap where the state is the longest that its rows belong to, and has room for the ids: else they are copied.
        """
        tokens, fork = as_ids(ids, self.model.config.vocab_size, self.device), state.fork()
        with torch.inference_mode():
            for _ in read_chunks(self.forward, tokens, fork, self.config.chunk_size):
                pass
        row = newest_picks(fork)
        return Picks.of([] if row is None else [row], fork.num_tokens - 1, fork, self.model.config)

    def _last_logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.model.logits(hidden[:, -1])[0]
        check_finite(logits, "logits")
        return logits

    def _decoder(
        self, state: ModelState, sampler: Sampler, max_tokens: int, lookup: PromptLookup | None
    ) -> "Decoder | _ModuleDecoder":
        if self._fused is None:
            return _ModuleDecoder(self, state, sampler)
        return Decoder(self._fused, state, sampler, max_tokens, lookup)


class _ModuleDecoder:
    """Feeds tokens into a state and draws the next ones, module by module."""

    def __init__(self, engine: Engine, state: ModelState, sampler: Sampler) -> None:
        self._engine, self._state, self._sampler = engine, state, sampler
        self._log = PickLog()
        self.stats = GuessStats()

    def next_token(self, token: int) -> int:
        """Feed `token` and draw the one behind it. Raises: NumericError."""
        with torch.inference_mode():
            hidden = self._engine.model(torch.tensor([[token]], device=self._engine.device), self._state)
            logits = self._engine._last_logits(hidden)
        self._log.take(self._state)
        return self._sampler.sample(logits, self._state.num_tokens)

    def picks(self) -> Picks:
        """What the last rows picked, those that did."""
        return self._log.picks(self._state, self._engine.model.config)


class Generation(Iterator[int]):
    """An answer as it is drawn: an iterator over its token ids, among them the stop token that ended it.

    A token is fed into the state when the next one is asked for. So at any moment between two tokens, at the end, and
    whatever the reason of the end, the state holds what it held at first and all tokens yielded so far except the last.
    That last one (`ids[-1]`, the stop token after an end by "stop") is what a caller feeds before the next turn.

    `reason` is None while the answer runs, then one of
        "stop"        a stop id was drawn, and yielded
        "length"      `max_tokens` tokens were yielded
        "repetition"  the answer ends in a loop (RepetitionGuard)
        "cancelled"   `is_cancelled` said so before the next token
    It is known as soon as the last token is yielded, a cancel one call later. If two hold, the first one counts.

    Raises from `next`: NumericError if the logits are NaN or infinite; nothing is yielded for that step, and the state
    must be dropped.
    """

    def __init__(
        self,
        engine: Engine,
        state: ModelState,
        logits: Tensor,
        params: SamplingParams,
        stop_ids: frozenset[int],
        is_cancelled: CancelCheck | None,
        lookup: PromptLookup | None = None,
    ) -> None:
        self.ids: list[int] = []
        self.reason: EndReason | None = None
        self._logits = logits
        self._params = params
        self._stop_ids = stop_ids
        self._is_cancelled = is_cancelled
        self._sampler = Sampler(params)
        self._decoder = engine._decoder(state, self._sampler, params.max_tokens, lookup)
        self._state = state
        self._config = engine.model.config
        self._first = state.num_tokens
        self._first_picking = first_picking(self._config, state)
        self._first_picks = newest_picks(state)
        self._guard = RepetitionGuard()

    @property
    def guesses(self) -> GuessStats:
        """How guessing what comes next went so far."""
        return self._decoder.stats

    def picks(self) -> AnswerPicks:
        """What was picked to draw the tokens so far; of a long answer the last ones. Waits for the device."""
        rows = [self._first_picks] if self._first_picks is not None and self.ids else []
        first = Picks.of(rows, self._first - 1, self._state, self._config)
        # A token is drawn by the row in front of it.
        num_dense = min(len(self.ids), max(0, self._first_picking - self._first + 1))
        return AnswerPicks((first + self._decoder.picks()).last(RING_ROWS), len(self.ids), num_dense)

    def close(self) -> None:
        """End here, as cancelled, and give back what the answer took on the device; harmless after the end."""
        if self.reason is None:
            self.reason = "cancelled"
        self._state.settle()

    def __iter__(self) -> "Generation":
        return self

    def __next__(self) -> int:
        if self.reason is None and self._is_cancelled is not None and self._is_cancelled():
            self.reason = "cancelled"
        if self.reason is not None:
            self._state.settle()
            raise StopIteration
        if self.ids:
            token = self._decoder.next_token(self.ids[-1])
        else:
            token = self._sampler.sample(self._logits, self._first)
        self.ids.append(token)
        self.reason = self._end_after(token)
        if self.reason is not None:
            self._state.settle()
        return token

    def _end_after(self, token: int) -> EndReason | None:
        if token in self._stop_ids:
            return "stop"
        if len(self.ids) >= self._params.max_tokens:
            return "length"
        if self._params.is_loop_guarded and self._guard.push(token):
            return "repetition"
        return None
