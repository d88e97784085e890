"""The block choice at the released sizes, as it is launched on each card."""

import torch
from compile_case import ARCHITECTURES, CompileCase

from salalocal.kernels.backend import entry_of_card
from salalocal.kernels.block_topk import BlockGeometry, decode, prefill
from salalocal.kernels.block_topk.decode import (
    _choose_kernel,
    _normalise_kernel,
    _score_kernel,
    _weigh_kernel,
    choose_warps,
    decode_constants,
)
from salalocal.kernels.block_topk.prefill import _block_topk_prefill_kernel, prefill_constants

RELEASED = BlockGeometry(kernel_size=32, kernel_stride=16, block_size=64, init_blocks=1, window_size=2048, topk=64)
KNOWN_SPILL_BYTES = 800  # around the lists, which are appended to and searched some thirty times a tile
POINTERS = {"q_ptr": "*bf16", "k1_ptr": "*bf16", "k2_ptr": "*bf16", "picks_ptr": "*i64"}
LISTS = {"floats_ptr": "*fp32", "ints_ptr": "*i32"}
SIZES = {"first_position": "i32", "num_rows": "i32", "num_groups": "i32", "num_tiles": "i32", "log2_scale": "fp32"}
STRIDES = [f"stride_{axis}" for axis in ("qb", "qt", "qh", "k1b", "k1n", "k1h", "k2b", "k2n", "k2h", "pb", "pt", "pg")]


def prefill_case(launch: prefill.PrefillLaunch, architecture: int) -> CompileCase:
    """The kernel of many rows."""
    keys = dict.fromkeys(("k1_ptr", "k2_ptr"), f"tensordesc<bf16[1, 1, {launch.tile_keys}, 128]>")
    return CompileCase(
        f"prefill sm_{architecture}",
        _block_topk_prefill_kernel,
        {**POINTERS, **(keys if launch.has_tma else {}), **LISTS, **SIZES, **dict.fromkeys(STRIDES, "i32")},
        prefill_constants(launch, RELEASED, 16, 128, torch.bfloat16),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        divisible=tuple(name for name in (*POINTERS, *LISTS, *STRIDES) if not launch.has_tma or name not in keys),
        architectures=(architecture,),
        max_registers=launch.max_registers,
        max_spill_bytes=KNOWN_SPILL_BYTES,
    )


CASES = [prefill_case(entry_of_card(prefill.LAUNCH, architecture), architecture) for architecture in ARCHITECTURES]


def decode_cases(architecture: int, num_rows: int) -> list[CompileCase]:
    """The launches of a step of so many rows on two million tokens."""
    launch = entry_of_card(decode.LAUNCH, architecture)
    constants = decode_constants(launch, RELEASED, 16, torch.empty(1, num_rows, 32, 128, dtype=torch.bfloat16))
    tile = constants["ROWS"] * 16
    pointers = {"q_ptr": "*bf16", "k1_ptr": "*bf16", "k2_ptr": "*bf16", "position_ptr": "*i64"}
    pointers |= {"parts_ptr": "*fp32", "starts_ptr": "*fp32", "ends_ptr": "*fp32", "picks_ptr": "*i64"}
    pointers |= {"weights_ptr": "*fp32"}
    strides = dict.fromkeys(("stride_qt", "stride_qh", "stride_kn", "stride_kh", "stride_pt", "stride_pg"), "i32")
    counts = dict.fromkeys(("num_rows", "num_parts", "num_groups", "capacity", "num_picks", "sparse_from"), "i32")
    kernels = {
        _normalise_kernel: {"TILE": tile},
        _score_kernel: {"PARTS": 128},
        _choose_kernel: {"BLOCKS": 2**15, "PICKS_TILE": 128},
        _weigh_kernel: {"PICKS_TILE": 128},
    }
    warps = {_choose_kernel: choose_warps(2**15), _weigh_kernel: 1}
    return [
        CompileCase(
            f"decode {kernel.__name__} {num_rows} rows",
            kernel,
            {**pointers, **strides, **counts, "log2_scale": "fp32"},
            {
                name: value
                for name, value in (constants | own | {"PDL": architecture >= 90}).items()
                if name in kernel.arg_names
            },
            num_warps=warps.get(kernel, launch.num_warps),
            num_stages=launch.num_stages,
            divisible=tuple(name for name in (*pointers, *strides) if name in kernel.arg_names),
            max_spill_bytes=120 if kernel is _choose_kernel else 0,  # 32 scores a thread at two million tokens
            architectures=(architecture,),
        )
        for kernel, own in kernels.items()
    ]


CASES += [case for architecture in (86, 90) for num_rows in (1, 4) for case in decode_cases(architecture, num_rows)]
