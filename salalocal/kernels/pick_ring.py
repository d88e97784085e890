"""A ring of what the newest rows picked: the picks of a step's layers go in, rows by position stay; for `engine.fused`.

    ring[(position + t) % N, l, h, s] = picks[l, t, h, s]        s < S, and the same for the weights of the picks

One launch that reads the position from the device, so that it can stand in a CUDA graph. A row that is stepped over
again, such as one behind a wrong guess, is overwritten, since it has the same position.
Shapes: position int32 or int64 [1]; the others as `StepPicks` and `PickRing` say.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from salalocal.kernels.backend import tl, triton, use_triton

NUM_WARPS = 1


@dataclass(frozen=True, eq=False, slots=True)
class StepPicks:
    """What the layers of a step left. Shapes: int64 and fp32 [L, T, H, P] of the same strides, contiguous in P."""

    blocks: Tensor
    weights: Tensor

    def first(self, num_rows: int) -> "StepPicks":
        """Those of the first rows."""
        return StepPicks(self.blocks[:, :num_rows], self.weights[:, :num_rows])


@dataclass(frozen=True, eq=False, slots=True)
class PickRing:
    """What stays. Shapes: int32 and fp16 [N, L, H, S], contiguous, N at least the rows of a step, S at most P."""

    blocks: Tensor
    weights: Tensor

    def __len__(self) -> int:
        return len(self.blocks)


def new_pick_ring(sizes: tuple[int, int, int, int], device: torch.device) -> PickRing:
    """Room that nothing is in yet."""
    blocks, weights = (torch.empty(sizes, dtype=dtype, device=device) for dtype in (torch.int32, torch.float16))
    return PickRing(blocks, weights)


def keep_picks_definition(ring: PickRing, picks: StepPicks, position: Tensor) -> None:
    """The formula, row by row."""
    for kept, made in ((ring.blocks, picks.blocks), (ring.weights, picks.weights)):
        for t in range(made.shape[1]):
            kept[(int(position) + t) % len(kept)] = made[:, t, :, : kept.shape[3]].to(kept.dtype)


def keep_picks_reference(ring: PickRing, picks: StepPicks, position: Tensor) -> None:
    """The same at once, without a look at the position: what a CPU runs."""
    _check(ring, picks)
    rows = (position + torch.arange(picks.blocks.shape[1], device=position.device)) % len(ring)
    for kept, made in ((ring.blocks, picks.blocks), (ring.weights, picks.weights)):
        kept.index_copy_(0, rows.long(), made[..., : kept.shape[3]].transpose(0, 1).to(kept.dtype))


@triton.jit
def _keep_picks_kernel(
    kept_ptr, kept_weights_ptr, picks_ptr, weights_ptr, position_ptr, num_rows, num_heads, num_picks,
    stride_pl, stride_pt, stride_ph,
    PICKS: tl.constexpr,
):  # fmt: skip
    """One program: the picks of one row and head of a layer."""
    row, part = tl.program_id(0), tl.program_id(1)
    at = (tl.load(position_ptr) + row) % num_rows
    columns = tl.arange(0, PICKS)
    inside = columns < num_picks
    source = (part // num_heads).to(tl.int64) * stride_pl + row * stride_pt + part % num_heads * stride_ph + columns
    target = (at * tl.num_programs(1) + part) * num_picks + columns
    tl.store(kept_ptr + target, tl.load(picks_ptr + source, mask=inside).to(tl.int32), mask=inside)
    tl.store(kept_weights_ptr + target, tl.load(weights_ptr + source, mask=inside).to(tl.float16), mask=inside)


def keep_picks_triton(ring: PickRing, picks: StepPicks, position: Tensor) -> None:
    """The same in one launch. Raises: ValueError for shapes that do not fit."""
    _check(ring, picks)
    num_layers, num_rows, num_heads, _ = picks.blocks.shape
    num_picks = ring.blocks.shape[3]
    _keep_picks_kernel[num_rows, num_layers * num_heads](
        ring.blocks, ring.weights, picks.blocks, picks.weights, position, len(ring), num_heads, num_picks,
        *picks.blocks.stride()[:3],
        PICKS=triton.next_power_of_2(num_picks), num_warps=NUM_WARPS,
    )  # fmt: skip


def keep_picks(ring: PickRing, picks: StepPicks, position: Tensor) -> None:
    """What a step calls; see the module."""
    if use_triton(ring.blocks, picks.blocks, position):
        keep_picks_triton(ring, picks, position)
    else:
        keep_picks_reference(ring, picks, position)


def _check(ring: PickRing, picks: StepPicks) -> None:
    num_layers, num_rows, num_heads, num_picks = picks.blocks.shape
    kept, made = (ring.blocks, ring.weights), (picks.blocks, picks.weights)
    is_fit = kept[0].shape[1:3] == (num_layers, num_heads) and kept[0].shape[3] <= num_picks and num_rows <= len(ring)
    is_same = made[0].stride() == made[1].stride() and made[0].shape == made[1].shape and kept[0].shape == kept[1].shape
    is_dense = made[0].stride(3) == 1 and all(tensor.is_contiguous() for tensor in kept)
    dtypes = [tensor.dtype for tensor in (*made, *kept)]
    if not (is_fit and is_same and is_dense) or dtypes != [torch.int64, torch.float32, torch.int32, torch.float16]:
        shapes = [tuple(tensor.shape) for tensor in (*made, *kept)]
        raise ValueError(f"picks and weights {shapes[:2]} do not fit into a ring {shapes[2:]}")
