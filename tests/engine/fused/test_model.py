"""The fused model against the module tree of the same weights, on a CPU (kernels without a plain form: interpreted)."""

import pytest
import torch

from fused_cases import packed_model, random_ids, relative_error
from salalocal.engine.fused.model import FusedModel, why_not_fused
from salalocal.kernels.int4.route import Math


@pytest.mark.parametrize(("math", "bound"), [("bf16", 3e-2), ("int8", 1e-1)])
def test_chunks_are_those_of_the_modules(seed: int, math: Math, bound: float) -> None:
    model = packed_model(math)
    ids = torch.tensor([random_ids(seed, 150)])
    with torch.inference_mode():
        expected_state, state = model.new_state(1, 160), model.new_state(1, 160)
        expected = model(ids, expected_state)
        fused = FusedModel(model)
        parts = [fused(part, state) for part in ids.split((100, 33, 16, 1), dim=1)]
    assert state.num_tokens == 150
    assert relative_error(torch.cat(parts, 1), expected) < bound
    for layer, expected_layer in zip(state.layers, expected_state.layers, strict=True):
        for name, tensor in layer.tensors().items():
            assert tensor.shape == expected_layer.tensors()[name].shape
            assert relative_error(tensor, expected_layer.tensors()[name]) < 2 * bound, name


def test_weights_are_held_once(seed: int) -> None:
    model = packed_model("bf16")
    ids = torch.tensor([random_ids(seed, 5)])
    with torch.inference_mode():
        before = model(ids, model.new_state(1, 8))
        num_bytes = _distinct_bytes(model)
        FusedModel(model)
        assert _distinct_bytes(model) <= num_bytes
        assert torch.equal(model(ids, model.new_state(1, 8)), before)


def test_a_cpu_runs_module_by_module() -> None:
    assert "CUDA" in why_not_fused(packed_model("bf16"))


def _distinct_bytes(model: torch.nn.Module) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())
