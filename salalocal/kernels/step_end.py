"""The end of a step of an answer, in one launch: the tokens behind its rows go in, what the next step begins with comes
out, beside a report for the host; for `engine.fused`.

Row 0 fed the token drawn last, the others fed guesses of what comes behind it:
    count = 1 + number of rows r < R - 1 up to the first with fed[r + 1] != found[r]
    fed[0] = found[count - 1]        position, random numbers += count        parity = 1 - parity
    report = count, found[0], ..., found[R - 1], with -1 for every token once a logit was NaN or infinite
The device alone knows these numbers, so that steps can stand in a CUDA graph and run ahead of the host.
Shapes: found int64 [R], R <= 16; the others as `StepTensors` and `kernels.sampling` say.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from salalocal.kernels.backend import tl, triton, use_triton
from salalocal.kernels.sampling import SamplingTensors


@dataclass(frozen=True, eq=False, slots=True)
class StepTensors:
    """What a step finds on the device, and leaves there for the next.

    Shapes: fed int64 [16]; position int64 [1], of row 0; count int32 [1], rows of the last step that hold; parity
    int32 [1], 0 or 1; report int64 [17].
    """

    fed: Tensor
    position: Tensor
    count: Tensor
    parity: Tensor
    report: Tensor


def end_step_definition(found: Tensor, sampling: SamplingTensors, step: StepTensors) -> None:
    """The formula, row by row."""
    fed, tokens = step.fed.tolist(), found.tolist()
    count = 1
    while count < len(tokens) and fed[count] == tokens[count - 1]:
        count += 1
    step.fed[0] = tokens[count - 1]
    step.count[0], step.report[0], step.parity[0] = count, count, 1 - int(step.parity)
    for r, token in enumerate(tokens):
        step.report[1 + r] = -1 if int(sampling.is_damaged) else token
    for number in (step.position, sampling.step):
        number[0] = int(number) + count


def end_step_reference(found: Tensor, sampling: SamplingTensors, step: StepTensors) -> None:
    """The same in large operations: what a CPU runs."""
    right = (step.fed[1 : len(found)] == found[:-1]).to(torch.int32)
    step.count.copy_(1 + right.cumprod(0).sum(0, keepdim=True))
    step.fed[:1].copy_(found.gather(0, step.count.long() - 1))
    step.report[:1].copy_(step.count)
    step.report[1 : 1 + len(found)].copy_(torch.where(sampling.is_damaged > 0, -1, found))
    step.position.add_(step.count)
    step.parity.bitwise_xor_(1)
    sampling.step.add_(step.count)


@triton.jit
def _end_step_kernel(
    found_ptr, is_damaged_ptr, draw_ptr, fed_ptr, position_ptr, count_ptr, parity_ptr, report_ptr, num_rows,
    ROWS: tl.constexpr,
):  # fmt: skip
    """One program. ROWS: padded."""
    rows = tl.arange(0, ROWS)
    is_row = rows < num_rows
    found = tl.load(found_ptr + rows, mask=is_row, other=0)
    guess = tl.load(fed_ptr + 1 + rows, mask=rows < num_rows - 1, other=0)
    is_last = (rows >= num_rows - 1) | (guess != found)
    last = tl.min(tl.where(is_last, rows, ROWS), 0)
    count = last + 1
    reported = tl.where(tl.load(is_damaged_ptr) > 0, -1, found)
    tl.store(report_ptr + 1 + rows, reported, mask=is_row)
    tl.store(report_ptr, count.to(tl.int64))
    tl.store(fed_ptr, tl.sum(tl.where(rows == last, found, 0), 0))
    tl.store(count_ptr, count)
    tl.store(parity_ptr, 1 - tl.load(parity_ptr))
    tl.store(position_ptr, tl.load(position_ptr) + count)
    tl.store(draw_ptr, tl.load(draw_ptr) + count)


def end_step_triton(found: Tensor, sampling: SamplingTensors, step: StepTensors) -> None:
    """One launch."""
    _end_step_kernel[(1,)](
        found,
        sampling.is_damaged,
        sampling.step,
        step.fed,
        step.position,
        step.count,
        step.parity,
        step.report,
        len(found),
        ROWS=triton.next_power_of_2(len(found)),
        num_warps=1,
    )


def end_step(found: Tensor, sampling: SamplingTensors, step: StepTensors) -> None:
    """What a step calls; see the module."""
    run = end_step_triton if use_triton(found, step.fed) else end_step_reference
    run(found, sampling, step)
