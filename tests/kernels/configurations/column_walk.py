"""What column_walk launches: one configuration, for any number of columns up to 128."""

from compile_case import CompileCase

from salalocal.kernels import column_walk

_POINTERS = {"block": "*fp32", "factor": "*fp32", "scales": "*fp32", "codes": "*u8", "errors": "*fp32"}
_SIZES = dict.fromkeys(("num_rows", "num_columns", "block_stride", "factor_stride", "scale_stride"), "i32")

CASES = [
    CompileCase(
        name=f"column_walk {columns}",
        kernel=column_walk._column_walk_kernel,
        types={**_POINTERS, **_SIZES},
        constants={"ZERO": 8, "ROUNDING": column_walk._ROUNDING, "ROWS": column_walk._ROWS, "COLUMNS": columns},
        num_warps=column_walk._NUM_WARPS,
        divisible=(*_POINTERS, "block_stride", "factor_stride", "scale_stride"),
    )
    for columns in (128, 64)
]
