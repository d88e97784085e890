"""The baseline: attention in two parts equals attention in one, chunks do not change what is computed, and memory that
is not there is refused by name."""

import itertools
import math

import pytest
import torch

from salalocal.bench import dense
from salalocal.bench.dense import _BACKENDS, DenseModel, DenseSubject, attend, choose_backend
from salalocal.bench.work import DenseShape
from salalocal.device import DeviceMemory
from salalocal.errors import BackendError, MemoryBudgetError

CPU = torch.device("cpu")
SHAPE = DenseShape(
    vocab_size=61, hidden_size=48, intermediate_size=80, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16
)
BACKEND = _BACKENDS["cpu"]["flash for CPUs"]


def heads(generator: torch.Generator, num_heads: int, num_rows: int) -> torch.Tensor:
    return torch.randn(1, num_heads, num_rows, 16, generator=generator)


@pytest.mark.parametrize(("num_rows", "num_keys"), [(1, 1), (1, 77), (13, 13), (64, 65), (32, 160)])
def test_attention_in_two_parts(seed: int, num_rows: int, num_keys: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, keys, values = heads(generator, 4, num_rows), heads(generator, 2, num_keys), heads(generator, 2, num_keys)
    found = attend(BACKEND, q, keys, values)
    for head in range(4):
        for row in range(num_rows):
            seen = num_keys - num_rows + row + 1
            scores = keys[0, head // 2, :seen].double() @ q[0, head, row].double() / math.sqrt(16)
            expected = scores.softmax(0) @ values[0, head // 2, :seen].double()
            assert torch.allclose(found[0, head, row].double(), expected, atol=1e-5)


def model(seed: int) -> DenseModel:
    torch.manual_seed(seed)
    with torch.inference_mode():
        built = DenseModel(SHAPE, CPU, torch.float32, BACKEND)
        for layer in built._layers:
            for weight in (layer.qkv, layer.out, layer.gate_up, layer.down):
                weight.mul_(10)  # else every layer is nearly nothing beside the residual stream
    return built


def test_chunks_and_single_tokens_fill_the_cache_alike(seed: int) -> None:
    built = model(seed)
    ids = torch.randint(0, SHAPE.vocab_size, (24,))
    caches, tokens = [], []
    for cuts in ([0, 24], [0, 8, 19, 24], list(range(25))):
        with torch.inference_mode():
            built.make_room(48)
            for start, end in itertools.pairwise(cuts):
                token = built.read(ids[start:end], torch.arange(start, end), end)
        tokens.append(int(token))
        caches.append([torch.cat([layer.keys[:, :, :24], layer.values[:, :, :24]]) for layer in built._layers])
    assert len(set(tokens)) == 1
    for other in caches[1:]:
        assert all(torch.allclose(a, b, atol=1e-4, rtol=1e-4) for a, b in zip(caches[0], other, strict=True))
    assert float(caches[0][2].std()) > 0


def subject() -> DenseSubject:
    return DenseSubject(SHAPE, "a test", CPU, torch.float32, 16)


def test_drawing_does_not_change_what_is_read_next(seed: int) -> None:
    """Drawn tokens stand in rows of the cache that the next read writes over."""
    caches = []
    for is_drawing in (True, False):
        torch.manual_seed(seed)
        measured = subject()
        torch.manual_seed(seed + 1)
        measured.begin(80)
        measured.read(20, lambda tokens: None)
        if is_drawing:
            drawn = measured.draw(3, 2, False)
            assert len(drawn.runs_s) == 2
        measured.read(21, lambda tokens: None)
        assert measured._num_tokens == 41
        caches.append(measured._model._layers[2].keys[:, :, :41].clone())
    assert torch.allclose(caches[0], caches[1], atol=1e-5)


def test_it_says_what_it_is_and_how_far_it_is() -> None:
    measured, told = subject(), []
    measured.begin(60)
    measured.warm_up([10, 50])
    held = measured._model._layers[0].keys
    measured.begin(60)
    assert measured._model._layers[0].keys is held
    measured.read(40, told.append)
    assert told == [16, 32, 40]
    facts = measured.facts
    assert facts.num_parameters == SHAPE.num_parameters and facts.chunk_size == 16
    assert "flash for CPUs" in facts.notes[0] and "random fp32 weights" in facts.description


def test_a_cache_that_does_not_fit_is_refused_before_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = subject()
    monkeypatch.setattr(dense, "device_memory", lambda device: DeviceMemory(2**20, 2**20))
    with pytest.raises(MemoryBudgetError, match=r"cache of 1,000,000 tokens needs 0\.7 GiB"):
        measured.begin(1_000_000)
    with pytest.raises(MemoryBudgetError, match="its weights need"):
        monkeypatch.setattr(dense, "device_memory", lambda device: DeviceMemory(2**10, 2**10))
        subject()


def test_a_backend_that_fails_or_lies_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> tuple[torch.Tensor, torch.Tensor]:
        raise RuntimeError("no kernel for this card\nmore of it")

    def wrong(q: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros_like(q), torch.zeros(q.shape[:3])

    monkeypatch.setitem(dense._BACKENDS, "cpu", {"broken": broken, "wrong": wrong, "right": BACKEND})
    name, trials = choose_backend(SHAPE, CPU, torch.float32, 32)
    assert name == "right"
    assert [trial.reason for trial in trials] == ["no kernel for this card", "its results are wrong", ""]
    monkeypatch.setitem(dense._BACKENDS, "cpu", {"broken": broken})
    with pytest.raises(BackendError, match="no kernel for this card"):
        choose_backend(SHAPE, CPU, torch.float32, 32)
