"""Every launch of the products of a few rows that ships, at the released shapes, and the kernels around them."""

from collections.abc import Iterator
from typing import Any

from compile_case import CompileCase

from salalocal.kernels.backend import PDL_CAPABILITY
from salalocal.kernels.int4.activations_by_group import (
    GROUPS_PER_PROGRAM,
    NORM_WARPS,
    NUM_WARPS,
    _grouped_activations_kernel,
)
from salalocal.kernels.int4.gemv.launch import LAUNCH, Launch, StreamLaunch, TileLaunch
from salalocal.kernels.int4.gemv.stream import GATED_GROUP, _int4_gemv_stream_kernel
from salalocal.kernels.int4.gemv.tiles import _int4_gemv_tiles_kernel
from salalocal.kernels.int4.gemv.words import _int4_gemv_words_kernel
from salalocal.kernels.int4.vocabulary import BLOCK_KEYS, _likeliest_kernel
from salalocal.kernels.int4.vocabulary import NUM_WARPS as LIKELIEST_WARPS

# Part of the table -> the architectures that stand for those which read it; every line is compiled for these, and once
# for those that differ from them in nothing that is measured here.
STANDING_FOR = {80: (86,), 90: (90, 120)}
OTHERS = (80, 89)
NOT_ALONE = (("int8", 8, 2), ("int8", 8, 8))  # lines whose neighbours do more with the same launch
POINTERS = {"x_ptr": "*i32", "x_scales_ptr": "*fp32", "words_ptr": "*i32", "scales_ptr": "*bf16", "out_ptr": "*bf16"}
NUMBERS = {"factor": "fp32", "num_tokens": "i32", "num_rows": "i32"}
STRIDES = {"residual_stride": "i32", "out_stride": "i32"}
# The epilogues of the released shapes [N, K]; any other shape is plain.
EPILOGUES = {(32768, 4096): "swiglu", (4096, 16384): "residual", (4096, 4096): "residual"}


def product_case(
    launch: Launch,
    key: tuple[str, int, int],
    shape: tuple[int, int],
    architectures: tuple[int, ...],
    epilogue: str = "residual",
    is_gated: bool = False,
) -> CompileCase:
    """`is_gated`: what it gates leaves quantized."""
    math, bits, tokens = key
    constants: dict[str, Any] = {"K": shape[1], "GROUP": 128, "BITS": bits, "EPILOGUE": epilogue}
    constants["PDL"] = min(architectures) >= PDL_CAPABILITY
    constants |= {"ROWS": launch.rows, "NATIVE": True}
    types = POINTERS | NUMBERS | STRIDES | {"residual_ptr": "*bf16"}
    if epilogue == "best":
        types |= {"residual_ptr": "*i64", "out_ptr": "*i64"}
    kernel: Any
    if isinstance(launch, TileLaunch):
        kernel, stages = _int4_gemv_tiles_kernel, launch.num_stages
        del types["words_ptr"]
        types |= {"x_ptr": "*i8" if math == "int8" else "*bf16", "octets_ptr": "*i8"}
        types |= {"partials_ptr": "*fp32", "tickets_ptr": "*i32"}
        constants |= {"TOKENS": max(tokens, 8), "SPLIT": launch.split, "STAGES": stages, "UNROLL": launch.unroll}
        constants["AHEAD"] = launch.ahead
    elif isinstance(launch, StreamLaunch):
        kernel, stages = _int4_gemv_stream_kernel, 1
        types |= {"gain_ptr": "*i32", "eps": "fp32", "x_scales_ptr": "*i32"}
        types |= {"codes_ptr": "*i8" if is_gated else "*bf16", "code_scales_ptr": "*fp32" if is_gated else "*bf16"}
        constants |= {"TOKENS": tokens, "SPAN": launch.span, "AHEAD": launch.ahead, "RAW": True}
        constants |= {"X_GROUP": 128, "UNIT": 2 * GATED_GROUP // launch.rows if is_gated else 1}
        constants["NORM"] = epilogue != "residual"
        del constants["BITS"]
    else:
        kernel, stages = _int4_gemv_words_kernel, 1
        constants |= {"TOKENS": tokens, "WORDS": min(launch.words, shape[1] * bits // 32), "X_GROUP": 128}
        if (bits, shape) == (4, (4096, 16384)):
            constants["X_GROUP"] = GATED_GROUP
    return CompileCase(
        name=f"{math} {bits} bit M={tokens} {shape[0]}x{shape[1]} {launch} {epilogue}{' quantized' * is_gated}",
        kernel=kernel,
        types=types,
        constants=constants,
        num_warps=launch.num_warps,
        num_stages=stages,
        divisible=(*(name for name in types if name.endswith("_ptr")), "num_rows", *STRIDES),
        architectures=architectures,
    )


def weight_of(launch: Launch) -> float:
    """What grows as registers and shared memory do."""
    if isinstance(launch, TileLaunch):
        return launch.rows * launch.num_stages * launch.unroll
    return launch.rows * (launch.span if isinstance(launch, StreamLaunch) else launch.words) / launch.num_warps


def product_cases() -> Iterator[CompileCase]:
    """The heaviest launch of every line of the table."""
    for capability, table in LAUNCH.items():
        for key, by_shape in table.items():
            if key not in NOT_ALONE:
                shape = max(by_shape, key=lambda shape: weight_of(by_shape[shape]))
                launch, shape = by_shape[shape], shape or ((73448, 4096) if key[1] == 8 else (4096, 16384))
                for epilogue in ("plain", "best") if key[1] == 8 else (EPILOGUES.get(shape, "plain"),):
                    yield product_case(launch, key, shape, STANDING_FOR[capability], epilogue)
    yield product_case(LAUNCH[80]["int8", 4, 4][None], ("int8", 4, 4), (4096, 4096), OTHERS)


# The form that norms and quantizes for itself, at the settings that benchmarks/int4_gemv.py tries first.
STREAMS = {
    (32768, 4096): StreamLaunch(8, 128, 8, 2, ahead=3),
    (4096, 4096): StreamLaunch(16, 128, 16, 1, ahead=3),
    (4096, 16384): StreamLaunch(4, 512, 16, 1, ahead=3),
}


def stream_cases() -> Iterator[CompileCase]:
    for shape, launch in STREAMS.items():
        yield product_case(launch, ("int8", 4, 1), shape, (90,), EPILOGUES[shape])
    for shape, launch in LAUNCH[90]["raw", 4, 1].items():
        if shape is not None and EPILOGUES.get(shape) == "swiglu":
            yield product_case(launch, ("raw", 4, 1), shape, (90, 120), "swiglu", is_gated=True)


def activation_cases() -> Iterator[CompileCase]:
    for norm, groups, features in ((True, 32, 4096), (False, GROUPS_PER_PROGRAM, 16384)):
        yield CompileCase(
            name=f"activations norm={norm} groups={groups}",
            kernel=_grouped_activations_kernel,
            types={
                "x_ptr": "*bf16",
                "weight_ptr": "*bf16",
                "values_ptr": "*i8",
                "scales_ptr": "*fp32",
                "row_stride": "i32",
                "eps": "fp32",
            },
            constants={"K": features, "GROUPS": groups, "NORM": norm, "QUANTIZE": True, "SPLIT": True, "PDL": True},
            num_warps=NORM_WARPS if norm else NUM_WARPS,
            divisible=("x_ptr", "weight_ptr", "values_ptr", "scales_ptr", "row_stride"),
            architectures=(90,),
        )


def vocabulary_cases() -> Iterator[CompileCase]:
    pointers = {"keys_ptr": "*i64", "tokens_ptr": "*i64", "is_damaged_ptr": "*i32"}
    for architectures in ((80, 86, 89), (90, 120)):
        yield CompileCase(
            name="likeliest",
            kernel=_likeliest_kernel,
            types={**pointers, "num_keys": "i32"},
            constants={"BLOCK": BLOCK_KEYS, "PDL": min(architectures) >= PDL_CAPABILITY},
            num_warps=LIKELIEST_WARPS,
            divisible=tuple(pointers),
            architectures=architectures,
        )


CASES = [*product_cases(), *stream_cases(), *activation_cases(), *vocabulary_cases()]
