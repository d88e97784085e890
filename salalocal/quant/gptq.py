"""GPTQ: a matrix and the second moments of its inputs come in, an `IntWeight` that errs little on such inputs goes
out; for the quantizer.

Columns are rounded one after the other, and what a column loses is made up for by those not rounded yet, as the
inverse of the moments says. The columns of the largest inputs go first. The scales are found before the walk, by what
errors of each column will cost in it, so a group keeps its neighbouring columns whatever the order, and the file needs
no act-order.

The inputs x of a layer are those that the quantized layers in front of it give; the original ones, o, are others. If
they are known too, what is rounded is not W but V, whose V x is closest to W o: errors of the layers in front are made
up for by the layers behind.

    V = W + W D,   D = (mean(o x^T) - mean(x x^T)) (mean(x x^T) + damping)^-1

Sources: Frantar et al., arXiv 2210.17323; the order by input size is the authors' `--act-order` with
`--static-groups`. V: Arai and Ichikawa, arXiv 2504.09629; the same aim in Li et al., arXiv 2504.02692.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from salalocal.errors import NumericError
from salalocal.kernels.column_walk import MAX_COLUMNS, column_walk
from salalocal.quant.int4 import IntScheme, IntWeight
from salalocal.quant.rounding import search_scales
from salalocal.quant.stored import QuantizedWeight

DEFAULT_DAMPING = 0.01

_MORE_DAMPING = 10.0
_MAX_DAMPING = 10.0
_SOLVED_AT_ONCE = 2048  # columns in float64 on the way to float32


@dataclass(frozen=True, eq=False)
class Feedback:
    """How the error of a column passes to the later ones: made once for all matrices that read the same inputs.

    Shapes: order int64 [in], the columns as they are walked; factor float32 [in, in], upper triangular, in that order;
    drift float32 [in, in], the D of V = W + W D, or None if the original inputs are not known.
    """

    order: Tensor
    factor: Tensor
    drift: Tensor | None = None

    @property
    def costs(self) -> Tensor:
        """What a squared error of a column adds to that of the outputs, after the later columns have made up for what
        they can. Shapes: float32 [in]."""
        return torch.empty_like(self.factor[0]).index_copy_(0, self.order, self.factor.diagonal() ** -2)


def make_feedback(moments: Tensor, damping: float = DEFAULT_DAMPING, cross: Tensor | None = None) -> Feedback:
    """Feedback out of the mean of x x^T, and of o x^T if original inputs o are known.

    `damping` times the mean of the diagonal is added to the diagonal, ten times as much as often as the factorization
    needs it. A caller that holds the arguments no more saves their memory.
    Shapes: moments, cross float64 [in, in]. Raises: NumericError if the moments cannot be factorized.
    """
    order = torch.argsort(moments.diagonal(), descending=True, stable=True)
    mean = float(moments.diagonal().mean())
    if not math.isfinite(mean):
        raise NumericError("NaN or infinity in the inputs of a layer", "check the weights and the calibration text")
    # Backwards: where the moments are L L^T, the inverse of L, turned round, is the upper factor of their inverse.
    backwards = order.flip(0)
    damped = moments[backwards[:, None], backwards]
    del moments  # in a large model gigabytes, as each of these
    lower, added = _factorize(damped, damping, mean if mean > 0 else 1.0 / damping)
    del damped
    drift = None if cross is None else _drift(cross, lower, backwards, added)
    del cross
    return Feedback(order, _inverse(lower).flip(0, 1), drift)


def round_with_feedback(weight: Tensor, feedback: Feedback, scheme: IntScheme, scale_dtype: torch.dtype) -> IntWeight:
    """Quantize a matrix, or some of its rows: rows do not depend on each other.

    Shapes: weight [out, in] float32, finite.
    """
    target = weight if feedback.drift is None else torch.addmm(weight, weight, feedback.drift)
    scales = search_scales(target, scheme, scale_dtype, feedback.costs)
    of_column = scales.float()[:, feedback.order // scheme.group_size]
    rest = target[:, feedback.order]
    codes = torch.empty_like(rest, dtype=torch.uint8)
    for start in range(0, rest.shape[1], MAX_COLUMNS):
        end = min(start + MAX_COLUMNS, rest.shape[1])
        factor = feedback.factor[start:end]
        codes[:, start:end], errors = column_walk(
            rest[:, start:end], factor[:, start:end], of_column[:, start:end], scheme.bits
        )
        rest[:, end:].addmm_(errors, factor[:, end:], alpha=-1.0)
    unordered = torch.empty_like(codes)
    unordered[:, feedback.order] = codes
    return IntWeight(unordered, scales, scheme.bits, scheme.group_size)


def squared_output_norms(weight: Tensor, quantized: QuantizedWeight, moments: Tensor) -> tuple[float, float]:
    """Mean sums of squares of the difference of the outputs and of the outputs, on inputs with these moments.

    Shapes: moments float32 [in, in].
    """
    difference = quantized.dequantize() - weight
    return _squared_sum(difference, moments), _squared_sum(weight, moments)


def _factorize(moments: Tensor, damping: float, mean: float) -> tuple[Tensor, float]:
    """The lower factor of moments that are damped in place, and how much was added to their diagonal."""
    lower: Tensor
    added = 0.0
    while damping <= _MAX_DAMPING:
        moments.diagonal().add_(damping * mean - added)
        added = damping * mean
        lower, is_failed = torch.linalg.cholesky_ex(moments)
        if not is_failed:
            return lower, added
        damping *= _MORE_DAMPING
    raise NumericError("the inputs of a layer cannot be factorized", "give more, and more varied, calibration text")


def _drift(cross: Tensor, lower: Tensor, order: Tensor, added: float) -> Tensor:
    """D out of the lower factor of the damped moments in this order: (cross + damping) (moments + damping)^-1 - 1."""
    drift = torch.empty_like(cross, dtype=torch.float32)
    for start in range(0, len(order), _SOLVED_AT_ONCE):
        rows = order[start : start + _SOLVED_AT_ONCE]
        right = cross[rows[:, None], order]
        right.diagonal(start).add_(added)
        solved = torch.cholesky_solve(right.t(), lower).t()
        solved.diagonal(start).sub_(1.0)
        drift[rows[:, None], order] = solved.float()
    return drift


def _inverse(lower: Tensor) -> Tensor:
    """Its inverse, in float32."""
    inverse = torch.empty_like(lower, dtype=torch.float32)
    for start in range(0, len(lower), _SOLVED_AT_ONCE):
        part = inverse[:, start : start + _SOLVED_AT_ONCE]
        unit = torch.zeros(part.shape, dtype=lower.dtype, device=lower.device)
        unit.diagonal(-start).fill_(1.0)
        part.copy_(torch.linalg.solve_triangular(lower, unit, upper=False))
    return inverse


def _squared_sum(matrix: Tensor, moments: Tensor) -> float:
    return max(0.0, float(((matrix @ moments) * matrix).sum(dtype=torch.float64)))
