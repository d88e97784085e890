"""Bringing blocks of the released sizes together: rows of codes, rows of bf16, scales."""

from compile_case import CompileCase

from salalocal.kernels.block_gather import NUM_WARPS, _gather_blocks_kernel

STRIDES = ("stride_rn", "stride_rh", "stride_b")


def case(kind: str, dim: int) -> CompileCase:
    """Rows of one kind; those of scales lie side by side."""
    fixed = {"stride_rn": 1} if dim == 1 else {}
    types = {"rows_ptr": f"*{kind}", "out_ptr": f"*{kind}", "blocks_ptr": "*i64", "num_tokens": "i32"}
    return CompileCase(
        f"gather {kind} x {dim}",
        _gather_blocks_kernel,
        types | {name: "i32" for name in STRIDES if name not in fixed},
        {"BLOCK": 64, "DIM": dim, **fixed},
        num_warps=NUM_WARPS,
        divisible=("rows_ptr", "out_ptr", "blocks_ptr", *(() if dim == 1 else ("stride_rn",)), "stride_rh"),
    )


CASES = [case("i8", 128), case("bf16", 128), case("bf16", 1)]
