"""GPTQ: a matrix and the second moments of its inputs come in, an `IntWeight` that errs little on such inputs goes
out; for the quantizer.

Columns are rounded one after the other, and what a column loses is made up for by those not rounded yet, as the
inverse of the moments says. The columns of the largest inputs go first. The scales are found before the walk, so a
group keeps its neighbouring columns whatever the order, and the file needs no act-order.
Source: Frantar et al., arXiv 2210.17323; the order by input size is the authors' `--act-order` with `--static-groups`.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from salalocal.errors import NumericError
from salalocal.quant.int4 import IntScheme, IntWeight
from salalocal.quant.rounding import round_codes, search_scales

DEFAULT_DAMPING = 0.01

_COLUMNS_AT_A_TIME = 128
_MORE_DAMPING = 10.0
_MAX_DAMPING = 10.0


@dataclass(frozen=True, eq=False)
class Feedback:
    """How the error of a column passes to the later ones: made once for all matrices that read the same inputs.

    Shapes: order int64 [in], the columns as they are walked; factor float32 [in, in], upper triangular, in that order.
    """

    order: Tensor
    factor: Tensor


def make_feedback(moments: Tensor, damping: float = DEFAULT_DAMPING) -> Feedback:
    """Order and factor out of the mean of x x^T.

    `damping` times the mean of the diagonal is added to the diagonal, ten times as much as often as the factorization
    needs it. Shapes: moments float64 [in, in]. Raises: NumericError if the moments cannot be factorized.
    """
    diagonal = moments.diagonal()
    order = torch.argsort(diagonal, descending=True, stable=True)
    mean = float(diagonal.mean())
    if not math.isfinite(mean):
        raise NumericError("NaN or infinity in the inputs of a layer", "check the weights and the calibration text")
    ordered = moments[order][:, order]
    while damping <= _MAX_DAMPING:
        damped = ordered.clone()
        damped.diagonal().add_(damping * mean if mean > 0 else 1.0)
        lower, is_failed = torch.linalg.cholesky_ex(damped)
        if not is_failed:
            inverse = torch.cholesky_inverse(lower)
            upper, is_failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not is_failed:
                return Feedback(order, upper.float())
        damping *= _MORE_DAMPING
    raise NumericError("the inputs of a layer cannot be factorized", "give more, and more varied, calibration text")


def round_with_feedback(weight: Tensor, feedback: Feedback, scheme: IntScheme, scale_dtype: torch.dtype) -> IntWeight:
    """Quantize a matrix, or some of its rows: rows do not depend on each other.

    Shapes: weight [out, in] float32, finite.
    """
    scales = search_scales(weight, scheme, scale_dtype)
    of_column = scales.float()[:, feedback.order // scheme.group_size]
    rest = weight[:, feedback.order]
    codes = torch.empty_like(rest, dtype=torch.uint8)
    zero = 2 ** (scheme.bits - 1)
    for start in range(0, rest.shape[1], _COLUMNS_AT_A_TIME):
        end = min(start + _COLUMNS_AT_A_TIME, rest.shape[1])
        block, factor = rest[:, start:end], feedback.factor[start:end, start:end]
        errors = torch.empty_like(block)
        for column in range(end - start):
            scale = of_column[:, start + column]
            code = round_codes(block[:, column], scale, scheme.bits)
            codes[:, start + column] = code
            error = (block[:, column] - (code.float() - zero) * scale) / factor[column, column]
            block[:, column + 1 :].addr_(error, factor[column, column + 1 :], alpha=-1.0)
            errors[:, column] = error
        rest[:, end:].addmm_(errors, feedback.factor[start:end, end:], alpha=-1.0)
    unordered = torch.empty_like(codes)
    unordered[:, feedback.order] = codes
    return IntWeight(unordered, scales, scheme.bits, scheme.group_size)


def squared_output_norms(weight: Tensor, quantized: IntWeight, moments: Tensor) -> tuple[float, float]:
    """Mean sums of squares of the difference of the outputs and of the outputs, on inputs with these moments.

    Shapes: moments float32 [in, in].
    """
    difference = quantized.dequantize() - weight
    return _squared_sum(difference, moments), _squared_sum(weight, moments)


def _squared_sum(matrix: Tensor, moments: Tensor) -> float:
    return max(0.0, float(((matrix @ moments) * matrix).sum(dtype=torch.float64)))
