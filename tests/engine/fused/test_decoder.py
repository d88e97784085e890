"""Answers of the fused model against its own chunks and against the module tree, on a CPU, without graphs."""

import gc
import weakref

import pytest
import torch
from fused_cases import CPU, packed_model, random_ids, read_by_modules, relative_error

from salalocal.engine.fused import decoder as decoder_module
from salalocal.engine.fused.decoder import Decoder
from salalocal.engine.fused.model import FusedModel
from salalocal.engine.picks import PickLog, newest_picks
from salalocal.engine.sampling import Sampler
from salalocal.engine.sampling_params import SamplingParams
from salalocal.errors import NumericError, StateError
from salalocal.model.state import ModelState

GREEDY = SamplingParams(max_tokens=8, temperature=0)


@pytest.fixture(scope="module")
def model() -> FusedModel:
    return FusedModel(packed_model("bf16"))


def read(model: FusedModel, seed: int, count: int = 130) -> ModelState:
    return read_by_modules(model.model, random_ids(seed, count))


def drawn(decoder: Decoder, first: int, count: int) -> list[int]:
    """The first token and so many behind it."""
    tokens = [first]
    for _ in range(count):
        tokens.append(decoder.next_token(tokens[-1]))
    return tokens


def test_a_state_is_what_it_would_be_had_its_tokens_been_read(seed: int, model: FusedModel) -> None:
    state = read(model, seed)
    again = state.fork()
    tokens = drawn(Decoder(model, state, Sampler(GREEDY), 8), 7, 3)
    assert state.num_tokens == again.num_tokens + 3
    with torch.inference_mode():
        model(torch.tensor([tokens[:3]]), again)
    state.check_whole()  # settles
    for layer, expected in zip(state.layers, again.layers, strict=True):
        for name, tensor in layer.tensors().items():
            assert relative_error(tensor, expected.tensors()[name]) < 2e-2, name


def test_the_card_is_waited_for_before_what_steps_use_goes_back(
    seed: int, model: FusedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When an answer ends, and when it is dropped in the middle."""
    happened: list[str] = []
    monkeypatch.setattr(decoder_module, "wait_for_card", lambda: happened.append("wait"))
    state = read(model, seed)
    for is_settled in (True, False):
        fork = state.fork()
        decoder = Decoder(model, fork, Sampler(GREEDY), 8)
        decoder.next_token(7)
        assert decoder._run is not None
        weakref.finalize(decoder._run._steps, happened.append, "gone")  # as a graph and its memory go
        assert happened == []
        if is_settled:
            fork.settle()
        del decoder, fork
        gc.collect()
        assert happened == ["wait", "gone"]
        happened.clear()


def test_forks_made_in_the_middle_go_their_own_ways(seed: int, model: FusedModel) -> None:
    state = read(model, seed)
    alone = state.fork()
    tokens = drawn(Decoder(model, alone, Sampler(GREEDY), 8), 9, 5)
    decoder, forks = Decoder(model, state, Sampler(GREEDY), 8), []
    for step in range(5):
        assert decoder.next_token(tokens[step]) == tokens[step + 1]
        forks.append(state.fork())
    late = Decoder(model, forks[1], Sampler(GREEDY), 8)
    assert [late.next_token(token) for token in tokens[2:5]] == tokens[3:]


@pytest.mark.parametrize(("top_k", "top_p"), [(50, 0.95), (0, 1.0)])
def test_drawn_tokens_are_those_of_the_sampler(seed: int, model: FusedModel, top_k: int, top_p: float) -> None:
    params = SamplingParams(max_tokens=8, temperature=0.9, top_p=top_p, top_k=top_k, seed=seed)
    state, logits, sampler = read(model, seed), [], Sampler(params)
    with pytest.MonkeyPatch.context() as patch:
        compute = model.model.logits
        patch.setattr(model.model, "logits", lambda hidden: logits.append(compute(hidden)) or logits[-1])
        tokens = drawn(Decoder(model, state, Sampler(params), 8), 5, 4)
    assert tokens[1:] == [sampler.sample(row[0], 131 + place) for place, row in enumerate(logits[:4])]


@pytest.mark.parametrize("is_int8", [False, True])
def test_steps_that_choose_blocks_attend_as_the_modules_do(seed: int, model: FusedModel, is_int8: bool) -> None:
    ids, hidden = random_ids(seed, 500), []  # eight blocks, of which six are picked
    state = read_by_modules(model.model, ids, is_int8)
    expected_state = state.fork()
    with pytest.MonkeyPatch.context() as patch:
        compute = model.model.logits
        patch.setattr(model.model, "logits", lambda last: hidden.append(last) or compute(last))
        tokens = drawn(Decoder(model, state, Sampler(GREEDY), 8), 6, 6)
    with torch.inference_mode():
        expected = model.model(torch.tensor([tokens[:6]]), expected_state)[0]
    errors = [relative_error(row, wanted) for row, wanted in zip(torch.cat(hidden)[:6], expected, strict=True)]
    # Two blocks with nearly the same score may change places, in one row or another.
    assert sorted(errors)[2] < 3e-2


def test_numbers_that_are_none_end_the_answer(seed: int, model: FusedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    state = read(model, seed)
    monkeypatch.setattr(model.model, "logits", lambda hidden: torch.full((1, 8192), torch.nan))
    with pytest.raises(NumericError, match="NaN"):
        Decoder(model, state, Sampler(GREEDY), 8).next_token(3)


def test_room_is_made_anew_when_it_is_used_up(seed: int, model: FusedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    state = read(model, seed)
    other = state.fork()
    tokens = drawn(Decoder(model, other, Sampler(GREEDY), 6), 4, 6)
    monkeypatch.setattr("salalocal.engine.fused.decoder.ROOM_TOKENS", 2)
    short = Decoder(model, state, Sampler(GREEDY), 6)
    assert [short.next_token(token) for token in tokens[:6]] == tokens[1:]
    assert state.layers[0].tensors()["s"].device == CPU


def test_picks_are_recorded_and_neither_forks_nor_new_room_change_an_answer(
    seed: int, model: FusedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = SamplingParams(max_tokens=8, temperature=0.9, seed=seed)
    state = read(model, seed, 500)  # eight blocks, of which six are picked
    other, by_modules, log = state.fork(), state.fork(), PickLog()
    plain = Decoder(model, other, Sampler(params), 8)
    assert len(plain.picks()) == 0
    tokens = drawn(plain, 7, 4)
    monkeypatch.setattr("salalocal.engine.fused.decoder.ROOM_TOKENS", 3)
    decoder, forks = Decoder(model, state, Sampler(params), 8), []
    for step in range(4):
        assert decoder.next_token(tokens[step]) == tokens[step + 1]
        if step == 1:
            forks.append(state.fork())
    found, expected = decoder.picks(), plain.picks()
    assert found.positions.tolist() == list(range(500, 504)) and torch.equal(found.positions, expected.positions)
    assert torch.equal(found.blocks, expected.blocks) and torch.equal(found.weights, expected.weights)
    late = Decoder(model, forks[0], Sampler(params), 8)
    assert late.next_token(tokens[2]) == tokens[3], "the number drawn belongs to the position"
    state.settle()
    assert newest_picks(state) is None
    with torch.inference_mode():
        for token in tokens[:4]:
            model.model(torch.tensor([[token]]), by_modules)
            log.take(by_modules)
    named = log.picks(by_modules, model.model.config)
    # Two blocks with nearly the same score may change places.
    is_same = named.blocks == found.blocks
    assert torch.equal(named.positions, found.positions) and is_same.double().mean() > 0.8
    torch.testing.assert_close(named.weights[is_same], found.weights[is_same], rtol=0, atol=0.2)


def test_a_state_interrupted_in_a_step_is_refused(
    seed: int, model: FusedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = read(model, seed)
    decoder = Decoder(model, state, Sampler(GREEDY), 8)
    decoder.next_token(3)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("salalocal.engine.fused.decoder._Landing.wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        decoder.next_token(4)
    for _ in range(2):
        with pytest.raises(StateError, match="interrupted"):
            state.fork()
