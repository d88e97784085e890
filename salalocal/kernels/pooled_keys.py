"""Pooled keys: means over overlapping windows of cached keys, for the block choice of sparse layers.

In come the raw keys of a layer, out go the means of the windows asked for; for `SparseState`, which appends them as its
cache grows.

    pooled_j = mean( K[stride * j : stride * j + kernel] ),   j = 0 .. num_pooled(n) - 1

Only complete windows count, so a pooled key never changes once it is written, and it is visible to the query at
position p exactly when its whole window is, which is when j < num_pooled(p + 1).
Source: InfLLM-V2 (arXiv 2509.24663); MiniCPM-SALA specification 9.1 and 9.2.
"""

import torch
from torch import Tensor


def num_pooled(num_tokens: int, kernel: int, stride: int) -> int:
    """Count the complete windows among `num_tokens` keys."""
    return max(0, (num_tokens - kernel) // stride + 1)


def pooled_keys_definition(keys: Tensor, first: int, last: int, kernel: int, stride: int) -> Tensor:
    """Average the windows first .. last - 1 one by one, in float64.

    Shapes: keys [B, N, H, D]; result [B, last - first, H, D] in keys.dtype.
    """
    means = [keys[:, stride * j : stride * j + kernel].double().mean(1) for j in range(first, last)]
    if not means:
        return keys[:, :0]
    return torch.stack(means, 1).to(keys.dtype)


def pooled_keys_reference(keys: Tensor, first: int, last: int, kernel: int, stride: int) -> Tensor:
    """Average the windows first .. last - 1, adding in float32 (float64 for float64 keys) in a fixed order.

    The order of the additions depends on nothing but `kernel` and `stride`, so a window has the same bits however many
    others are averaged beside it, and equal keys give equal means.

    Shapes: keys [B, N, H, D]; result [B, last - first, H, D] in keys.dtype.
    Raises: ValueError when the last window ends after the last key, or when `stride` does not divide `kernel`.
    """
    if kernel % stride:
        raise ValueError(f"window of {kernel} keys is not a multiple of its stride {stride}")
    if last <= first:
        return keys[:, :0]
    end = (last - 1) * stride + kernel
    if end > keys.shape[1]:
        raise ValueError(f"window {last - 1} ends at key {end}, but there are {keys.shape[1]} keys")
    wide = torch.float64 if keys.dtype == torch.float64 else torch.float32
    segments = torch.unflatten(keys[:, first * stride : end].to(wide), 1, (-1, stride))
    sums = _sum_by_halves(segments)  # [B, last - first + kernel/stride - 1, H, D]
    windows = sums.unfold(1, kernel // stride, 1).movedim(-1, 2)  # [B, last - first, kernel/stride, H, D]
    return (_sum_by_halves(windows) / kernel).to(keys.dtype)


def pooled_keys(keys: Tensor, first: int, last: int, kernel: int, stride: int) -> Tensor:
    """What the model calls; see `pooled_keys_reference`."""
    return pooled_keys_reference(keys, first, last, kernel, stride)


def _sum_by_halves(x: Tensor) -> Tensor:
    """Sum over axis 2 by adding the two halves until one is left; elementwise, hence the same bits for any shape."""
    size = x.shape[2]
    while size > 1:
        half = size // 2
        x, rest = x[:, :, :half] + x[:, :, size - half :], x[:, :, half : size - half]
        if rest.shape[2]:
            x = torch.cat([x, rest], 2)
        size = x.shape[2]
    return x[:, :, 0]
