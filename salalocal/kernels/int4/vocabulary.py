"""The likeliest token behind every row, from the last hidden states and the packed output matrix: logits are not
written; for greedy steps of an answer.

    token[m] = the first n of the largest round( W x[m] )[n]        round: to bf16, as logits are stored

A logit and its index travel as one integer that sorts as the logit does and, among equals, puts the lower index first:
one for each program of the product, then the largest of them. So the choice is the one that `kernels.sampling` makes
from logits, and does not depend on the order of programs.
Shapes: x [M, K], M <= 16; tokens int64 [M]; is_damaged int32 [1], set to 1 if a logit is NaN or infinite.
"""

import torch
from torch import Tensor

from salalocal.kernels.backend import dependent_launch, tl, triton, use_triton
from salalocal.kernels.int4.gemv import (
    PLAIN,
    Activations,
    Epilogue,
    PackedMatrix,
    Scratch,
    int4_gemv_reference,
    int4_gemv_triton,
)

BLOCK_KEYS = 4096
NUM_WARPS = 8
_NO_KEY = tl.constexpr(-0x7FFFFFFFFFFFFFFF)


def likeliest_tokens_reference(x: Activations, weight: PackedMatrix, is_damaged: Tensor) -> Tensor:
    """By way of the logits: what a CPU runs."""
    logits = int4_gemv_reference(x, weight, PLAIN, torch.bfloat16).float()
    is_damaged.bitwise_or_(~torch.isfinite(logits.sum(dtype=torch.float64)))
    return torch.argmax(logits, dim=1)


@triton.jit
def _likeliest_kernel(keys_ptr, tokens_ptr, is_damaged_ptr, num_keys, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """One program: the largest key of a row, and the token that it stands for."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0)
    keys = tl.full([BLOCK], _NO_KEY, tl.int64)
    for start in range(0, num_keys, BLOCK):
        entries = start + tl.arange(0, BLOCK)
        loaded = tl.load(keys_ptr + row * num_keys + entries, mask=entries < num_keys, other=_NO_KEY)
        keys = tl.maximum(keys, loaded)
    best = tl.max(keys, axis=0)
    # Above it are the bits of an infinity: `epilogue.logit_key` makes damage the largest of all.
    if (best >> 32) >= 0x7F800000:
        tl.store(is_damaged_ptr, 1)
    tl.store(tokens_ptr + row, 0x7FFFFFFF - (best & 0xFFFFFFFF))


def likeliest_tokens_triton(
    x: Activations, weight: PackedMatrix, is_damaged: Tensor, scratch: Scratch | None = None
) -> Tensor:
    """Two launches. Raises: as `int4_gemv_triton`."""
    keys = int4_gemv_triton(x, weight, Epilogue("best"), scratch=scratch)
    tokens = torch.empty(len(keys), dtype=torch.int64, device=keys.device)
    _likeliest_kernel[(len(keys),)](
        keys,
        tokens,
        is_damaged,
        keys.shape[1],
        BLOCK=BLOCK_KEYS,
        num_warps=NUM_WARPS,
        **dependent_launch(keys.device),
    )
    return tokens


def likeliest_tokens(
    x: Activations, weight: PackedMatrix, is_damaged: Tensor, scratch: Scratch | None = None
) -> Tensor:
    """What a greedy step calls; `scratch` as for `int4_gemv_triton`."""
    if use_triton(x.values, weight.words):
        return likeliest_tokens_triton(x, weight, is_damaged, scratch)
    return likeliest_tokens_reference(x, weight, is_damaged)
