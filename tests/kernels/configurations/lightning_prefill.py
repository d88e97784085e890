"""Every setting of the lightning prefill kernel that ships, at the released shape, and the small kernels around it."""

from typing import Any

from compile_case import CompileCase

from salalocal.kernels.gated_norm import NUM_WARPS, _gated_norm_kernel
from salalocal.kernels.lightning_prefill import LAUNCHES, LOG2_E, PrefillLaunch, _prefill_kernel
from salalocal.kernels.qk_norm_rope import _norm_rope_kernel

HEADS = {
    "NUM_HEADS": 32,
    "PADDED_HEADS": 32,
    "KEY_DIM": 128,
    "VALUE_DIM": 128,
    "EPS": 1e-6,
    "FAST": True,
    "LOG2_E": LOG2_E,
}
NARROW = ("q_ptr", "k_ptr", "v_ptr", "o_ptr", "y_ptr", "gate_ptr", "x_ptr", "weight_ptr")
WIDE = ("state_ptr", "new_state_ptr", "states_ptr", "slopes_ptr", "frequencies_ptr")
STRIDES = tuple(f"{name}_stride_{axis}" for name in "qkvo" for axis in "bth")
STRIDES += ("x_stride", "gate_stride", "stride_b", "stride_t", "stride_h")
POINTERS = dict.fromkeys(NARROW, "*bf16") | dict.fromkeys(WIDE, "*fp32")
TYPES = (
    POINTERS
    | {"positions_ptr": "*i64", "counters_ptr": "*i32", "scale": "fp32"}
    | dict.fromkeys(("num_tokens", "segment_tokens", "num_rows", *STRIDES), "i32")
)
DIVISIBLE = (*POINTERS, "counters_ptr", *STRIDES)
ARCHITECTURES = {80: (80, 86, 89), 90: (90,), 100: (120,)}  # that take an entry of LAUNCHES


def case(name: str, kernel: Any, constants: dict[str, Any], **settings: Any) -> CompileCase:
    """A kernel with the constants that it takes of these."""
    taken = {key: value for key, value in constants.items() if key in kernel.arg_names}
    divisible = tuple(key for key in DIVISIBLE if key in kernel.arg_names and key not in taken)
    return CompileCase(name, kernel, TYPES, taken, num_stages=1, divisible=divisible, **settings)


def prefill_case(launch: PrefillLaunch, has_state: bool, cards: tuple[int, ...]) -> CompileCase:
    constants = HEADS | {
        "CHUNK": launch.chunk,
        "VALUES": launch.values,
        "LAG": launch.lag,
        "SUM_STAGES": launch.sum_stages,
        "OUTPUT_STAGES": launch.output_stages,
        "HAS_STATE": has_state,
    }
    constants |= {} if has_state else {"state_ptr": None}
    name = f"prefill {launch.chunk}x{launch.values} {launch.num_warps}w {launch.sum_stages}+{launch.output_stages}s"
    name += "" if has_state else ", no state"
    return case(name, _prefill_kernel, constants, num_warps=launch.num_warps, architectures=cards)


CASES = [
    *(prefill_case(LAUNCHES[oldest], has, ARCHITECTURES[oldest]) for oldest in LAUNCHES for has in (False, True)),
    case("q/k norm and RoPE", _norm_rope_kernel, HEADS | {"ROWS": 32, "HALF": 64}, num_warps=4),
    case("gated norm", _gated_norm_kernel, HEADS | {"CHANNELS": 4096, "WIDTH": 4096}, num_warps=NUM_WARPS),
]
