"""Where a program's products go: its rows of the weights, and one token's products into memory; for every form."""

from typing import Any, NamedTuple

from salalocal.kernels.backend import tl, triton


class Target(NamedTuple):
    """What an epilogue reads and writes, inside a kernel; see `product.Product.arguments`."""

    residual: Any
    out: Any
    factor: Any
    num_tokens: Any
    num_rows: Any
    residual_stride: Any
    out_stride: Any


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
def logit_key(v, index):
    """Such a key of a logit as it is stored, in bf16; the largest of all if that is no number, or infinite."""
    logit = v.to(tl.bfloat16).to(tl.float32)
    return ordered_key(tl.where(tl.abs(logit) < float("inf"), logit, float("nan")), index)


@triton.jit
def write_token(v, token, tile, target, EPILOGUE: tl.constexpr, ROWS: tl.constexpr):
    """The epilogue for one token: v [ROWS] fp32 -> memory."""
    num_rows, out = target.num_rows, target.out
    dtype = out.dtype.element_ty
    is_token = token < target.num_tokens
    if EPILOGUE == "swiglu":
        gate, up = tl.split(tl.reshape(v, [ROWS // 2, 2]))
        n = tile * (ROWS // 2) + tl.arange(0, ROWS // 2)
        y = gate / (1.0 + tl.exp(-gate)) * up
        half = num_rows // 2
        tl.store(out + token * target.out_stride + n, y.to(dtype), mask=(n < half) & is_token)
    else:
        n = tile * ROWS + tl.arange(0, ROWS)
        inside = (n < num_rows) & is_token
        y = v * target.factor
        if EPILOGUE == "best":
            key = tl.max(tl.where(n < num_rows, logit_key(y, n), -0x7FFFFFFFFFFFFFFF), axis=0)
            tl.store(out + token * target.out_stride + tile, key, mask=is_token)
        else:
            if EPILOGUE == "residual":
                residual = target.residual + token * target.residual_stride + n
                y += tl.load(residual, mask=inside, other=0.0).to(tl.float32)
            tl.store(out + token * target.out_stride + n, y.to(dtype), mask=inside)
