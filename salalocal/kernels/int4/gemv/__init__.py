"""Products of packed weights with at most 16 rows, at the speed of reading the weights. Enter by `operation`.

operation   the formula, its plain forms, the checks, and which form a product takes
product     the words that the forms share: a packed matrix, an epilogue, one call
launch      how products are launched, by card and shape, and the rule over it
words       1 to 4 rows, integer registers: a program for every few rows of the weights
stream      1 to 4 rows, integer registers: weights flow past activations that a program holds, and may quantize
tiles       1 to 16 rows, tensor cores
gated       gate and up, their outputs quantized for the next product
epilogue    what follows the sums, inside the kernels
"""

from salalocal.kernels.int4.gemv.gated import gated_groups
from salalocal.kernels.int4.gemv.launch import MAX_TOKENS
from salalocal.kernels.int4.gemv.operation import (
    Activations,
    int4_gemv,
    int4_gemv_definition,
    int4_gemv_reference,
    int4_gemv_triton,
)
from salalocal.kernels.int4.gemv.product import PLAIN, SWIGLU, Epilogue, PackedMatrix, Scratch

__all__ = [
    "MAX_TOKENS",
    "PLAIN",
    "SWIGLU",
    "Activations",
    "Epilogue",
    "PackedMatrix",
    "Scratch",
    "gated_groups",
    "int4_gemv",
    "int4_gemv_definition",
    "int4_gemv_reference",
    "int4_gemv_triton",
]
