"""Matrix product of two int8 matrices with one scale a row each, for prefill chunks; ends in the residual stream.

    y[m, n] = x_scales[m] * row_scales[n] * sum_k x[m, k] * w[n, k]             sums in int32, exact
    y[m, n] = residual[m, n] + factor * (the same)                              if there is a residual
    y[m, n] = silu(gate[m, n]) * up[m, n]           with swiglu: products with the even and the odd rows of w

The scales are applied in fp32 in this order and y is rounded once, to its own dtype. The order of k does not matter if
x and w share it: both come in split order (`kernels.int4.activations_by_row`, `kernels.int4.scratch`).

Shapes: x codes int8 [M, K], scales fp32 [M]; w int8 [N, K], row_scales fp32 [N]; y, residual [M, N], whose rows may lie
apart; with swiglu w int8 [2 N, K] and row_scales [2 N], these not in pairs but gate's first; K a multiple of 128.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from salalocal.errors import BackendError
from salalocal.kernels.backend import (
    HAS_INLINE_ASM,
    compute_capability,
    num_multiprocessors,
    tl,
    triton,
    use_triton,
)
from salalocal.kernels.gate import sigmoid
from salalocal.kernels.int4.activations_by_row import SPLIT_BLOCK, QuantizedRows
from salalocal.kernels.int4.gemm_launch import INT8_LAUNCH, GemmLaunch, pick_launch
from salalocal.kernels.swiglu import swiglu_definition, swiglu_reference


class Residual(NamedTuple):
    """What a branch joins: `values` [M, N] plus `factor` times the product."""

    values: Tensor
    factor: float


def int8_gemm_definition(x: QuantizedRows, w: Tensor, row_scales: Tensor, residual: Residual | None = None) -> Tensor:
    """The formula, in float64."""
    y = x.codes.double() @ w.double().t() * x.scales.double().unsqueeze(-1) * row_scales.double()
    return y if residual is None else residual.values.double() + residual.factor * y


def int8_gemm_reference(
    x: QuantizedRows, w: Tensor, row_scales: Tensor, out: Tensor, residual: Residual | None
) -> Tensor:
    """The same with fp32 scaling, as the kernel computes it. float64 holds every int32 sum."""
    sums = (x.codes.double() @ w.double().t()).float()
    return out.copy_(_scaled_sums(sums, x.scales, row_scales, residual))


def _scaled_sums(sums: Tensor, x_scales: Tensor, row_scales: Tensor, residual: Residual | None) -> Tensor:
    """What follows the integer sums, in fp32 and in the kernel's order. Shapes: sums fp32 [M, N]."""
    y = sums * x_scales.unsqueeze(-1) * row_scales
    return y if residual is None else residual.values.float() + y * residual.factor


def int8_swiglu_definition(x: QuantizedRows, w: Tensor, row_scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The formula: products rounded to `dtype`, as they would be stored, then the gated activation."""
    y = int8_gemm_definition(x, _apart(w), row_scales).to(dtype)
    return swiglu_definition(*y.chunk(2, dim=1))


def int8_swiglu_reference(x: QuantizedRows, w: Tensor, row_scales: Tensor, out: Tensor) -> Tensor:
    """The same with fp32 scaling."""
    both = torch.empty(len(out), 2 * out.shape[1], dtype=out.dtype, device=out.device)
    int8_gemm_reference(x, _apart(w), row_scales, both, None)
    return out.copy_(swiglu_reference(*both.chunk(2, dim=1)))


def _apart(w: Tensor) -> Tensor:
    """Rows in pairs -> the even ones, then the odd ones."""
    return torch.cat((w[0::2], w[1::2]))


@triton.jit
def tile_of_program(program, num_rows, num_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPAN: tl.constexpr):
    """Row and column tile of a program: SPAN row tiles share one column tile after the other."""
    row_tiles = tl.cdiv(num_rows, ROWS)
    column_tiles = tl.cdiv(num_columns, COLUMNS)
    first = program // (SPAN * column_tiles) * SPAN
    span = tl.minimum(row_tiles - first, SPAN)
    inside = program % (SPAN * column_tiles)
    return first + inside % span, inside // span


class Ending(NamedTuple):
    """What follows the sums of a tile, inside a kernel: scales, the residual, and where the result goes."""

    x_scales: Any
    row_scales: Any
    residual: Any
    factor: Any
    y: Any
    num_rows: Any
    num_columns: Any
    residual_stride: Any
    y_stride: Any


@triton.jit
def store_scaled(sums, rows, columns, ending, HAS_SCALES: tl.constexpr, HAS_RESIDUAL: tl.constexpr):
    """Scale a tile, join the residual, store it. rows and columns broadcast to the shape of sums, either way round."""
    y, num_rows, num_columns = ending.y, ending.num_rows, ending.num_columns
    is_there = (rows < num_rows) & (columns < num_columns)
    values = sums.to(tl.float32)
    if HAS_SCALES:
        values = values * tl.load(ending.x_scales + rows, mask=rows < num_rows, other=0.0)
        values = values * tl.load(ending.row_scales + columns, mask=columns < num_columns, other=0.0)
    rows = rows.to(tl.int64)
    if HAS_RESIDUAL:
        joined = tl.load(ending.residual + rows * ending.residual_stride + columns, mask=is_there, other=0.0)
        values = joined.to(tl.float32) + values * ending.factor
    tl.store(y + rows * ending.y_stride + columns, values.to(y.dtype.element_ty), mask=is_there)


@triton.jit
def _store_swiglu(
    sums, row_tile, column_tile, ending, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HAS_ASM: tl.constexpr
):
    """Scale a tile whose columns are gate and up in turn, and store their gated activation. sums [ROWS, COLUMNS].

    Neighbouring columns are sums of the same thread: taking them apart moves nothing.
    """
    y, num_rows = ending.y, ending.num_rows
    DTYPE: tl.constexpr = y.dtype.element_ty
    half = ending.num_columns // 2
    row = row_tile * ROWS + tl.arange(0, ROWS)[:, None]
    both = column_tile * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    values = sums.to(tl.float32) * tl.load(ending.x_scales + row, mask=row < num_rows, other=0.0)
    values *= tl.load(ending.row_scales + both // 2 + both % 2 * half, mask=both < ending.num_columns, other=0.0)
    gate, up = tl.split(tl.reshape(values.to(DTYPE).to(tl.float32), [ROWS, COLUMNS // 2, 2]))
    silu = (gate * sigmoid(gate, HAS_ASM)).to(DTYPE).to(tl.float32)
    column = column_tile * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)[None, :]
    is_there = (row < num_rows) & (column < half)
    tl.store(y + row.to(tl.int64) * ending.y_stride + column, (silu * up).to(DTYPE), mask=is_there)


@triton.jit
def _store_tile(
    sums,
    row_tile,
    column_tile,
    ending,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EPILOGUE: tl.constexpr,
    HAS_ASM: tl.constexpr,
):
    """What follows the sums of a tile. EPILOGUE: plain, residual or swiglu."""
    if EPILOGUE == "swiglu":
        _store_swiglu(sums, row_tile, column_tile, ending, ROWS, COLUMNS, HAS_ASM)
    elif EPILOGUE == "residual":  # by halves: sums and residual together are more than the registers hold
        left, right = tl.split(tl.permute(tl.reshape(sums, [ROWS, 2, COLUMNS // 2]), (0, 2, 1)))
        row = row_tile * ROWS + tl.arange(0, ROWS)[:, None]
        column = column_tile * COLUMNS + tl.arange(0, COLUMNS // 2)[None, :]
        store_scaled(left, row, column, ending, True, True)
        store_scaled(right, row, column + COLUMNS // 2, ending, True, True)
    else:
        row = row_tile * ROWS + tl.arange(0, ROWS)[:, None]
        column = column_tile * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        store_scaled(sums, row, column, ending, True, False)


@triton.jit
def _int8_gemm_tile(
    tile,
    x,
    w,
    num_features,
    ending,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    SPAN: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_TMA: tl.constexpr,
    EPILOGUE: tl.constexpr,
    HAS_ASM: tl.constexpr,
):
    """One tile, from its place to the memory."""
    num_rows, num_columns = ending.num_rows, ending.num_columns
    row_tile, column_tile = tile_of_program(tile, num_rows, num_columns, ROWS, COLUMNS, SPAN)
    if not HAS_TMA:
        row = row_tile * ROWS + tl.arange(0, ROWS)
        column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
        feature = tl.arange(0, DEPTH)
        x_tile = x + tl.where(row < num_rows, row, 0).to(tl.int64)[:, None] * num_features + feature[None, :]
        w_tile = w + tl.where(column < num_columns, column, 0).to(tl.int64)[None, :] * num_features + feature[:, None]
    sums = tl.zeros([ROWS, COLUMNS], tl.int32)
    for start in tl.range(0, num_features, DEPTH, num_stages=STAGES):
        if HAS_TMA:
            left = x.load([row_tile * ROWS, start])
            right = w.load([column_tile * COLUMNS, start]).T
        else:
            left = tl.load(x_tile + start)
            right = tl.load(w_tile + start)
        sums = tl.dot(left, right, sums, out_dtype=tl.int32)
    _store_tile(sums, row_tile, column_tile, ending, ROWS, COLUMNS, EPILOGUE, HAS_ASM)


@triton.jit(do_not_specialize=["num_rows"])
def _int8_gemm_kernel(
    x,
    w,
    x_scales,
    row_scales,
    residual,
    factor,
    y,
    num_rows,
    num_columns,
    num_features,
    residual_stride,
    y_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    SPAN: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_TMA: tl.constexpr,
    WALKS: tl.constexpr,
    EPILOGUE: tl.constexpr,
    HAS_ASM: tl.constexpr,
):
    """x and w are pointers, or descriptors with blocks [ROWS, DEPTH] and [COLUMNS, DEPTH].

    One program a tile; or with WALKS programs that walk over tiles: the first loads of a tile are on their way while
    the one before it is stored.
    """
    ending = Ending(x_scales, row_scales, residual, factor, y, num_rows, num_columns, residual_stride, y_stride)
    if WALKS:
        num_tiles = tl.cdiv(num_rows, ROWS) * tl.cdiv(num_columns, COLUMNS)
        for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=True):
            _int8_gemm_tile(
                tile, x, w, num_features, ending, ROWS, COLUMNS, DEPTH, SPAN, STAGES, HAS_TMA, EPILOGUE, HAS_ASM
            )
    else:
        _int8_gemm_tile(
            tl.program_id(0), x, w, num_features, ending, ROWS, COLUMNS, DEPTH, SPAN, STAGES, HAS_TMA, EPILOGUE, HAS_ASM
        )


def int8_gemm_triton(
    x: QuantizedRows,
    w: Tensor,
    row_scales: Tensor,
    out: Tensor,
    residual: Residual | None = None,
    launch: GemmLaunch | None = None,
) -> Tensor:
    """One program a tile, or programs that walk over tiles, by the launch.

    Raises: ValueError for shapes that do not belong together; BackendError for features not in blocks of 128.
    """
    check_gemm(x.codes, (w.shape[0], w.shape[1]), out, residual)
    _launch(x, w, row_scales, out, residual, "plain" if residual is None else "residual", launch)
    return out


def int8_swiglu_triton(
    x: QuantizedRows, w: Tensor, row_scales: Tensor, out: Tensor, launch: GemmLaunch | None = None
) -> Tensor:
    """The same with pairs of rows. Raises: as `int8_gemm_triton`, and ValueError for rows that are not in pairs."""
    num_outputs = w.shape[0] // 2
    if w.shape[0] % 2:
        raise ValueError(f"w is {tuple(w.shape)}: its rows are not in pairs")
    check_gemm(x.codes, (num_outputs, w.shape[1]), out, None)
    _launch(x, w, row_scales, out, None, "swiglu", launch)
    return out


def _launch(
    x: QuantizedRows,
    w: Tensor,
    row_scales: Tensor,
    out: Tensor,
    residual: Residual | None,
    epilogue: Literal["plain", "residual", "swiglu"],
    launch: GemmLaunch | None,
) -> None:
    """Launch for checked operands."""
    (num_rows, num_features), num_columns = x.codes.shape, w.shape[0]
    if num_rows == 0:
        return
    launch = launch or pick_launch(INT8_LAUNCH, compute_capability(w.device), num_rows, *w.shape)
    joined = out if residual is None else residual.values
    # Rows that start anywhere are stored by way of more shared memory than the loads of a walk's next tile leave.
    walks = launch.walks and out.stride(0) % 16 == joined.stride(0) % 16 == 0
    num_programs = triton.cdiv(num_rows, launch.rows) * triton.cdiv(num_columns, launch.columns)
    if walks:
        num_programs = min(num_programs, launch.programs * num_multiprocessors(w.device))
    _int8_gemm_kernel[(num_programs,)](
        operand(x.codes.contiguous(), (launch.rows, launch.depth), launch),
        operand(w.contiguous(), (launch.columns, launch.depth), launch),
        x.scales,
        row_scales,
        joined,
        1.0 if residual is None else residual.factor,
        out,
        num_rows,
        num_columns,
        num_features,
        joined.stride(0),
        out.stride(0),
        ROWS=launch.rows,
        COLUMNS=launch.columns,
        DEPTH=launch.depth,
        SPAN=launch.span,
        STAGES=launch.num_stages,
        HAS_TMA=launch.has_tma,
        WALKS=walks,
        EPILOGUE=epilogue,
        HAS_ASM=HAS_INLINE_ASM,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        enable_fp_fusion=False,
    )


def int8_gemm(x: QuantizedRows, w: Tensor, row_scales: Tensor, out: Tensor, residual: Residual | None = None) -> Tensor:
    """The product into `out`, which may be the residual itself."""
    if use_triton(x.codes, w, out):
        return int8_gemm_triton(x, w, row_scales, out, residual)
    return int8_gemm_reference(x, w, row_scales, out, residual)


def int8_swiglu(x: QuantizedRows, w: Tensor, row_scales: Tensor, out: Tensor) -> Tensor:
    """Products with pairs of rows, gated, into `out`; see the top of the file."""
    if use_triton(x.codes, w, out):
        return int8_swiglu_triton(x, w, row_scales, out)
    return int8_swiglu_reference(x, w, row_scales, out)


def operand(matrix: Tensor, block: tuple[int, int], launch: GemmLaunch) -> Any:
    """A matrix as the kernel takes it: as it is, or described for the copy engine."""
    if not launch.has_tma:
        return matrix
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(matrix, list(block))


def check_gemm(x: Tensor, w_shape: tuple[int, int], out: Tensor, residual: Residual | None) -> None:
    """Raises: ValueError for shapes that do not belong together; BackendError for features not in blocks of 128."""
    num_rows, num_features = x.shape
    num_columns = w_shape[0]
    if w_shape[1] != num_features or out.shape != (num_rows, num_columns) or out.stride(1) != 1:
        raise ValueError(f"x is {tuple(x.shape)}, w {w_shape}, out {tuple(out.shape)} {out.stride()}")
    if residual is not None and (residual.values.shape != out.shape or residual.values.stride(1) != 1):
        raise ValueError(
            f"residual is {tuple(residual.values.shape)} {residual.values.stride()}, out {tuple(out.shape)}"
        )
    if num_features % SPLIT_BLOCK:
        raise BackendError(f"{num_features:,} input features are not in blocks of {SPLIT_BLOCK}", "use bf16 matmul")
