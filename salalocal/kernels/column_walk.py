"""The walk of GPTQ over a few columns: each is rounded in turn, and what it loses is made up for by those behind it.

Weights of some columns come in, as the columns before them have left them; their codes and errors go out; for
`quant.gptq`, which lets the errors act on all columns behind these at once. For columns j = 0, 1, ...:

    code_j = clamp(round(w_j / scale_j), -zero, zero - 1) + zero,   zero = 2**(bits - 1)
    error_j = (w_j - (code_j - zero) * scale_j) / factor_jj
    w_i = w_i - error_j * factor_ji   for i > j

Halves are rounded to even. Rows do not depend on each other. Shapes: block, scales [R, C] fp32; factor [C, C] fp32,
of which the upper triangle is read; codes uint8, errors fp32 [R, C]. The block is left as it is.
Source: Frantar et al., arXiv 2210.17323.
"""

import torch
from torch import Tensor

from salalocal.errors import BackendError
from salalocal.kernels.backend import tl, triton, use_triton

MAX_COLUMNS = 128

# One launch walks all columns: a row's weights stay in registers. Few rows a program, for the walk is a chain.
_ROWS = 16
_NUM_WARPS = 4
_ROUNDING = 1.5 * 2**23  # a float32 of this size has no digits behind the point: adding it rounds, halves to even


def column_walk_definition(block: Tensor, factor: Tensor, scales: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The formula, row by row, in float64."""
    zero = 2 ** (bits - 1)
    codes, errors = torch.empty(block.shape, dtype=torch.uint8), torch.empty(block.shape, dtype=torch.float64)
    for row, weights in enumerate(block.double()):
        rest = weights.clone()
        for j, scale in enumerate(scales[row].double()):
            level = (rest[j] / scale).round().clamp(-zero, zero - 1)
            codes[row, j] = int(level) + zero
            errors[row, j] = (rest[j] - level * scale) / factor[j, j].double()
            rest[j + 1 :] -= errors[row, j] * factor[j, j + 1 :].double()
    return codes, errors


def column_walk_reference(block: Tensor, factor: Tensor, scales: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The same for all rows at once: what a CPU runs."""
    zero = 2 ** (bits - 1)
    rest, errors = block.clone(), torch.empty_like(block)
    codes = torch.empty(block.shape, dtype=torch.uint8, device=block.device)
    for j in range(block.shape[1]):
        scale = scales[:, j]
        level = torch.round(rest[:, j] / scale).clamp_(-zero, zero - 1)
        codes[:, j] = level + zero
        errors[:, j] = (rest[:, j] - level * scale) / factor[j, j]
        rest[:, j + 1 :].addr_(errors[:, j], factor[j, j + 1 :], alpha=-1.0)
    return codes, errors


@triton.jit
def _column_walk_kernel(
    block, factor, scales, codes, errors, num_rows, num_columns, block_stride, factor_stride, scale_stride,
    ZERO: tl.constexpr, ROUNDING: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    is_row = rows < num_rows
    is_inside = is_row[:, None] & (columns < num_columns)[None, :]
    rows = rows.to(tl.int64)
    rest = tl.load(block + rows[:, None] * block_stride + columns[None, :], mask=is_inside, other=0.0)
    all_codes = tl.zeros((ROWS, COLUMNS), dtype=tl.int32)
    all_errors = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for j in range(num_columns):
        is_column = (columns == j)[None, :]
        weight = tl.sum(tl.where(is_column, rest, 0.0), axis=1)
        scale = tl.load(scales + rows * scale_stride + j, mask=is_row, other=1.0)
        is_behind = (columns > j) & (columns < num_columns)
        factors = tl.load(factor + j * factor_stride + columns, mask=is_behind, other=0.0)
        level = tl.minimum(tl.maximum(tl.div_rn(weight, scale), -ZERO), ZERO - 1)
        level = (level + ROUNDING) - ROUNDING
        error = tl.div_rn(weight - level * scale, tl.load(factor + j * factor_stride + j))
        rest -= error[:, None] * factors[None, :]
        all_codes = tl.where(is_column, (level + ZERO).to(tl.int32)[:, None], all_codes)
        all_errors = tl.where(is_column, error[:, None], all_errors)
    places = rows[:, None] * num_columns + columns[None, :]
    tl.store(codes + places, all_codes.to(tl.uint8), mask=is_inside)
    tl.store(errors + places, all_errors, mask=is_inside)


def column_walk_triton(block: Tensor, factor: Tensor, scales: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """One launch; a row's weights stay in registers from the first column to the last.

    Raises: BackendError for more columns than `MAX_COLUMNS`.
    """
    num_rows, num_columns = block.shape
    if num_columns > MAX_COLUMNS:
        raise BackendError(f"column_walk: {num_columns} columns, at most {MAX_COLUMNS} are walked at once")
    codes = torch.empty(block.shape, dtype=torch.uint8, device=block.device)
    errors = torch.empty(block.shape, dtype=torch.float32, device=block.device)
    block, factor, scales = (x if x.stride(1) == 1 else x.contiguous() for x in (block, factor, scales))
    _column_walk_kernel[(triton.cdiv(num_rows, _ROWS),)](
        block, factor, scales, codes, errors, num_rows, num_columns, block.stride(0), factor.stride(0),
        scales.stride(0), 2 ** (bits - 1), _ROUNDING, _ROWS, triton.next_power_of_2(num_columns), num_warps=_NUM_WARPS,
    )  # fmt: skip
    return codes, errors


def column_walk(block: Tensor, factor: Tensor, scales: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """What the quantizer calls. Raises: ValueError for shapes that do not fit or a dtype other than fp32."""
    num_columns = block.shape[1]
    if scales.shape != block.shape or factor.shape != (num_columns, num_columns):
        raise ValueError(
            f"column_walk: block {tuple(block.shape)}, factor {tuple(factor.shape)}, scales {tuple(scales.shape)}"
        )
    if not block.dtype == factor.dtype == scales.dtype == torch.float32:
        raise ValueError(f"column_walk: {block.dtype}, {factor.dtype} and {scales.dtype}, needed is fp32")
    walk = column_walk_triton if use_triton(block, factor, scales) else column_walk_reference
    return walk(block, factor, scales, bits)
