"""What is emulated rounds where a card rounds, and is undone when its context closes."""

import sys
from pathlib import Path

import pytest
import tiny_model
import torch

from benchmarks.emulation import Int8Linear, emulated
from salalocal.kernels.int4.activations_by_group import quantize_groups_reference
from salalocal.kernels.int4.activations_by_row import quantize_rows_reference
from salalocal.kernels.int4.gemv.operation import int4_gemv_definition
from salalocal.kernels.int4.int8_gemm import int8_gemm_definition
from salalocal.kernels.int4.scratch import decode_int8_reference, int4_weight
from salalocal.kernels.packing import pack_codes
from salalocal.quant import linear
from salalocal.quant.int4 import PackedWeight
from salalocal.session.runtime import Runtime


def packed_weight(bits: int, generator: torch.Generator) -> PackedWeight:
    codes = torch.randint(0, 2**bits, (48, 256), generator=generator, dtype=torch.uint8)
    return PackedWeight(pack_codes(codes, bits), 0.01 + torch.rand(48, 2, generator=generator) / 100, bits, 128)


@pytest.mark.parametrize("bits", [4, 8])
def test_int8_products_are_those_of_the_kernels(bits: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = packed_weight(bits, generator)
    map_ = Int8Linear(weight)
    few, many = torch.randn(3, 256, generator=generator), torch.randn(2, 20, 256, generator=generator)
    by_group = int4_gemv_definition(quantize_groups_reference(few, is_split=bits == 4), weight)
    torch.testing.assert_close(map_(few).double(), by_group, rtol=1e-5, atol=1e-5)
    folded = int4_weight(weight.words, weight.scales, 128, bits)
    rows = quantize_rows_reference(many.view(40, 256))
    by_row = int8_gemm_definition(rows, decode_int8_reference(folded), folded.row_scales)
    torch.testing.assert_close(map_(many).double().view(40, 48), by_row, rtol=1e-5, atol=1e-5)
    exact = linear.QuantizedLinear(weight)(many)
    assert 0 < (map_(many) - exact).abs().max() < 0.05 * exact.abs().max()


def logits_of(runtime: Runtime, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(16, runtime.config.vocab_size, (300,), generator=generator)
    return runtime.logits(ids)


@pytest.fixture
def runtime(tmp_path: Path, seed: int) -> Runtime:
    return tiny_model.open_tiny_runtime(tmp_path / "model", seed)


def test_a_state_in_bf16_changes_little_and_only_what_follows_the_first_chunk(runtime: Runtime, seed: int) -> None:
    plain = logits_of(runtime, seed)
    with emulated("state"):
        rounded = logits_of(runtime, seed)
    first = tiny_model.CHUNK_SIZE
    assert torch.equal(plain[:first], rounded[:first])
    difference = (plain[first:] - rounded[first:]).norm() / plain[first:].norm()
    assert 0 < difference < 0.2
    assert torch.equal(logits_of(runtime, seed), plain)


def test_dense_layers_differ_only_where_blocks_are_picked(runtime: Runtime, seed: int) -> None:
    plain = logits_of(runtime, seed)
    with emulated("dense"):
        dense = logits_of(runtime, seed)
        state = runtime.engine.new_state()
    assert state.layers[runtime.config.mixer_types.index("minicpm4")].sparse_from == sys.maxsize  # type: ignore[attr-defined]
    same = (plain - dense).abs().amax(1) < 1e-3 * plain.abs().max()
    assert same[: runtime.config.sparse.dense_len - 1].all() and not same.all()
    assert torch.equal(logits_of(runtime, seed), plain)


def test_silent_layers_still_take_tokens_in(runtime: Runtime, seed: int) -> None:
    with emulated("silent"):
        state = runtime.engine.new_state()
        runtime.engine.prefill(list(range(20, 90)), state)
        assert {layer.num_tokens for layer in state.layers} == {70}
        silent = logits_of(runtime, seed)
    assert not torch.allclose(silent, logits_of(runtime, seed))


def test_int8_math_is_for_packed_weights_while_it_is_open(seed: int) -> None:
    weight = packed_weight(4, torch.Generator().manual_seed(seed))
    original = linear.make_linear
    with emulated("int8"):
        assert isinstance(linear.make_linear(weight, torch.float32), Int8Linear)
    with emulated(None):
        assert not isinstance(linear.make_linear(weight, torch.float32), Int8Linear)
    assert linear.make_linear is original
    with pytest.raises(RuntimeError, match="inside"), emulated("int8"):
        raise RuntimeError("inside")
    assert linear.make_linear is original
