"""Products of packed weights with a few rows on a GPU, at real widths: against float64, every launch that ships."""

import pytest
import torch
from quantized_cases import random_weight

from salalocal.kernels.backend import compute_capability
from salalocal.kernels.int4.activations_by_group import (
    RawActivations,
    float_activations,
    quantize_groups,
    quantize_groups_definition,
    rms_norm_quantize_groups,
    rms_norm_quantize_groups_definition,
)
from salalocal.kernels.int4.gemv import (
    PLAIN,
    SWIGLU,
    Epilogue,
    Scratch,
    int4_gemv,
    int4_gemv_definition,
    int4_gemv_triton,
)
from salalocal.kernels.int4.gemv.gated import gated_groups_definition, gated_groups_triton
from salalocal.kernels.int4.gemv.launch import LAUNCH, GemvShape, StreamLaunch, fitted
from salalocal.quant.int4 import IntScheme, PackedWeight

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("poisoned"),
]
CUDA = torch.device("cuda")
QUANTIZING = StreamLaunch(8, 128, 8, 2, quantizes=True)


def packed(num_out: int, num_in: int, scheme: IntScheme, seed: int) -> PackedWeight:
    return random_weight(num_out, num_in, scheme, seed).packed().to(CUDA)


def rows(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator(CUDA).manual_seed(seed), device=CUDA).bfloat16()


def relative_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    return float((value.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4, 5, 8, 11, 16])
@pytest.mark.parametrize(("num_out", "num_in"), [(4096, 4096), (1026, 16384)])
@pytest.mark.parametrize("group_size", [32, 128])
def test_products_are_as_exact_as_their_output_dtype(
    seed: int, num_tokens: int, num_out: int, num_in: int, group_size: int
) -> None:
    weight = packed(num_out, num_in, IntScheme(4, group_size), seed)
    x = rows(seed, num_tokens, num_in)
    residual = rows(seed + 1, num_tokens, 2 * num_out)[:, :num_out]
    for values in (quantize_groups(x), float_activations(x)):
        for epilogue in (PLAIN, SWIGLU, Epilogue("residual", 0.2475, residual)):
            exact = int4_gemv_definition(values, weight, epilogue)
            assert relative_error(int4_gemv(values, weight, epilogue, torch.float32), exact) < 2e-5
            plain = relative_error(exact.bfloat16(), exact)
            assert relative_error(int4_gemv(values, weight, epilogue), exact) < 2 * plain


def test_every_launch_that_ships_is_right(seed: int) -> None:
    table = LAUNCH[max(known for known in LAUNCH if known <= compute_capability(CUDA))]
    scratch = Scratch.make(CUDA)
    for (math_kind, bits, num_tokens), by_shape in table.items():
        weight = packed(512, 4096, IntScheme(bits, 128), seed)
        x = rows(seed, num_tokens, 4096)
        values = float_activations(x) if math_kind == "float" else quantize_groups(x, is_split=bits == 4)
        exact = int4_gemv_definition(values, weight)
        for launch in dict.fromkeys(by_shape.values()):
            launch = fitted(launch, GemvShape(512, 4096, bits, 128))
            for _ in range(3):
                y = int4_gemv_triton(values, weight, PLAIN, torch.float32, scratch, launch)
                assert relative_error(y, exact) < 2e-5, (math_kind, bits, num_tokens, launch)


@pytest.mark.parametrize(("num_in", "launch"), [
    (4096, StreamLaunch(8, 128, 8, 2, ahead=3)),
    (4096, StreamLaunch(4, 256, 4, 4)),
    (16384, StreamLaunch(2, 512, 8, 2)),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("num_tokens", [1, 3, 4])
def test_a_product_norms_and_quantizes_its_activations_itself(
    seed: int, num_tokens: int, num_in: int, launch: StreamLaunch
) -> None:
    weight = packed(4098, num_in, IntScheme(4, 128), seed)
    x, norm = rows(seed, num_tokens, num_in) * 30, (rows(seed + 1, num_in), 1e-6)
    for raw in (RawActivations(x), RawActivations(x, norm)):
        grouped = raw.grouped(is_split=True)
        for epilogue in (PLAIN, SWIGLU):
            exact = int4_gemv_definition(grouped, weight, epilogue)
            bound = 2e-5 if raw.norm is None else 4e-3  # a norm sums in another order: some codes are the next ones
            assert relative_error(int4_gemv_triton(raw, weight, epilogue, torch.float32, launch=launch), exact) < bound
            y = int4_gemv_triton(grouped, weight, epilogue, torch.float32, launch=launch)
            assert relative_error(y, exact) < 2e-5


def test_producers_give_the_codes_of_the_definition(seed: int) -> None:
    x, weight = rows(seed, 5, 4096) * 30, rows(seed + 1, 4096)
    for made, exact in (
        (quantize_groups(x), quantize_groups_definition(x)),
        (rms_norm_quantize_groups(x, weight, 1e-6), rms_norm_quantize_groups_definition(x, weight, 1e-6)),
    ):
        assert made.scales is not None and exact.scales is not None
        assert torch.allclose(made.scales, exact.scales, rtol=1e-2)
        difference = (made.values.int() - exact.values.int()).abs()
        assert int(difference.max()) <= 1 and float(difference.float().mean()) < 0.01


@pytest.mark.parametrize("num_features", [16384, 96])
def test_what_is_gated_leaves_quantized(seed: int, num_features: int) -> None:
    weight, x = packed(2 * num_features, 4096, IntScheme(4, 128), seed), rows(seed, 1, 4096)
    given = RawActivations(x, (rows(seed + 1, 4096), 1e-6))
    found, exact = gated_groups_triton(given, weight, launch=QUANTIZING), gated_groups_definition(given, weight)
    assert found.scales is not None and found.group == 32 and found.scales.isfinite().all()
    assert relative_error(found.floats(torch.float32), exact.floats(torch.float64)) < 1e-2


def test_a_captured_step_follows_its_inputs(seed: int) -> None:
    """Norm, product, quantization and product in one graph, each starting before the other ends: no stale reads."""
    up, down = packed(32768, 4096, IntScheme(4, 128), seed), packed(4096, 16384, IntScheme(4, 128), seed + 1)
    norm, hidden = torch.ones(4096, device=CUDA).bfloat16(), rows(seed, 1, 4096)

    def step() -> torch.Tensor:
        y = hidden
        for _ in range(4):
            inner = int4_gemv(rms_norm_quantize_groups(y, norm, 1e-6), up, SWIGLU)
            y = int4_gemv(quantize_groups(inner), down, Epilogue("residual", 1e-3, y))
            inner = int4_gemv_triton(RawActivations(y, (norm, 1e-6)), up, SWIGLU, launch=StreamLaunch(8, 128, 8, 2, 3))
            y = int4_gemv_triton(
                RawActivations(inner), down, Epilogue("residual", 1e-3, y), launch=StreamLaunch(2, 512, 8, 2)
            )
            gated = gated_groups_triton(RawActivations(y, (norm, 1e-6)), up, launch=QUANTIZING)
            y = int4_gemv(gated, down, Epilogue("residual", 1e-3, y))
        return y

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for fresh in range(20):
        hidden.copy_(rows(seed + fresh, 1, 4096))
        graph.replay()
        assert torch.equal(captured, step())


@pytest.mark.parametrize("num_tokens", [1, 6])
def test_logits_of_the_output_matrix_are_those_of_the_formula(seed: int, num_tokens: int) -> None:
    weight = packed(73448, 4096, IntScheme(8, 128), seed)
    x = quantize_groups(rows(seed, num_tokens, 4096), is_split=False)
    exact = int4_gemv_definition(x, weight, Epilogue(factor=1 / 16))
    logits = int4_gemv(x, weight, Epilogue("plain", 1 / 16), torch.float32)
    assert torch.equal(logits.argmax(dim=1), exact.argmax(dim=1))
    torch.testing.assert_close(logits.double(), exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max()))
