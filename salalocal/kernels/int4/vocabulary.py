"""From the last hidden state to tokens: logits, the largest of them, or the largest k; for greedy choice and sampling.

    logits[m] = factor * W x[m]        best: argmax        top_k: the k largest, in falling order

W is the output matrix in 8 bits, see `kernels.int4.gemv`. A logit and its index travel as one integer that sorts as the
logit does and, among equals, puts the lower index first: so the choice does not depend on the order of programs.
Shapes: x [M, K], M <= 16; logits fp32 [M, V]; values fp32 [M, k], indices int64 [M, k].
"""

import torch
from torch import Tensor

from salalocal.errors import BackendError
from salalocal.kernels.backend import dependent_launch, tl, triton, use_triton
from salalocal.kernels.int4.activations_by_group import GroupedActivations
from salalocal.kernels.int4.gemv import Epilogue, PackedMatrix, int4_gemv, int4_gemv_triton
from salalocal.kernels.int4.gemv.epilogue import ordered_key

MAX_TOP_K = 64
BLOCK_ENTRIES = 1024
SELECT_WARPS = 8
_BEST_BLOCK = 4096
_NO_KEY = tl.constexpr(-0x7FFFFFFFFFFFFFFF)


def vocabulary_logits(x: GroupedActivations, weight: PackedMatrix, factor: float) -> Tensor:
    """Shapes: [M, V] fp32."""
    return int4_gemv(x, weight, Epilogue(factor=factor), torch.float32)


def vocabulary_best_reference(x: GroupedActivations, weight: PackedMatrix, factor: float) -> tuple[Tensor, Tensor]:
    """The largest logit of every row and its index, the lowest among equals. Shapes: fp32 [M], int64 [M]."""
    values, indices = top_k_reference(vocabulary_logits(x, weight, factor), 1)
    return values[:, 0], indices[:, 0]


def top_k_reference(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest in falling order, the lower index first among equals."""
    values, indices = torch.sort(logits, dim=-1, descending=True, stable=True)
    return values[:, :k], indices[:, :k]


@triton.jit
def _value_of(key):
    """The logit that a key stands for."""
    ordered = (key >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _index_of(key):
    """The index that a key stands for."""
    return 0x7FFFFFFF - (key & 0xFFFFFFFF)


@triton.jit
def _best_key_kernel(keys_ptr, values_ptr, entries_ptr, num_keys, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """One program: the largest key of a row."""
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
    tl.store(values_ptr + row, _value_of(best))
    tl.store(entries_ptr + row, _index_of(best))


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


def vocabulary_best_triton(x: GroupedActivations, weight: PackedMatrix, factor: float) -> tuple[Tensor, Tensor]:
    """The same without writing logits: one key per program of the product, then the largest of them."""
    keys = int4_gemv_triton(x, weight, Epilogue("best", factor))
    values = torch.empty(len(keys), dtype=torch.float32, device=keys.device)
    indices = torch.empty(len(keys), dtype=torch.int64, device=keys.device)
    _best_key_kernel[(len(keys),)](
        keys, values, indices, keys.shape[1], BLOCK=_BEST_BLOCK, num_warps=SELECT_WARPS, **dependent_launch(keys.device)
    )
    return values, indices


def top_k_triton(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The same by blocks, and blocks of what is left of them. Raises: BackendError for k out of range."""
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
            num_warps=SELECT_WARPS,
            **dependent_launch(logits.device),
        )
        source, num_entries, is_logits = keys, blocks * kept, False
    ordered = (source[:, :k] >> 32).to(torch.int32)
    values = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)
    return values, 0x7FFFFFFF - (source[:, :k] & 0xFFFFFFFF)


def vocabulary_best(x: GroupedActivations, weight: PackedMatrix, factor: float) -> tuple[Tensor, Tensor]:
    """For a greedy decode step. Shapes: fp32 [M], int64 [M]."""
    if use_triton(x.values, weight.words):
        return vocabulary_best_triton(x, weight, factor)
    return vocabulary_best_reference(x, weight, factor)


def top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """For sampling. Shapes: fp32 [M, V] -> fp32 [M, k], int64 [M, k]."""
    if use_triton(logits) and k <= MAX_TOP_K:
        return top_k_triton(logits, k)
    return top_k_reference(logits, k)
