"""Products of activations with packed 4-bit weights on a GPU, and with 8-bit ones. Enter by `linear`.

    linear                any rows: chooses between `gemv` and `route`; what `quant.linear` calls
    gemv/                 1 to 16 rows, at the speed of reading weights: `words` and `stream` to 4 rows, `tiles` to 16
    activations_by_group  what `gemv` takes: int8 in groups of 128 features; a row's even ones before its odd ones
    vocabulary            1 to 16 rows behind `gemv`: the likeliest token of a packed output matrix
    route                 17 rows and more: unpack in registers up to `FUSED_ROWS`, into a scratch beyond
    activations_by_row    what `route` takes: int8 or fp8 with a scale a row; even before odd in each block of 128
    gemm                  17 rows to 128, 512 or (int8) 1,024: words unpacked in registers, int8 or bf16 math
    scratch               more rows: words unfolded once into int8, or into bf16 or fp8 for the vendor's GEMM
    int8_gemm             more rows: the product with that int8 scratch, ending in a residual or in a gated activation
    gemm_launch           how `gemm` and `int8_gemm` are cut, by card, shape and rows

Shapes: x [..., K] @ W [N, K]^T -> y [..., N]; a row is a token. Bit order of packed words: `kernels.packing`.
"""
