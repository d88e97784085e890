"""What memory_read launches: one configuration."""

from compile_case import CompileCase

from salalocal.kernels import memory_read

CASES = [
    CompileCase(
        name="memory_read",
        kernel=memory_read._read_sums_kernel,
        types={"words": "*i32", "sums": "*i32"},
        constants={"PIECE": memory_read.PIECE, "STEP": memory_read._STEP},
        num_warps=memory_read._WARPS,
        divisible=("words", "sums"),
    )
]
