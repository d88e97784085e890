"""Laws 1, 5 and 6: it never matters how the tokens were cut, and later tokens never change anything earlier."""

import random

import numpy as np
import pytest
import small_models
import torch
from small_configs import CONFIGS

EXACT = 1e-10  # float64
ROUNDED = 2e-5  # float32; sums over a few hundred tokens in another order


def random_chunks(seed: int, length: int) -> list[int]:
    """Sizes from 1 to 90, in sum at least the length."""
    source = random.Random(seed)
    return [source.choice((1, 2, 3, source.randint(1, 90))) for _ in range(length)]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("chunk", [1, 7, 16, 64, 100, "random"])
def test_any_cut_gives_the_same_logits_and_state(name: str, chunk: int | str, seed: int) -> None:
    case = small_models.draw(name, seed)
    model = case.model()
    chunks = random_chunks(seed, len(case.tokens)) if chunk == "random" else [chunk]
    whole_state, cut_state = small_models.new_state(model), small_models.new_state(model)
    whole = small_models.feed(model, case.tokens, whole_state)
    cut = small_models.feed(model, case.tokens, cut_state, chunks)
    assert small_models.row_error(cut, whole) < EXACT
    assert cut_state.num_tokens == whole_state.num_tokens == len(case.tokens)
    for number, (one, other) in enumerate(zip(cut_state.layers, whole_state.layers, strict=True)):
        tensors = other.tensors()
        assert one.num_tokens == len(case.tokens) and one.tensors().keys() == tensors.keys()
        for key, tensor in one.tensors().items():
            assert torch.allclose(tensor, tensors[key], rtol=0, atol=EXACT), f"layer {number}, {key}"


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("chunk", [1, 64, "random"])
def test_any_cut_gives_the_same_logits_in_float32(name: str, chunk: int | str, seed: int) -> None:
    case = small_models.draw(name, seed)
    model = case.model(torch.float32)
    chunks = random_chunks(seed, len(case.tokens)) if chunk == "random" else [chunk]
    whole = small_models.read(model, case.tokens)
    assert small_models.row_error(small_models.read(model, case.tokens, chunks), whole) < ROUNDED


@pytest.mark.parametrize("rule", ["prompt", "always"])
@pytest.mark.parametrize("name", ["plain", "tied"])
def test_any_cut_gives_the_same_logits_under_the_parity_rules(name: str, rule: str, seed: int) -> None:
    case = small_models.draw(name, seed)
    model = case.model()
    for prompt_tokens in (case.dense_len - 1, case.dense_len):
        whole = small_models.read(model, case.tokens, (), rule, prompt_tokens)
        for chunks in ([7], random_chunks(seed, len(case.tokens))):
            cut = small_models.read(model, case.tokens, chunks, rule, prompt_tokens)
            assert small_models.row_error(cut, whole) < EXACT


@pytest.mark.parametrize("name", CONFIGS)
def test_later_tokens_change_nothing_earlier(name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prefix read by itself has the logits, choices, keys and compressed keys that it has inside a longer text."""
    case = small_models.draw(name, seed)
    model = case.model()
    lengths = [1, len(case.tokens) // 3, len(case.tokens) - case.geometry.block_size - 1]
    whole_state = small_models.new_state(model)
    with small_models.choices(model, monkeypatch) as whole_choices:
        whole = small_models.feed(model, case.tokens, whole_state)
    for length in lengths:
        state = small_models.new_state(model)
        with small_models.choices(model, monkeypatch) as found:
            prefix = small_models.feed(model, case.tokens[:length], state)
        assert small_models.row_error(prefix, whole[:length]) < EXACT
        assert found == {place: blocks for place, blocks in whole_choices.items() if place[1] < length}
        for mixer, short, long in zip(case.config["mixer_types"], state.layers, whole_state.layers, strict=True):
            if mixer != "minicpm4":
                continue
            for key, tensor in short.tensors().items():
                kept = long.tensors()[key][:, : tensor.shape[1]]
                assert torch.allclose(tensor, kept, rtol=0, atol=EXACT), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["plain", "tied", "wide"])
def test_appending_leaves_every_bit_of_old_keys(name: str, dtype: torch.dtype, seed: int) -> None:
    case = small_models.draw(name, seed)
    model = case.model(dtype)
    state = small_models.new_state(model)
    before: list[dict[str, torch.Tensor]] = [{} for _ in state.layers]
    for start in range(0, len(case.tokens), 13):
        small_models.feed(model, case.tokens[start : start + 13], state)
        for mixer, layer, old in zip(case.config["mixer_types"], state.layers, before, strict=True):
            if mixer == "minicpm4":
                now = {key: tensor.clone() for key, tensor in layer.tensors().items()}
                for key, tensor in old.items():
                    assert torch.equal(now[key][:, : tensor.shape[1]], tensor), f"{key} after {start} tokens"
                old.update(now)


@pytest.mark.parametrize("name", ["plain", "tied", "wide", "apart"])
def test_keys_and_states_are_those_of_the_oracle_at_every_length(name: str, seed: int) -> None:
    """k1_j exists from the token that completes its window on, not before; states hold the oracle's numbers."""
    case = small_models.draw(name, seed)
    model = case.model()
    state = small_models.new_state(model)
    geometry, wanted = case.geometry, case.expected()
    windows = {
        "k1": (geometry.kernel_size, geometry.kernel_stride),
        "k2": (4 * geometry.kernel_size, 4 * geometry.kernel_stride),
    }
    for n in range(1, len(case.tokens) + 1):
        small_models.feed(model, case.tokens[n - 1 : n], state)
        for layer, trace in zip(state.layers, wanted.layers, strict=True):
            if trace.kind != "sparse":
                continue
            tensors = layer.tensors()
            expected = {"k": trace.k[:n], "v": trace.v[:n], "k1": trace.k1, "k2": trace.k2}
            for key, (kernel, stride) in windows.items():
                expected[key] = expected[key][: max(0, (n - kernel) // stride + 1)]
            assert tensors.keys() == expected.keys()
            for key, tensor in tensors.items():
                assert tuple(tensor.shape) == (1, *expected[key].shape), f"{key} after {n} tokens"
    for layer, trace in zip(state.layers, wanted.layers, strict=True):
        tensors = {key: tensor[0].numpy() for key, tensor in layer.tensors().items()}
        if trace.kind == "lightning":
            assert np.allclose(tensors["s"], trace.state, rtol=0, atol=1e-9)
        else:
            for key, tensor in tensors.items():
                assert np.allclose(tensor, getattr(trace, key), rtol=0, atol=1e-9), key
