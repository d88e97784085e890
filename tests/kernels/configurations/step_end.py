"""The end of a step, for one row and for as many as there can be."""

from compile_case import CompileCase

from salalocal.kernels.step_end import _end_step_kernel

LONG = ("found_ptr", "draw_ptr", "fed_ptr", "position_ptr", "report_ptr")
TYPES = dict.fromkeys(LONG, "*i64") | dict.fromkeys(("is_damaged_ptr", "count_ptr", "parity_ptr"), "*i32")
CASES = [
    CompileCase(f"end of {rows} rows", _end_step_kernel, TYPES | {"num_rows": "i32"}, constants | {"ROWS": rows}, 1, 1)
    for rows, constants in ((1, {"num_rows": 1}), (8, {}))
]
