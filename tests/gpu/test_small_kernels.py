"""The small kernels on a card, at the released widths: norm, gates, embedding from the host's memory, chosen tokens."""

import pytest
import torch
from torch import Tensor

from salalocal.errors import BackendError
from salalocal.kernels.embedding import embed, embed_reference
from salalocal.kernels.gate import sigmoid_gate, sigmoid_gate_reference
from salalocal.kernels.gated_norm import GatedNorm, gated_norm, gated_norm_reference
from salalocal.kernels.int4.activations_by_row import (
    QuantizedRows,
    from_split_order,
    gated_norm_quantize_rows,
    quantize_rows_reference,
    rms_norm_quantize_rows,
    sigmoid_gate_quantize_rows,
    swiglu_quantize,
)
from salalocal.kernels.norm import rms_norm, rms_norm_reference
from salalocal.kernels.sampling import (
    SamplingTensors,
    draw_tokens,
    greedy_tokens,
    new_sampling_tensors,
    sample_tokens,
    sample_tokens_reference,
)
from salalocal.kernels.swiglu import swiglu, swiglu_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
HIDDEN, WIDE, VOCABULARY = 4096, 16_384, 73_448
ROWS = (1, 3, 16, 257)


def slices(seed: int, rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Two slices of one stacked projection."""
    generator = torch.Generator("cuda").manual_seed(seed)
    both = 2 * torch.randn(1, rows, 2 * width + 256, device="cuda", generator=generator)
    return both.bfloat16()[..., :width], both.bfloat16()[..., width : 2 * width]


def assert_nearly(found: Tensor, expected: Tensor) -> None:
    """Equal but for single roundings."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=2**-6, atol=1e-3)
    assert (found != expected).double().mean() < 0.01


def assert_codes(made: QuantizedRows, value: Tensor) -> None:
    """The codes of the reference but for single steps, and values within half a step and a rounding."""
    expected = quantize_rows_reference(value)
    assert (made.codes.int() - expected.codes.int()).abs().max() <= 1
    assert (made.codes != expected.codes).double().mean() < 0.02
    values = from_split_order(made.codes).double() * made.scales.double().unsqueeze(-1)
    room = made.scales.double().unsqueeze(-1) * 0.51 + value.double().abs() * 2**-6
    assert ((values - value.double()).abs() <= room).all()


@pytest.mark.parametrize("rows", ROWS)
def test_rows_are_those_of_the_reference(rows: int, seed: int) -> None:
    x, gate = slices(seed, rows, HIDDEN)
    weight = torch.rand(HIDDEN, device="cuda").bfloat16()
    gated = GatedNorm(weight=weight, gate=gate, eps=1e-6)
    assert_nearly(rms_norm(x, weight, 1e-6), rms_norm_reference(x, weight, 1e-6))
    heads = x.unflatten(-1, (32, 128))
    assert_nearly(rms_norm(heads, weight[:128], 1e-6), rms_norm_reference(heads, weight[:128], 1e-6))
    assert_nearly(sigmoid_gate(x, gate), sigmoid_gate_reference(x, gate))
    assert_nearly(gated_norm(x, gated), gated_norm_reference(x, gated))
    assert_codes(rms_norm_quantize_rows(x, weight, 1e-6), rms_norm_reference(x, weight, 1e-6))
    assert_codes(sigmoid_gate_quantize_rows(x, gate), sigmoid_gate_reference(x, gate))
    assert_codes(gated_norm_quantize_rows(x, gated), gated_norm_reference(x, gated))
    x, gate = slices(seed + 1, rows, WIDE)
    assert_nearly(swiglu(gate, x), swiglu_reference(gate, x))
    assert_codes(swiglu_quantize(gate, x), swiglu_reference(gate, x))


@pytest.mark.parametrize("place", ("card", "host"))
@pytest.mark.parametrize("tokens", (1, 16, 1000))
def test_embedding_reads_the_table_where_it_is(place: str, tokens: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(5000, HIDDEN, generator=generator).bfloat16()
    ids = torch.randint(5000, (tokens,), generator=generator)
    expected = embed_reference(table, ids, 12.0)
    table = table.cuda() if place == "card" else table.pin_memory()
    found = embed(table, ids.cuda(), 12.0)
    assert found.is_cuda and torch.equal(found.cpu(), expected)


def test_a_table_that_a_card_cannot_read_is_refused() -> None:
    with pytest.raises(BackendError, match="pageable"):
        embed(torch.zeros(4, 64), torch.zeros(1, dtype=torch.int64, device="cuda"), 1.0)


def filled(device: str, seed: int, values: tuple[float, int, float, float], rows: int) -> SamplingTensors:
    sampling = new_sampling_tensors(torch.device(device), 64, rows)
    for tensor, value in zip(
        (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p), values, strict=True
    ):
        tensor.fill_(value)
    uniforms = torch.rand(64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    sampling.uniforms.copy_(uniforms)
    return sampling


@pytest.mark.parametrize("rows", (1, 4))
def test_a_captured_step_draws_what_a_cpu_draws(rows: int, seed: int) -> None:
    logits = 3 * torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed))
    given = logits.cuda()
    sampling = filled("cuda", seed, (0.0, 0, 1.0, 0.0), rows)
    sample_tokens(given, sampling), greedy_tokens(given, sampling), draw_tokens(given, sampling)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sampled, greedy = sample_tokens(given, sampling), greedy_tokens(given, sampling)
        drawn = draw_tokens(given, sampling)
        sampling.step.add_(rows)
    step = 0
    for values in (
        (0.0, 0, 1.0, 0.0),
        (0.8, 40, 0.95, 0.0),
        (1.0, 0, 0.9, 0.02),
        (0.9, 0, 1.0, 0.01),
        (100.0, 0, 1.0, 0.0),
    ):
        on_cpu = filled("cpu", seed, values, rows)
        for name in ("temperature", "top_k", "top_p", "min_p"):
            getattr(sampling, name).copy_(getattr(on_cpu, name))
        on_cpu.step.fill_(step)
        graph.replay()
        assert sampled.tolist() == sample_tokens_reference(logits, on_cpu).tolist()
        on_cpu.top_k.zero_(), on_cpu.top_p.fill_(1)
        assert drawn.tolist() == sample_tokens_reference(logits, on_cpu).tolist()
        assert greedy.tolist() == logits.argmax(1).tolist()
        step += rows
    given[0, 70_000] = torch.nan
    assert int(sampling.is_damaged) == 0
    graph.replay()
    assert int(sampling.is_damaged) == 1
