"""Law 10: a fork leaves its original untouched, and a saved state goes on as if it had never left."""

from pathlib import Path

import numpy as np
import pytest
import small_models
import torch
from small_configs import CONFIGS

from salalocal.errors import StateError
from salalocal.model.sala import SalaModel
from salalocal.model.state import ModelState

DTYPES = [torch.float32, torch.bfloat16]


def contents(state: ModelState) -> list[dict[str, torch.Tensor]]:
    """A copy of every tensor of the state."""
    return [{key: tensor.clone() for key, tensor in layer.tensors().items()} for layer in state.layers]


def same_bits(one: list[dict[str, torch.Tensor]], other: list[dict[str, torch.Tensor]]) -> bool:
    """Whether two copies are equal, bit by bit."""
    return all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in zip(one, other, strict=True)
    )


def fed(model: SalaModel, tokens: tuple[int, ...], *chunks: int) -> ModelState:
    """A new state that has read the tokens."""
    state = small_models.new_state(model)
    small_models.feed(model, tokens, state, chunks)
    return state


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("fork_first", [False, True])
def test_a_fork_and_its_original_never_meet(name: str, fork_first: bool, seed: int) -> None:
    case = small_models.draw(name, seed)
    model = case.model(torch.float32)
    cut = len(case.tokens) - 40
    past, left, right = case.tokens[:cut], case.tokens[cut:], case.tokens[:40]
    original = fed(model, past)
    before = contents(original)
    fork = original.fork()
    order = [(fork, right), (original, left)] if fork_first else [(original, left), (fork, right)]
    logits = {}
    for state, tokens in order:
        if state is original:
            assert same_bits(contents(original), before), "the fork's tokens reached its original"
        logits[id(state)] = small_models.feed(model, tokens, state, [1, 20, 1])
    for state, tokens in order:
        twin = fed(model, past)
        assert np.array_equal(logits[id(state)], small_models.feed(model, tokens, twin, [1, 20, 1]))
        assert same_bits(contents(state), contents(twin))
        assert state.num_tokens == twin.num_tokens == len(case.tokens)


def test_forks_of_forks_with_their_originals_gone(seed: int) -> None:
    case = small_models.draw("plain", seed)
    model = case.model(torch.float32)
    branches: dict[tuple[int, ...], ModelState] = {(): small_models.new_state(model)}
    for start in range(0, 120, 24):
        piece = case.tokens[start : start + 24]
        grown = {}
        for past, state in branches.items():
            for variant in (piece, piece[::-1]):
                fork = state.fork()
                small_models.feed(model, variant, fork)
                grown[past + variant] = fork
        kept = sorted(grown)[:: max(1, len(grown) // 4)]
        branches = {past: grown[past] for past in kept}
    for past, state in branches.items():
        twin = small_models.new_state(model)
        small_models.feed(model, past, twin, [24])
        assert same_bits(contents(state), contents(twin))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_saved_state_goes_on_bit_by_bit(name: str, dtype: torch.dtype, seed: int, tmp_path: Path) -> None:
    case = small_models.draw(name, seed)
    model = case.model(dtype)
    cut = len(case.tokens) - 30
    state = fed(model, case.tokens[:cut], 50)
    state.save(tmp_path / "state.safetensors", {"documents": "two"})
    loaded, metadata = ModelState.load(tmp_path / "state.safetensors", small_models.new_state(model))
    assert metadata == {"documents": "two"}
    assert loaded.num_tokens == cut and loaded.sparse_from == state.sparse_from
    assert same_bits(contents(loaded), contents(state))
    rest = case.tokens[cut:]
    chunks = [1, 1, 17, 1]
    wanted = small_models.feed(model, rest, state, chunks)
    assert np.array_equal(small_models.feed(model, rest, loaded, chunks), wanted)
    again, _ = ModelState.load(tmp_path / "state.safetensors", small_models.new_state(model))
    assert np.array_equal(small_models.feed(model, rest, again, chunks), wanted), "the file must not have changed"


def test_a_state_of_another_model_or_rule_is_refused(seed: int, tmp_path: Path) -> None:
    case, other = small_models.draw("plain", seed), small_models.draw("always", seed)
    state = fed(case.model(torch.float32), case.tokens[:20])
    with pytest.raises(StateError):
        small_models.feed(other.model(torch.float32), [1], state)
    state.save(tmp_path / "state")
    with pytest.raises(StateError):
        ModelState.load(tmp_path / "state", small_models.new_state(other.model(torch.float32)))
    with pytest.raises(StateError):
        ModelState.load(tmp_path / "state", small_models.new_state(case.model(torch.float32), "always"))
    with pytest.raises(StateError):
        ModelState.load(tmp_path / "state", small_models.new_state(case.model(torch.bfloat16)))
