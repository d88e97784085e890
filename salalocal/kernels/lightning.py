"""Lightning attention: linear attention with one fixed decay per head.

    S_t = exp(-s) S_(t-1) + k_t^T v_t        o_t = scale * q_t S_t        s: the slope of the head

Computed in fp32 whatever the inputs are (float64 stays float64); every exponent is a difference of positions, so it
never exceeds 0 and nothing overflows. The given state is left as it is.
Shapes: q, k [B, T, H, K]; v, o [B, T, H, V]; slopes [H], positive; S [B, H, K, V] fp32, None for zeros.
Source: specification, section 8.
"""

import torch
from torch import Tensor

from salalocal.kernels.backend import use_triton
from salalocal.kernels.lightning_prefill import PREFILL_DTYPE, Recurrence, lightning_prefill_triton
from salalocal.kernels.rows import needs_gradient

CHUNK_TOKENS = 64
# So many chunks stay in a CPU's cache together; more of them at once were slower per token.
_CHUNKS_AT_A_TIME = 8


def lightning_slopes(num_heads: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The decay rate of every head, the ALiBi series. Shapes: [H]. Source: specification, section 8.1."""
    power = 1 << (num_heads.bit_length() - 1)
    series = [2.0 ** (-8.0 * (h + 1) / power) for h in range(power)]
    between = [2.0 ** (-8.0 * (h + 1) / (2 * power)) for h in range(0, 2 * power, 2)]
    return torch.tensor((series + between)[:num_heads], dtype=dtype)


def lightning_definition(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, scale: float, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The recurrence, token by token."""
    q, k, v, slopes, state = _widened(q, k, v, slopes, state)
    out = []
    decay = torch.exp(-slopes)[None, :, None, None]
    for t in range(q.shape[1]):
        state = decay * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        out.append(scale * (q[:, t, :, None, :] @ state).squeeze(2))
    return torch.stack(out, dim=1), state


def lightning_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    scale: float,
    state: Tensor | None,
    chunk: int = CHUNK_TOKENS,
) -> tuple[Tensor, Tensor]:
    """The same in chunks of tokens: what a CPU runs.

    The chunks start at the first token of the call; a last, shorter one is computed by itself, without padding.
    """
    q, k, v, slopes, state = _widened(q, k, v, slopes, state)
    num_tokens = q.shape[1]
    if num_tokens == 1:
        return _step(q, k, v, slopes, scale, state)
    whole = num_tokens - num_tokens % chunk
    starts = [*range(0, whole, chunk * _CHUNKS_AT_A_TIME), *([whole] if whole < num_tokens else [])]
    out = []
    for start, end in zip(starts, [*starts[1:], num_tokens], strict=True):
        piece = slice(start, end)
        o, state = _chunks(q[:, piece], k[:, piece], v[:, piece], slopes, scale, state, min(chunk, end - start))
        out.append(o)
    return (out[0] if len(out) == 1 else torch.cat(out, dim=1)), state


def lightning(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, scale: float, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What the model calls; gradients and all but bfloat16 take the reference. The kernel's outputs are bfloat16."""
    if use_triton(q, k, v) and q.dtype == PREFILL_DTYPE and not needs_gradient(q, k, v):
        o, states = lightning_prefill_triton(q, k, v, Recurrence(slopes, scale, state))
        return o, states[-1]
    return lightning_reference(q, k, v, slopes, scale, state)


def _widened(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, _, heads, key_dim = q.shape
    if k.shape != q.shape or v.shape[:3] != q.shape[:3] or slopes.shape != (heads,):
        raise ValueError(
            f"lightning: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, slopes {tuple(slopes.shape)}"
        )
    dtype = torch.promote_types(q.dtype, torch.float32)
    shape = (batch, heads, key_dim, v.shape[3])
    if state is None:
        state = q.new_zeros(shape, dtype=dtype)
    elif state.shape != shape:
        raise ValueError(f"lightning: the state is {tuple(state.shape)}, needed is {shape}")
    return q.to(dtype), k.to(dtype), v.to(dtype), slopes.to(dtype), state.to(dtype)


def _step(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, scale: float, state: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, 1, K]
    state = torch.exp(-slopes)[:, None, None] * state + k.transpose(2, 3) * v
    return (scale * (q @ state)).transpose(1, 2), state


def _chunks(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, scale: float, state: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    batch, num_tokens, heads, key_dim = q.shape
    num_chunks, value_dim = num_tokens // chunk, v.shape[3]
    grid = (batch * num_chunks, heads, chunk)
    # [B*N*H, C, K]: plain batches of matrices, which is what the matrix product is fastest at
    q, k, v = (x.reshape(batch, num_chunks, chunk, heads, -1).transpose(2, 3).flatten(0, 2) for x in (q, k, v))
    steps = torch.arange(chunk, device=q.device, dtype=q.dtype)
    distance = (steps[:, None] - steps[None, :]).clamp(min=0)
    within = torch.exp(-slopes[:, None, None] * distance).tril() * scale  # [H, C, C]
    since_start = torch.exp(-slopes[:, None] * (steps + 1))[..., None] * scale  # [H, C, 1]
    until_end = torch.exp(-slopes[:, None] * (chunk - 1 - steps))[..., None]  # [H, C, 1]
    over_chunk = torch.exp(-slopes * chunk)[:, None, None]  # [H, 1, 1]

    weights = torch.bmm(q, k.transpose(1, 2)).view(*grid, chunk).mul_(within).view(-1, chunk, chunk)
    decayed_keys = (k.view(*grid, key_dim) * until_end).view(-1, chunk, key_dim)
    added = torch.bmm(decayed_keys.transpose(1, 2), v).view(batch, num_chunks, heads, key_dim, value_dim)
    before = []
    for n in range(num_chunks):
        before.append(state)
        state = torch.addcmul(added[:, n], over_chunk, state)
    decayed_queries = (q.view(*grid, key_dim) * since_start).view(-1, chunk, key_dim)
    states = torch.stack(before, dim=1).view(-1, key_dim, value_dim)
    o = torch.baddbmm(torch.bmm(weights, v), decayed_queries, states)
    return o.view(batch, num_chunks, heads, chunk, value_dim).transpose(2, 3).flatten(1, 2), state
