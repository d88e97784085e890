"""Matrix product of two int8 matrices with one scale a row each, for prefill chunks; ends in the residual stream.

    y[m, n] = x_scales[m] * row_scales[n] * sum_k x[m, k] * w[n, k]             sums in int32, exact
    y[m, n] = residual[m, n] + factor * (the same)                              if there is a residual

The scales are applied in fp32 in this order and y is rounded once, to its own dtype. The order of k does not matter if
x and w share it: both come in split order (`kernels.int4.activations_by_row`, `kernels.int4.scratch`).

Shapes: x codes int8 [M, K], scales fp32 [M]; w int8 [N, K], row_scales fp32 [N]; y, residual [M, N]; K a multiple
of 128.
"""

from typing import Any, NamedTuple

from torch import Tensor

from salalocal.errors import BackendError
from salalocal.kernels.backend import compute_capability, tl, triton, use_triton
from salalocal.kernels.int4.activations_by_row import SPLIT_BLOCK, QuantizedRows
from salalocal.kernels.int4.gemm_launch import INT8_LAUNCH, GemmLaunch, pick_launch


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


@triton.jit
def tile_of_program(program, num_rows, num_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPAN: tl.constexpr):
    """Row and column tile of a program: SPAN row tiles share one column tile after the other."""
    row_tiles = tl.cdiv(num_rows, ROWS)
    column_tiles = tl.cdiv(num_columns, COLUMNS)
    first = program // (SPAN * column_tiles) * SPAN
    span = tl.minimum(row_tiles - first, SPAN)
    inside = program % (SPAN * column_tiles)
    return first + inside % span, inside // span


@triton.jit
def store_scaled(
    sums,
    rows,
    columns,
    x_scales,
    row_scales,
    residual,
    factor,
    y,
    num_rows,
    num_columns,
    HAS_SCALES: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """Scale a tile, join the residual, store it. rows and columns broadcast to the shape of sums, either way round."""
    is_there = (rows < num_rows) & (columns < num_columns)
    values = sums.to(tl.float32)
    if HAS_SCALES:
        values = values * tl.load(x_scales + rows, mask=rows < num_rows, other=0.0)
        values = values * tl.load(row_scales + columns, mask=columns < num_columns, other=0.0)
    place = rows.to(tl.int64) * num_columns + columns
    if HAS_RESIDUAL:
        values = tl.load(residual + place, mask=is_there, other=0.0).to(tl.float32) + values * factor
    tl.store(y + place, values.to(y.dtype.element_ty), mask=is_there)


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
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    SPAN: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_TMA: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """x and w are pointers, or descriptors with blocks [ROWS, DEPTH] and [COLUMNS, DEPTH]."""
    row_tile, column_tile = tile_of_program(tl.program_id(0), num_rows, num_columns, ROWS, COLUMNS, SPAN)
    row = row_tile * ROWS + tl.arange(0, ROWS)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    if not HAS_TMA:
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
    store_scaled(
        sums, row[:, None], column[None, :], x_scales, row_scales, residual, factor, y, num_rows, num_columns, True,
        HAS_RESIDUAL,
    )  # fmt: skip


def int8_gemm_triton(
    x: QuantizedRows,
    w: Tensor,
    row_scales: Tensor,
    out: Tensor,
    residual: Residual | None = None,
    launch: GemmLaunch | None = None,
) -> Tensor:
    """One program a tile. Raises: BackendError for features in other than whole blocks of 128."""
    num_rows, num_features = x.codes.shape
    num_columns = w.shape[0]
    check_gemm(x.codes, (num_columns, w.shape[1]), out, residual)
    if num_rows == 0:
        return out
    launch = launch or pick_launch(INT8_LAUNCH, compute_capability(w.device), num_rows, *w.shape)
    left, right = x.codes.contiguous(), w.contiguous()
    _int8_gemm_kernel[(triton.cdiv(num_rows, launch.rows) * triton.cdiv(num_columns, launch.columns),)](
        operand(left, (launch.rows, launch.depth), launch),
        operand(right, (launch.columns, launch.depth), launch),
        x.scales,
        row_scales,
        out if residual is None else residual.values,
        1.0 if residual is None else residual.factor,
        out,
        num_rows,
        num_columns,
        num_features,
        ROWS=launch.rows,
        COLUMNS=launch.columns,
        DEPTH=launch.depth,
        SPAN=launch.span,
        STAGES=launch.num_stages,
        HAS_TMA=launch.has_tma,
        HAS_RESIDUAL=residual is not None,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        enable_fp_fusion=False,
    )
    return out


def int8_gemm(x: QuantizedRows, w: Tensor, row_scales: Tensor, out: Tensor, residual: Residual | None = None) -> Tensor:
    """The product into `out`, which may be the residual itself."""
    if use_triton(x.codes, w, out):
        return int8_gemm_triton(x, w, row_scales, out, residual)
    return int8_gemm_reference(x, w, row_scales, out, residual)


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
    if w_shape[1] != num_features or out.shape != (num_rows, num_columns) or not out.is_contiguous():
        raise ValueError(f"x is {tuple(x.shape)}, w {w_shape}, out {tuple(out.shape)}")
    if residual is not None and (residual.values.shape != out.shape or not residual.values.is_contiguous()):
        raise ValueError(f"residual is {tuple(residual.values.shape)}, out {tuple(out.shape)}, contiguous both")
    if num_features % SPLIT_BLOCK:
        raise BackendError(f"{num_features:,} input features are not in blocks of {SPLIT_BLOCK}", "use bf16 matmul")
