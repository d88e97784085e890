"""The quantization study on a small model: its blocks are the model's, its ideas do what they say, a row comes out."""

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks.quantization_study import CHUNK_TOKENS, Original, Walk, make_model, measure, quantized_weights
from benchmarks.study_matrices import random_map
from benchmarks.study_table import VARIANTS, as_table
from benchmarks.study_variants import (
    ALL_INPUTS,
    DOWN,
    InputMoments,
    Variant,
    hadamard_basis,
    output_error,
    quantize_maps,
    simulate_int8,
)
from benchmarks.synthetic_checkpoint import random_tensor, small_config
from salalocal.checkpoint.names import expected_tensors
from salalocal.engine.engine import Engine, EngineConfig
from salalocal.evals.divergence import read_reference


@pytest.fixture
def original(seed: int) -> Original:
    config, cpu = small_config(), torch.device("cpu")
    shapes = expected_tensors(config).items()
    weights = {name: random_tensor(config, name, shape, seed, cpu).float() for name, shape in shapes}
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, config.vocab_size, (2, 400), generator=generator)
    with torch.no_grad():
        return Original(config, weights, ids.tolist())


def inputs_of(original: Original, layer: int) -> Tensor:
    return torch.cat(original.hidden[layer])


def test_blocks_in_pieces_are_the_blocks_of_the_model(original: Original, seed: int) -> None:
    model, seen = make_model(original.config, original.weights), []
    model.model.layers[1].register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0][0]))
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, original.config.vocab_size, (2, 400), generator=generator)
    with torch.no_grad():
        for sequence in ids:
            model(sequence[None], model.new_state(capacity=400))
    assert torch.allclose(torch.cat(seen), inputs_of(original, 1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("order", ["block", "stages"])
@pytest.mark.parametrize("drift", [None, "model", "block"])
def test_a_walk_without_loss_loses_nothing(
    original: Original, order: str, drift: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def keep(variant: Variant, name: str, weights: dict[str, Tensor], known: InputMoments, is_sparse: bool) -> object:
        assert known.cross is None or torch.allclose(known.cross, known.moments, rtol=1e-3, atol=1e-4)
        return weights

    monkeypatch.setattr("benchmarks.quantization_study.quantize_maps", keep)
    with torch.no_grad():
        left = Walk(original, Variant("kept", order=order, drift=drift)).run()
    assert all(torch.equal(left[name], weight) for name, weight in original.weights.items())


def test_a_row_has_figures_and_more_bits_lose_less(original: Original) -> None:
    engine = Engine(make_model(original.config, original.weights), EngineConfig(CHUNK_TOKENS))
    reference = read_reference(engine, [list(range(3, 303))])
    best = next(variant for variant in VARIANTS if variant.counts_flips)
    rows = [measure(original, reference, v) for v in (best, replace(best, name="finer", bits=8, sensitive_bits=8))]
    rows.append(measure(original, reference, Variant("as it is", "none")))
    assert rows[0]["kl_mean_nats"] > 10 * rows[1]["kl_mean_nats"] > 0 and abs(rows[2]["kl_mean_nats"]) < 1e-5
    assert rows[0]["bits_per_weight"] == pytest.approx(4.125) and rows[2]["bits_per_weight"] == 16
    assert 0 <= rows[0]["flips_near_ties"] <= 1
    record = {"variants": {best.name: json.loads(json.dumps(rows[0]))}}
    assert best.name in as_table(record)


def test_sensitive_maps_alone_get_more_bits(original: Original) -> None:
    four, mixed = (quantized_weights(original, Variant("", "rtn", sensitive_bits=bits)) for bits in (4, 8))
    changed = {name for name in four if not torch.equal(four[name], mixed[name])}
    assert changed == {f"model.layers.0.self_attn.{leaf}_proj.weight" for leaf in "qkv"}


def test_a_rotation_turns_nothing_but_the_basis(seed: int) -> None:
    for size in (128, 640):
        basis = hadamard_basis(size)
        assert torch.allclose(basis.into @ basis.back, torch.eye(size, dtype=torch.float64), atol=1e-12)
        x = torch.randn(3, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert torch.allclose((x @ basis.into).norm(dim=1), x.norm(dim=1))


def test_ideas_lower_the_error_that_they_are_for(seed: int) -> None:
    weight, inputs = random_map(seed, 20.0, num_in=256)
    moments = inputs.t().double() @ inputs.double() / len(inputs)

    def error(variant: Variant) -> float:
        left = quantize_maps(variant, DOWN, {"map": weight}, InputMoments(moments), is_sparse=False)["map"]
        return output_error(weight, left, moments)

    plain, gptq = error(Variant("", "rtn")), error(Variant(""))
    assert error(Variant("", "rtn", is_activation_aware=True)) < plain and gptq < plain
    assert error(Variant("", num_sweeps=3)) < gptq
    assert error(Variant("", num_refits=2)) < gptq
    assert error(Variant("", scale_search="feedback")) < 1.02 * gptq


def test_int8_inputs_err_by_half_a_step(seed: int) -> None:
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(seed))
    x[:, 3] *= 50
    by_token, by_group = simulate_int8(x, None), simulate_int8(x, 128)
    assert ((by_token - x).abs() <= 0.5001 * x.abs().amax(1, keepdim=True) / 127).all()
    assert (by_group - x).norm() < (by_token - x).norm()


def test_names_of_variants_are_unique() -> None:
    names = [variant.name for variant in VARIANTS]
    assert len(set(names)) == len(names)
    assert {variant.activation_inputs for variant in VARIANTS} >= {(name,) for name in ALL_INPUTS}
