"""Attention over picked blocks at the released sizes, as it is launched on each card."""

import torch
from compile_case import ARCHITECTURES, CompileCase

from salalocal.kernels.backend import entry_of_card
from salalocal.kernels.block_attention import decode, prefill
from salalocal.kernels.block_attention.decode import (
    _attend_part_kernel,
    _join_parts_kernel,
    decode_constants,
)
from salalocal.kernels.block_attention.prefill import (
    _NO_BLOCK,
    _block_attention_prefill_kernel,
    _merge_blocks_kernel,
    prefill_constants,
)

TENSORS = {"q_ptr": "*bf16", "k_ptr": "*bf16", "v_ptr": "*bf16", "out_ptr": "*bf16"}
UNIONS = {"union_ptr": "*i32", "counts_ptr": "*i32"}
COUNTS = dict.fromkeys(("first_position", "num_rows", "num_keys", "num_groups", "capacity"), "i32")
STRIDES = [f"stride_{axis}" for axis in ("qb", "qt", "qh", "kb", "kn", "kh", "vb", "vn", "vh", "ob", "ot", "oh")]
CASES = [
    CompileCase(
        f"prefill sm_{architecture}",
        _block_attention_prefill_kernel,
        {**TENSORS, **UNIONS, **COUNTS, "log2_scale": "fp32", **dict.fromkeys(STRIDES, "i32")},
        prefill_constants(entry_of_card(prefill.LAUNCH, architecture), 16, 128, 64, torch.bfloat16),
        num_warps=entry_of_card(prefill.LAUNCH, architecture).num_warps,
        num_stages=entry_of_card(prefill.LAUNCH, architecture).num_stages,
        divisible=(*TENSORS, *UNIONS, *STRIDES),
        architectures=(architecture,),
    )
    for architecture in ARCHITECTURES
] + [
    CompileCase(
        "merge_blocks",
        _merge_blocks_kernel,
        {"blocks_ptr": "*i64", **UNIONS}
        | dict.fromkeys(("num_rows", "num_groups", "num_picks", "capacity"), "i32")
        | dict.fromkeys(("stride_b", "stride_t", "stride_g"), "i32"),
        {"ROWS": entry_of_card(prefill.LAUNCH, 80).rows, "PICKS": 128, "NO_BLOCK": _NO_BLOCK},
        num_warps=1,
        divisible=("blocks_ptr", *UNIONS, "stride_b", "stride_t", "stride_g"),
    )
]

DECODE_TYPES = {
    **dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), "*bf16"),
    **dict.fromkeys(("picks_ptr", "position_ptr"), "*i64"),
    **dict.fromkeys(("outs_ptr", "weights_ptr"), "*fp32"),
    **dict.fromkeys([f"stride_{axis}" for axis in ("qt", "qh", "kn", "kh", "vn", "vh", "pt", "pg", "ot", "oh")], "i32"),
    **dict.fromkeys(("num_picks", "parts"), "i32"),
    "log2_scale": "fp32",
}
DECODE_ALIGNED = [name for name in DECODE_TYPES if name.endswith("_ptr") or name.startswith("stride_")]
CASES += [
    CompileCase(
        f"decode {kernel.__name__}",
        kernel,
        DECODE_TYPES,
        constants,
        num_warps=4,
        num_stages=entry_of_card(decode.LAUNCH, 80).num_stages,
        divisible=tuple(name for name in DECODE_ALIGNED if name in kernel.arg_names),
    )
    for kernel, constants in (
        (_attend_part_kernel, decode_constants(entry_of_card(decode.LAUNCH, 80), 16, 128, 64, torch.bfloat16)),
        (_join_parts_kernel, {"HEADS": 16, "DIM": 128, "PARTS": 64}),
    )
]
