"""One matrix: the stored weights of a linear map come in, an `IntWeight` with its errors goes out; for the quantizer.

Worked on by pieces of rows, so that no copy of the whole in float32 is made. The pieces depend on the shape alone.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from salalocal.quant.gptq import Feedback, round_with_feedback, squared_output_norms
from salalocal.quant.int4 import IntScheme, IntWeight
from salalocal.quant.rounding import round_to_nearest, squared_norms
from salalocal.quant.workers import Workers, pieces

_PIECE_WEIGHTS = 2**18  # in float32 what a core's cache holds
_PIECE_ROWS_WITH_FEEDBACK = 256  # fewer would spend the time between the columns


@dataclass(frozen=True, eq=False)
class Inputs:
    """What is known about the inputs of a map: their second moments, and feedback if GPTQ is to be used.

    Shapes: moments float32 [in, in].
    """

    moments: Tensor
    feedback: Feedback | None


@dataclass(frozen=True)
class MatrixErrors:
    """Norm of what was lost over the norm of the whole: of the weights, and of the outputs if inputs are known."""

    weights: float
    outputs: float | None


class _Piece(NamedTuple):
    quantized: IntWeight
    weights_lost: float
    weights: float
    outputs_lost: float
    outputs: float


def quantize_matrix(
    weight: Tensor, scheme: IntScheme, scale_dtype: torch.dtype, inputs: Inputs | None, workers: Workers
) -> tuple[IntWeight, MatrixErrors]:
    """Quantize a whole matrix. Shapes: weight [out, in], finite."""
    has_feedback = inputs is not None and inputs.feedback is not None
    rows = _PIECE_ROWS_WITH_FEEDBACK if has_feedback else max(1, _PIECE_WEIGHTS // weight.shape[1])
    done = list(workers.map(partial(_quantize_rows, scheme, scale_dtype, inputs), pieces(weight, rows)))
    whole = IntWeight(
        torch.cat([piece.quantized.codes for piece in done]),
        torch.cat([piece.quantized.scales for piece in done]),
        scheme.bits,
        scheme.group_size,
    )
    weights = _relative(sum(piece.weights_lost for piece in done), sum(piece.weights for piece in done))
    outputs = _relative(sum(piece.outputs_lost for piece in done), sum(piece.outputs for piece in done))
    return whole, MatrixErrors(weights, outputs if inputs else None)


def _quantize_rows(scheme: IntScheme, scale_dtype: torch.dtype, inputs: Inputs | None, rows: Tensor) -> _Piece:
    weight = rows.float()
    if inputs is not None and inputs.feedback is not None:
        quantized = round_with_feedback(weight, inputs.feedback, scheme, scale_dtype)
    else:
        quantized = round_to_nearest(weight, scheme, scale_dtype)
    outputs = squared_output_norms(weight, quantized, inputs.moments) if inputs else (0.0, 0.0)
    return _Piece(quantized, *squared_norms(weight, quantized), *outputs)


def _relative(lost: float, whole: float) -> float:
    return math.sqrt(lost / whole) if whole else math.sqrt(lost)
