"""Products of packed weights with at most 16 rows; see `operation`."""

from salalocal.kernels.int4.gemv.launch import MAX_TOKENS
from salalocal.kernels.int4.gemv.operation import (
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
    "Epilogue",
    "PackedMatrix",
    "Scratch",
    "int4_gemv",
    "int4_gemv_definition",
    "int4_gemv_reference",
    "int4_gemv_triton",
]
