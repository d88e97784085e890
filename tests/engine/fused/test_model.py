"""The fused model against the module tree of the same weights, on a CPU (kernels without a plain form: interpreted)."""

import pytest
import torch
from fused_cases import packed_model, random_ids, read_by_modules, relative_error

from salalocal.engine.fused.model import FusedModel, why_not_fused
from salalocal.kernels.int4.route import Math


@pytest.mark.parametrize(("math", "bound"), [("bf16", 3e-2), ("int8", 1e-1)])
@pytest.mark.parametrize(("num_before", "chunks"), [(0, (18, 16, 1)), (250, (17,))])
def test_chunks_are_those_of_the_modules(
    seed: int, math: Math, bound: float, num_before: int, chunks: tuple[int, ...]
) -> None:
    model = packed_model(math)
    ids = torch.tensor([random_ids(seed, num_before + sum(chunks))])
    state = read_by_modules(model, ids[0, :num_before].tolist()) if num_before else model.new_state(1, 64)
    expected_state = state.fork()
    with torch.inference_mode():
        expected = model(ids[:, num_before:], expected_state)
        fused = FusedModel(model)
        parts = [fused(part, state) for part in ids[:, num_before:].split(chunks, dim=1)]
    assert state.num_tokens == num_before + sum(chunks)
    assert relative_error(torch.cat(parts, 1), expected) < bound
    for layer, expected_layer in zip(state.layers, expected_state.layers, strict=True):
        for name, tensor in layer.tensors().items():
            wanted = expected_layer.tensors()[name]
            assert tensor.shape == wanted.shape
            assert tensor.numel() == 0 or relative_error(tensor, wanted) < 2 * bound, name


def test_an_int8_cache_holds_what_the_modules_put_there(seed: int) -> None:
    model = packed_model("bf16")
    ids = torch.tensor([random_ids(seed, 117)])
    state = read_by_modules(model, ids[0, :100].tolist(), is_int8=True)
    expected_state = state.fork()
    with torch.inference_mode():
        expected = model(ids[:, 100:], expected_state)
        hidden = FusedModel(model)(ids[:, 100:], state)
    assert relative_error(hidden, expected) < 3e-2
    layer, expected_layer = (one.layers[2] for one in (state, expected_state))
    for name, scales in (("k", "k_scales"), ("v", "v_scales")):
        values, wanted = (
            one.tensors()[name].float() * one.tensors()[scales].float() for one in (layer, expected_layer)
        )
        assert layer.tensors()[name].dtype == torch.int8
        assert relative_error(values, wanted) < 6e-2


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
