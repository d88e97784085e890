"""Products of packed weights with a few rows: kernels = reference = definition, for every form and epilogue."""

import math

import pytest
import torch
from quantized_cases import random_weight

from salalocal.errors import BackendError
from salalocal.kernels.int4.activations_by_group import (
    GroupedActivations,
    RawActivations,
    float_activations,
    quantize_groups_definition,
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
from salalocal.kernels.int4.gemv.launch import Launch, StreamLaunch, TileLaunch, WordLaunch
from salalocal.quant.int4 import IntScheme, PackedWeight

pytestmark = pytest.mark.usefixtures("poisoned")
WORDS, TILES, PARTS = WordLaunch(32, 16, 2), TileLaunch(32, 4, 2, 1), TileLaunch(32, 4, 2, 2)


def packed(num_out: int, num_in: int, scheme: IntScheme, seed: int) -> PackedWeight:
    return random_weight(num_out, num_in, scheme, seed).packed()


def rows(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def relative_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    return float((value.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize(
    ("scheme", "launch", "num_tokens"),
    [
        (IntScheme(4, 128), WORDS, 1),
        (IntScheme(4, 32), WORDS, 3),
        (IntScheme(4, 64), WORDS, 6),
        (IntScheme(8, 256), WORDS, 2),
        (IntScheme(4, 128), StreamLaunch(16, 16, 2, 1), 1),
        (IntScheme(4, 32), StreamLaunch(8, 32, 1, 2), 2),
        (IntScheme(4, 64), StreamLaunch(8, 16, 2, 2), 3),
        (IntScheme(4, 128), TILES, 5),
        (IntScheme(4, 128), TileLaunch(32, 4, 2, 1, unroll=2), 10),
        (IntScheme(4, 64), PARTS, 16),
        (IntScheme(8, 128), TILES, 3),
        (IntScheme(4, 256), TILES, 9),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["plain", "residual", "swiglu"])
def test_integer_math_is_the_definition(
    seed: int, scheme: IntScheme, launch: Launch, num_tokens: int, kind: str
) -> None:
    weight = packed(40, 256, scheme, seed)
    x = quantize_groups_definition(rows(seed, num_tokens, 256), is_split=scheme.bits == 4)
    epilogue = SWIGLU if kind == "swiglu" else Epilogue("plain", 0.5)
    if kind == "residual":
        epilogue = Epilogue("residual", 0.25, rows(seed + 1, num_tokens, 80)[:, :40])
    exact = int4_gemv_definition(x, weight, epilogue)
    assert exact.shape == (num_tokens, 20 if kind == "swiglu" else 40)
    assert relative_error(int4_gemv(x, weight, epilogue, torch.float32), exact) < 3e-6
    assert relative_error(int4_gemv_triton(x, weight, epilogue, torch.float32, launch=launch), exact) < 3e-6
    if kind == "residual":
        assert relative_error(int4_gemv_triton(x, weight, epilogue, launch=launch), exact) < 4e-3


@pytest.mark.parametrize("launch", [WORDS, StreamLaunch(8, 16, 2, 2), TILES, PARTS], ids=str)
@pytest.mark.parametrize("kind", ["residual", "swiglu"])
def test_rows_of_the_output_may_lie_apart_and_be_the_residual(seed: int, launch: Launch, kind: str) -> None:
    weight = packed(40, 256, IntScheme(4, 128), seed)
    x = quantize_groups_definition(rows(seed, 3, 256))
    wide = torch.full((5, 64), math.nan)
    out = wide[1:-1, 8 : 28 if kind == "swiglu" else 48]
    epilogue = SWIGLU
    if kind == "residual":
        epilogue = Epilogue("residual", 0.25, out.copy_(rows(seed + 1, 3, 40)))
    exact = int4_gemv_definition(x, weight, epilogue)
    before = out.clone()
    assert int4_gemv_triton(x, weight, epilogue, launch=launch, out=out) is out
    assert relative_error(out, exact) < 3e-6
    assert int4_gemv(x, weight, epilogue, out=out.copy_(before)) is out and relative_error(out, exact) < 3e-6
    out.fill_(math.nan)
    assert wide.isnan().all()
    with pytest.raises(ValueError, match="out is"):
        int4_gemv_triton(x, weight, epilogue, launch=launch, out=out[:2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("group_size", "launch"), [(128, TILES), (32, PARTS)])
def test_float_math_is_the_definition(seed: int, dtype: torch.dtype, group_size: int, launch: Launch) -> None:
    weight = packed(40, 256, IntScheme(4, group_size), seed)
    x = float_activations(rows(seed, 3, 256).to(dtype))
    exact = int4_gemv_definition(x, weight)
    assert relative_error(int4_gemv_triton(x, weight, PLAIN, torch.float32, launch=launch), exact) < 3e-6
    assert relative_error(int4_gemv(x, weight, PLAIN, torch.float32), exact) < 3e-6


@pytest.mark.parametrize("num_tokens", [1, 4])
@pytest.mark.parametrize("normed", [False, True])
def test_a_product_norms_and_quantizes_its_activations_itself(seed: int, num_tokens: int, normed: bool) -> None:
    weight = packed(40, 256, IntScheme(4, 128), seed)
    norm = (rows(seed + 1, 256).abs() + 0.5, 1e-6) if normed else None
    x = RawActivations(rows(seed, num_tokens, 256) * 30, norm)
    exact = int4_gemv_definition(x.grouped(is_split=True), weight, SWIGLU)
    assert relative_error(int4_gemv(x, weight, SWIGLU, torch.float32), exact) < 3e-6
    for launch in (WORDS, StreamLaunch(8, 16, 2, 2)):
        y = int4_gemv_triton(x, weight, SWIGLU, torch.float32, launch=launch)
        # A norm sums its squares in another order: now and then a code is the next one.
        assert relative_error(y, exact) < (4e-3 if normed else 3e-6)


def test_the_definition_is_the_product_with_the_dequantized_weights(seed: int) -> None:
    weight = random_weight(24, 256, IntScheme(4, 64), seed)
    x = rows(seed, 5, 256)
    exact = x.double() @ weight.dequantize(torch.float64).t()
    assert relative_error(int4_gemv_definition(float_activations(x), weight.packed()), exact) < 1e-12
    quantized = int4_gemv_definition(quantize_groups_definition(x), weight.packed())
    assert 1e-4 < relative_error(quantized, exact) < 1.5e-2


def test_a_launch_is_chosen_for_every_kind_of_product(seed: int) -> None:
    for scheme, num_tokens in ((IntScheme(4, 128), 1), (IntScheme(4, 32), 9), (IntScheme(8, 128), 4)):
        weight = packed(24, 128, scheme, seed)
        x = quantize_groups_definition(rows(seed, num_tokens, 128), is_split=scheme.bits == 4)
        y = int4_gemv_triton(x, weight, PLAIN, torch.float32)
        assert relative_error(y, int4_gemv_definition(x, weight)) < 3e-6


def test_programs_that_share_a_row_leave_the_scratch_ready_and_stay_inside_it(seed: int) -> None:
    weight = packed(40, 256, IntScheme(4, 128), seed)
    x = quantize_groups_definition(rows(seed, 8, 256))
    launch = TileLaunch(32, 4, 2, 2)
    needed = 2 * 32 * 8 * 2
    scratch = Scratch(torch.full((needed + 64,), math.nan), torch.zeros(8, dtype=torch.int32))
    first = int4_gemv_triton(x, weight, PLAIN, torch.float32, scratch, launch)
    again = int4_gemv_triton(x, weight, PLAIN, torch.float32, scratch, launch)
    assert torch.equal(first, again) and relative_error(first, int4_gemv_definition(x, weight)) < 3e-6
    assert not scratch.tickets.any() and bool(scratch.partials[needed:].isnan().all())
    small = Scratch(torch.empty(16, dtype=torch.float32, device=x.values.device), scratch.tickets)
    with pytest.raises(BackendError, match="scratch of 16 sums"):
        int4_gemv_triton(x, weight, PLAIN, torch.float32, small, launch)


def test_what_no_kernel_takes_is_refused(seed: int) -> None:
    weight = packed(24, 128, IntScheme(4, 128), seed)
    x = quantize_groups_definition(rows(seed, 1, 128))
    for refused, values in (
        (packed(24, 128, IntScheme(4, 16), seed), x),
        (packed(24, 128, IntScheme(8, 128), seed), float_activations(rows(seed, 1, 128))),
        (weight, GroupedActivations(torch.ones(1, 128), None, True)),
        (weight, quantize_groups_definition(rows(seed, 17, 128))),
        (random_weight(24, 128, IntScheme(4, 32), seed, act_order=True).packed(), x),
        (weight, RawActivations(rows(seed, 1, 128).half())),
    ):
        with pytest.raises(BackendError):
            int4_gemv_triton(values, refused)
    with pytest.raises(BackendError, match="power of two"):
        odd = packed(24, 384, IntScheme(4, 128), seed)
        int4_gemv_triton(RawActivations(rows(seed, 1, 384)), odd, launch=StreamLaunch(8, 16, 1, 1))
    with pytest.raises(BackendError, match="swiglu takes"):
        int4_gemv_triton(x, weight, SWIGLU, launch=WordLaunch(1, 16, 1))
    with pytest.raises(ValueError, match="split order"):
        int4_gemv_triton(x, packed(24, 128, IntScheme(8, 128), seed))
    with pytest.raises(ValueError, match="no residual"):
        int4_gemv_triton(x, weight, Epilogue("residual"))
    with pytest.raises(ValueError, match="values are"):
        int4_gemv_triton(quantize_groups_definition(rows(seed, 1, 256)), weight)


def test_no_number_comes_out_as_one(seed: int) -> None:
    weight, x = packed(24, 128, IntScheme(4, 128), seed), rows(seed, 1, 128)
    x[0, 5] = math.nan
    for launch in (WORDS, TILES, StreamLaunch(8, 16, 2, 1)):
        assert bool(int4_gemv_triton(quantize_groups_definition(x), weight, launch=launch).isnan().all())
    for norm in (None, (rows(seed + 1, 128), 1e-6)):
        assert bool(int4_gemv_triton(RawActivations(x, norm), weight, launch=StreamLaunch(8, 16, 2, 1)).isnan().all())
