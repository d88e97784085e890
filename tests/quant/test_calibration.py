"""Calibration runs the model as it is, whatever the number of threads; moments are those of the true inputs."""

from typing import Any

import pytest
import torch
from checkpoint_cases import random_tensors, small_config
from torch import Tensor, nn

from salalocal.errors import RequestError
from salalocal.model.sala import SalaModel
from salalocal.quant import calibration
from salalocal.quant.calibration import STAGES, BlockReader, Streams, embed, input_of
from salalocal.quant.workers import Workers

CONFIG = small_config()  # sparse from 64 tokens on


def sequences(seed: int) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = (150, 37, 90)
    return [tuple(torch.randint(CONFIG.vocab_size, (length,), generator=generator).tolist()) for length in lengths]


def in_layer(tensors: dict[str, Tensor], layer: int) -> dict[str, Tensor]:
    prefix = f"model.layers.{layer}."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def embedded(tensors: dict[str, Tensor], seed: int) -> list[Tensor]:
    return embed(CONFIG, tensors["model.embed_tokens.weight"], sequences(seed))


def other_weights(tensors: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Linear maps a little off, as quantized ones are."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor + 0.05 * tensor.std() * torch.randn(tensor.shape, generator=generator)
        if "layers" in name and tensor.ndim == 2
        else tensor
        for name, tensor in tensors.items()
    }


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


@pytest.mark.parametrize("has_original", [False, True])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_stage_by_stage_is_the_model(
    num_threads: int, has_original: bool, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "_CHUNK_TOKENS", 48)
    tensors, texts = random_tensors(CONFIG, seed), sequences(seed)
    replaced = other_weights(tensors, seed)
    models = []
    for weights in (replaced, tensors):
        model = SalaModel(CONFIG, dtype=torch.float32)
        model.load_state_dict(weights)
        models.append(model)
    expected = [[true_inputs(model, text) for text in texts] for model in models]
    hidden = embedded(tensors, seed)
    streams = Streams(hidden, list(hidden) if has_original else None)
    with Workers(num_threads) as workers:
        for layer in range(CONFIG.num_hidden_layers):
            reader = BlockReader(CONFIG, layer, in_layer(tensors, layer), streams, workers)
            for stage in STAGES:
                name = f"model.layers.{layer}.{stage}"
                x, o = (torch.cat([inputs[name] for _, inputs in rows]).double() for rows in expected)
                found = reader.measure(stage)
                trusted = len(x) / (len(x) + 8 * x.shape[1])
                wanted = [x.t() @ x / len(x), (x + trusted * (o - x)).t() @ x / len(x)][: len(found)]
                assert len(found) == (2 if has_original else 1)
                for products, true in zip(found, wanted, strict=True):
                    torch.testing.assert_close(products, true, rtol=2e-3, atol=2e-4 * float(true.abs().max()))
                for inner, weight in in_layer(replaced, layer).items():
                    if input_of(inner) == stage:
                        reader.replace(inner, weight)
                reader.advance(stage)
    for model, rows, stream in zip(models, expected, (streams.quantized, streams.original), strict=True):
        for found_hidden, (wanted_hidden, _) in zip(stream or [], rows, strict=stream is not None):
            torch.testing.assert_close(model.model.norm(found_hidden), wanted_hidden, rtol=2e-3, atol=2e-3)


def test_maps_of_one_stage_read_the_same(seed: int) -> None:
    tensors = random_tensors(CONFIG, seed)
    model = SalaModel(CONFIG, dtype=torch.float32)
    model.load_state_dict(tensors)
    _, inputs = true_inputs(model, sequences(seed)[0])
    for name, rows in inputs.items():
        layer = name.rsplit(".", 2)[0]
        assert torch.equal(rows, inputs[f"{layer}.{input_of(name)}"])
    assert input_of("lm_head.weight") == "lm_head"


def test_any_number_of_threads_gives_the_same_bits(seed: int) -> None:
    tensors = random_tensors(CONFIG, seed)
    found = []
    for num_threads in (1, 2, 4):
        hidden = embedded(tensors, seed)
        streams = Streams(hidden, list(hidden))
        products = []
        with Workers(num_threads) as workers:
            reader = BlockReader(CONFIG, 0, in_layer(tensors, 0), streams, workers)
            for stage in STAGES:
                products += reader.measure(stage)
                reader.advance(stage)
        found.append([*products, *streams.tensors])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("lane_bytes", [1, 10**6])
def test_few_moments_are_held_at_a_time(lane_bytes: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "_LANE_BYTES", lane_bytes)
    tensors = random_tensors(CONFIG, seed)
    streams = Streams(embedded(tensors, seed) * 4, None)
    made = 0
    zeros = torch.zeros

    def count(*sizes: int, **options: Any) -> Tensor:
        nonlocal made
        made += options.get("dtype") == torch.float64
        return zeros(*sizes, **options)

    with Workers(3) as workers:
        reader = BlockReader(CONFIG, 0, in_layer(tensors, 0), streams, workers)
        monkeypatch.setattr(torch, "zeros", count)
        reader.measure(STAGES[0])
    assert made == (1 if lane_bytes == 1 else 8)


def test_given_tensors_are_left_as_they_are(seed: int) -> None:
    tensors = random_tensors(CONFIG, seed)
    hidden = embedded(tensors, seed)
    before = [part.clone() for part in hidden]
    streams = Streams(hidden, list(hidden))
    with Workers(2) as workers:
        reader = BlockReader(CONFIG, 1, in_layer(tensors, 1), streams, workers)
        for stage in STAGES:
            reader.measure(stage)
            assert all(torch.equal(a, b) for a, b in zip(hidden, streams.quantized, strict=True))
            reader.advance(stage)
            hidden = list(streams.quantized)
    assert all(not torch.equal(a, b) for a, b in zip(before, streams.quantized, strict=True))
    first = embedded(tensors, seed)
    assert all(torch.equal(a, b) for a, b in zip(before, first, strict=True))
    assert all(not tensor.requires_grad for tensor in tensors.values())


def test_streams_are_kept_and_come_back(seed: int) -> None:
    hidden = embedded(random_tensors(CONFIG, seed), seed)
    for streams in (Streams(hidden, None), Streams(hidden, [2 * part for part in hidden])):
        again = Streams.of(streams.tensors, streams.original is not None)
        assert all(a is b for a, b in zip(again.tensors, streams.tensors, strict=True))
        assert (again.original is None) == (streams.original is None)


def test_ids_of_another_model_are_refused() -> None:
    for wrong in (-1, CONFIG.vocab_size):
        with pytest.raises(RequestError, match="does not have"):
            embed(CONFIG, torch.zeros(CONFIG.vocab_size, 4), [(1, wrong)])
