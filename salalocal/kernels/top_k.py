"""The k largest of every row in falling order, the lower index first among equals; for sampling.

Blocks of a row leave their k largest, blocks of those theirs, until one block is left. A value and its index travel as
one integer that sorts as the value does, see `int4.gemv.epilogue.ordered_key`.
Shapes: logits fp32 [R, V]; values fp32 [R, k], indices int64 [R, k].
"""

import torch
from torch import Tensor

from salalocal.errors import BackendError
from salalocal.kernels.backend import dependent_launch, tl, triton, use_triton
from salalocal.kernels.int4.gemv.epilogue import ordered_key

MAX_TOP_K = 64
BLOCK_ENTRIES = 1024
NUM_WARPS = 8
_NO_KEY = tl.constexpr(-0x7FFFFFFFFFFFFFFF)


def top_k_reference(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """By a sort: what a CPU runs."""
    values, indices = torch.sort(logits, dim=-1, descending=True, stable=True)
    return values[:, :k], indices[:, :k]


@triton.jit
def _select_kernel(
    source_ptr,
    keys_ptr,
    num_entries,
    BLOCK: tl.constexpr,
    KEPT: tl.constexpr,
    FROM_LOGITS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program: the KEPT largest keys of BLOCK entries of a row, in falling order."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(1)
    entries = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = entries < num_entries
    if FROM_LOGITS:
        loaded = tl.load(source_ptr + row * num_entries + entries, mask=inside, other=0.0)
        keys = tl.where(inside, ordered_key(loaded, entries), _NO_KEY)
    else:
        keys = tl.load(source_ptr + row * num_entries + entries, mask=inside, other=_NO_KEY)
    kept = tl.topk(keys, KEPT)
    first = (row * tl.num_programs(0) + tl.program_id(0)) * KEPT
    tl.store(keys_ptr + first + tl.arange(0, KEPT), kept)


def top_k_triton(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Launch by launch the k largest of every 1,024 that are left. Raises: BackendError for k out of range."""
    if not 1 <= k <= min(MAX_TOP_K, logits.shape[1]) or logits.dtype != torch.float32:
        raise BackendError(f"the {k} largest of {logits.shape[1]:,} {logits.dtype}, possible are 1 to {MAX_TOP_K} fp32")
    kept = max(2, triton.next_power_of_2(k))
    source, num_entries, is_logits = logits.contiguous(), logits.shape[1], True
    while is_logits or num_entries > kept:
        blocks = triton.cdiv(num_entries, BLOCK_ENTRIES)
        keys = torch.empty(len(logits), blocks * kept, dtype=torch.int64, device=logits.device)
        _select_kernel[blocks, len(logits)](
            source,
            keys,
            num_entries,
            BLOCK=BLOCK_ENTRIES,
            KEPT=kept,
            FROM_LOGITS=is_logits,
            num_warps=NUM_WARPS,
            **dependent_launch(logits.device),
        )
        source, num_entries, is_logits = keys, blocks * kept, False
    ordered = (source[:, :k] >> 32).to(torch.int32)
    values = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)
    return values, 0x7FFFFFFF - (source[:, :k] & 0xFFFFFFFF)


def top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """What sampling calls; more than the kernel keeps is the reference's."""
    if use_triton(logits) and k <= MAX_TOP_K:
        return top_k_triton(logits, k)
    return top_k_reference(logits, k)
