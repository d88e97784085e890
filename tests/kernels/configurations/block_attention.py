"""Attention over picked blocks at the released sizes, as it is launched on each card."""

from typing import Any

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

TENSORS = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "k_scales_ptr", "v_scales_ptr", "out_ptr"), "*bf16")
CODES = dict.fromkeys(("k_ptr", "v_ptr"), "*i8")
SCALES = ("k_scales_ptr", "v_scales_ptr")
UNIONS = {"union_ptr": "*i32", "counts_ptr": "*i32"}
COUNTS = dict.fromkeys(("first_position", "num_rows", "num_keys", "num_groups", "capacity"), "i32")
STRIDES = [
    f"stride_{axis}"
    for axis in ("qb", "qt", "qh", "kb", "kn", "kh", "vb", "vn", "vh", "ob", "ot", "oh", "sb", "sn", "sh")
]
CASES = [
    CompileCase(
        f"prefill {'int8' if is_quantized else 'bf16'} sm_{architecture}",
        _block_attention_prefill_kernel,
        {
            **TENSORS,
            **(CODES if is_quantized else {}),
            **UNIONS,
            **COUNTS,
            "log2_scale": "fp32",
            **dict.fromkeys(STRIDES, "i32"),
        },
        prefill_constants(entry_of_card(prefill.LAUNCH, architecture), 16, 128, 64, torch.bfloat16)
        | ({"stride_sn": 1} if is_quantized else dict.fromkeys(SCALES)),
        num_warps=entry_of_card(prefill.LAUNCH, architecture).num_warps,
        num_stages=entry_of_card(prefill.LAUNCH, architecture).num_stages,
        max_registers=entry_of_card(prefill.LAUNCH, architecture).max_registers,
        divisible=tuple(
            name
            for name in (*TENSORS, *UNIONS, *STRIDES)
            if name != "stride_sn" and (is_quantized or name not in SCALES)
        ),
        architectures=(architecture,),
    )
    for architecture in ARCHITECTURES
    for is_quantized in (False, True)
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
    **TENSORS,
    "gate_ptr": "*bf16",
    **dict.fromkeys(("picks_ptr", "position_ptr"), "*i64"),
    **dict.fromkeys(("outs_ptr", "weights_ptr"), "*fp32"),
    **dict.fromkeys(
        [f"stride_{axis}" for axis in ("qt", "qh", "kn", "kh", "vn", "vh", "sh", "pt", "pg", "gt", "ot", "oh")], "i32"
    ),
    **dict.fromkeys(("num_picks", "parts"), "i32"),
    "log2_scale": "fp32",
}
DECODE_ALIGNED = [name for name in DECODE_TYPES if name.endswith("_ptr") or name.startswith("stride_")]
PART = decode_constants(16, 128, 64, torch.bfloat16) | {"stride_sn": 1}
JOIN = {"HEADS": 16, "DIM": 128, "PARTS": 128}


def decode_case(
    kernel: Any, constants: dict[str, Any], is_quantized: bool, architectures: tuple[int, ...]
) -> CompileCase:
    """A launch of a step, with the gate; a dependent one on the cards that have them."""
    absent = dict.fromkeys([] if is_quantized else [name for name in SCALES if name in kernel.arg_names])
    return CompileCase(
        f"decode {'int8' if is_quantized else 'bf16'} {kernel.__name__}",
        kernel,
        DECODE_TYPES | (CODES if is_quantized else {}),
        constants | absent | {"PDL": min(architectures) >= 90},
        num_warps=entry_of_card(decode.LAUNCH, min(architectures)).num_warps if kernel is _attend_part_kernel else 4,
        divisible=tuple(name for name in DECODE_ALIGNED if name in kernel.arg_names and name not in absent),
        architectures=architectures,
    )


CASES += [
    decode_case(kernel, constants, is_quantized, architectures)
    for kernel, constants, quantized in (
        (_attend_part_kernel, PART, (False, True)),
        (_join_parts_kernel, JOIN, (False,)),
    )
    for is_quantized in quantized
    for architectures in ((80, 86, 89), (90, 120))
]
