"""Calibration runs the model as it is, whatever the number of threads; moments are those of the true inputs."""

import pytest
import torch
from checkpoint_cases import random_tensors, small_config
from torch import Tensor, nn

from salalocal.errors import RequestError
from salalocal.model.sala import SalaModel
from salalocal.quant import calibration
from salalocal.quant.calibration import INPUT_OF, BlockWeights, advance, cut_sequences, embed, input_moments
from salalocal.quant.workers import Workers

CONFIG = small_config()  # sparse from 64 tokens on


def sequences(seed: int) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = (150, 37, 90)
    return [tuple(torch.randint(CONFIG.vocab_size, (length,), generator=generator).tolist()) for length in lengths]


def block_weights(tensors: dict[str, Tensor], layer: int) -> BlockWeights:
    prefix = f"model.layers.{layer}."
    held = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return BlockWeights(CONFIG, layer, held)


def true_inputs(model: SalaModel, tokens: tuple[int, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    """The model's hidden states, and what every linear map of it reads."""
    inputs: dict[str, Tensor] = {}
    names = {module: name for name, module in model.named_modules() if name.endswith(("_proj", "_gate"))}

    def listen(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        inputs[names[module]] = arguments[0][0]

    hooks = [module.register_forward_pre_hook(listen) for module in names]
    with torch.inference_mode():
        hidden = model(torch.tensor([tokens]), model.new_state())
    for hook in hooks:
        hook.remove()
    return hidden, inputs


@pytest.mark.parametrize("num_threads", [1, 3])
def test_layer_by_layer_is_the_model(num_threads: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "_CHUNK_TOKENS", 48)
    tensors, texts = random_tensors(CONFIG, seed), sequences(seed)
    model = SalaModel(CONFIG, dtype=torch.float32)
    model.load_state_dict(tensors)
    expected = [true_inputs(model, text) for text in texts]
    hidden = embed(CONFIG, tensors["model.embed_tokens.weight"], texts)
    with Workers(num_threads) as workers:
        for layer in range(CONFIG.num_hidden_layers):
            weights = block_weights(tensors, layer)
            moments = input_moments(weights, hidden, workers)
            for module in [name.removesuffix(".weight") for name in weights.tensors]:
                if module not in INPUT_OF:
                    continue
                rows = torch.cat([inputs[f"model.layers.{layer}.{module}"] for _, inputs in expected]).double()
                wanted = rows.t() @ rows / len(rows)
                torch.testing.assert_close(moments[INPUT_OF[module]], wanted, rtol=1e-3, atol=1e-4 * wanted.max())
            hidden = advance(weights, hidden, workers)
    for found, (wanted, _) in zip(hidden, expected, strict=True):
        torch.testing.assert_close(model.model.norm(found), wanted, rtol=1e-3, atol=1e-3)


def test_any_number_of_threads_gives_the_same_bits(seed: int) -> None:
    tensors = random_tensors(CONFIG, seed)
    hidden = embed(CONFIG, tensors["model.embed_tokens.weight"], sequences(seed))
    found = []
    for num_threads in (1, 2, 4):
        with Workers(num_threads) as workers:
            moments = input_moments(block_weights(tensors, 0), hidden, workers)
            found.append((*moments.values(), *advance(block_weights(tensors, 0), hidden, workers)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_weights_and_hidden_states_are_left_as_they_are(seed: int) -> None:
    tensors = random_tensors(CONFIG, seed)
    hidden = embed(CONFIG, tensors["model.embed_tokens.weight"], sequences(seed))
    before = [part.clone() for part in hidden]
    with Workers(2) as workers:
        input_moments(block_weights(tensors, 1), hidden, workers)
        advance(block_weights(tensors, 1), hidden, workers)
    assert all(torch.equal(a, b) for a, b in zip(before, hidden, strict=True))
    assert all(not tensor.requires_grad for tensor in tensors.values())


def test_text_is_cut_and_a_rest_of_few_tokens_dropped() -> None:
    ids = list(range(100))
    assert cut_sequences(ids, 50) == [tuple(ids[:50]), tuple(ids[50:])]
    assert cut_sequences(ids, 80) == [tuple(ids[:80])]
    assert cut_sequences(ids, 1000) == [tuple(ids)]
    with pytest.raises(RequestError, match="9 tokens of calibration text"):
        cut_sequences(ids[:9], 50)


def test_ids_of_another_model_are_refused() -> None:
    for wrong in (-1, CONFIG.vocab_size):
        with pytest.raises(RequestError, match="does not have"):
            embed(CONFIG, torch.zeros(CONFIG.vocab_size, 4), [(1, wrong)])
