"""The block choice at the released sizes, as it is launched on each card."""

from typing import Any

import torch
from compile_case import ARCHITECTURES, CompileCase

from salalocal.kernels.backend import entry_of_card
from salalocal.kernels.block_topk import BlockGeometry, decode, decode_choice, prefill
from salalocal.kernels.block_topk.decode import _normalise_kernel, _score_kernel, decode_constants
from salalocal.kernels.block_topk.decode_choice import (
    _choose_kernel,
    _choose_listed_kernel,
    _shortlist_kernel,
    choice_constants,
    shortlist_constants,
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


def decode_case(kernel: Any, name: str, constants: dict[str, Any], warps: tuple[int, int], arch: int) -> CompileCase:
    """One launch of a step; `warps` and stages."""
    pointers = {"q_ptr": "*bf16", "k1_ptr": "*bf16", "k2_ptr": "*bf16", "position_ptr": "*i64"}
    pointers |= {"parts_ptr": "*fp32", "starts_ptr": "*fp32", "ends_ptr": "*fp32", "picks_ptr": "*i64"}
    pointers |= {"weights_ptr": "*fp32", "scores_ptr": "*fp32", "blocks_ptr": "*i32"}
    strides = dict.fromkeys(("stride_qt", "stride_qh", "stride_kn", "stride_kh", "stride_pt", "stride_pg"), "i32")
    counts = dict.fromkeys(("num_rows", "num_parts", "num_groups", "capacity", "num_picks", "sparse_from"), "i32")
    return CompileCase(
        f"decode {kernel.__name__} {name}",
        kernel,
        {**pointers, **strides, **counts, "log2_scale": "fp32"},
        {key: value for key, value in (constants | {"PDL": arch >= 90}).items() if key in kernel.arg_names},
        num_warps=warps[0],
        num_stages=warps[1],
        divisible=tuple(key for key in (*pointers, *strides, "capacity") if key in kernel.arg_names),
        architectures=(arch,),
    )


def score_cases(architecture: int, num_rows: int) -> list[CompileCase]:
    """What gives a step of so many rows its scores."""
    launch = entry_of_card(decode.LAUNCH, architecture)
    constants = decode_constants(launch, RELEASED, 16, torch.empty(1, num_rows, 32, 128, dtype=torch.bfloat16))
    constants |= {"TILE": constants["ROWS"] * 16, "PARTS": 128}
    warps = (launch.num_warps, launch.num_stages)
    return [
        decode_case(kernel, f"{num_rows} rows", constants, warps, architecture)
        for kernel in (_normalise_kernel, _score_kernel)
    ]


def choice_cases(architecture: int, num_tokens: int, has_weights: bool = True) -> list[CompileCase]:
    """What searches the scores of a step where there is room for so many tokens."""
    launch = entry_of_card(decode_choice.LAUNCH, architecture)
    capacity = launch.room(num_tokens // 64 - 31)
    constants = choice_constants(RELEASED) | {"PICKS_TILE": 128, "HAS_WEIGHTS": has_weights, "BLOCKS": capacity}
    name = f"{num_tokens >> 10}K{' with weights' if has_weights else ''}"
    if capacity <= launch.whole_blocks:
        return [decode_case(_choose_kernel, name, constants, (launch.num_warps(capacity), 3), architecture)]
    lists = shortlist_constants(launch, RELEASED, capacity)
    listed = lists["PARTS"] * lists["ROOM"]
    constants |= lists | {"LISTED": listed}
    sizes = {_shortlist_kernel: launch.part_blocks, _choose_listed_kernel: listed}
    return [
        decode_case(kernel, name, constants, (launch.num_warps(size), 3), architecture)
        for kernel, size in sizes.items()
    ]


ROOMS = [2**17, 2**18, 2**20, 2**21, 2**22]
for architecture in ARCHITECTURES:
    CASES += [case for num_rows in (1, 4) for case in score_cases(architecture, num_rows)]
    CASES += [case for num_tokens in ROOMS for case in choice_cases(architecture, num_tokens)]
    CASES += choice_cases(architecture, 2**20, has_weights=False)
