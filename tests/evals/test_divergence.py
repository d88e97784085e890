"""Divergence of two models against its definition in float64, and what must hold whatever the models are."""

import math
from collections.abc import Iterator
from types import SimpleNamespace

import checkpoint_cases
import numpy as np
import pytest
import torch

from salalocal.engine.engine import Engine, EngineConfig
from salalocal.errors import MemoryBudgetError, NumericError, RequestError
from salalocal.evals import divergence as module
from salalocal.evals.divergence import Divergence, compare, read_reference
from salalocal.model.sala import SalaModel

VOCAB = 96


def engine(seed: int, chunk_size: int = 37, vocab_size: int = VOCAB) -> Engine:
    """A small random model, sparse from 64 tokens on."""
    config = checkpoint_cases.small_config(vocab_size=vocab_size)
    model = SalaModel(config, dtype=torch.float32)
    model.load_state_dict(checkpoint_cases.random_tensors(config, seed))
    return Engine(model, EngineConfig(chunk_size))


def sequences(seed: int, *lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB, (length,), generator=generator).tolist() for length in lengths]


def definition(original: Engine, quantized: Engine, texts: list[list[int]]) -> Divergence:
    """The formulas at the top of the module, token by token in float64, from logits of whole texts."""
    losses, other_losses, divergences, agreed = [], [], [], []
    for text in texts:
        first, second = (log_softmax(side.logits(text).double().numpy()) for side in (original, quantized))
        for place in range(len(text) - 1):
            p, q = first[place], second[place]
            losses.append(-p[text[place + 1]])
            other_losses.append(-q[text[place + 1]])
            divergences.append(float((np.exp(p) * (p - q)).sum()))
            agreed.append(p.argmax() == q.argmax())
    rank = math.ceil(0.99 * len(divergences)) - 1
    return Divergence(
        num_sequences=len(texts),
        num_tokens=len(losses),
        perplexity_original=float(np.exp(np.mean(losses))),
        perplexity_quantized=float(np.exp(np.mean(other_losses))),
        kl_mean_nats=float(np.mean(divergences)),
        kl_p99_nats=sorted(divergences)[rank],
        top1_agreement=float(np.mean(agreed)),
    )


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def test_figures_are_those_of_the_definition(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOGIT_ROWS", 16)
    original, quantized = engine(seed), engine(seed + 1, chunk_size=50)
    texts = sequences(seed, 150, 1, 37, 38, 2)
    found = compare(read_reference(original, texts), quantized)
    expected = definition(original, quantized, texts)
    assert (found.num_sequences, found.num_tokens) == (5, 149 + 36 + 37 + 1)
    assert (expected.num_sequences, expected.num_tokens) == (found.num_sequences, found.num_tokens)
    assert found.top1_agreement == expected.top1_agreement
    for name in ("perplexity_original", "perplexity_quantized", "kl_mean_nats", "kl_p99_nats"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=2e-5), name
    assert found.kl_p99_nats > found.kl_mean_nats > 0


def test_a_model_does_not_diverge_from_itself(seed: int) -> None:
    texts = sequences(seed, 90, 20)
    found = compare(read_reference(engine(seed), texts), engine(seed))
    assert found.kl_mean_nats == found.kl_p99_nats == 0 and found.top1_agreement == 1
    assert found.perplexity_original == found.perplexity_quantized


def test_one_reference_serves_several_comparisons(seed: int) -> None:
    texts = sequences(seed, 80)
    reference = read_reference(engine(seed), texts)
    first = compare(reference, engine(seed + 1))
    compare(reference, engine(seed + 2))
    assert compare(reference, engine(seed + 1)) == first


def test_progress_adds_up_and_few_logits_are_held(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    logits = SalaModel.logits
    monkeypatch.setattr(
        SalaModel, "logits", lambda self, hidden: (rows.append(hidden.shape[0]), logits(self, hidden))[1]
    )
    texts = sequences(seed, 700, 30)
    read: list[int] = []
    reference = read_reference(engine(seed, chunk_size=512), texts, read.append)
    assert sum(read) == 730 and rows == []
    compare(reference, engine(seed, chunk_size=512), read.append)
    assert sum(read) == 2 * 730 and max(read) <= 512
    assert max(rows) <= 256 and sum(rows) == 2 * (699 + 29)


def test_an_interrupt_passes_through(seed: int) -> None:
    def stop(num_tokens: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read_reference(engine(seed), sequences(seed, 80), stop)


def spoiled(side: Engine) -> Engine:
    with torch.no_grad():
        next(p for name, p in side.model.named_parameters() if name == "lm_head.weight")[3, 5] = float("nan")
    return side


def refusals(seed: int) -> Iterator[tuple[type[Exception], str, Engine, Engine]]:
    yield RequestError, "vocabularies of 96 and 94", engine(seed), engine(seed, vocab_size=94)
    yield NumericError, "original", spoiled(engine(seed)), engine(seed)
    yield NumericError, "quantized", engine(seed), spoiled(engine(seed))


def test_what_cannot_be_compared_is_refused(seed: int) -> None:
    texts = [[token % 94 for token in text] for text in sequences(seed, 40)]
    for error, said, original, quantized in refusals(seed):
        with pytest.raises(error, match=said):
            compare(read_reference(original, texts), quantized)
    with pytest.raises(RequestError, match="no token to predict"):
        compare(read_reference(engine(seed), [[3], [4]]), engine(seed))
    with pytest.raises(RequestError, match="outside the vocabulary"):
        read_reference(engine(seed), [[3, VOCAB]])


def test_hidden_states_that_do_not_fit_are_refused_before_reading(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "device_memory", lambda device: SimpleNamespace(free_bytes=80 * 48 * 4 - 1))
    with pytest.raises(MemoryBudgetError, match="80 tokens"):
        read_reference(engine(seed), sequences(seed, 50, 30))
