"""Multiplying packed weights with a few rows, as writing and verifying do, at memory speed; for a decode step.

    y[m] = epilogue( W x[m] )        W[n, k] = scales[n, k // group_size] * (codes[n, k] - 2**(bits - 1))

Activations are int8 in groups of 128 or 32 (integer math), bf16/fp16 (float math), or bf16 that the product norms and
quantizes itself, see `kernels.int4.activations_by_group`; sums and epilogue are fp32, and y is rounded once. Three
forms: for up to 4 rows words are multiplied in integer registers, with a program for every few of them (`words`) or
flowing past activations that stay (`stream`); for up to 16 rows tiles on tensor cores (`tiles`).
Shapes: x [M, K], M <= 16; words int32 [N, K * bits / 32], see `kernels.packing`; scales [N, K / group_size];
y [M, N], with swiglu [M, N / 2]. 8 bits have integer math alone.
"""

import torch
from torch import Tensor
from torch.nn import functional

from salalocal.errors import BackendError
from salalocal.kernels.backend import compute_capability, triton, use_triton
from salalocal.kernels.int4.activations_by_group import ACTIVATION_GROUP, GroupedActivations, RawActivations
from salalocal.kernels.int4.gemv.launch import (
    MAX_TOKENS,
    GemvShape,
    Launch,
    Math,
    StreamLaunch,
    TileLaunch,
    choose_launch,
)
from salalocal.kernels.int4.gemv.product import PLAIN, Epilogue, PackedMatrix, Product, Scratch, shape_of
from salalocal.kernels.int4.gemv.stream import GATED_GROUP, launch_stream
from salalocal.kernels.int4.gemv.tiles import launch_tiles
from salalocal.kernels.int4.gemv.words import launch_words
from salalocal.kernels.packing import PACKED_BITS, unpack_codes

_MATH_DTYPES: dict[torch.dtype, Math] = {torch.int8: "int8", torch.bfloat16: "float", torch.float16: "float"}

Activations = GroupedActivations | RawActivations


def int4_gemv_definition(x: Activations, weight: PackedMatrix, epilogue: Epilogue = PLAIN) -> Tensor:
    """The formula, in float64. Shapes: [M, N] float64, with swiglu [M, N / 2]."""
    x = _grouped(x, weight)
    return _finished(x.floats(torch.float64) @ _matrix(weight, torch.float64).t(), epilogue)


def int4_gemv_reference(
    x: Activations, weight: PackedMatrix, epilogue: Epilogue = PLAIN, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """The same in fp32: what a CPU runs."""
    x = _grouped(x, weight)
    return _finished(x.floats(torch.float32) @ _matrix(weight, torch.float32).t(), epilogue).to(dtype)


def int4_gemv_triton(
    x: Activations,
    weight: PackedMatrix,
    epilogue: Epilogue = PLAIN,
    dtype: torch.dtype = torch.bfloat16,
    scratch: Scratch | None = None,
    launch: Launch | None = None,
    out: Tensor | None = None,
    gated: GroupedActivations | None = None,
) -> Tensor:
    """Checks, chooses a launch unless one is given, and launches; `out`, whose rows may lie apart, says the dtype.

    `scratch` is needed in a CUDA graph; without it, memory is allocated for a launch that needs some. `out` may be the
    residual itself. `gated`: where the outputs of swiglu are quantized to as well, by a launch that `can_group`.
    Raises: BackendError for what the kernels do not take; ValueError for shapes that do not belong together.
    """
    shape = shape_of(weight)
    _check_operands(x, weight, epilogue)
    num_tokens = x.values.shape[0]
    launch = launch or launch_of(x, weight)
    if not isinstance(launch, StreamLaunch):
        x = _grouped(x, weight)
    num_out = shape.N // 2 if epilogue.kind == "swiglu" else shape.N
    if epilogue.kind == "best":
        num_out, dtype = triton.cdiv(shape.N, launch.rows), torch.int64
    if epilogue.kind == "swiglu" and launch.rows < 2:
        raise BackendError(f"swiglu takes gate and up rows in one program, the launch has {launch.rows} row")
    if out is None:
        out = torch.empty(num_tokens, num_out, dtype=dtype, device=x.values.device)
    elif out.shape != (num_tokens, num_out) or out.stride(1) != 1 or epilogue.kind == "best":
        raise ValueError(f"out is {tuple(out.shape)} {out.stride()}, needed is {(num_tokens, num_out)}")
    product = Product(x, weight, epilogue, out)
    if isinstance(launch, TileLaunch):
        launch_tiles(product, launch, scratch)
    elif isinstance(launch, StreamLaunch):
        launch_stream(product, launch, gated)
    else:
        launch_words(product, launch)
    return product.out


def launch_of(x: Activations, weight: PackedMatrix) -> Launch:
    """The launch that a product takes on the card that it is on. Raises: BackendError for what no kernel takes."""
    shape, math = shape_of(weight), _math(x)
    _check_limits(x, weight, shape)
    assert math is not None  # checked
    return choose_launch(compute_capability(x.values.device), math, x.values.shape[0], shape)


def int4_gemv(
    x: Activations,
    weight: PackedMatrix,
    epilogue: Epilogue = PLAIN,
    dtype: torch.dtype = torch.bfloat16,
    scratch: Scratch | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """What a decode step calls. Shapes: out [M, N], if given, rows may lie apart; it says the dtype."""
    if use_triton(x.values, weight.words):
        return int4_gemv_triton(x, weight, epilogue, dtype, scratch, out=out)
    y = int4_gemv_reference(x, weight, epilogue, dtype if out is None else out.dtype)
    return y if out is None else out.copy_(y)


def _check_operands(x: Activations, weight: PackedMatrix, epilogue: Epilogue) -> None:
    """Raises: BackendError for what the kernels do not take; ValueError for shapes that do not belong together."""
    shape = shape_of(weight)
    num_tokens = x.values.shape[0]
    _check_limits(x, weight, shape)
    expected: dict[str, tuple[Tensor, tuple[int, ...]]] = {
        "values": (x.values, (num_tokens, shape.K)),
        "scales": (weight.scales, (shape.N, shape.K // shape.group_size)),
        "words": (weight.words, (shape.N, shape.K * shape.bits // 32)),
    }
    if isinstance(x, GroupedActivations) and x.scales is not None:
        expected["activation scales"] = (x.scales, (num_tokens, shape.K // x.group))
    if isinstance(x, RawActivations) and x.norm is not None:
        expected["norm weight"] = (x.norm[0], (shape.K,))
    for name, (tensor, needed) in expected.items():
        if tensor.shape != needed or not tensor.is_contiguous():
            raise ValueError(f"{name} are {tuple(tensor.shape)} {tensor.stride()}, needed are {needed}, contiguous")
    if isinstance(x, GroupedActivations) and x.is_split != (shape.bits == 4):
        raise ValueError(f"activations in {'split' if x.is_split else 'plain'} order for {shape.bits}-bit weights")
    residual = epilogue.residual
    if (epilogue.kind == "residual") != (residual is not None):
        raise ValueError(f"epilogue {epilogue.kind} with {'no' if residual is None else 'a'} residual")
    if residual is not None and (residual.shape != (num_tokens, shape.N) or residual.stride(1) != 1):
        raise ValueError(f"residual is {tuple(residual.shape)} {residual.stride()}, needed {(num_tokens, shape.N)}")


def _math(x: Activations) -> Math | None:
    """The arithmetic that activations are for; None if there is none for their dtype."""
    if isinstance(x, RawActivations):
        gain_dtype = torch.bfloat16 if x.norm is None else x.norm[0].dtype
        return "raw" if x.values.dtype == gain_dtype == torch.bfloat16 else None
    return _MATH_DTYPES.get(x.values.dtype)


def _grouped(x: Activations, weight: PackedMatrix) -> GroupedActivations:
    return x.grouped(is_split=weight.bits == 4) if isinstance(x, RawActivations) else x


def _check_limits(x: Activations, weight: PackedMatrix, shape: GemvShape) -> None:
    math = _math(x)
    is_known = shape.bits in PACKED_BITS and (shape.bits == 4 or math != "float")
    groups_fit = shape.group_size % 32 == 0 and shape.K % shape.group_size == 0 and shape.K % ACTIVATION_GROUP == 0
    aligned = shape.group_size % 128 == 0 or 128 % shape.group_size == 0
    if isinstance(x, GroupedActivations) and x.group not in (ACTIVATION_GROUP, GATED_GROUP):
        raise BackendError(f"activations in groups of {x.group}, the kernels take {ACTIVATION_GROUP} and {GATED_GROUP}")
    if math is None or not is_known or not groups_fit or not aligned or weight.group_index is not None:
        raise BackendError(
            f"no kernel multiplies {shape.bits}-bit weights [{shape.N:,}, {shape.K:,}] in groups of {shape.group_size}"
            f"{'' if weight.group_index is None else ' with act-order'} with {x.values.dtype}: needed are 4 or 8 bits, "
            f"groups of 32, 64 or a multiple of 128 features, and int8 (or bf16 or fp16 for 4 bits)"
        )
    if not 1 <= x.values.shape[0] <= MAX_TOKENS or weight.words.numel() >= 2**31:
        raise BackendError(
            f"{x.values.shape[0]} rows and {weight.words.numel():,} words, at most {MAX_TOKENS} rows and 2**31 words"
        )


def _matrix(weight: PackedMatrix, dtype: torch.dtype) -> Tensor:
    codes = unpack_codes(weight.words, weight.bits, dtype).sub_(2 ** (weight.bits - 1))
    scales = weight.scales.to(dtype).repeat_interleave(weight.group_size, dim=1)
    return codes.mul_(scales[:, : codes.shape[1]])


def _finished(v: Tensor, epilogue: Epilogue) -> Tensor:
    if epilogue.kind == "swiglu":
        gate, up = v.chunk(2, dim=1)
        return functional.silu(gate) * up
    if epilogue.residual is not None:
        return epilogue.residual.to(v.dtype) + epilogue.factor * v
    return epilogue.factor * v
