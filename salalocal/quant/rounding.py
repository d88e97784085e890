"""Round to nearest with a search for the scale: a float matrix in, an `IntWeight` out; for GPTQ and the quantizer.

The scale of a group is the one of a grid below `max|w| / (2**(bits - 1) - 1)` that leaves the least squared error:
clipping the largest weights a little makes all others finer. Every candidate is rounded to the stored dtype before it
is judged, so the error that decides is the error that stays.
"""

import torch
from torch import Tensor
from torch.nn import functional

from salalocal.quant.int4 import IntScheme, IntWeight
from salalocal.quant.stored import QuantizedWeight

# Fractions of the scale that clips nothing: a coarse grid, then a finer one around its best.
_COARSE = tuple(1.0 - 0.04 * step for step in range(13))
_FINE = (-0.02, -0.01, 0.01, 0.02)


def round_to_nearest(weight: Tensor, scheme: IntScheme, scale_dtype: torch.dtype) -> IntWeight:
    """Quantize every weight by itself.

    Shapes: weight [out, in] float32, finite.
    """
    scales = search_scales(weight, scheme, scale_dtype)
    columns = torch.arange(weight.shape[1], device=weight.device) // scheme.group_size
    codes = round_codes(weight, scales.float()[:, columns], scheme.bits)
    return IntWeight(codes, scales, scheme.bits, scheme.group_size)


def search_scales(weight: Tensor, scheme: IntScheme, scale_dtype: torch.dtype, costs: Tensor | None = None) -> Tensor:
    """The scale of least squared error for every group of a row; `costs` says what an error of a column weighs.

    Shapes: weight [out, in] float32; costs [in] float32 -> [out, groups].
    """
    num_out, num_in = weight.shape
    size = min(scheme.group_size, num_in)
    groups = functional.pad(weight, (0, -num_in % size)).view(num_out, -1, size)  # zeros add no error
    costs = None if costs is None else functional.pad(costs, (0, -num_in % size)).view(1, -1, size)
    widest = groups.abs().amax(2) / (2 ** (scheme.bits - 1) - 1)
    best = _storable(widest, scale_dtype)
    least = _squared_error(groups, best, scheme.bits, costs)
    fraction = torch.ones_like(widest)
    for step in _COARSE[1:]:
        _keep_better(groups, widest * step, scheme.bits, costs, (best, least))
    fraction = torch.where(widest > 0, best.float() / widest, fraction)
    for step in _FINE:
        _keep_better(groups, widest * (fraction + step), scheme.bits, costs, (best, least))
    return best


def round_codes(weight: Tensor, scales: Tensor, bits: int) -> Tensor:
    """The nearest code of every weight. Shapes: weight and scales broadcast to one shape; uint8 of that shape."""
    zero = 2 ** (bits - 1)
    return torch.round(weight / scales).clamp_(-zero, zero - 1).add_(zero).to(torch.uint8)


def squared_norms(weight: Tensor, quantized: QuantizedWeight) -> tuple[float, float]:
    """Sums of squares of the difference and of the weights."""
    difference = quantized.dequantize() - weight
    return _squared_sum(difference), _squared_sum(weight)


def _keep_better(
    groups: Tensor, candidate: Tensor, bits: int, costs: Tensor | None, found: tuple[Tensor, Tensor]
) -> None:
    best, least = found
    scales = _storable(candidate, best.dtype)
    error = _squared_error(groups, scales, bits, costs)
    is_better = error < least
    best[is_better] = scales[is_better]
    least[is_better] = error[is_better]


def _storable(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales as they are stored, none of them zero, since weights are divided by them."""
    smallest = torch.finfo(dtype).tiny
    return scales.clamp(smallest, torch.finfo(dtype).max).to(dtype)


def _squared_error(groups: Tensor, scales: Tensor, bits: int, costs: Tensor | None) -> Tensor:
    wide, zero = scales.float()[..., None], 2 ** (bits - 1)
    rounded = torch.round(groups / wide).clamp_(-zero, zero - 1)
    squares = rounded.mul_(wide).sub_(groups).square_()
    return (squares if costs is None else squares.mul_(costs)).sum(2)


def _squared_sum(values: Tensor) -> float:
    return float(values.square().sum(dtype=torch.float64))
