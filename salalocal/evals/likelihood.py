"""Likelihood of given texts, and completions: what harnesses that bring their own tasks ask of a model; for `harness`.

    of_continuation   sum of log p(token | all in front of it) over the tokens of a continuation, and whether each was
                      the likeliest one
    of_text           the same sum over a whole text behind the start token, with no truncation
    complete          what the model writes behind a text, greedily or drawn, up to a stop text

Contexts that come one after the other and begin alike are read from where they part.
"""

from collections.abc import Sequence
from itertools import takewhile

import torch
from torch import Tensor

from salalocal.model.state import ModelState
from salalocal.session.memory import naming_memory_errors
from salalocal.session.runtime import Runtime


class Likelihood:
    """A runtime, asked for likelihoods. One call at a time."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._ids: tuple[int, ...] = ()
        self._state: ModelState | None = None
        self._logits: Tensor | None = None

    def encode(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The ids of a context behind the start token, and of its continuation, split where the context's text ends.

        Spaces at the end of the context count as the continuation's, since tokens begin with them.
        """
        tokenizer = self._runtime.tokenizer
        whole = tokenizer.encode_prompt(context + continuation)
        front = tokenizer.encode_prompt(context.rstrip())
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(front, whole, strict=False)))
        split = max(1, min(shared, len(whole) - 1))
        return whole[:split], whole[split:]

    def of_continuation(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
        """The log-likelihood of a continuation in nats, and whether greedy decoding would write it.

        Both have one token at least. Raises: RequestError, MemoryBudgetError, NumericError.
        """
        with naming_memory_errors("computing likelihoods"):
            logits = self._read(tuple(context), len(continuation))
            state = None if self._state is None else self._state.fork()
            if state is None or logits is None:
                raise ValueError("a read that nobody can cancel was cancelled")
            total, is_greedy = 0.0, True
            for index, token in enumerate(continuation):
                total += float(logits.log_softmax(-1)[token])
                is_greedy = is_greedy and int(logits.argmax()) == token
                if index + 1 < len(continuation):
                    logits = self._runtime.engine.prefill([token], state)
                    if logits is None:
                        raise ValueError("a read that nobody can cancel was cancelled")
            return total, is_greedy

    def of_text(self, text: str) -> float:
        """The log-likelihood of a text behind the start token, in nats; 0 for an empty one."""
        ids = self._runtime.tokenizer.encode_prompt(text)
        total, position = 0.0, 0
        if len(ids) < 2:
            return total
        with naming_memory_errors("computing likelihoods"):
            for logits in self._runtime.engine.iter_logits(ids):
                following = ids[position + 1 : position + 1 + logits.shape[0]]
                if following:
                    rows = logits[: len(following)].log_softmax(-1)
                    places = torch.tensor(following, device=rows.device)[:, None]
                    total += float(rows.gather(1, places).sum(dtype=torch.float64))
                position += logits.shape[0]
        return total

    def complete(self, context: str, stop: Sequence[str], max_tokens: int, temperature: float = 0.0) -> str:
        """What the model writes behind a context, up to the first stop text. Raises: as `Runtime.generate`."""
        generation = self._runtime.generate(
            context, max_tokens=max_tokens, temperature=temperature, stop=[text for text in stop if text]
        )
        for _ in generation:
            pass
        return generation.text

    def _read(self, ids: tuple[int, ...], room: int) -> Tensor | None:
        """The logits behind a context; its state is kept for the next one."""
        if self._state is not None and self._ids == ids:
            return self._logits
        is_longer = self._state is not None and len(ids) > len(self._ids) and ids[: len(self._ids)] == self._ids
        if self._state is None or not is_longer:
            self._state, self._ids = self._runtime.engine.new_state(len(ids) + room), ()
        self._logits = self._runtime.engine.prefill(list(ids[len(self._ids) :]), self._state)
        self._ids = ids
        return self._logits
