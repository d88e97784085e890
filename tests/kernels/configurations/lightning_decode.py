"""Every launch of the lightning kernels for a step of an answer, at the released shape."""

from typing import Any

from compile_case import CompileCase

from salalocal.kernels.lightning_decode import LAUNCH, MAX_STEPS, _commit_pending_kernel, _speculative_step_kernel

NARROW = ("q_ptr", "k_ptr", "v_ptr", "o_ptr", "y_ptr", "gate_ptr", "keys_ptr", "values_ptr")
NARROW += ("q_weight_ptr", "k_weight_ptr", "o_weight_ptr")
WIDE = ("state_ptr", "decays_ptr", "frequencies_ptr")
POINTERS = dict.fromkeys(NARROW, "*bf16") | dict.fromkeys(WIDE, "*fp32") | {"counter_ptr": "*i32"}
STRIDES = (*(f"{name}_stride_{axis}" for name in "qkv" for axis in "th"), "gate_stride")
TYPES = (
    POINTERS
    | {"count_ptr": "*i32", "parity_ptr": "*i32", "position_ptr": "*i64", "scale": "fp32", "num_tokens": "i32"}
    | dict.fromkeys(STRIDES, "i32")
)
LAUNCHED = {"NUM_HEADS": 32, "HALF": 64, "VALUE_DIM": 128, "VALUES": LAUNCH.values, "STEPS": MAX_STEPS}
STEP = {**LAUNCHED, "EPS": 1e-6, "O_EPS": 1e-6, "WIDTH": 4096, "MAX_FINISHERS": 256, "FAST": True}


def case(name: str, kernel: Any, constants: dict[str, Any]) -> CompileCase:
    """One launch for all cards."""
    divisible = tuple(key for key in (*POINTERS, *STRIDES) if key in kernel.arg_names)
    return CompileCase(name, kernel, TYPES, constants, LAUNCH.num_warps, 1, divisible)


CASES = [
    case("step of 1 token", _speculative_step_kernel, {**STEP, "num_tokens": 1}),
    case("step of more tokens", _speculative_step_kernel, STEP),
    case("commit of pending tokens", _commit_pending_kernel, LAUNCHED),
]
