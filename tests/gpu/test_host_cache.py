"""Keys and values in host memory on a CUDA device: the bits of a run that has them on the card."""

import gc
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from salalocal.checkpoint.checkpoint import Checkpoint
from salalocal.checkpoint.hub import find_model
from salalocal.engine.engine import Engine, EngineConfig
from salalocal.engine.load import Placement, load_model
from salalocal.engine.sampling_params import SamplingParams
from salalocal.errors import BackendError
from salalocal.kernels.block_attention import host
from salalocal.kernels.block_gather import gather_blocks, gather_blocks_definition
from salalocal.kernels.host_memory import page_locked_empty, wait_for_card
from salalocal.model.mixers.sparse import SparseState
from salalocal.model.state import ModelState

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(300),
]
CUDA = torch.device("cuda")
CHUNK = 2048


@cache
def engine(is_on_host: bool, is_int8: bool, is_guessing: bool = False) -> Engine:
    model = load_model(Checkpoint.open(find_model("builtin")), CUDA, torch.bfloat16, Placement())
    made = Engine(model, EngineConfig(CHUNK, is_int8, is_guessing, is_on_host))
    assert made._fused is not None
    return made


def random_ids(seed: int, count: int) -> Tensor:
    return torch.randint(3, 8_000, (count,), generator=torch.Generator().manual_seed(seed))


def read(runner: Engine, ids: Tensor, capacity: int | None = None) -> tuple[ModelState, Tensor]:
    state = runner.new_state(len(ids) + 128 if capacity is None else capacity)
    logits = runner.prefill(ids, state)
    assert logits is not None
    return state, logits


def answer(runner: Engine, state: ModelState, logits: Tensor, ids: Tensor) -> list[int]:
    params = SamplingParams(max_tokens=24, temperature=0)
    return list(runner.generate(state, logits, params, guess_from=ids.tolist()))


def assert_same_bits(one: ModelState, other: ModelState) -> None:
    wait_for_card()
    assert one.num_tokens == other.num_tokens
    for left, right in zip(one.layers, other.layers, strict=True):
        for name, tensor in left.tensors().items():
            assert torch.equal(tensor.cpu(), right.tensors()[name].cpu()), name


@pytest.mark.parametrize("dim", [1, 128])
@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16])
def test_blocks_are_gathered_from_host_memory(seed: int, dtype: torch.dtype, dim: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = page_locked_empty((2, 1000, dim), dtype)
    rows.copy_(torch.randint(-127, 128, rows.shape, generator=generator).to(dtype))
    assert rows.is_pinned()
    blocks = torch.randint(-1, 16, (2, 40), generator=generator)
    expected = gather_blocks_definition(rows[:, :990].transpose(0, 1), blocks, 64)
    found = gather_blocks(rows[:, :990].transpose(0, 1), blocks.to(CUDA), 64)
    assert found.is_cuda and torch.equal(found.cpu(), expected)


def test_pageable_memory_is_refused() -> None:
    rows, blocks = torch.zeros(128, 2, 16, dtype=torch.int8), torch.zeros(2, 1, dtype=torch.int64, device=CUDA)
    with pytest.raises(BackendError, match="pageable memory"):
        gather_blocks(rows, blocks, 64)


@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("most_copies", [64, 150, 4096])
def test_answers_and_states_are_those_of_the_card(
    seed: int, is_int8: bool, most_copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below and above the switch, whole chunks and a last one of a few rows, whatever room there is for copies."""
    monkeypatch.setattr(host, "MOST_COPIES", most_copies)
    ids = random_ids(seed, 20_491)
    found = []
    for is_on_host in (True, False):
        runner = engine(is_on_host, is_int8)
        state, logits = read(runner, ids)
        for layer in state.layers:
            if isinstance(layer, SparseState):
                assert layer.key_values.keys.is_cuda is not is_on_host and layer.k1.is_cuda
        found.append((state, logits, answer(runner, state, logits, ids)))
    assert torch.equal(found[0][1], found[1][1]) and found[0][2] == found[1][2]
    assert_same_bits(found[0][0], found[1][0])


@pytest.mark.parametrize("is_int8", [False, True])
def test_guesses_change_nothing(seed: int, is_int8: bool) -> None:
    ids = random_ids(seed, 700).repeat(9)  # much to guess from
    answers = []
    for is_on_host, is_guessing in ((True, True), (True, False), (False, False)):
        runner = engine(is_on_host, is_int8, is_guessing)
        state, logits = read(runner, ids)
        answers.append(answer(runner, state, logits, ids))
    assert answers[1] == answers[2]  # one row a step reads the same keys in the same order
    assert len(answers[0]) == len(answers[1])


@pytest.mark.parametrize("is_int8", [False, True])
def test_caches_that_grow_and_forks(seed: int, is_int8: bool) -> None:
    """No room at first: buffers move while the card works on them."""
    ids, runner, usual = random_ids(seed, 9_000), engine(True, is_int8), engine(False, is_int8)
    state, logits = read(runner, ids, capacity=0)
    expected_state, expected = read(usual, ids)
    assert torch.equal(logits, expected)
    forks = [one.fork() for one in (state, expected_state)]
    more = random_ids(seed + 1, 3_000)
    for one, run in ((state, runner), (forks[0], runner), (expected_state, usual), (forks[1], usual)):
        run.prefill(more if one in (state, expected_state) else more.flip(0), one)
    assert_same_bits(state, expected_state)
    assert_same_bits(*forks)


@pytest.mark.parametrize("is_int8", [False, True])
def test_a_state_is_saved_and_restored_across_places(seed: int, tmp_path: Path, is_int8: bool) -> None:
    ids, path = random_ids(seed, 9_000), tmp_path / "state.safetensors"
    runners = [engine(is_on_host, is_int8) for is_on_host in (True, False)]
    expected_state, expected = read(runners[1], ids)
    half = 2 * CHUNK
    for writer in runners:
        state, _ = read(writer, ids[:half])
        state.save(path)
        for reader in runners:
            restored, _ = ModelState.load(path, reader.new_state())
            logits = reader.prefill(ids[half:], restored)
            assert logits is not None and torch.equal(logits, expected)
            assert_same_bits(restored, expected_state)


def test_the_card_holds_no_keys_and_values() -> None:
    sizes = []
    for is_on_host in (True, False):
        runner = engine(is_on_host, True)
        gc.collect()
        before = torch.cuda.memory_allocated()
        state = runner.new_state(200_000)
        sizes.append(torch.cuda.memory_allocated() - before)
        sparse = next(layer for layer in state.layers if isinstance(layer, SparseState))
        cached = sum(tensor.nbytes for tensor in sparse._cache.storage.values())
        num_sparse = sum(isinstance(layer, SparseState) for layer in state.layers)
        del state, sparse
    assert abs(sizes[1] - sizes[0] - num_sparse * cached) < 2**22
