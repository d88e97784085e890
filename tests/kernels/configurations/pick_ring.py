"""The copy of picks into the ring."""

from compile_case import CompileCase

from salalocal.kernels.pick_ring import NUM_WARPS, _keep_picks_kernel

POINTERS = {"kept_ptr": "*i32", "kept_weights_ptr": "*fp16", "picks_ptr": "*i64", "position_ptr": "*i64"}
POINTERS |= {"weights_ptr": "*fp32"}
SIZES = dict.fromkeys(("num_rows", "num_heads", "num_picks", "stride_pl", "stride_pt", "stride_ph"), "i32")

CASES = [
    CompileCase(
        "picks of 96 blocks", _keep_picks_kernel, POINTERS | SIZES, {"PICKS": 128}, NUM_WARPS, 3, tuple(POINTERS)
    ),
]
