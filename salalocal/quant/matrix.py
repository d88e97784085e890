"""One matrix: the stored weights of a linear map come in, a quantized one with its errors goes out; for the quantizer.

Worked on where the weights are, by pieces of rows, so that no copy of the whole in float32 is made. The pieces depend
on the shape and the kind of device alone.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from salalocal.quant.codebook import CodebookScheme, round_to_codebook
from salalocal.quant.gptq import Feedback, round_with_feedback, squared_output_norms
from salalocal.quant.rounding import round_to_nearest, squared_norms
from salalocal.quant.stored import QuantizedWeight, Scheme, joined
from salalocal.quant.workers import Workers, pieces

# By kind of device: in float32 what a core's cache holds, or what keeps a card busy.
_PIECE_WEIGHTS = {"cpu": 2**18, "cuda": 2**24}
_PIECE_ROWS_WITH_FEEDBACK = {"cpu": 256, "cuda": 2**14}  # fewer would spend the time between the columns


@dataclass(frozen=True, eq=False)
class Inputs:
    """What is known about the inputs of a map: their second moments, and feedback if GPTQ is to be used.

    Shapes: moments float32 [in, in].
    """

    moments: Tensor
    feedback: Feedback | None


@dataclass(frozen=True)
class MatrixErrors:
    """Norm of what was lost over the norm of the whole: of the weights, and of the outputs if inputs are known.

    Against the original weights and on the inputs that the quantized layers in front give. Feedback that makes up for
    what those have lost raises both on purpose.
    """

    weights: float
    outputs: float | None


class _Piece(NamedTuple):
    quantized: QuantizedWeight
    weights_lost: float
    weights: float
    outputs_lost: float
    outputs: float


def quantize_matrix(
    weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype, inputs: Inputs | None, workers: Workers
) -> tuple[QuantizedWeight, MatrixErrors]:
    """Quantize a whole matrix. Shapes: weight [out, in], finite."""
    rows = _rows_at_a_time(weight, scheme, inputs is not None and inputs.feedback is not None)
    done = list(workers.map(partial(_quantize_rows, scheme, scale_dtype, inputs), pieces(weight, rows)))
    whole = joined([piece.quantized for piece in done])
    weights = _relative(sum(piece.weights_lost for piece in done), sum(piece.weights for piece in done))
    outputs = _relative(sum(piece.outputs_lost for piece in done), sum(piece.outputs for piece in done))
    return whole, MatrixErrors(weights, outputs if inputs else None)


def _rows_at_a_time(weight: Tensor, scheme: Scheme, has_feedback: bool) -> int:
    kind, num_in = weight.device.type, weight.shape[1]
    if has_feedback:
        return _PIECE_ROWS_WITH_FEEDBACK[kind]
    multiple = scheme.row_multiple(num_in) if isinstance(scheme, CodebookScheme) else 1
    return max(1, _PIECE_WEIGHTS[kind] // num_in // multiple) * multiple


def _quantize_rows(scheme: Scheme, scale_dtype: torch.dtype, inputs: Inputs | None, rows: Tensor) -> _Piece:
    weight = rows.float()
    quantized: QuantizedWeight
    if isinstance(scheme, CodebookScheme):
        quantized = round_to_codebook(weight, scheme, scale_dtype)
    elif inputs is not None and inputs.feedback is not None:
        quantized = round_with_feedback(weight, inputs.feedback, scheme, scale_dtype)
    else:
        quantized = round_to_nearest(weight, scheme, scale_dtype)
    outputs = squared_output_norms(weight, quantized, inputs.moments) if inputs else (0.0, 0.0)
    return _Piece(quantized, *squared_norms(weight, quantized), *outputs)


def _relative(lost: float, whole: float) -> float:
    return math.sqrt(lost / whole) if whole else math.sqrt(lost)
