"""Answers of the fused model against its own chunks and against the module tree, on a CPU, without graphs."""

import pytest
import torch

from fused_cases import CPU, packed_model, random_ids, relative_error
from salalocal.engine.fused.decoder import Decoder
from salalocal.engine.fused.model import FusedModel
from salalocal.engine.sampling import Sampler
from salalocal.engine.sampling_params import SamplingParams
from salalocal.errors import NumericError
from salalocal.model.state import ModelState

GREEDY = SamplingParams(max_tokens=8, temperature=0)


@pytest.fixture(scope="module")
def model() -> FusedModel:
    return FusedModel(packed_model("bf16"))


def read(model: FusedModel, seed: int, count: int = 130) -> ModelState:
    state = model.model.new_state(1, count + 16)
    with torch.inference_mode():
        model(torch.tensor([random_ids(seed, count)]), state)
    return state


def test_a_state_is_what_it_would_be_had_its_tokens_been_read(seed: int, model: FusedModel) -> None:
    state = read(model, seed)
    again = state.fork()
    decoder, tokens = Decoder(model, state, Sampler(GREEDY), 8), [7]
    for _ in range(3):
        tokens.append(decoder.next_token(tokens[-1]))
    assert state.num_tokens == again.num_tokens + 3
    with torch.inference_mode():
        model(torch.tensor([tokens[:3]]), again)
    state.check_whole()  # settles
    for layer, expected in zip(state.layers, again.layers, strict=True):
        for name, tensor in layer.tensors().items():
            assert relative_error(tensor, expected.tensors()[name]) < 2e-2, name


def test_forks_made_in_the_middle_go_their_own_ways(seed: int, model: FusedModel) -> None:
    state = read(model, seed)
    alone, tokens = Decoder(model, state.fork(), Sampler(GREEDY), 8), [9]
    for _ in range(5):
        tokens.append(alone.next_token(tokens[-1]))
    decoder, forks = Decoder(model, state, Sampler(GREEDY), 8), []
    for step in range(5):
        assert decoder.next_token(tokens[step]) == tokens[step + 1]
        forks.append(state.fork())
    late = Decoder(model, forks[1], Sampler(GREEDY), 8)
    assert [late.next_token(token) for token in tokens[2:5]] == tokens[3:]


def test_drawn_tokens_are_those_of_the_sampler(seed: int, model: FusedModel) -> None:
    params = SamplingParams(max_tokens=8, temperature=0.9, top_p=0.95, top_k=50, seed=seed)
    state = read(model, seed)
    logits_state, sampler, tokens = state.fork(), Sampler(params), [5]
    decoder = Decoder(model, state, Sampler(params), 8)
    for _ in range(4):
        tokens.append(decoder.next_token(tokens[-1]))
    for token, drawn in zip(tokens[:-1], tokens[1:], strict=True):
        with torch.inference_mode():
            logits = model.model.logits(model(torch.tensor([[token]]), logits_state)[0, -1])
        assert sampler.sample(logits) == drawn


def test_numbers_that_are_none_end_the_answer(seed: int, model: FusedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    state = read(model, seed)
    monkeypatch.setattr(model.model, "logits", lambda hidden: torch.full((1, 8192), torch.nan))
    with pytest.raises(NumericError, match="NaN"):
        Decoder(model, state, Sampler(GREEDY), 8).next_token(3)


def test_room_is_made_anew_when_it_is_used_up(seed: int, model: FusedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    state = read(model, seed)
    long, tokens = Decoder(model, state.fork(), Sampler(GREEDY), 6), [4]
    for _ in range(6):
        tokens.append(long.next_token(tokens[-1]))
    monkeypatch.setattr("salalocal.engine.fused.decoder.ROOM_TOKENS", 2)
    short = Decoder(model, state, Sampler(GREEDY), 6)
    assert [short.next_token(token) for token in tokens[:6]] == tokens[1:]
    assert CPU == state.layers[0].tensors()["s"].device
