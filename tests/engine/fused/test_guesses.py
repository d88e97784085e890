"""Answers with guesses: the tokens are those of an answer without, and the state what it would be."""

from collections.abc import Sequence

import pytest
from fused_cases import packed_model, random_ids, read_by_modules, relative_error

from salalocal.engine.fused.decoder import Decoder
from salalocal.engine.fused.model import FusedModel
from salalocal.engine.prompt_lookup import PromptLookup
from salalocal.engine.sampling import Sampler
from salalocal.engine.sampling_params import SamplingParams


class Oracle(PromptLookup):
    """Guesses from a text that is known: some right, then a wrong one."""

    def __init__(self, answer: Sequence[int], num_right: int) -> None:
        super().__init__([])
        self._answer_ids, self._num_right, self._place = list(answer), num_right, 0

    def push(self, token: int) -> None:
        self._place += 1

    def guess(self, count: int) -> list[int]:
        right = self._answer_ids[self._place : self._place + self._num_right]
        return [*right, 1][:count]


@pytest.mark.parametrize(("num_right", "temperature"), [(0, 0.8), (2, 0.0), (2, 0.8)])
def test_tokens_are_those_without_guesses(seed: int, num_right: int, temperature: float) -> None:
    model = FusedModel(packed_model("bf16"))
    state = read_by_modules(model.model, random_ids(seed, 140))
    guessing, params = state.fork(), SamplingParams(max_tokens=8, temperature=temperature, seed=seed)
    plain, tokens = Decoder(model, state, Sampler(params), 8), [7]
    for _ in range(5):
        tokens.append(plain.next_token(tokens[-1]))
    decoder = Decoder(model, guessing, Sampler(params), 8, Oracle(tokens, num_right))
    assert [decoder.next_token(token) for token in tokens[:5]] == tokens[1:]
    assert decoder.stats.num_right >= (0 if num_right == 0 else 2)
    assert guessing.num_tokens == state.num_tokens
    assert len(decoder.picks()) == 0, "every block is read so early"
    state.settle()
    guessing.settle()
    for layer, expected in zip(guessing.layers, state.layers, strict=True):
        for name, tensor in layer.tensors().items():
            assert tensor.numel() == 0 or relative_error(tensor, expected.tensors()[name]) < 2e-2, name


def test_a_guess_that_was_wrong_leaves_no_picks(seed: int) -> None:
    model = FusedModel(packed_model("bf16"))
    state = read_by_modules(model.model, random_ids(seed, 500))  # eight blocks, of which six are picked
    guessing, params = state.fork(), SamplingParams(max_tokens=8)
    plain, tokens = Decoder(model, state, Sampler(params), 8), [7]
    for _ in range(4):
        tokens.append(plain.next_token(tokens[-1]))
    decoder = Decoder(model, guessing, Sampler(params), 8, Oracle(tokens, 1))
    assert [decoder.next_token(token) for token in tokens[:4]] == tokens[1:]
    found, expected = decoder.picks(), plain.picks()
    assert found.positions.tolist() == expected.positions.tolist() == list(range(500, 504))
    # Two blocks with nearly the same score may change places: rows of one step share their sums.
    assert (found.blocks == expected.blocks).double().mean() > 0.8
