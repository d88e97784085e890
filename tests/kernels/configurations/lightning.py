"""Every launch of the lightning kernels that ships, at the released shape."""

from typing import Any

from compile_case import CompileCase

from salalocal.kernels.gated_norm import _gated_norm_kernel
from salalocal.kernels.lightning_decode import LAUNCH, _gated_step_kernel, _recurrence_kernel
from salalocal.kernels.lightning_prefill import LAUNCHES, LOG2_E, _prefill_kernel
from salalocal.kernels.qk_norm_rope import _norm_rope_kernel

HEADS = {
    "NUM_HEADS": 32,
    "HALF": 64,
    "KEY_DIM": 128,
    "VALUE_DIM": 128,
    "EPS": 1e-6,
    "FAST": True,
    "LOG2_E": LOG2_E,
}
STRIDES = tuple(f"{name}_stride_{axis}" for name in "qkvo" for axis in "bth")
ROW_STRIDES = ("gate_stride_b", "x_stride", "gate_stride", "stride_b", "stride_t", "stride_h")
NARROW = ("q_ptr", "k_ptr", "v_ptr", "o_ptr", "y_ptr", "gate_ptr", "x_ptr", "states_ptr")
NARROW += ("q_weight_ptr", "k_weight_ptr", "o_weight_ptr", "weight_ptr")
WIDE = ("state_ptr", "new_state_ptr", "slopes_ptr", "decays_ptr", "frequencies_ptr")
POINTERS = dict.fromkeys(NARROW, "*bf16") | dict.fromkeys(WIDE, "*fp32")
TYPES = (
    POINTERS
    | {"positions_ptr": "*i64", "counters_ptr": "*i32", "count_ptr": "*i32", "scale": "fp32"}
    | dict.fromkeys(("num_tokens", "num_rows", *STRIDES, *ROW_STRIDES), "i32")
)
DIVISIBLE = (*POINTERS, "positions_ptr", "counters_ptr", "num_rows", *STRIDES, *ROW_STRIDES)
# Once a program, outside every loop, without the launch's limit on registers, which this test does not know.
KNOWN_SPILL_BYTES = {(90, True): 8}
ARCHITECTURES = {80: (80, 86, 89), 90: (90,), 100: (120,)}  # that take an entry of LAUNCHES


def fitted(kernel: Any, constants: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The constants that a kernel takes, and its divisible arguments."""
    taken = {key: value for key, value in constants.items() if key in kernel.arg_names}
    return taken, tuple(key for key in DIVISIBLE if key in kernel.arg_names and key not in taken)


def prefill_cases() -> list[CompileCase]:
    """The kernel under every launch, plain from no state, and on raw heads from a state."""
    found = []
    for capability, launch in LAUNCHES.items():
        for is_raw in (False, True):
            constants = {**HEADS, "CHUNK": launch.chunk, "VALUES": launch.values, "HAS_STATE": is_raw, "TURN": is_raw}
            if not is_raw:
                constants |= dict.fromkeys(("state_ptr", "q_weight_ptr", "positions_ptr", "frequencies_ptr"))
            taken, divisible = fitted(_prefill_kernel, constants)
            name = f"prefill {launch.chunk} x {launch.values}, {launch.num_warps} warps" + ", raw" * is_raw
            found.append(
                CompileCase(
                    name,
                    _prefill_kernel,
                    TYPES,
                    taken,
                    launch.num_warps,
                    1,
                    divisible,
                    ARCHITECTURES[capability],
                    KNOWN_SPILL_BYTES.get((capability, is_raw), 0),
                )
            )
    return found


def small_case(name: str, kernel: Any, num_warps: int, **more: Any) -> CompileCase:
    """A kernel of one launch for all cards, with norm and rotation."""
    taken, divisible = fitted(kernel, {**HEADS, "TURN": True, **more})
    return CompileCase(name, kernel, TYPES, taken, num_warps, 1, divisible)


def small_cases() -> list[CompileCase]:
    step = {"VALUES": LAUNCH.values, "count_ptr": None, "HAS_COUNT": False, "HAS_OUTPUT": True, "KEEPS_STATE": True}
    commit = {**step, "HAS_COUNT": True, "HAS_OUTPUT": False, "o_ptr": None}
    del commit["count_ptr"]
    gated = {"VALUES": LAUNCH.values, "O_EPS": 1e-6, "WIDTH": 4096}
    heads = {"NUM_HEADS": 32, "ROWS": 32}
    return [
        small_case("step", _recurrence_kernel, LAUNCH.num_warps, **step, num_tokens=1),
        small_case("verify", _recurrence_kernel, LAUNCH.num_warps, **{**step, "KEEPS_STATE": False}),
        small_case("commit", _recurrence_kernel, LAUNCH.num_warps, **commit),
        small_case("gated step", _gated_step_kernel, LAUNCH.num_warps, **gated),
        small_case("q/k norm and RoPE", _norm_rope_kernel, 4, **heads),
        small_case("gated norm", _gated_norm_kernel, 8, CHANNELS=4096, WIDTH=4096),
    ]


CASES = [*prefill_cases(), *small_cases()]
