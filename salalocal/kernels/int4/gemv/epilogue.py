"""Where a program's products go: its rows of the weights, and one token's products into memory; for both forms."""

from salalocal.kernels.backend import tl, triton


@triton.jit
def tile_rows(tile, num_rows, EPILOGUE: tl.constexpr, ROWS: tl.constexpr):
    """The weight rows of a program, held inside the matrix. With swiglu gate and up rows alternate."""
    r = tl.arange(0, ROWS)
    if EPILOGUE == "swiglu":
        half = num_rows // 2
        return tl.minimum(tile * (ROWS // 2) + r // 2, half - 1) + (r % 2) * half
    return tl.minimum(tile * ROWS + r, num_rows - 1)


@triton.jit
def ordered_key(v, index):
    """An integer that sorts as (v, -index) does, so that equal values leave the lower index."""
    bits = (v + 0.0).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@triton.jit
def write_token(
    v,
    token,
    tile,
    residual_ptr,
    out_ptr,
    factor,
    num_tokens,
    num_rows,
    residual_stride,
    out_stride,
    EPILOGUE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The epilogue for one token: v [ROWS] fp32 -> memory."""
    is_token = token < num_tokens
    if EPILOGUE == "swiglu":
        gate, up = tl.split(tl.reshape(v, [ROWS // 2, 2]))
        n = tile * (ROWS // 2) + tl.arange(0, ROWS // 2)
        y = gate / (1.0 + tl.exp(-gate)) * up
        half = num_rows // 2
        tl.store(out_ptr + token * out_stride + n, y.to(out_ptr.dtype.element_ty), mask=(n < half) & is_token)
    else:
        n = tile * ROWS + tl.arange(0, ROWS)
        inside = (n < num_rows) & is_token
        y = v * factor
        if EPILOGUE == "best":
            key = tl.max(tl.where(n < num_rows, ordered_key(y, n), -0x7FFFFFFFFFFFFFFF), axis=0)
            tl.store(out_ptr + token * tl.num_programs(0) + tile, key, mask=is_token)
        else:
            if EPILOGUE == "residual":
                y += tl.load(residual_ptr + token * residual_stride + n, mask=inside, other=0.0).to(tl.float32)
            tl.store(out_ptr + token * out_stride + n, y.to(out_ptr.dtype.element_ty), mask=inside)
