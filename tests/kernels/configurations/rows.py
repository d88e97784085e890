"""The kernels over rows that ship: norm, gates, embedding, greedy choice, and the gate that quantizes."""

from typing import Any

from compile_case import CompileCase

from salalocal.kernels.embedding import NUM_WARPS, _embed_kernel
from salalocal.kernels.gate import BLOCK_CHANNELS, _gated_rows_kernel
from salalocal.kernels.int4.activations_by_row import _gate_quantize_kernel, _num_warps
from salalocal.kernels.norm import _rms_norm_kernel
from salalocal.kernels.rows import num_warps_for
from salalocal.kernels.sampling import _COLDEST, BLOCK_ENTRIES, _cut_kernel, _draw_kernel, _greedy_kernel

NARROW = dict.fromkeys(("x_ptr", "first_ptr", "second_ptr", "weight_ptr", "table_ptr", "y_ptr"), "*bf16")
WIDE = dict.fromkeys(("sums_ptr", "temperature_ptr", "min_p_ptr", "top_p_ptr", "uniforms_ptr"), "*fp64")
WIDE |= {"ranked_ptr": "*fp32"} | dict.fromkeys(("best_ptr", "step_ptr", "cuts_ptr", "top_k_ptr"), "*i64")
WIDE |= {"ids_ptr": "*i64", "logits_ptr": "*fp32", "keys_ptr": "*i64", "tokens_ptr": "*i64"}
STRIDES = dict.fromkeys(("x_stride", "first_stride", "second_stride", "table_stride", "row_stride"), "i32")
SIZES = dict.fromkeys(("num_rows", "num_channels", "num_entries", "num_uniforms"), "i32")
TYPES = NARROW | WIDE | STRIDES | SIZES | {"scale": "fp32", "is_damaged_ptr": "*i32", "counters_ptr": "*i32"}
DIVISIBLE = (*NARROW, *WIDE, *STRIDES, "num_channels", "is_damaged_ptr", "counters_ptr")
WORDS = {"x": "*i32", "gate": "*i32", "weight": "*i32", "codes": "*i8", "scales": "*fp32", "eps": "fp32"}
WORDS |= dict.fromkeys(("x_stride", "gate_stride", "num_columns"), "i32")
GATED_WARPS = num_warps_for(BLOCK_CHANNELS)


def case(name: str, kernel: Any, num_warps: int, **constants: Any) -> CompileCase:
    divisible = tuple(key for key in DIVISIBLE if key in kernel.arg_names)
    return CompileCase(name, kernel, TYPES, constants, num_warps, 3, divisible)


def gate_quantize_case(has_norm: bool) -> CompileCase:
    constants = {"NORM": has_norm, "LIMIT": 127.0, "BLOCK": 4096, "IN_WORDS": True, "HAS_ASM": True}
    divisible = tuple(key for key in WORDS if key != "eps")
    name = "norm, gate, quantize" if has_norm else "gate, quantize"
    return CompileCase(name, _gate_quantize_kernel, WORDS, constants, _num_warps(4096), 3, divisible)


CASES = [
    case("norm of 4096", _rms_norm_kernel, num_warps_for(4096), EPS=1e-6, CHANNELS=4096, WIDTH=4096, ROWS=1),
    case("norm of heads", _rms_norm_kernel, num_warps_for(2048), EPS=1e-6, CHANNELS=128, WIDTH=128, ROWS=16),
    case("gate", _gated_rows_kernel, GATED_WARPS, IS_SWIGLU=False, BLOCK=BLOCK_CHANNELS, FAST=True),
    case("swiglu", _gated_rows_kernel, GATED_WARPS, IS_SWIGLU=True, BLOCK=BLOCK_CHANNELS, FAST=True),
    case("embedding", _embed_kernel, NUM_WARPS, BLOCK=1024),
    case("draw", _draw_kernel, 4, BLOCK=BLOCK_ENTRIES, SLICES=128, COLDEST=_COLDEST, HAS_CUT=True),
    case("cut", _cut_kernel, 4, BLOCK=BLOCK_ENTRIES, SLICES=128, COLDEST=_COLDEST),
    case("greedy", _greedy_kernel, 4, BLOCK=BLOCK_ENTRIES, SLICES=128),
    gate_quantize_case(has_norm=False),
    gate_quantize_case(has_norm=True),
]
