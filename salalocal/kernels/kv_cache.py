"""Appending to the KV cache of one sparse layer on its device: keys, values and the pooled keys they complete.

In come the keys and values of new tokens as the projection left them, into the buffers of the layer they go; for the
engine, whose captured steps know their position only on the device. What lies from the position on is overwritten,
so drafts that were rejected need no undoing.

    keys[p + t] = k_t        values[p + t] = v_t        pooled_j as in `pooled_keys`, for windows that end in the tokens
Cached in 8 bits, with one scale a token and head, rounded up to bf16 so that no code leaves its range:
    scale = ceil_bf16( max |x| / 127 )        code = round( x / scale )        x ~ code * scale
A token that holds NaN or infinity gets a scale of NaN. Means are then made of the unquantized keys: those of the last
tokens are kept in `recent`, a ring. Keys and values with their scales may lie in page-locked host memory, where kernels
write and read them by their address; everything else is on the card.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from salalocal.errors import BackendError
from salalocal.kernels.backend import dependent_launch, tl, triton, use_triton
from salalocal.kernels.block_gather import gather_blocks
from salalocal.kernels.block_topk.geometry import BlockGeometry
from salalocal.kernels.pooled_keys import num_pooled, pooled_keys_definition, pooled_keys_reference

RECENT_TOKENS = 256  # length of the ring: the longest window, and drafts that may be overwritten
_LARGEST_CODE = 127.0
_TILE_TOKENS = 64  # of one program
# 1.5 * 2**23: added to a float below 2**22 it leaves the nearest even integer, as bits of the mantissa.
_ROUNDER = tl.constexpr(12582912.0)


@dataclass(frozen=True, eq=False, slots=True)
class KeyValues:
    """Cached keys and values to attend to, in 16 bits or in 8 with scales.

    Shapes: keys, values [B, N, H, D], any strides; int8 with key_scales, value_scales bf16 [B, N, H].
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.key_scales is None) != (self.keys.dtype != torch.int8):
            raise ValueError(
                f"keys are {self.keys.dtype}, scales are {'missing' if self.key_scales is None else 'there'}"
            )
        if (self.key_scales is None) != (self.value_scales is None) or self.keys.dtype != self.values.dtype:
            raise ValueError("keys and values are cached alike: both in int8 with scales, or neither")

    def first(self, num_tokens: int) -> "KeyValues":
        """Views of the first tokens."""
        views = (self.keys[:, :num_tokens], self.values[:, :num_tokens])
        if self.key_scales is None or self.value_scales is None:
            return KeyValues(*views)
        return KeyValues(*views, self.key_scales[:, :num_tokens], self.value_scales[:, :num_tokens])

    def widened(self, dtype: torch.dtype) -> "KeyValues":
        """Copies in a float dtype if they are codes, else these themselves."""
        if self.key_scales is None or self.value_scales is None:
            return self
        keys, values = (
            (codes.float() * scales.float()[..., None]).to(dtype)
            for codes, scales in ((self.keys, self.key_scales), (self.values, self.value_scales))
        )
        return KeyValues(keys, values)

    def gathered(self, blocks: Tensor, block_size: int) -> "KeyValues":
        """Copies of some blocks of the only sequence, where `blocks` is; see `gather_blocks`."""
        rows = [self.keys[0], self.values[0]]
        if self.key_scales is not None and self.value_scales is not None:
            rows += [self.key_scales[0, ..., None], self.value_scales[0, ..., None]]
        keys, values, *scales = (gather_blocks(x, blocks, block_size)[None] for x in rows)
        return KeyValues(keys, values, *(x[..., 0] for x in scales))

    def beside(self, q: Tensor) -> "KeyValues":
        """All of them where `q` is and in its dtype: these themselves if they are so."""
        if self.keys.device == q.device:
            return self.widened(q.dtype)
        num_tokens, heads = self.keys.shape[1:3]
        blocks = torch.arange(-(-num_tokens // _TILE_TOKENS), device=q.device).expand(heads, -1)
        return self.gathered(blocks, _TILE_TOKENS).first(num_tokens).widened(q.dtype)


@dataclass(frozen=True, eq=False, slots=True)
class CacheRows:
    """The buffers of one layer and one sequence, with room for more tokens than they hold.

    Shapes: keys, values [H, capacity, D] in a float dtype, or int8 with key_scales, value_scales bf16 [H, capacity] and
    recent [256, H, D], token p at p % 256; k1, k2 [H, room, D]. Of every head the rows are dense. On a card, keys,
    values and their scales may lie in page-locked host memory.
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None
    value_scales: Tensor | None
    k1: Tensor
    k2: Tensor
    recent: Tensor | None

    @property
    def key_values(self) -> KeyValues:
        """All the room as keys and values of one sequence, views."""
        views = (self.keys.transpose(0, 1)[None], self.values.transpose(0, 1)[None])
        if self.key_scales is None or self.value_scales is None:
            return KeyValues(*views)
        return KeyValues(*views, self.key_scales.T[None], self.value_scales.T[None])


def quantize_tokens_definition(x: Tensor) -> tuple[Tensor, Tensor]:
    """The formula in float64. Shapes: x [..., D] -> codes int8 [..., D], scales bf16 [...]."""
    largest = x.double().abs().amax(-1) / _LARGEST_CODE
    nearest = largest.to(torch.bfloat16)
    above = torch.nextafter(nearest, torch.full_like(nearest, torch.inf))
    scales = torch.where(nearest.double() < largest, above, nearest)
    scales = torch.where(largest.isfinite(), scales, torch.nan)
    steps = torch.nan_to_num(x.double() / scales.double()[..., None], 0.0, 0.0, 0.0)
    return steps.round().to(torch.int8), scales


def quantize_tokens_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """The same in fp32: what a CPU runs, and what the kernel computes. A quotient that is a tie stays one."""
    wide = x.float()
    largest = wide.abs().amax(-1)
    is_number = largest.isfinite()
    # A tensor: torch divides by a number by way of its reciprocal.
    exact = torch.where(is_number, largest, 0.0) / torch.full_like(largest, _LARGEST_CODE)
    scales = ((exact.view(torch.int32) + 0xFFFF) & -0x10000).view(torch.float32)  # the next bf16 that is no less
    steps = torch.where(is_number[..., None], wide / torch.where(scales > 0, scales, 1.0)[..., None], 0.0)
    return steps.round().to(torch.int8), torch.where(is_number, scales, torch.nan).to(torch.bfloat16)


def append_tokens_definition(rows: CacheRows, k: Tensor, v: Tensor, position: Tensor, geometry: BlockGeometry) -> None:
    """Append token by token, means and scales in float64; see `append_tokens`."""
    first = int(position)
    past = rows.keys[:, :first] if rows.recent is None else _unroll(rows.recent, first)
    keys = torch.cat([past.double(), k.transpose(0, 1).double()], 1)[None].transpose(1, 2)  # [1, past + T, H, D]
    missing = first + k.shape[0] - keys.shape[1]  # tokens that the ring has forgotten
    for t in range(k.shape[0]):
        end = first + t + 1
        for pooled, kernel, stride in _windows(rows, geometry):
            window, rest = divmod(end - kernel, stride)
            if window >= 0 and rest == 0:
                mean = pooled_keys_definition(keys[:, stride * window - missing :], 0, 1, kernel, stride)
                pooled[:, window] = mean[0, 0].to(pooled.dtype)
        if rows.recent is not None:
            rows.recent[(first + t) % RECENT_TOKENS] = k[t]
    _write(rows, k, v, first, quantize_tokens_definition)


def append_tokens_reference(rows: CacheRows, k: Tensor, v: Tensor, position: Tensor, geometry: BlockGeometry) -> None:
    """Append in a few large operations; see `append_tokens`."""
    _check(rows, k, v, geometry)
    first, num_tokens = int(position), k.shape[0]
    past = rows.keys[:, :first] if rows.recent is None else _unroll(rows.recent, first)
    num_past = min(past.shape[1], geometry.coarse_kernel_size)
    keys = torch.cat([past[:, past.shape[1] - num_past :], k.transpose(0, 1)], 1)[None].transpose(1, 2)
    for pooled, kernel, stride in _windows(rows, geometry):
        begin, end = (num_pooled(n, kernel, stride) for n in (first, first + num_tokens))
        if end > begin:
            seen = keys[:, stride * begin - (first - num_past) :]
            pooled[:, begin:end] = pooled_keys_reference(seen, 0, end - begin, kernel, stride)[0].transpose(0, 1)
    if rows.recent is not None:
        _remember(rows.recent, k, position)
    _write(rows, k, v, first, quantize_tokens_reference)


@triton.jit
def _store_tokens(x, at, codes_ptr, scales_ptr, scale_at, is_there):
    """Keep [TOKENS, DIM] values as they are, or as codes with a scale a token."""
    if scales_ptr is None:
        tl.store(codes_ptr + at, x, mask=is_there[:, None])
    else:
        wide = x.to(tl.float32)
        magnitude = tl.max(wide.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)  # as bits NaN and infinity are largest
        is_number = magnitude < 0x7F800000
        exact = tl.div_rn(tl.where(is_number, magnitude, 0).to(tl.float32, bitcast=True), 127.0)
        scale = ((exact.to(tl.int32, bitcast=True) + 0xFFFF) & -65536).to(tl.float32, bitcast=True)
        divisor = tl.broadcast_to(tl.where(scale > 0, scale, 1.0)[:, None], wide.shape)
        codes = (tl.div_rn(wide, divisor) + _ROUNDER).to(tl.int32, bitcast=True)  # in the lowest byte
        codes = tl.where(is_number[:, None], codes, 0).to(tl.int8)
        tl.store(codes_ptr + at, codes, mask=is_there[:, None])
        tl.store(scales_ptr + scale_at, tl.where(is_number, scale, float("nan")).to(tl.bfloat16), mask=is_there)


@triton.jit
def _sum_by_halves(x, OUTER: tl.constexpr, COUNT: tl.constexpr, DIM: tl.constexpr):
    """[OUTER * COUNT, DIM] -> [OUTER, DIM], the halves of COUNT added until one is left."""
    for level in tl.static_range(8):  # COUNT is at most 256
        if COUNT >> level > 1:
            x = tl.sum(tl.reshape(x, [OUTER, 2, COUNT >> (level + 1), DIM]), 1)
    return tl.reshape(x, [OUTER, DIM])


@triton.jit
def _pool_windows(
    k_ptr, past_ptr, pooled_ptr, position, begin_token, end_token, stride_kt, stride_pt,
    SIZE: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    """The means of the windows that end in begin_token < end <= end_token, added by halves as the reference does."""
    dims = tl.arange(0, DIM)
    first = tl.maximum(begin_token - SIZE + STRIDE, 0) // STRIDE
    last = tl.maximum(end_token - SIZE + STRIDE, 0) // STRIDE
    for window in tl.range(first, last, num_stages=1):
        token = window * STRIDE + tl.arange(0, SIZE)
        is_new = (token >= position)[:, None]
        new = tl.load(k_ptr + (token - position)[:, None] * stride_kt + dims[None, :], mask=is_new, other=0.0)
        slot = token % RING if RING > 0 else token
        old = tl.load(past_ptr + slot[:, None] * stride_pt + dims[None, :], mask=token[:, None] < position, other=0.0)
        total = tl.where(is_new, new, old).to(tl.float32)
        total = _sum_by_halves(_sum_by_halves(total, SIZE // STRIDE, STRIDE, DIM), 1, SIZE // STRIDE, DIM)
        mean = tl.reshape(total, [DIM]) / SIZE
        tl.store(pooled_ptr + window * DIM + dims, mean.to(pooled_ptr.dtype.element_ty))


@triton.jit
def _append_kernel(
    k_ptr, v_ptr, keys_ptr, values_ptr, key_scales_ptr, value_scales_ptr, k1_ptr, k2_ptr, recent_ptr, position_ptr,
    num_tokens, stride_kt, stride_kh, stride_vt, stride_vh, stride_keys, stride_values, stride_scales, stride_k1,
    stride_k2,
    TOKENS: tl.constexpr, DIM: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr, COARSE_SIZE: tl.constexpr,
    COARSE_STRIDE: tl.constexpr, RING: tl.constexpr, REMEMBERS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: TOKENS tokens of one head, and the windows that end in them. RING: 0 without one."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    head = tl.program_id(1).to(tl.int64)
    position = tl.load(position_ptr).to(tl.int64)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    dims = tl.arange(0, DIM)
    is_there = token < num_tokens
    k_ptr += head * stride_kh
    k = tl.load(k_ptr + token[:, None] * stride_kt + dims[None, :], mask=is_there[:, None], other=0.0)
    v_at = head * stride_vh + token[:, None] * stride_vt + dims[None, :]
    v = tl.load(v_ptr + v_at, mask=is_there[:, None], other=0.0)
    at = (position + token)[:, None] * DIM + dims[None, :]
    scale_at = head * stride_scales + position + token
    _store_tokens(k, keys_ptr + head * stride_keys, at, key_scales_ptr, scale_at, is_there)
    _store_tokens(v, values_ptr + head * stride_values, at, value_scales_ptr, scale_at, is_there)
    if RING > 0:
        stride_past = tl.num_programs(1) * DIM
        past_ptr = recent_ptr + head * DIM
        if REMEMBERS:  # else a slot may still be read
            slot = (position + token) % RING
            tl.store(past_ptr + slot[:, None] * stride_past + dims[None, :], k, mask=is_there[:, None])
    else:
        stride_past = DIM
        past_ptr = keys_ptr + head * stride_keys
    begin = position + tl.program_id(0) * TOKENS
    end = tl.minimum(begin + TOKENS, position + num_tokens)
    _pool_windows(
        k_ptr, past_ptr, k1_ptr + head * stride_k1, position, begin, end, stride_kt, stride_past, SIZE, STRIDE, DIM,
        RING,
    )  # fmt: skip
    _pool_windows(
        k_ptr, past_ptr, k2_ptr + head * stride_k2, position, begin, end, stride_kt, stride_past, COARSE_SIZE,
        COARSE_STRIDE, DIM, RING,
    )  # fmt: skip


def append_tokens_triton(rows: CacheRows, k: Tensor, v: Tensor, position: Tensor, geometry: BlockGeometry) -> None:
    """See `append_tokens`. Raises: ValueError as the reference; BackendError for sizes that are no powers of two."""
    _check(rows, k, v, geometry)
    if k.is_cuda and not (rows.keys.is_cuda or rows.keys.is_pinned()):
        raise BackendError("a card cannot write to a cache in pageable memory", "make it with page_locked_empty")
    num_tokens, num_heads, dim = k.shape
    sizes = {"head size": dim, "kernel_size": geometry.kernel_size, "kernel_stride": geometry.kernel_stride}
    for name, size in sizes.items():
        if size & (size - 1):
            raise BackendError(f"appending to a KV cache: {name} is {size}, a power of two is needed")
    constants = append_constants(geometry, num_tokens, dim, rows.recent is not None)
    _append_kernel[(triton.cdiv(num_tokens, constants["TOKENS"]), num_heads)](
        k, v, *(getattr(rows, field.name) for field in fields(rows)), position, num_tokens,
        *k.stride()[:2], *v.stride()[:2], rows.keys.stride(0), rows.values.stride(0),
        0 if rows.key_scales is None else rows.key_scales.stride(0), rows.k1.stride(0), rows.k2.stride(0),
        **constants, num_warps=4, **dependent_launch(k.device),
    )  # fmt: skip
    if rows.recent is not None and num_tokens > _most_remembered(geometry):
        _remember(rows.recent, k, position)


def append_tokens(rows: CacheRows, k: Tensor, v: Tensor, position: Tensor, geometry: BlockGeometry) -> None:
    """Write the next tokens into the buffers from `position` on, and every pooled key whose window ends in them.

    Shapes: k, v [T, H, D], any strides of the first two axes; position int64 [1] on the device, read there alone.
    The ring of an 8-bit cache stays right when the last call is repeated from a position inside it, if it had up to
    128 tokens. Raises: ValueError for shapes or dtypes that do not fit.
    """
    append = append_tokens_triton if use_triton(rows.k1, k, v) else append_tokens_reference
    append(rows, k, v, position, geometry)


def append_constants(geometry: BlockGeometry, num_tokens: int, dim: int, has_ring: bool) -> dict[str, int | bool]:
    """The compile-time arguments of the kernel."""
    return {
        "TOKENS": min(_TILE_TOKENS, triton.next_power_of_2(num_tokens)),
        "DIM": dim,
        "SIZE": geometry.kernel_size,
        "STRIDE": geometry.kernel_stride,
        "COARSE_SIZE": geometry.coarse_kernel_size,
        "COARSE_STRIDE": geometry.coarse_kernel_stride,
        "RING": RECENT_TOKENS if has_ring else 0,
        "REMEMBERS": num_tokens <= _most_remembered(geometry),
    }


def _most_remembered(geometry: BlockGeometry) -> int:
    """So many tokens at once overwrite none in the ring that their own windows read."""
    return RECENT_TOKENS - geometry.coarse_kernel_size


def _windows(rows: CacheRows, geometry: BlockGeometry) -> tuple[tuple[Tensor, int, int], tuple[Tensor, int, int]]:
    fine = (rows.k1, geometry.kernel_size, geometry.kernel_stride)
    return fine, (rows.k2, geometry.coarse_kernel_size, geometry.coarse_kernel_stride)


def _unroll(recent: Tensor, end: int) -> Tensor:
    """The tokens before `end` that a ring holds, in order. Shapes: [256, H, D] -> [H, up to 256, D]."""
    tokens = torch.arange(max(0, end - RECENT_TOKENS), end, device=recent.device)
    return recent[tokens % RECENT_TOKENS].transpose(0, 1)


def _remember(recent: Tensor, k: Tensor, position: Tensor) -> None:
    """Put the last tokens into the ring, without asking the device for the position."""
    first = max(0, k.shape[0] - RECENT_TOKENS)
    tokens = position + torch.arange(first, k.shape[0], device=k.device)
    recent.index_copy_(0, tokens % RECENT_TOKENS, k[first:])


def _write(
    rows: CacheRows, k: Tensor, v: Tensor, first: int, quantize: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> None:
    end = first + k.shape[0]
    for x, cached, scales in ((k, rows.keys, rows.key_scales), (v, rows.values, rows.value_scales)):
        tokens = x.transpose(0, 1)
        if scales is not None:
            tokens, scales[:, first:end] = quantize(tokens)
        cached[:, first:end] = tokens


def _check(rows: CacheRows, k: Tensor, v: Tensor, geometry: BlockGeometry) -> None:
    """Raises ValueError for what cannot be appended."""
    heads, dim = rows.keys.shape[0], rows.keys.shape[2]
    if k.shape != v.shape or k.ndim != 3 or k.shape[1:] != (heads, dim) or rows.values.shape != rows.keys.shape:
        raise ValueError(f"k {tuple(k.shape)}, v {tuple(v.shape)} and a cache of {tuple(rows.keys.shape)} do not fit")
    if any(
        x.shape[::2] != (heads, dim) or x.stride()[1:] != (dim, 1) for x in (rows.keys, rows.values, rows.k1, rows.k2)
    ):
        raise ValueError("the rows of every head of a KV cache must be dense")
    is_quantized = rows.keys.dtype == torch.int8
    if any((part is None) == is_quantized for part in (rows.key_scales, rows.value_scales, rows.recent)):
        raise ValueError("scales and recent keys belong to an int8 cache, and to no other")
    if rows.recent is not None and rows.recent.shape != (RECENT_TOKENS, heads, dim):
        raise ValueError(f"recent keys are {tuple(rows.recent.shape)}, needed are {(RECENT_TOKENS, heads, dim)}")
    if geometry.coarse_kernel_size > RECENT_TOKENS:
        raise ValueError(f"windows of {geometry.coarse_kernel_size} tokens do not fit in a ring of {RECENT_TOKENS}")
    if any(x.stride(-1) != 1 for x in (k, v)):
        raise ValueError("the last axis of k and v must be dense")
