"""The next tokens, chosen where the logits are: logits come in, token ids go out; for decode steps in a CUDA graph.

Filters, in this order, each on what the one before left:

    w = exp((logit - max) / temperature)
    top_k   the k largest logits, ties to the lower id; 0 for all
    top_p   the shortest run of the largest whose sum is at least top_p of what top_k left; ties as above
    min_p   the tokens with w >= min_p
    token = the first, by id, at which the sum of what is left exceeds u times the whole sum

All in float64. Temperature 0 is greedy: the first of the largest. With the same u, `engine.sampling` draws the same
token but where a sum comes within rounding of a limit: it adds up the same numbers in another order.
    greedy_tokens   temperature 0, one launch
    draw_tokens     without top_k and top_p, which alone need an order: two launches
    sample_tokens   any settings: three launches, and a sort by torch or, for a small top_k, `kernels.top_k`
Settings and random numbers lie on the device, so that one captured step serves every answer. A logit that is NaN or
infinite sets a flag there; the tokens are then ids of the vocabulary without meaning.
Shapes: logits fp32 [R, V], ids int64 [R].
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from salalocal.kernels.backend import tl, triton, use_triton
from salalocal.kernels.int4.gemv.epilogue import ordered_key
from salalocal.kernels.top_k import MAX_TOP_K, top_k_triton

BLOCK_ENTRIES = 1024
NUM_WARPS = 4
_COLDEST = 1e-300  # a temperature at which every token but the largest has weight 0, and no division is by 0
_NO_KEY = tl.constexpr(-0x7FFFFFFFFFFFFFFF)


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class SamplingTensors:
    """How tokens are chosen, on the device.

    Shapes: temperature, top_p, min_p float64 [1]; top_k int64 [1]; uniforms float64 [N], from [0, 1); step int64 [1];
    is_damaged int32 [1], counters int32 [R], zeros at first. Row r of a call takes uniforms[(step + r) % N]; whoever
    calls counts `step` up and refills. `is_damaged` is only ever set here; `counters` are left zero.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    uniforms: Tensor
    step: Tensor
    is_damaged: Tensor
    counters: Tensor


def new_sampling_tensors(device: torch.device, num_uniforms: int, num_rows: int = 1) -> SamplingTensors:
    """Settings of a greedy answer; fill them in place. `num_rows`: the most that one call brings."""

    def numbers(value: float, count: int = 1) -> Tensor:
        return torch.full((count,), value, dtype=torch.float64, device=device)

    return SamplingTensors(
        temperature=numbers(0.0),
        top_k=torch.zeros(1, dtype=torch.int64, device=device),
        top_p=numbers(1.0),
        min_p=numbers(0.0),
        uniforms=numbers(0.0, num_uniforms),
        step=torch.zeros(1, dtype=torch.int64, device=device),
        is_damaged=torch.zeros(1, dtype=torch.int32, device=device),
        counters=torch.zeros(num_rows, dtype=torch.int32, device=device),
    )


def sample_tokens_definition(logits: Tensor, sampling: SamplingTensors) -> Tensor:
    """The formula, row by row and token by token."""
    temperature, top_p, min_p = (float(x) for x in (sampling.temperature, sampling.top_p, sampling.min_p))
    tokens = []
    for r, row in enumerate(logits.double().tolist()):
        ranked = sorted(range(len(row)), key=lambda i: (-row[i], i))
        if temperature == 0:
            tokens.append(ranked[0])
            continue
        weights = torch.exp((torch.tensor(row, dtype=torch.float64) - row[ranked[0]]) / temperature).tolist()
        ranked = ranked[: int(sampling.top_k) or len(row)]
        limit, so_far = top_p * sum(weights[i] for i in ranked), 0.0
        kept: list[int] = []
        for i in ranked:
            if kept and so_far >= limit and top_p < 1:
                break
            so_far += weights[i]
            kept.append(i)
        kept = sorted(i for i in kept if weights[i] >= min_p and weights[i] > 0)
        drawn = float(sampling.uniforms[(int(sampling.step) + r) % len(sampling.uniforms)])
        drawn *= sum(weights[i] for i in kept)
        so_far, token = 0.0, kept[-1]
        for i in kept:
            so_far += weights[i]
            if so_far > drawn:
                token = i
                break
        tokens.append(token)
    return torch.tensor(tokens, dtype=torch.int64, device=logits.device)


def sample_tokens_reference(logits: Tensor, sampling: SamplingTensors) -> Tensor:
    """The same at once, without a look at any number: what a CPU runs."""
    sampling.is_damaged.bitwise_or_(~torch.isfinite(logits.sum(dtype=torch.float64)))
    num_rows, num_entries = logits.shape
    is_greedy = sampling.temperature == 0
    wide = logits.double()
    weights = torch.exp((wide - wide.amax(1, keepdim=True)) / sampling.temperature.clamp(min=_COLDEST))
    places = torch.arange(num_entries, device=logits.device)
    ids = torch.sort(logits, dim=1, descending=True, stable=True).indices  # stable: ties to the lower id
    count = torch.where(is_greedy, 1, torch.where(sampling.top_k > 0, sampling.top_k, num_entries))
    ranked = torch.where(places < count, weights.gather(1, ids), 0.0)
    cumulative = ranked.cumsum(1)
    before = cumulative.roll(1, 1)
    is_kept = (places == 0) | (before < sampling.top_p * cumulative[:, -1:]) | (sampling.top_p >= 1)
    ranked = torch.where(is_kept & (ranked >= sampling.min_p), ranked, 0.0)
    kept = torch.zeros_like(weights).scatter_(1, ids, ranked)
    cumulative = kept.cumsum(1)
    turns = (sampling.step + torch.arange(num_rows, device=logits.device)) % len(sampling.uniforms)
    drawn = sampling.uniforms[turns, None] * cumulative[:, -1:]
    last = torch.where(kept > 0, places, 0).amax(1)
    return torch.minimum(torch.searchsorted(cumulative, drawn, right=True).squeeze(1), last)


def greedy_tokens_reference(logits: Tensor, sampling: SamplingTensors) -> Tensor:
    """The first of the largest of every row: what a CPU runs."""
    sampling.is_damaged.bitwise_or_(~torch.isfinite(logits.sum(dtype=torch.float64)))
    return torch.argmax(logits, dim=1)


@triton.jit
def _greedy_kernel(
    logits_ptr,
    keys_ptr,
    tokens_ptr,
    is_damaged_ptr,
    counters_ptr,
    row_stride,
    num_entries,
    BLOCK: tl.constexpr,
    SLICES: tl.constexpr,
):
    """The largest of BLOCK entries of a row; the last program of a row to finish takes the largest of all.

    keys int64 [R, programs]; counters [R], zero before and after. SLICES: the programs of a row, padded.
    """
    row = tl.program_id(1).to(tl.int64)
    entries = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    num_slices = tl.num_programs(0)
    inside = entries < num_entries
    logits = tl.load(logits_ptr + row * row_stride + entries, mask=inside, other=0.0)
    magnitudes = logits.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    if tl.max(magnitudes) >= 0x7F800000:
        tl.store(is_damaged_ptr, 1)
    keys = tl.where(inside, ordered_key(logits, entries), _NO_KEY)
    tl.store(keys_ptr + row * num_slices + tl.program_id(0), tl.max(keys))
    tl.debug_barrier()
    if tl.atomic_add(counters_ptr + row, 1) == num_slices - 1:
        places = tl.arange(0, SLICES)
        at = keys_ptr + row * num_slices + places
        best = tl.max(tl.load(at, mask=places < num_slices, other=_NO_KEY, cache_modifier=".cg"))
        tl.store(tokens_ptr + row, 0x7FFFFFFF - (best & 0xFFFFFFFF))
        tl.store(counters_ptr + row, 0)


def greedy_tokens_triton(logits: Tensor, sampling: SamplingTensors) -> Tensor:
    """The same in one launch. Raises: ValueError for other shapes or dtypes."""
    if logits.ndim != 2 or logits.dtype != torch.float32 or logits.stride(1) != 1 or not logits.numel():
        raise ValueError(f"logits are {tuple(logits.shape)} {logits.dtype}, needed is fp32 [R, V]")
    num_rows, num_entries = logits.shape
    if len(sampling.counters) < num_rows:
        raise ValueError(f"logits have {num_rows} rows, sampling was made for {len(sampling.counters)}")
    slices = triton.cdiv(num_entries, BLOCK_ENTRIES)
    keys = torch.empty((num_rows, slices), dtype=torch.int64, device=logits.device)
    tokens = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    _greedy_kernel[slices, num_rows](
        logits,
        keys,
        tokens,
        sampling.is_damaged,
        sampling.counters,
        logits.stride(0),
        num_entries,
        BLOCK=BLOCK_ENTRIES,
        SLICES=triton.next_power_of_2(slices),
        num_warps=NUM_WARPS,
    )
    return tokens


@triton.jit
def _temperature(temperature_ptr, COLDEST: tl.constexpr):
    """What logits are divided by."""
    given = tl.load(temperature_ptr)
    return tl.where(given > 0, given, tl.full((), COLDEST, tl.float64))


@triton.jit
def _weights_of(logits_ptr, entries, num_entries, largest, temperature, min_p, cut, HAS_CUT: tl.constexpr):
    """w of some entries of a row in float64, 0 behind the cut and where min_p cuts."""
    inside = entries < num_entries
    logits = tl.load(logits_ptr + entries, mask=inside, other=0.0)
    if HAS_CUT:
        inside = inside & (ordered_key(logits, entries) >= cut)
    weights = tl.exp((logits.to(tl.float64) - largest) / temperature)
    return tl.where(inside & (weights >= min_p), weights, 0.0)


@triton.jit
def _cut_kernel(
    ranked_ptr,
    ids_ptr,
    sums_ptr,
    cuts_ptr,
    counters_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    num_entries,
    BLOCK: tl.constexpr,
    SLICES: tl.constexpr,
    COLDEST: tl.constexpr,
):
    """Where top_k and top_p end, from logits in falling order: the key of the last that they leave.

    ranked fp32 [R, V]; ids int64 [R, V]; sums float64 [R, programs]; cuts int64 [R]; counters as for the draw.
    """
    row = tl.program_id(1).to(tl.int64)
    num_slices = tl.num_programs(0)
    ranked_ptr += row * num_entries
    sums_ptr += row * num_slices
    temperature = _temperature(temperature_ptr, COLDEST)
    top_k = tl.load(top_k_ptr)
    count = tl.where(top_k > 0, tl.minimum(top_k, num_entries), num_entries)
    largest = tl.load(ranked_ptr).to(tl.float64)
    places = tl.arange(0, BLOCK)
    first = tl.program_id(0) * BLOCK
    weights = _weights_of(ranked_ptr, first + places, count, largest, temperature, 0.0, 0, False)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(weights))
    tl.debug_barrier()
    if tl.atomic_add(counters_ptr + row, 1) == num_slices - 1:
        slices = tl.arange(0, SLICES)
        sums = tl.load(sums_ptr + slices, mask=slices < num_slices, other=0.0, cache_modifier=".cg")
        top_p = tl.load(top_p_ptr)
        limit = top_p * tl.sum(sums)
        chosen = tl.minimum(tl.sum((tl.cumsum(sums) < limit).to(tl.int32)), num_slices - 1)
        before = tl.sum(tl.where(slices < chosen, sums, 0.0))
        weights = _weights_of(ranked_ptr, chosen * BLOCK + places, count, largest, temperature, 0.0, 0, False)
        place = tl.sum((before + tl.cumsum(weights) < limit).to(tl.int32))
        last = tl.where(top_p < 1, tl.minimum(chosen * BLOCK + place, count - 1), count - 1)
        key = ordered_key(tl.load(ranked_ptr + last), tl.load(ids_ptr + row * num_entries + last))
        tl.store(cuts_ptr + row, key)
        tl.store(counters_ptr + row, 0)


@triton.jit
def _draw_kernel(
    logits_ptr,
    best_ptr,
    cuts_ptr,
    sums_ptr,
    tokens_ptr,
    counters_ptr,
    temperature_ptr,
    min_p_ptr,
    uniforms_ptr,
    step_ptr,
    row_stride,
    num_entries,
    num_uniforms,
    BLOCK: tl.constexpr,
    SLICES: tl.constexpr,
    COLDEST: tl.constexpr,
    HAS_CUT: tl.constexpr,
):
    """The sum of BLOCK weights of a row; the last program of a row to finish draws: first a slice, then an entry of it.

    best int64 [R], the largest; cuts int64 [R], the least key that is left; sums float64 [R, programs]; counters [R],
    zero before and after.
    """
    row = tl.program_id(1).to(tl.int64)
    num_slices = tl.num_programs(0)
    logits_ptr += row * row_stride
    sums_ptr += row * num_slices
    best = tl.load(best_ptr + row)
    largest = tl.load(logits_ptr + best).to(tl.float64)
    temperature = _temperature(temperature_ptr, COLDEST)
    min_p = tl.load(min_p_ptr)
    cut = tl.load(cuts_ptr + row) if HAS_CUT else best
    places = tl.arange(0, BLOCK)
    first = tl.program_id(0) * BLOCK
    weights = _weights_of(logits_ptr, first + places, num_entries, largest, temperature, min_p, cut, HAS_CUT)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(weights))
    tl.debug_barrier()
    if tl.atomic_add(counters_ptr + row, 1) == num_slices - 1:
        slices = tl.arange(0, SLICES)
        sums = tl.load(sums_ptr + slices, mask=slices < num_slices, other=0.0, cache_modifier=".cg")
        ends = tl.cumsum(sums)
        drawn = tl.load(uniforms_ptr + (tl.load(step_ptr) + row) % num_uniforms) * tl.sum(sums)
        last = tl.max(tl.where(sums > 0, slices, 0))
        chosen = tl.minimum(tl.sum((ends <= drawn).to(tl.int32)), last)
        before = tl.sum(tl.where(slices < chosen, sums, 0.0))
        entries = chosen * BLOCK + places
        weights = _weights_of(logits_ptr, entries, num_entries, largest, temperature, min_p, cut, HAS_CUT)
        last = tl.max(tl.where(weights > 0, places, 0))
        place = tl.minimum(tl.sum((before + tl.cumsum(weights) <= drawn).to(tl.int32)), last)
        token = tl.where(tl.load(temperature_ptr) > 0, (chosen * BLOCK + place).to(tl.int64), best)
        tl.store(tokens_ptr + row, token)
        tl.store(counters_ptr + row, 0)


def draw_tokens_triton(logits: Tensor, sampling: SamplingTensors) -> Tensor:
    """The largest of every row, and then a draw: two launches. Raises: as `greedy_tokens_triton`."""
    return _draw(logits, greedy_tokens_triton(logits, sampling), None, sampling)


def sample_tokens_triton(logits: Tensor, sampling: SamplingTensors, most: int = 0) -> Tensor:
    """The same behind a search for where top_k and top_p end. Raises: as `greedy_tokens_triton`."""
    best = greedy_tokens_triton(logits, sampling)
    num_rows, num_entries = logits.shape
    if 0 < most <= min(MAX_TOP_K, num_entries):
        ranked, ids = (x.contiguous() for x in top_k_triton(logits, most))
        num_entries = most
    else:
        ranked, ids = torch.sort(logits, dim=1, descending=True, stable=True)
    slices = triton.cdiv(num_entries, BLOCK_ENTRIES)
    cuts = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    _cut_kernel[slices, num_rows](
        ranked,
        ids,
        torch.empty((num_rows, slices), dtype=torch.float64, device=logits.device),
        cuts,
        sampling.counters,
        sampling.temperature,
        sampling.top_k,
        sampling.top_p,
        num_entries,
        BLOCK=BLOCK_ENTRIES,
        SLICES=triton.next_power_of_2(slices),
        COLDEST=_COLDEST,
        num_warps=NUM_WARPS,
    )
    return _draw(logits, best, cuts, sampling)


def _draw(logits: Tensor, best: Tensor, cuts: Tensor | None, sampling: SamplingTensors) -> Tensor:
    num_rows, num_entries = logits.shape
    slices = triton.cdiv(num_entries, BLOCK_ENTRIES)
    tokens = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    _draw_kernel[slices, num_rows](
        logits,
        best,
        cuts,
        torch.empty((num_rows, slices), dtype=torch.float64, device=logits.device),
        tokens,
        sampling.counters,
        sampling.temperature,
        sampling.min_p,
        sampling.uniforms,
        sampling.step,
        logits.stride(0),
        num_entries,
        len(sampling.uniforms),
        BLOCK=BLOCK_ENTRIES,
        SLICES=triton.next_power_of_2(slices),
        COLDEST=_COLDEST,
        HAS_CUT=cuts is not None,
        num_warps=NUM_WARPS,
    )
    return tokens


def draw_tokens(logits: Tensor, sampling: SamplingTensors) -> Tensor:
    """For answers without top_k and top_p, which need no order: neither is read. Shapes: as `sample_tokens`."""
    if use_triton(logits):
        return draw_tokens_triton(logits, sampling)
    return sample_tokens_reference(logits, replace(sampling, top_k=sampling.top_k * 0, top_p=sampling.top_p * 0 + 1))


def greedy_tokens(logits: Tensor, sampling: SamplingTensors) -> Tensor:
    """For answers at temperature 0. Shapes: logits fp32 [R, V] -> int64 [R]; settings but the flag are not read."""
    if use_triton(logits):
        return greedy_tokens_triton(logits, sampling)
    return greedy_tokens_reference(logits, sampling)


def sample_tokens(logits: Tensor, sampling: SamplingTensors, most: int = 0) -> Tensor:
    """For any answer. `most`: what `sampling.top_k` is, where the host knows; else 0. Shapes: fp32 [R, V] -> int64 [R].

    A small one spares a card the sort, and changes no token.
    """
    if use_triton(logits):
        return sample_tokens_triton(logits, sampling, most)
    return sample_tokens_reference(logits, sampling)
