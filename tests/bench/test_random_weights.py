"""Random weights: every tensor of the shape, numbers that stay finite, the same model every time."""

import dataclasses

import pytest
import torch
from checkpoint_cases import small_config

from salalocal.bench.opening import tensor_bytes
from salalocal.bench.random_weights import GROUP_SIZE, random_engine, random_layout
from salalocal.checkpoint.names import EMBEDDING, HEAD, expected_tensors
from salalocal.engine.engine import EngineConfig
from salalocal.engine.load import Placement
from salalocal.engine.sampling_params import SamplingParams
from salalocal.model.config import SalaConfig
from salalocal.quant.int4 import IntScheme, PackedWeight

CPU = torch.device("cpu")


def wide_config() -> SalaConfig:
    """Sizes that fill groups of 128 in all maps but those out of attention, which stay dense."""
    return small_config(hidden_size=128, intermediate_size=256)


def test_the_layout_names_every_tensor_once() -> None:
    for config in (wide_config(), SalaConfig.released(), small_config(tie_word_embeddings=True)):
        layout = random_layout(config, CPU)
        names = {*layout.dense, *(f"{module}.weight" for module in layout.matrices)}
        assert names == set(expected_tensors(config))
        assert EMBEDDING in layout.dense


def test_the_released_shape_is_int4_with_an_int8_output() -> None:
    layout = random_layout(SalaConfig.released(), CPU)
    assert len(layout.matrices) == 8 * 8 + 24 * 8 + 1
    bits = {
        name: matrix.scheme.bits for name, matrix in layout.matrices.items() if isinstance(matrix.scheme, IntScheme)
    }
    assert bits.pop(HEAD.removesuffix(".weight")) == 8
    assert set(bits.values()) == {4}
    sizes = tensor_bytes(layout, torch.bfloat16)
    assert sum(size for name, size in sizes.items() if name not in (EMBEDDING, HEAD)) == pytest.approx(4.58e9, rel=1e-3)


def test_codes_and_scales_keep_the_variance(seed: int) -> None:
    torch.manual_seed(seed)
    layout = random_layout(wide_config(), CPU)
    weight = layout.read("model.layers.1.mlp.gate_proj")
    assert isinstance(weight, PackedWeight) and weight.group_size == GROUP_SIZE
    values = weight.unpacked().dequantize()
    assert values.shape == (256, 128)
    assert float(values.pow(2).sum(1).mean()) == pytest.approx(1.0, rel=0.15)


def test_a_random_model_reads_and_draws_finite_numbers() -> None:
    config = wide_config()
    engine = random_engine(config, random_layout(config, CPU), CPU, Placement(), EngineConfig(64))
    assert engine.config.chunk_size == 64
    state = engine.new_state(300)
    logits = engine.prefill(torch.randint(0, config.vocab_size, (100,)), state)
    assert logits is not None and bool(torch.isfinite(logits).all()) and float(logits.std()) > 0
    params = SamplingParams(max_tokens=8, is_loop_guarded=False)
    assert len(list(engine.generate(state, logits, params))) == 8


def test_the_same_model_every_time() -> None:
    config = dataclasses.replace(wide_config(), mixer_types=wide_config().mixer_types)
    logits = []
    for _ in range(2):
        engine = random_engine(config, random_layout(config, CPU), CPU, Placement(), EngineConfig())
        logits.append(engine.prefill([3, 4, 5], engine.new_state(8)))
    assert logits[0] is not None and logits[1] is not None and torch.equal(logits[0], logits[1])
