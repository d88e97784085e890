"""How far one model's next-token distributions are from another's; for `eval divergence`, `quantize` and studies.

In: the token ids of some texts, and two models that share a vocabulary, run one after the other. Out: a `Divergence`.
Over all positions t that have a next token x_{t+1}, with the original's distribution p_t and the other one's q_t:

    perplexity    exp(mean -log p_t(x_{t+1})), and the same with q
    KL            sum_v p_t(v) (log p_t(v) - log q_t(v)), in nats: its mean and its 99th percentile
    agreement     how often argmax p_t = argmax q_t

The original is read first and leaves its hidden states behind, which are small; its logits are made from them, some
rows at a time, while the other model reads. So the layers of one model only need to be in memory, and never the logits
of a whole text.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from salalocal.device import device_memory
from salalocal.engine.engine import Engine
from salalocal.engine.prefill import as_ids, read_chunks
from salalocal.engine.sampling import check_finite
from salalocal.errors import MemoryBudgetError, RequestError
from salalocal.model.sala import SalaModel

_LOGIT_ROWS = 256  # rows of logits made at once: 75 MB for each of some five tensors at a vocabulary of 73,448

Sequences = Sequence[Sequence[int]]
OnTokens = Callable[[int], None]
"""Called after each chunk with how many more tokens have been read."""


@dataclass(frozen=True)
class Divergence:
    """The result. Units: num_tokens counts predicted tokens; KL in nats; top1_agreement is a share from 0 to 1."""

    num_sequences: int
    num_tokens: int
    perplexity_original: float
    perplexity_quantized: float
    kl_mean_nats: float
    kl_p99_nats: float
    top1_agreement: float


class Reference:
    """What the original model has to say about some sequences; made by `read_reference`."""

    def __init__(self, head: SalaModel, sequences: Sequences, hidden: list[Tensor]) -> None:
        self.sequences = sequences
        self._head = head
        self._hidden = hidden

    def log_probabilities(self, sequence: int, start: int, end: int) -> Tensor:
        """Shapes: -> [end - start, vocab] fp32, for the tokens behind rows `start` to `end` of a sequence."""
        return _log_softmax(self._head, self._hidden[sequence][start:end].to(self._head.device), "original")


def read_reference(engine: Engine, sequences: Sequences, on_tokens: OnTokens = lambda num_tokens: None) -> Reference:
    """Read sequences with the original model and keep their hidden states in host memory.

    Raises: RequestError for ids that make no sense; MemoryBudgetError; NumericError.
    """
    model = engine.model
    needed = sum(map(len, sequences)) * model.config.hidden_size * model.dtype.itemsize
    free = device_memory(torch.device("cpu")).free_bytes
    if needed > free:
        raise MemoryBudgetError(
            f"hidden states of {sum(map(len, sequences)):,} tokens need {needed / 2**30:.1f} GiB, "
            f"{free / 2**30:.1f} GiB are free",
            "evaluate a shorter text",
        )
    hidden = []
    for sequence in sequences:
        kept = torch.empty(len(sequence), model.config.hidden_size, dtype=model.dtype)
        start = 0
        for rows in _hidden_rows(engine, sequence):
            kept[start : start + rows.shape[0]] = rows
            start += rows.shape[0]
            on_tokens(rows.shape[0])
        hidden.append(kept)
    return Reference(model, sequences, hidden)


def compare(reference: Reference, engine: Engine, on_tokens: OnTokens = lambda num_tokens: None) -> Divergence:
    """Read the same sequences with another model and compare.

    Raises: RequestError if the vocabularies differ in size, or no sequence has two tokens; NumericError.
    """
    tally = _Tally()
    for number, sequence in enumerate(reference.sequences):
        start, last = 0, len(sequence) - 1
        for rows in _hidden_rows(engine, sequence):
            for first in range(start, min(start + rows.shape[0], last), _LOGIT_ROWS):
                end = min(first + _LOGIT_ROWS, start + rows.shape[0], last)
                original = reference.log_probabilities(number, first, end)
                quantized = _log_softmax(engine.model, rows[first - start : end - start], "quantized")
                tally.add(original, quantized.to(original.device), sequence[first + 1 : end + 1])
            start += rows.shape[0]
            on_tokens(rows.shape[0])
    return tally.result(len(reference.sequences))


class _Tally:
    """Adds up what every predicted token contributes; sums are float64."""

    def __init__(self) -> None:
        self._nll_original = self._nll_quantized = 0.0
        self._num_agreed = 0
        self._divergences: list[Tensor] = []

    def add(self, original: Tensor, quantized: Tensor, following: Sequence[int]) -> None:
        """Shapes: log-probabilities [R, vocab] fp32 each, the ids that did follow [R]."""
        if original.shape != quantized.shape:
            raise RequestError(
                f"vocabularies of {original.shape[1]:,} and {quantized.shape[1]:,} tokens cannot be compared",
                "give a model and a quantized copy of it",
            )
        with torch.inference_mode():
            places = torch.tensor(following, device=original.device)[:, None]
            self._nll_original -= float(original.gather(1, places).sum(dtype=torch.float64))
            self._nll_quantized -= float(quantized.gather(1, places).sum(dtype=torch.float64))
            self._num_agreed += int((original.argmax(-1) == quantized.argmax(-1)).sum())
            divergence = (original.exp() * (original - quantized)).sum(-1, dtype=torch.float64)
            self._divergences.append(divergence.cpu())

    def result(self, num_sequences: int) -> Divergence:
        if not self._divergences:
            raise RequestError("there is no token to predict", "evaluate a longer text")
        divergences = torch.cat(self._divergences)
        num_tokens = divergences.numel()
        return Divergence(
            num_sequences=num_sequences,
            num_tokens=num_tokens,
            perplexity_original=math.exp(self._nll_original / num_tokens),
            perplexity_quantized=math.exp(self._nll_quantized / num_tokens),
            kl_mean_nats=float(divergences.mean()),
            kl_p99_nats=float(divergences.sort().values[math.ceil(0.99 * num_tokens) - 1]),
            top1_agreement=self._num_agreed / num_tokens,
        )


def _hidden_rows(engine: Engine, sequence: Sequence[int]) -> Iterator[Tensor]:
    """The last hidden states of a sequence, chunk by chunk. Shapes: [C, hidden] each, on the model's device."""
    tokens = as_ids(sequence, engine.model.config.vocab_size, engine.device)
    state = engine.new_state(tokens.numel())
    chunks = read_chunks(engine.forward, tokens, state, engine.config.chunk_size)
    while state.num_tokens < tokens.numel():
        with torch.inference_mode():  # not around a yield: the caller's own work must not fall under it
            rows = next(chunks)[0]
        yield rows


def _log_softmax(model: SalaModel, hidden: Tensor, name: str) -> Tensor:
    with torch.inference_mode():
        logits = model.logits(hidden)
        check_finite(logits, f"logits of the {name} model")
        return logits.float().log_softmax(-1)
